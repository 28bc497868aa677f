"""Several knowledge bases searched as one: what they hold together is ranked as if one of them held it all.

Vectors are compared alike everywhere, so the lists of the parts merge. Words weigh by how rare they are in all parts
together, so the statistics are added up before any part is asked. A pair that several parts have counts as the first
one's. Built on the views of `view.py`; the retriever is the one that a single knowledge base has.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial, reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from index.embedder import Embedder
from index.errors import KnowledgeBaseError, QueryError
from index.records import Hit, ShownPair, StoredPair
from index.search.duplicates import Duplicates
from index.search.ids import contains, distinct
from index.search.lexical import LanceBM25, Lexical, RankBM25, Ranking, Subset, TfIdf, at_once, best_of, has_fts
from index.search.retriever import Retriever, SearchResult
from index.search.searcher import Queries
from index.search.view import Found, RankedList, View, lexical_kind, merge, with_same_bytes
from index.search.words import Statistics

if TYPE_CHECKING:
    from index.knowledge_base import KnowledgeBase
    from index.store import PairStore


class JoinedKnowledgeBase:
    """Knowledge bases of one model, searched as one. What changes a knowledge base is done to each by itself."""

    def __init__(self, parts: "Sequence[KnowledgeBase]"):
        _check_parts(parts)
        self.parts = list(parts)
        self.manifest = parts[0].manifest
        self.embedder: Embedder = parts[0].embedder
        self.store = JoinedStore([part.store for part in parts])
        self._retriever: Retriever | None = None
        self._asked: list[Retriever] = []  # of the parts, when that was made

    @classmethod
    def open(
        cls, directories: Sequence[str | Path], embedder: Embedder | None = None, *, models: Sequence[str] = ()
    ) -> "JoinedKnowledgeBase":
        """Open each as `KnowledgeBase.open` does; one model serves all. KnowledgeBaseError when one has another."""
        from index.knowledge_base import KnowledgeBase

        return cls([KnowledgeBase.open(directory, embedder, models=models) for directory in directories])

    @property
    def name(self) -> str:
        """All their folders and URLs, for people."""
        return " + ".join(part.name for part in self.parts)

    def __len__(self) -> int:
        """Number of pairs; one that several parts have counts once."""
        return self.store.count()

    def search(self, text: str | None = None, **asked: Any) -> list[Hit]:
        """As `KnowledgeBase.search`; each hit says in `kb` where it was found."""
        return self.query(text, **asked).hits

    def query(self, text: str | None = None, **asked: Any) -> SearchResult:
        """`search`, with where the time went."""
        try:
            result = self.retriever.search(text, **asked)
        except (OSError, ValueError, KnowledgeBaseError):  # as in `KnowledgeBase.query`
            if not any(part.is_outdated() for part in self.parts):
                raise
            for part in self.parts:
                part.refresh()
            result = self.retriever.search(text, **asked)
        return replace(result, hits=[replace(hit, kb=self.part_of(hit.id).name) for hit in result.hits])

    @property
    def retriever(self) -> Retriever:
        """The retriever over all parts as they are now."""
        asked = [part.retriever for part in self.parts]  # each anew when its `kb.json` names another searcher
        if self._retriever is None or any(now is not before for now, before in zip(asked, self._asked, strict=True)):
            self._retriever = Retriever.over(self.store, self._make_view, self.embedder)
            self._asked = asked
        return self._retriever

    @contextmanager
    def held(self) -> Iterator[None]:
        """As `KnowledgeBase.held`, of each."""
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.held())
            yield

    @property
    def note(self) -> str:
        """As `KnowledgeBase.note`, of each."""
        return "; ".join(f"{part.name}: {part.note}" for part in self.parts if part.note)

    def part_of(self, pair: int) -> "KnowledgeBase":
        """The knowledge base that has the pair, the first if several do. QueryError when none does."""
        for part in self.parts:
            if part.store.count(f"id = {pair}"):
                return part
        raise QueryError(f"there is no pair {pair} in {self.name}; `radt index query` lists ids")

    def show(self, pair: int) -> StoredPair:
        """One pair, its vector included. QueryError when it is not there."""
        return self.part_of(pair).show(pair)

    def stats(self) -> dict[str, Any]:
        """Sizes of all parts together, then those of each."""
        parts = [part.stats() for part in self.parts]
        return {
            "kb": [part["kb"] for part in parts],
            "pairs": len(self),
            "datasets": self.store.datasets(),
            "parts": parts,
        }

    def _make_view(self) -> View:
        return JoinedView(self.store.parts, [part.retriever.view for part in self.parts])


class JoinedStore:
    """What the retriever asks of a store, answered by several. Of a pair that several have, the first one's row."""

    def __init__(self, parts: "Sequence[PairStore]"):
        self.parts = list(parts)

    @property
    def version(self) -> tuple[int, ...]:
        """The version of each."""
        return tuple(part.version for part in self.parts)

    def count(self, where: str | None = None) -> int:
        """How many pairs there are, or how many the SQL filter lets through."""
        return len(self.matching_ids(where))

    def matching_ids(self, where: str | None = None) -> Int64[ndarray, " n"]:
        """Ids of the pairs that the SQL filter lets through, ascending."""
        return distinct(*(part.matching_ids(where) for part in self.parts))

    def captions(self, where: str | None = None) -> tuple[Int64[ndarray, " n"], list[str]]:
        """Ids, ascending, and captions."""
        ids, texts = zip(*(part.captions(where) for part in self.parts), strict=True)
        unique, first = np.unique(np.concatenate(ids), return_index=True)
        captions = [caption for several in texts for caption in several]
        return unique, [captions[position] for position in first.tolist()]

    def get(self, ids: Sequence[int] | Int64[ndarray, " n"], **asked: Any) -> list[StoredPair]:
        """Rows in the order of `ids`; an id that is not there (any more) is left out."""
        return self._of_first(lambda part, some: part.get(some, **asked), ids)

    def shown(self, ids: Sequence[int] | Int64[ndarray, " n"]) -> list[ShownPair]:
        """`get`, of every row only what a hit shows."""
        return self._of_first(lambda part, some: part.shown(some), ids)

    def datasets(self) -> dict[str, int]:
        """Pairs per dataset name, sorted by name; here a pair that several parts have counts for each."""
        counts: dict[str, int] = {}
        for part in self.parts:
            for name, pairs in part.datasets().items():
                counts[name] = counts.get(name, 0) + pairs
        return dict(sorted(counts.items()))

    def _of_first(
        self, read: "Callable[[PairStore, list[int]], list[Any]]", ids: Sequence[int] | Int64[ndarray, " n"]
    ) -> list[Any]:
        """What is read of each pair in the first part that has it."""
        wanted = [int(i) for i in ids]
        found: dict[int, Any] = {}
        for part in self.parts:
            found |= {pair.id: pair for pair in read(part, [i for i in wanted if i not in found])}
        return [found[i] for i in wanted if i in found]


