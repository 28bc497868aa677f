"""The store at one version beside a searcher that may be older: what is newer, what is gone, what is in memory."""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from numpy import ndarray

from index.search.ahead import Ahead
from index.search.duplicates import Duplicates
from index.search.ids import contains, distinct
from index.search.lexical import LanceBM25, Lexical, RankBM25, Subset, TfIdf, has_fts
from index.search.searcher import (
    ExactSearcher,
    ExactStream,
    Ids,
    Queries,
    Scores,
    Searcher,
    StreamSearcher,
    exact_searcher,
    is_resident,
    merge_answers,
    padded,
    queries_at_once,
)
from index.search.sizes import may_be_held

if TYPE_CHECKING:
    from index.store import PairStore

_IN_MEMORY_WORDS = 200_000  # captions up to which a batch of queries is scored in memory rather than by Lance
_SMALL_SUBSET = 20_000  # rows left by a filter up to which they are simply compared one by one,
_SMALL_SHARE = 0.02  # if they are no more of all rows than this, or few: else asking the searcher for more is faster
_FEW_ROWS = 2_000
_KEPT_FILTERS = 8  # whose ids are remembered: sessions and batches ask for the same ones again
_NO_IDS: Int64[ndarray, " 0"] = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedList:
    """One ranked list of one query, best first."""

    ids: Int64[ndarray, " n"] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    scores: Float64[ndarray, " n"] = field(default_factory=lambda: np.empty(0))

    def without(self, exclude: Int64[ndarray, " x"], *, limit: int) -> "RankedList":
        """The first `limit` of those that are not among the ascending `exclude`."""
        kept = ~contains(exclude, self.ids)
        return RankedList(ids=self.ids[kept][:limit], scores=self.scores[kept][:limit])

    def scatter(self, ids: Int64[ndarray, " n"]) -> tuple[Float64[ndarray, " n"], Bool[ndarray, " n"]]:
        """The scores of ascending `ids`, 0 where this list has none; and which it has."""
        scores, known = np.zeros(len(ids)), np.zeros(len(ids), dtype=bool)
        positions = np.searchsorted(ids, self.ids)
        scores[positions], known[positions] = self.scores, True
        return scores, known


class Found(NamedTuple):
    """What a search by vector found, as `Searcher.search` has it, and how many rows it looked at for a query."""

    ids: Ids
    scores: Scores
    examined: int


@runtime_checkable  # for the shape checks of the test run
class View(Protocol):
    """What the retriever searches: one store at one version, or several as if they were one."""

    version: Any  # another one means that the view is out of date
    ids: Int64[ndarray, " rows"]  # ascending

    @property
    def duplicates(self) -> Duplicates:
        """Which rows are known to show the same picture."""
        ...

    def subset(self, condition: str) -> Subset:
        """The rows that an SQL filter leaves. QueryError when it does not parse."""
        ...

    def late(self, *, subset: Subset | None, exact: bool) -> Callable[[], None] | None:
        """What loads that which such a search needs and is not there yet; None when all is."""
        ...

    def search(
        self, queries: Queries, *, top_k: int, subset: Subset | None, exact: bool, recall_at: int | None = None
    ) -> Found:
        """As `Searcher.search`, over all rows or over a subset of them."""
        ...

    def complete_clip(
        self, vectors: Queries, ids: Sequence[Int64[ndarray, " _"]], known: Sequence[RankedList]
    ) -> list[Float64[ndarray, " _"]]:
        """The CLIP score of every candidate; those that only the words brought are computed here."""
        ...

    def vectors(self, ids: Int64[ndarray, " n"]) -> Float32[ndarray, "n d"]:
        """The vectors of these rows, in their order."""
        ...

    def lexical(self, by: str, *, many: bool = False) -> Lexical:
        """Who scores words, one query at a time or many."""
        ...

    def repeats_of(self, ids: Int64[ndarray, " n"]) -> Int64[ndarray, " m"]:
        """These rows and every row that shows the same picture as one of them, ascending."""
        ...


@runtime_checkable
class LoadsLate(Protocol):
    """A searcher that is opened before it is loaded: who searches by words alone does not wait for that."""

    def late(self) -> Callable[[], None] | None:
        """What has to be called before the first search, or would be called by it; None once that is done."""
        ...


@runtime_checkable
class HoldsVectors(Protocol):
    """A searcher that can say what the vectors of its rows are: a hundred from the store take Lance milliseconds."""

    def vectors(self, ids: Int64[ndarray, " n"]) -> Float32[ndarray, "n d"] | None:
        """The vectors of these rows, in their order; None when it holds none after all."""
        ...


