"""The store at one version beside a searcher that may be older: what is newer, what is gone, what is in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from numpy import ndarray

from index.search.lexical import LanceBM25, Lexical, RankBM25, Subset, TfIdf, has_fts
from index.search.searcher import ExactSearcher, Ids, Queries, Scores, Searcher, exact_searcher, padded

if TYPE_CHECKING:
    from index.store import PairStore

_IN_MEMORY_WORDS = 200_000  # captions up to which a batch of queries is scored in memory rather than by Lance
_SMALL_SUBSET = 20_000  # rows left by a filter up to which they are simply compared one by one


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedList:
    """One ranked list of one query, best first."""

    ids: Int64[ndarray, " n"] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    scores: Float64[ndarray, " n"] = field(default_factory=lambda: np.empty(0))

    def without(self, exclude: Int64[ndarray, " x"], *, limit: int) -> "RankedList":
        """The first `limit` of those that are not excluded."""
        kept = ~np.isin(self.ids, exclude)
        return RankedList(ids=self.ids[kept][:limit], scores=self.scores[kept][:limit])

    def scatter(self, ids: Int64[ndarray, " n"]) -> tuple[Float64[ndarray, " n"], Bool[ndarray, " n"]]:
        """The scores of ascending `ids`, 0 where this list has none; and which it has."""
        scores, known = np.zeros(len(ids)), np.zeros(len(ids), dtype=bool)
        positions = np.searchsorted(ids, self.ids)
        scores[positions], known[positions] = self.scores, True
        return scores, known


@runtime_checkable  # for the shape checks of the test run
class View(Protocol):
    """What the retriever searches: one store at one version, or several as if they were one."""

    version: Any  # another one means that the view is out of date
    ids: Int64[ndarray, " rows"]  # ascending

    def search(self, queries: Queries, *, top_k: int, subset: Subset | None, exact: bool) -> tuple[Ids, Scores]:
        """As `Searcher.search`, over all rows or over a subset of them."""
        ...

    def complete_clip(
        self, vectors: Queries, ids: Sequence[Int64[ndarray, " _"]], known: Sequence[RankedList]
    ) -> list[Float64[ndarray, " _"]]:
        """The CLIP score of every candidate; those that only the words brought are computed here."""
        ...

    def lexical(self, by: str, *, many: bool = False) -> Lexical:
        """Who scores words, one query at a time or many."""
        ...


class StoreView:
    """Searches the rows of the store as it is now, whatever the searcher was built from."""

    def __init__(self, store: "PairStore", searcher: Searcher):
        self._store = store
        self._searcher = searcher
        self.version = store.version
        self.ids: Int64[ndarray, " rows"] = np.sort(store.matching_ids())
        newer = _newer_rows(store, searcher, self.ids)
        self._tail = ExactSearcher(*newer) if len(newer[0]) else None
        # A row that was replaced keeps its id: the searcher's copy of it is out of date, so it counts as gone there.
        known = np.isin(searcher.ids, self.ids, assume_unique=True)
        if self._tail is not None:
            known &= ~np.isin(searcher.ids, self._tail.ids, assume_unique=True)
        self._valid: Int64[ndarray, " valid"] = searcher.ids[known]
        self._exact: ExactSearcher | None = None
        self._subset: tuple[str, ExactSearcher] | None = None
        self._words: dict[str, Lexical] = {}

    def search(self, queries: Queries, *, top_k: int, subset: Subset | None, exact: bool) -> tuple[Ids, Scores]:
        """As `Searcher.search`, over the rows of the store as it is now, or over a subset of them."""
        top_k = min(top_k, len(self.ids) if subset is None else max(1, len(subset.ids)))
        if subset is not None and (exact or len(subset.ids) <= _SMALL_SUBSET):
            return self._subset_searcher(subset).search(queries, top_k=top_k)
        if exact:
            return self.exact_searcher().search(queries, top_k=top_k)
        valid = self._valid if subset is None else np.intersect1d(self._valid, subset.ids, assume_unique=True)
        answers = [_search_valid(self._searcher, queries, top_k, valid)]
        if self._tail is not None:
            tail = self._tail.ids if subset is None else np.intersect1d(self._tail.ids, subset.ids, assume_unique=True)
            if len(tail):
                answers.append(_search_valid(self._tail, queries, top_k, tail))
        return _merge(answers, top_k)

    def exact_searcher(self) -> ExactSearcher:
        """Every row of the store, in memory."""
        if self._exact is None:
            is_current = len(self._valid) == len(self.ids) == len(self._searcher.ids)
            if isinstance(self._searcher, ExactSearcher) and is_current:
                self._exact = self._searcher
            else:
                self._exact = exact_searcher(self._store)
        return self._exact

    def _subset_searcher(self, subset: Subset) -> ExactSearcher:
        """The rows that a filter leaves. The last one is kept: sessions and batches ask for the same again."""
        if self._subset is None or self._subset[0] != subset.where:
            if self._exact is not None or isinstance(self._searcher, ExactSearcher):
                searcher = self.exact_searcher().subset(subset.ids)
            else:
                searcher = exact_searcher(self._store, subset.where)
            self._subset = (subset.where, searcher)
        return self._subset[1]

    def complete_clip(
        self, vectors: Queries, ids: Sequence[Int64[ndarray, " _"]], known: Sequence[RankedList]
    ) -> list[Float64[ndarray, " _"]]:
        """The CLIP score of every candidate; those that only the words brought are computed here."""
        scattered = [listed.scatter(i) for i, listed in zip(ids, known, strict=True)]
        missing = [i[~have] for i, (_, have) in zip(ids, scattered, strict=True)]
        wanted = np.unique(np.concatenate(missing))
        if len(wanted):
            source = self._vectors_of(wanted)
            for vector, gaps, (scores, have) in zip(vectors, missing, scattered, strict=True):
                scores[~have] = source.scores(vector, gaps)
        return [scores for scores, _ in scattered]

    def lexical(self, by: str, *, many: bool = False) -> Lexical:
        """As `View.lexical`."""
        kind = lexical_kind(by, rows=len(self.ids), many=many, indexed=has_fts(self._store))
        if kind not in self._words:
            self._words[kind] = self._make_lexical(kind)
        return self._words[kind]

    def _make_lexical(self, kind: str) -> Lexical:
        if kind == "lance":
            return LanceBM25(self._store)
        ids, captions = self._store.captions()
        return TfIdf(ids, captions) if kind == "tfidf" else RankBM25(ids, captions)

    def _vectors_of(self, ids: Int64[ndarray, " n"]) -> ExactSearcher:
        if self._exact is not None or isinstance(self._searcher, ExactSearcher):
            return self.exact_searcher()
        return exact_searcher(self._store, f"id IN ({', '.join(map(str, ids.tolist()))})")


def lexical_kind(by: str, *, rows: int, many: bool, indexed: bool) -> Literal["tfidf", "memory", "lance"]:
    """Who scores words: Lance; for a batch, and where Lance has no word index, the captions in memory."""
    if by == "tfidf":
        return "tfidf"
    return "memory" if not indexed or (many and rows <= _IN_MEMORY_WORDS) else "lance"


def _newer_rows(
    store: "PairStore", searcher: Searcher, live: Int64[ndarray, " rows"]
) -> tuple[Int64[ndarray, " new"], Float32[ndarray, "new d"]]:
    """The rows written since the searcher was built."""
    if searcher.snapshot is not None:
        return store.rows_after(searcher.snapshot)
    unknown = np.setdiff1d(live, searcher.ids, assume_unique=True)
    if not len(unknown):
        return np.empty(0, dtype=np.int64), np.empty((0, store.dim), dtype=np.float32)
    return store.ids_and_vectors(f"id IN ({', '.join(map(str, unknown.tolist()))})")


def _search_valid(
    searcher: Searcher, queries: Queries, top_k: int, valid: Int64[ndarray, " valid"]
) -> tuple[Ids, Scores]:
    """Search for ids in ascending `valid` only: ask for more than is wanted until every query has enough."""
    rows = len(searcher.ids)
    wanted = min(top_k, len(valid))
    if not wanted:
        return padded(len(queries), top_k)
    if len(valid) == rows:
        return searcher.search(queries, top_k=wanted)
    asked = min(rows, max(wanted + 10, 2 * wanted * rows // len(valid)))
    while True:
        ids, scores = searcher.search(queries, top_k=asked)
        positions = np.minimum(np.searchsorted(valid, ids), len(valid) - 1)
        is_valid = valid[positions] == ids
        if asked == rows or (is_valid.sum(axis=1) >= wanted).all():
            ids, scores = np.where(is_valid, ids, -1), np.where(is_valid, scores, np.float32(-np.inf))
            order = np.argsort(~is_valid, axis=1, kind="stable")[:, :wanted]
            return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
        asked = min(rows, 2 * asked)


def _merge(answers: Sequence[tuple[Int64[ndarray, "q _"], Float32[ndarray, "q _"]]], top_k: int) -> tuple[Ids, Scores]:
    """The best of several answers over disjoint rows."""
    if len(answers) == 1:
        return answers[0]
    ids = np.concatenate([ids for ids, _ in answers], axis=1)
    scores = np.concatenate([scores for _, scores in answers], axis=1)
    order = np.lexsort((ids, -scores), axis=1)[:, :top_k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