class JoinedView:
    """The views of several stores as one."""

    def __init__(self, stores: "Sequence[PairStore]", views: Sequence[View]):
        self._joined = JoinedStore(stores)
        self._stores = stores
        self._views = views
        self.version = self._joined.version
        self._own: list[Int64[ndarray, " _"]] = []  # the ids of each view that no earlier one has, ascending
        self.ids: Int64[ndarray, " rows"] = np.empty(0, dtype=np.int64)
        for view in views:
            self._own.append(view.ids[~contains(self.ids, view.ids)])
            self.ids = np.sort(np.concatenate([self.ids, self._own[-1]]))
        self._words: dict[str, Lexical] = {}

    @cached_property
    def duplicates(self) -> Duplicates:
        """The groups of every part; a pair that several parts have is in the first one's group."""
        found = [
            view.duplicates.without(view.ids[~contains(own, view.ids)])
            for view, own in zip(self._views, self._own, strict=True)
        ]
        ids = np.concatenate([each.ids for each in found])
        order = np.argsort(ids)
        return Duplicates(ids=ids[order], groups=np.concatenate([each.groups for each in found])[order])

    def subset(self, condition: str) -> Subset:
        """As `View.subset`."""
        whole = [view.subset(condition) for view in self._views]
        ids = [subset.ids[contains(own, subset.ids)] for subset, own in zip(whole, self._own, strict=True)]
        return Subset(where=condition, ids=np.sort(np.concatenate(ids)))

    def vectors(self, ids: Int64[ndarray, " n"]) -> Float32[ndarray, "n d"]:
        """As `View.vectors`."""
        rows = np.empty((len(ids), self._stores[0].dim), dtype=np.float32)
        for view, own in zip(self._views, self._own, strict=True):
            mask = contains(own, ids)
            if mask.any():
                rows[mask] = view.vectors(ids[mask])
        return rows

    def repeats_of(self, ids: Int64[ndarray, " n"]) -> Int64[ndarray, " m"]:
        """As `View.repeats_of`, in every part by the bytes of the image as well: the parts were grouped apart."""
        return with_same_bytes(self._joined, self.duplicates.members(ids))

    def late(self, *, subset: Subset | None, exact: bool) -> Callable[[], None] | None:
        """As `View.late`, of every part."""
        parts = [_part_of(subset, own) for own in self._own]
        found = [view.late(subset=part, exact=exact) for view, part in zip(self._views, parts, strict=True)]
        waiting = [load for load in found if load is not None]
        return partial(_call_all, waiting) if waiting else None

    def search(
        self, queries: Queries, *, top_k: int, subset: Subset | None, exact: bool, recall_at: int | None = None
    ) -> Found:
        """As `View.search`: every part's best, merged."""
        answers = []
        for view, own in zip(self._views, self._own, strict=True):
            part = _part_of(subset, own)
            if len(own) and (part is None or len(part.ids)):
                answers.append(
                    _search_own(view, own, queries, top_k=top_k, subset=part, exact=exact, recall_at=recall_at)
                )
        return merge(answers, top_k)

    def complete_clip(
        self, vectors: Queries, ids: Sequence[Int64[ndarray, " _"]], known: Sequence[RankedList]
    ) -> list[Float64[ndarray, " _"]]:
        """As `View.complete_clip`: every part completes those of its own."""
        completed = [np.zeros(len(i)) for i in ids]
        for view, own in zip(self._views, self._own, strict=True):
            masks = [contains(own, i) for i in ids]
            theirs = [_only(listed, own) for listed in known]
            answers = view.complete_clip(vectors, [i[m] for i, m in zip(ids, masks, strict=True)], theirs)
            for scores, mask, answer in zip(completed, masks, answers, strict=True):
                scores[mask] = answer
        return completed

    def lexical(self, by: str, *, many: bool = False) -> Lexical:
        """As `View.lexical`. In memory, all captions are one corpus; in Lance every part has an index of its own."""
        kind = lexical_kind(by, rows=len(self.ids), many=many, indexed=all(map(has_fts, self._stores)))
        if kind not in self._words:
            self._words[kind] = self._make_lexical(kind)
        return self._words[kind]

    def _make_lexical(self, kind: str) -> Lexical:
        if kind == "lance":
            return JoinedBM25([LanceBM25(store) for store in self._stores], self._own)
        ids, captions = self._joined.captions()
        return TfIdf(ids, captions) if kind == "tfidf" else RankBM25(ids, captions)