@runtime_checkable
class LooksAhead(Protocol):
    """A view that is better told which queries will come: its searcher may have to be loaded for every search."""

    def expect(
        self, queries: Queries | None, *, top_k: int = 1, subset: Subset | None = None, recall_at: int | None = None
    ) -> None:
        """These will be searched for, a few at a time, in this order, for at most `top_k` answers; None: no more."""
        ...


@dataclass(kw_only=True, slots=True)
class _Filtered:
    """Some rows of a filter, and what was made of them."""

    ids: Int64[ndarray, " n"]
    split: tuple[Int64[ndarray, " valid"], Int64[ndarray, " newer"]] | None = None
    searcher: ExactSearcher | None = None


class _AheadOfThread(threading.local):
    """What a thread was told to expect: threads that share a view each search ahead for their own queries."""

    lot: Ahead | None = None


class StoreView:
    """Searches the rows of the store as it is now, whatever the searcher was built from."""

    def __init__(self, store: "PairStore", searcher: Searcher, duplicates: Duplicates | None = None):
        self._store = store
        self._searcher = searcher
        self.version = store.version
        newer = _newer_rows(store, searcher)
        self._tail = ExactSearcher(*newer) if len(newer[0]) else None
        tail_ids = self._tail.ids if self._tail is not None else _NO_IDS
        if self._tail is None and searcher.snapshot is not None and store.count() == len(searcher.ids):
            self.ids: Int64[ndarray, " rows"] = searcher.ids  # nothing is newer and none is gone: they are the same
        else:
            self.ids = np.sort(store.matching_ids())
        # A row that was replaced keeps its id: the searcher's copy of it is out of date, so it counts as gone there.
        self._valid: Int64[ndarray, " valid"] = searcher.ids
        if self.ids is not searcher.ids:
            known = contains(self.ids, searcher.ids) & ~contains(tail_ids, searcher.ids)
            self._valid = searcher.ids[known]
        self._duplicates = (duplicates or Duplicates()).without(tail_ids)
        self._exact: ExactSearcher | None = None
        self._loading = threading.RLock()  # threads that need the same vectors load them once
        self._subsets: dict[str, Subset] = {}
        self._filtered: dict[str, _Filtered] = {}
        self._words: dict[str, Lexical] = {}
        self._ahead = _AheadOfThread()

    @property
    def duplicates(self) -> Duplicates:
        """As `View.duplicates`, without what was replaced since."""
        return self._duplicates

    def subset(self, condition: str) -> Subset:
        """As `View.subset`."""
        subset = self._subsets.get(condition)
        if subset is None:
            subset = Subset(where=condition, ids=np.sort(self._store.matching_ids(condition)))
            _remember(self._subsets, condition, subset)
        return subset

    def late(self, *, subset: Subset | None, exact: bool) -> Callable[[], None] | None:
        """As `View.late`."""
        is_asked = not exact and (subset is None or not self._is_small(len(subset.ids)))
        return self._searcher.late() if is_asked and isinstance(self._searcher, LoadsLate) else None

    def search(
        self, queries: Queries, *, top_k: int, subset: Subset | None, exact: bool, recall_at: int | None = None
    ) -> Found:
        """As `View.search`: a small subset exactly, a large one by asking the searcher for more than is wanted."""
        rows = len(self.ids) if subset is None else len(subset.ids)
        top_k = max(1, min(top_k, rows))
        if exact or isinstance(self._searcher, StreamSearcher) or (subset is not None and self._is_small(rows)):
            return Found(*self._comparing(subset).search(queries, top_k=top_k), examined=rows)
        valid, newer = self._split(subset)
        answers = [self._search_known(queries, top_k, valid, recall_at)]
        if self._tail is not None and len(newer):
            answers.append(_search_valid(self._tail, queries, top_k, newer, recall_at=recall_at))
        return merge(answers, top_k)

    def expect(
        self, queries: Queries | None, *, top_k: int = 1, subset: Subset | None = None, recall_at: int | None = None
    ) -> None:
        """As `LooksAhead.expect`: of no use to a searcher that is in memory."""
        self._ahead.lot = None
        if queries is None or is_resident(self._searcher):
            return
        valid, _ = self._split(subset)
        top_k = max(1, min(top_k, len(valid)))
        self._ahead.lot = Ahead(
            lambda lot, *, top_k: _search_valid(self._searcher, lot, top_k, valid, recall_at=recall_at)[:2],
            queries,
            top_k=top_k,
            at_once=queries_at_once(self._searcher, self._store.dim, top_k=top_k, usual=1),
            among=valid,
        )

    def exact_searcher(self) -> ExactSearcher:
        """Every row of the store, in memory."""
        with self._loading:
            if self._exact is None:
                is_current = len(self._valid) == len(self.ids) == len(self._searcher.ids)
                if isinstance(self._searcher, ExactSearcher) and is_current:
                    self._exact = self._searcher
                else:
                    self._exact = exact_searcher(self._store)
            return self._exact

    def complete_clip(
        self, vectors: Queries, ids: Sequence[Int64[ndarray, " _"]], known: Sequence[RankedList]
    ) -> list[Float64[ndarray, " _"]]:
        """As `View.complete_clip`."""
        scattered = [listed.scatter(i) for i, listed in zip(ids, known, strict=True)]
        missing = [i[~have] for i, (_, have) in zip(ids, scattered, strict=True)]
        wanted = distinct(*missing)
        if len(wanted):
            source = self._searcher_of(wanted)
            for vector, gaps, (scores, have) in zip(vectors, missing, scattered, strict=True):
                scores[~have] = source.scores(vector, gaps)
        return [scores for scores, _ in scattered]

    def vectors(self, ids: Int64[ndarray, " n"]) -> Float32[ndarray, "n d"]:
        """As `View.vectors`."""
        source = self._searcher_of(distinct(ids))
        return source.vectors[np.searchsorted(source.ids, ids)]

    def lexical(self, by: str, *, many: bool = False) -> Lexical:
        """As `View.lexical`."""
        kind = lexical_kind(by, rows=len(self.ids), many=many, indexed=has_fts(self._store))
        if kind not in self._words:
            self._words[kind] = self._make_lexical(kind)
        return self._words[kind]

    def repeats_of(self, ids: Int64[ndarray, " n"]) -> Int64[ndarray, " m"]:
        """As `View.repeats_of`: by group, and for rows that no group was looked for, by the bytes of the image."""
        members = self.duplicates.members(ids)
        if not len(members):
            return members
        if self.duplicates.manifest is not None and self._tail is None:
            return members
        return with_same_bytes(self._store, members)

    def _make_lexical(self, kind: str) -> Lexical:
        if kind == "lance":
            return LanceBM25(self._store)
        ids, captions = self._store.captions()
        return TfIdf(ids, captions) if kind == "tfidf" else RankBM25(ids, captions)

    def _kept(self, subset: Subset) -> _Filtered:
        """What was made of these rows before. One of several stores is asked for fewer than the filter leaves."""
        known = self._filtered.get(subset.where)
        if known is None or not np.array_equal(known.ids, subset.ids):
            known = _Filtered(ids=subset.ids)
            _remember(self._filtered, subset.where, known)
        return known

    def _search_known(
        self, queries: Queries, top_k: int, valid: Int64[ndarray, " valid"], recall_at: int | None
    ) -> Found:
        """Among the rows that the searcher knows; perhaps it was asked before."""
        wanted = min(top_k, len(valid))
        ahead = self._ahead.lot
        known = None if ahead is None else ahead.answer(queries, top_k=wanted, among=valid)
        if known is not None:
            return Found(*known, examined=_examined(self._searcher, wanted))
        return _search_valid(self._searcher, queries, top_k, valid, recall_at=recall_at)

    def _split(self, subset: Subset | None) -> tuple[Int64[ndarray, " valid"], Int64[ndarray, " newer"]]:
        """The rows that the searcher knows, and those that are newer, both ascending."""
        if subset is None:
            return self._valid, self._tail.ids if self._tail is not None else _NO_IDS
        kept = self._kept(subset)
        if kept.split is None:
            is_known = np.ones(len(subset.ids), dtype=bool)
            if self._valid is not self.ids:
                is_known = contains(self._valid, subset.ids)
            kept.split = subset.ids[is_known], subset.ids[~is_known]
        return kept.split

    def _is_small(self, rows: int) -> bool:
        """Whether a filter leaves so few rows that they are compared one by one."""
        is_exact = isinstance(self._searcher, ExactSearcher)
        return rows <= _SMALL_SUBSET and (is_exact or rows <= max(_FEW_ROWS, _SMALL_SHARE * len(self.ids)))

    def _comparing(self, subset: Subset | None) -> ExactSearcher | ExactStream:
        """Who compares every row, or every one that a filter leaves: in memory, unless that takes much of it."""
        rows = len(self.ids) if subset is None else len(subset.ids)
        is_loaded = self._exact is not None or isinstance(self._searcher, ExactSearcher)
        if not is_loaded and not may_be_held(rows, self._store.dim):
            if subset is None:
                return ExactStream(self._store)
            return ExactStream(self._store, subset.where, within=subset.ids)
        return self.exact_searcher() if subset is None else self._subset_searcher(subset)

    def _subset_searcher(self, subset: Subset) -> ExactSearcher:
        """The rows that a filter leaves, in memory."""
        with self._loading:
            kept = self._kept(subset)
            if kept.searcher is None:
                self._let_go(len(subset.ids))
                if self._exact is not None or isinstance(self._searcher, ExactSearcher):
                    kept.searcher = self.exact_searcher().subset(subset.ids)
                else:
                    kept.searcher = exact_searcher(self._store, subset.where).subset(subset.ids)
            return kept.searcher

    def _let_go(self, rows: int) -> None:
        """Make room for the vectors of so many rows: all subsets together may take what one may, the oldest go."""
        others = [kept for kept in list(self._filtered.values()) if kept.searcher is not None]
        held = rows + sum(len(kept.ids) for kept in others)
        for kept in others:
            if may_be_held(held, self._store.dim):
                return
            kept.searcher = None
            held -= len(kept.ids)

    def _searcher_of(self, ids: Int64[ndarray, " n"]) -> ExactSearcher:
        """One that has these rows, and perhaps others."""
        if self._exact is not None or isinstance(self._searcher, ExactSearcher):
            return self.exact_searcher()
        known = ids[contains(self._valid, ids)]
        vectors = self._searcher.vectors(known) if isinstance(self._searcher, HoldsVectors) else None
        if vectors is None:
            return ExactSearcher(*self._store.vectors_of(ids))
        if self._tail is None:
            return ExactSearcher(known, vectors)
        newer = self._tail.subset(ids)
        return ExactSearcher(np.concatenate([known, newer.ids]), np.concatenate([vectors, newer.vectors]))


