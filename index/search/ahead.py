"""Searching ahead: where every search loads all shards of a searcher anew, many queries are searched for at once."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from index.search.searcher import Ids, Queries, Scores


class Ahead:
    """Queries that are about to come, a few at a time, and the answers to the lot that was searched for last.

    `search(queries, top_k=...)` is asked for `top_k` answers to `at_once` of them when one comes that is not known yet.
    `among` are the rows that it looks among.
    """

    def __init__(
        self,
        search: Callable[..., tuple[Any, Any]],
        queries: Queries,
        *,
        top_k: int,
        at_once: int,
        among: Int64[ndarray, " valid"],
    ):
        self._search, self._queries, self._top_k, self._at_once, self._among = search, queries, top_k, at_once, among
        self._places = {query.tobytes(): place for place, query in enumerate(queries)}
        self._start = 0  # of the lot whose answers these are
        self._ids: Int64[ndarray, "lot k"] = np.empty((0, top_k), np.int64)
        self._scores: Float32[ndarray, "lot k"] = np.empty((0, top_k), np.float32)

    def answer(self, queries: Queries, *, top_k: int, among: Int64[ndarray, " valid"]) -> tuple[Ids, Scores] | None:
        """The best `top_k` of each; None when they were not expected, not so deep, or not among these rows."""
        places = np.array([self._places.get(query.tobytes(), -1) for query in queries])
        if among is not self._among or top_k > self._top_k or not len(places) or places.min() < 0:
            return None
        if places.max() - places.min() >= self._at_once:
            return None
        if places.min() < self._start or places.max() >= self._start + len(self._ids):
            self._start = int(places.min())
            lot = self._queries[self._start : self._start + self._at_once]
            self._ids, self._scores = self._search(lot, top_k=self._top_k)
        rows = places - self._start
        return self._ids[rows, :top_k], self._scores[rows, :top_k]