class JoinedBM25:
    """BM25 by the word indices of several stores, under the statistics of all their captions together."""

    def __init__(self, parts: Sequence[LanceBM25], own: Sequence[Int64[ndarray, " _"]]):
        self._parts = parts
        self._own = own

    def search(self, query: str, *, top_k: int, within: Subset | None = None) -> Ranking:
        """As `Lexical.search`."""
        corpus = self.statistics(query)
        found = [
            _search_own_words(part, own, corpus, query, top_k=top_k, within=_part_of(within, own))
            for part, own in zip(self._parts, self._own, strict=True)
        ]
        return best_of(found, top_k)

    def search_many(self, queries: Sequence[str], *, top_k: int, within: Subset | None = None) -> list[Ranking]:
        """As `Lexical.search_many`."""
        return at_once(lambda query: self.search(query, top_k=top_k, within=within), queries)

    def scores(self, query: str, ids: Int64[ndarray, " n"]) -> Float64[ndarray, " n"]:
        """As `Lexical.scores`."""
        corpus, scores = self.statistics(query), np.zeros(len(ids))
        for part, own in zip(self._parts, self._own, strict=True):
            mask = contains(own, ids)
            scores[mask] = part.scores(query, ids[mask], corpus=corpus)
        return scores

    def scores_many(self, queries: Sequence[str], ids: Sequence[Int64[ndarray, " _"]]) -> list[Float64[ndarray, " _"]]:
        """As `Lexical.scores_many`."""
        return at_once(self.scores, queries, ids)

    def contributions(self, query: str, pair_id: int) -> dict[str, float]:
        """As `Lexical.contributions`."""
        one = np.array([pair_id], dtype=np.int64)
        for part, own in zip(self._parts, self._own, strict=True):
            if contains(own, one)[0]:
                return part.contributions(query, pair_id, corpus=self.statistics(query))
        return {}

    def statistics(self, query: str) -> Statistics:
        """Of all parts together."""
        return reduce(add, (part.statistics(query) for part in self._parts))