def _remember(cache: dict[str, Any], condition: str, made: Any) -> None:
    """Keep it, in place of the oldest if need be."""
    cache[condition] = made
    for oldest in list(cache)[:-_KEPT_FILTERS]:
        cache.pop(oldest, None)


def lexical_kind(by: str, *, rows: int, many: bool, indexed: bool) -> Literal["lance", "memory", "tfidf"]:
    """Who scores words: Lance; for a batch, and where Lance has no word index, the captions in memory."""
    if by == "tfidf":
        return "tfidf"
    return "memory" if (many and rows <= _IN_MEMORY_WORDS) or not indexed else "lance"


def with_same_bytes(store: Any, ids: Int64[ndarray, " n"]) -> Int64[ndarray, " m"]:
    """These rows of a PairStore, or of several as one, and every row whose image is one of theirs byte for byte."""
    digests = {pair.sha256 for pair in store.get(ids)} - {None}
    if not digests:
        return ids
    quoted = ", ".join(f"'{digest}'" for digest in sorted(map(str, digests)))
    return distinct(ids, store.matching_ids(f"image_sha256 IN ({quoted})"))


def _newer_rows(store: "PairStore", searcher: Searcher) -> tuple[Int64[ndarray, " new"], Float32[ndarray, "new d"]]:
    """The rows written since the searcher was built."""
    if searcher.snapshot is not None:
        return store.rows_after(searcher.snapshot)
    ids = store.matching_ids()
    unknown = ids[~contains(searcher.ids, ids)]
    if not len(unknown):
        return np.empty(0, dtype=np.int64), np.empty((0, store.dim), dtype=np.float32)
    return store.vectors_of(unknown)