def _search_own(
    view: View,
    own: Int64[ndarray, " own"],
    queries: Queries,
    *,
    top_k: int,
    subset: Subset | None,
    exact: bool,
    recall_at: int | None,
) -> Found:
    """The best of one part, without the pairs that count as another's; a subset has none of those."""
    if subset is not None or len(own) == len(view.ids):
        return view.search(queries, top_k=top_k, subset=subset, exact=exact, recall_at=recall_at)
    asked = top_k
    while True:
        sure = None if recall_at is None else recall_at * asked // top_k
        ids, scores, examined = view.search(queries, top_k=asked, subset=None, exact=exact, recall_at=sure)
        is_own = contains(own, ids)
        if asked >= len(view.ids) or (is_own.sum(axis=1) >= min(top_k, len(own))).all():
            return Found(np.where(is_own, ids, -1), np.where(is_own, scores, np.float32(-np.inf)), examined)
        asked *= 2


def _search_own_words(
    part: LanceBM25,
    own: Int64[ndarray, " own"],
    corpus: Statistics,
    query: str,
    *,
    top_k: int,
    within: Subset | None,
) -> Ranking:
    """The best of one part, without the pairs that count as another's."""
    asked = top_k
    while True:
        ids, scores = part.search_among(corpus, query, top_k=asked, within=within)
        is_own = contains(own, ids)
        if len(ids) < asked or is_own.sum() >= top_k:
            return ids[is_own][:top_k], scores[is_own][:top_k]
        asked *= 2


def _check_parts(parts: "Sequence[KnowledgeBase]") -> None:
    """Something to search, nothing twice, and vectors that can be compared."""
    if not parts:
        raise KnowledgeBaseError("there is nothing to search; name at least one knowledge base with --kb")
    folders = [part.name for part in parts]
    for folder, times in Counter(folders).items():
        if times > 1:
            raise KnowledgeBaseError(f"the knowledge base {folder} is named {times} times; name each once")
    usual, _ = Counter(part.manifest.fingerprint for part in parts).most_common(1)[0]
    model = next(part.manifest.model for part in parts if part.manifest.fingerprint == usual)
    for part in parts:
        if part.manifest.fingerprint != usual:
            raise KnowledgeBaseError(
                f"{part.name} was made by the model {part.manifest.model}, and the others by {model}: their "
                "vectors cannot be compared. Leave it out, or build it again with the model of the others"
            )


def _call_all(functions: Sequence[Callable[[], None]]) -> None:
    for each in functions:
        each()


def _part_of(subset: Subset | None, own: Int64[ndarray, " own"]) -> Subset | None:
    return None if subset is None else replace(subset, ids=subset.ids[contains(own, subset.ids)])


def _only(listed: RankedList, own: Int64[ndarray, " own"]) -> RankedList:
    kept = contains(own, listed.ids)
    return RankedList(ids=listed.ids[kept], scores=listed.scores[kept])