def _search_valid(
    searcher: Searcher, queries: Queries, top_k: int, valid: Int64[ndarray, " valid"], *, recall_at: int | None
) -> Found:
    """Search for ids in ascending `valid` only: ask for more than is wanted until every query has enough."""
    rows = len(searcher.ids)
    wanted = min(top_k, len(valid))
    if not wanted:
        return Found(*padded(len(queries), top_k), examined=0)
    if len(valid) == rows:
        return Found(*searcher.search(queries, top_k=wanted, recall_at=recall_at), examined=_examined(searcher, wanted))
    asked = min(rows, max(wanted + 10, 2 * wanted * rows // len(valid)))
    while True:
        sure = None if recall_at is None else math.ceil(recall_at * asked / wanted)
        ids, scores = searcher.search(queries, top_k=asked, recall_at=sure)
        is_valid = contains(valid, ids)
        if asked == rows or (is_valid.sum(axis=1) >= wanted).all():
            ids, scores = np.where(is_valid, ids, -1), np.where(is_valid, scores, np.float32(-np.inf))
            order = np.argsort(~is_valid, axis=1, kind="stable")[:, :wanted]
            ids, scores = np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
            return Found(ids, scores, examined=_examined(searcher, asked))
        asked = min(rows, 2 * asked)


def _examined(searcher: Searcher, asked: int) -> int:
    """An exact searcher scores every row; of an approximate one those are counted that it was asked to rank."""
    return len(searcher.ids) if isinstance(searcher, ExactSearcher) else asked


def merge(answers: Sequence[Found], top_k: int) -> Found:
    """The best of several answers over disjoint rows."""
    if len(answers) == 1:
        return answers[0]
    ids, scores = merge_answers([(answer.ids, answer.scores) for answer in answers], top_k=top_k)
    return Found(ids, scores, examined=sum(answer.examined for answer in answers))
