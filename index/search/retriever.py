"""Retriever: a query in, fused hits out. Embed, search by vector and by words, fuse, fetch.

Candidates are the union of the best max(10 k, 100) of both lists, with both scores exact for every one of them. The
searcher is a snapshot: rows newer than it are compared one by one, and ids that are gone never come back.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from index.errors import KnowledgeBaseError, QueryError
from index.records import Hit, StoredPair
from index.search.fusion import FusionRule, best_first, fuse
from index.search.lexical import Lexical, Subset, coarse
from index.search.searcher import Queries, Searcher
from index.search.view import RankedList, StoreView, View

if TYPE_CHECKING:
    import PIL.Image

    from index.embedder import Embedder
    from index.store import PairStore

By = Literal["hybrid", "clip", "bm25", "tfidf"]

_DEPTH = 10  # candidates of each list per hit asked for
_MIN_DEPTH = 100
_EMBED_BATCH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """Hits, best first, and where the time went: embed, vector, lexical, fuse, fetch, in milliseconds."""

    hits: list[Hit]
    timings_ms: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """Where one pair stands among all that a query could find, every one of them scored. Ranks start at 1.

    A rank is None where its component was not asked for, or where the caption shares no word with the query.
    """

    rank: int
    of: int
    score: float
    clip: float | None
    clip_rank: int | None
    bm25: float | None
    bm25_rank: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    """What is asked of every query of a batch."""

    k: int
    by: By
    fusion: FusionRule
    min_score: float | None
    exact: bool
    subset: Subset | None

    @property
    def uses_clip(self) -> bool:
        return self.by in ("hybrid", "clip")

    @property
    def uses_words(self) -> bool:
        return self.by != "clip"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Query:
    """One query of a batch. `vector` is None when no vector is needed, `text` when no words are."""

    text: str | None
    vector: Float32[ndarray, " d"] | None
    exclude: Int64[ndarray, " x"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidates:
    """The scored candidates of one query, best first."""

    ids: Int64[ndarray, " n"]
    score: Float64[ndarray, " n"]
    clip: Float64[ndarray, " n"] | None
    words: Float64[ndarray, " n"] | None


class Retriever:
    """Finds pairs by CLIP, by words, or by both. Reads the store at its present version, whatever the searcher knew."""

    def __init__(self, store: "PairStore", searcher: Searcher, embedder: "Embedder | None" = None):
        self.store = store
        self._make_view: Callable[[], View] = lambda: StoreView(store, searcher)
        self._embedder = embedder
        self._view: View | None = None

    @classmethod
    def over(cls, store: Any, make_view: Callable[[], View], embedder: "Embedder | None" = None) -> "Retriever":
        """Search what `make_view` shows. `store` answers `version`, `matching_ids` and `get` as a PairStore does."""
        retriever = cls.__new__(cls)
        retriever.store, retriever._make_view, retriever._embedder, retriever._view = store, make_view, embedder, None
        return retriever

    def search(
        self,
        text: str | None = None,
        *,
        image: "PIL.Image.Image | None" = None,
        vector: Float32[ndarray, " d"] | None = None,
        k: int = 5,
        by: By = "hybrid",
        fusion: FusionRule = "rrf",
        where: str | None = None,
        dataset: str | None = None,
        min_score: float | None = None,
        exclude: Collection[int] = (),
        exact: bool = False,
    ) -> SearchResult:
        """The k best pairs with distinct images, by text, by image, by a vector, or by text and one of those.

        An image or a vector takes the text's place on the CLIP side; the text then speaks through its words only.
        Without text, `hybrid` means `clip`. `min_score` is a bound on the fused score. `exact` compares every pair.
        """
        clock = _Clock()
        by = _checked_by(by, text, has_vector=image is not None or vector is not None)
        request = self._request(k, by, fusion=fusion, min_score=min_score, exact=exact, where=where, dataset=dataset)
        with clock("embed"):
            row = self._query_vector(text, image, vector) if request.uses_clip else None
        query = _Query(text=text, vector=row, exclude=_id_array(exclude))
        (hits,) = self._answer([query], request, clock, lexical=self._current().lexical(by))
        return SearchResult(hits=hits, timings_ms=clock.milliseconds)

    def standing(
        self,
        pair_id: int,
        text: str | None = None,
        *,
        image: "PIL.Image.Image | None" = None,
        vector: Float32[ndarray, " d"] | None = None,
        by: By = "hybrid",
        fusion: FusionRule = "rrf",
        where: str | None = None,
        dataset: str | None = None,
    ) -> Standing | None:
        """Where a pair stands when every pair is compared; None when it is not there, or the filter takes it away."""
        by = _checked_by(by, text, has_vector=image is not None or vector is not None)
        request = self._request(1, by, fusion=fusion, min_score=None, exact=True, where=where, dataset=dataset)
        view = self._current()
        among = view.ids if request.subset is None else request.subset.ids
        if pair_id not in among:
            return None
        row = self._query_vector(text, image, vector) if request.uses_clip else None
        query = _Query(text=text, vector=row, exclude=_id_array(()))
        (ranked,) = self._rank([query], request, _Clock(), depth=len(among), lexical=view.lexical(by))
        return _standing(ranked, pair_id, of=len(among))

    def contributions(self, text: str, pair_ids: Sequence[int]) -> list[dict[str, float]]:
        """For each pair, what every matching term of `text` adds to its BM25 score."""
        lexical = self._current().lexical("bm25")
        return [lexical.contributions(text, pair_id) for pair_id in pair_ids]

    def search_many(
        self,
        texts: Sequence[str],
        *,
        vectors: Queries | None = None,
        k: int = 5,
        by: By = "hybrid",
        fusion: FusionRule = "rrf",
        where: str | None = None,
        dataset: str | None = None,
        min_score: float | None = None,
        exclude: Sequence[Collection[int]] | None = None,
        exact: bool = False,
    ) -> list[list[Hit]]:
        """`search` for many texts at once, embedded and searched in batches; `exclude` has one entry for each text.

        `vectors`, unit rows, stand in for the embedded texts.
        """
        if vectors is not None and len(vectors) != len(texts):
            raise QueryError(f"{len(texts)} texts need as many vectors, got {len(vectors)}")
        if exclude is not None and len(exclude) != len(texts):
            raise QueryError(f"{len(texts)} texts need as many lists of excluded ids, got {len(exclude)}")
        if not texts:
            return []
        for text in texts:
            _checked_by(by, text, has_vector=vectors is not None)
        request = self._request(k, by, fusion=fusion, min_score=min_score, exact=exact, where=where, dataset=dataset)
        if request.uses_clip:
            rows = self._embed(texts) if vectors is None else _unit_rows(vectors)
        queries = [
            _Query(
                text=text,
                vector=rows[position] if request.uses_clip else None,
                exclude=_id_array(exclude[position] if exclude is not None else ()),
            )
            for position, text in enumerate(texts)
        ]
        lexical = self._current().lexical(by, many=len(texts) > 1)
        hits: list[list[Hit]] = []
        for start in range(0, len(queries), _EMBED_BATCH):
            hits += self._answer(queries[start : start + _EMBED_BATCH], request, _Clock(), lexical=lexical)
        return hits

    # From the words of the caller to a request

    def _request(
        self,
        k: int,
        by: By,
        *,
        fusion: FusionRule,
        min_score: float | None,
        exact: bool,
        where: str | None,
        dataset: str | None,
    ) -> _Request:
        if k < 1:
            raise QueryError(f"k must be at least 1, got {k}")
        if fusion not in get_args(FusionRule):
            raise QueryError(f"fusion is one of {', '.join(get_args(FusionRule))}, got {fusion!r}")
        if not len(self._current().ids):
            raise KnowledgeBaseError(
                "the knowledge base is empty; add pairs with `radt index build` or `radt index add`"
            )
        condition = _condition(where, dataset)
        subset = None
        if condition is not None:
            subset = Subset(where=condition, ids=np.sort(self.store.matching_ids(condition)))
        return _Request(k=k, by=by, fusion=fusion, min_score=min_score, exact=exact, subset=subset)

    def _query_vector(
        self, text: str | None, image: "PIL.Image.Image | None", vector: Float32[ndarray, " d"] | None
    ) -> Float32[ndarray, " d"]:
        if vector is not None:
            if image is not None:
                raise QueryError("give an image or a vector to search by, not both")
            return _unit_rows(np.asarray(vector, dtype=np.float32)[None])[0]
        if image is not None:
            return self._need_embedder().images([image])[0]
        assert text is not None
        return self._need_embedder().texts([text])[0]

    def _embed(self, texts: Sequence[str]) -> Queries:
        embedder = self._need_embedder()
        starts = range(0, len(texts), _EMBED_BATCH)
        return np.concatenate([embedder.texts(list(texts[start : start + _EMBED_BATCH])) for start in starts])

    def _need_embedder(self) -> "Embedder":
        if self._embedder is None:
            raise QueryError(
                "searching by CLIP needs the model the knowledge base was built with; name it with --model"
            )
        return self._embedder

    # From a request to hits

    def _answer(
        self, queries: Sequence[_Query], request: _Request, clock: "_Clock", *, lexical: Lexical
    ) -> list[list[Hit]]:
        view = self._current()
        rows = len(view.ids) if request.subset is None else len(request.subset.ids)
        depth = rows if request.exact else max(_DEPTH * request.k, _MIN_DEPTH)
        answers: list[list[Hit]] = [[] for _ in queries]
        pending = list(range(len(queries))) if rows else []
        while pending:
            asked = [queries[position] for position in pending]
            ranked = self._rank(asked, request, clock, depth=depth, lexical=lexical)
            with clock("fetch"):
                fetched = self._fetch(ranked, request.k)
            for position, hits in zip(pending, fetched, strict=True):
                answers[position] = hits
            if depth >= rows:
                break
            # Many captions of few images can use up the candidates before there are k images. A threshold has cut
            # the list for good, so then there is nothing more to find further down.
            pending = [p for p in pending if len(answers[p]) < request.k and request.min_score is None]
            depth *= 4
        return answers

    def _rank(
        self, queries: Sequence[_Query], request: _Request, clock: "_Clock", *, depth: int, lexical: Lexical
    ) -> list[_Candidates]:
        """Score and order the candidates of every query."""
        vectors = (
            np.stack([query.vector for query in queries if query.vector is not None]) if request.uses_clip else None
        )
        by_vector = [RankedList()] * len(queries)
        by_words = [RankedList()] * len(queries)
        if vectors is not None:
            with clock("vector"):
                by_vector = self._search_vectors(vectors, queries, request, depth=depth)
        if request.uses_words:
            with clock("lexical"):
                by_words = self._search_words(queries, lexical, request, depth=depth)
        ids = [np.union1d(one.ids, other.ids) for one, other in zip(by_vector, by_words, strict=True)]
        clips: list[Float64[ndarray, " n"]] | None = None
        words: list[Float64[ndarray, " n"]] | None = None
        if vectors is not None:
            with clock("vector"):
                clips = self._current().complete_clip(vectors, ids, by_vector)
        if request.uses_words:
            with clock("lexical"):
                words = [
                    _complete_words(lexical, query, i, known, exhausted=len(known.ids) < depth)
                    for query, i, known in zip(queries, ids, by_words, strict=True)
                ]
        with clock("fuse"):
            return [
                _order(i, clips[n] if clips else None, words[n] if words else None, request) for n, i in enumerate(ids)
            ]

    def _search_vectors(
        self, vectors: Queries, queries: Sequence[_Query], request: _Request, *, depth: int
    ) -> list[RankedList]:
        spare = max(len(query.exclude) for query in queries)
        found, scores = self._current().search(vectors, top_k=depth + spare, subset=request.subset, exact=request.exact)
        return [
            RankedList(ids=i[i >= 0], scores=s[i >= 0].astype(np.float64)).without(query.exclude, limit=depth)
            for i, s, query in zip(found, scores, queries, strict=True)
        ]

    def _search_words(
        self, queries: Sequence[_Query], lexical: Lexical, request: _Request, *, depth: int
    ) -> list[RankedList]:
        spare = max(len(query.exclude) for query in queries)
        texts = [query.text or "" for query in queries]
        rankings = lexical.search_many(texts, top_k=depth + spare, within=request.subset)
        return [
            RankedList(ids=ids, scores=scores).without(query.exclude, limit=depth)
            for (ids, scores), query in zip(rankings, queries, strict=True)
        ]

    def _fetch(self, ranked: Sequence[_Candidates], k: int) -> list[list[Hit]]:
        """The first k candidates of each query that show different images."""
        rows: dict[int, StoredPair] = {}
        hits: list[list[Hit]] = [[] for _ in ranked]
        pending, window = list(range(len(ranked))), k
        while pending:
            wanted = {i for p in pending for i in ranked[p].ids[:window].tolist()} - rows.keys()
            rows.update((pair.id, pair) for pair in self.store.get(sorted(wanted)))
            for p in pending:
                hits[p] = _distinct_hits(ranked[p], rows, k=k, window=window)
            pending = [p for p in pending if len(hits[p]) < k and window < len(ranked[p].ids)]
            window *= 2
        return hits

    @property
    def view(self) -> View:
        """What is searched now."""
        return self._current()

    def _current(self) -> View:
        if self._view is None or self._view.version != self.store.version:
            self._view = self._make_view()
        return self._view


class _Clock:
    """Adds up wall time under a few names."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = dict.fromkeys(("embed", "vector", "lexical", "fuse", "fetch"), 0.0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.milliseconds[name] += (time.perf_counter() - start) * 1e3


def _checked_by(by: By, text: str | None, *, has_vector: bool) -> By:
    """The kind of search that the given parts of a query allow, or a QueryError."""
    if by not in get_args(By):
        raise QueryError(f"by is one of {', '.join(get_args(By))}, got {by!r}")
    if text is not None and not text.strip():
        raise QueryError("the query text is empty; give at least one word")
    if text is None:
        if not has_vector:
            raise QueryError("there is nothing to search for; give a text, an image or a vector")
        if by in ("bm25", "tfidf"):
            raise QueryError(f"searching by {by} needs a text; give one, or search by clip")
        return "clip"
    return by


def _condition(where: str | None, dataset: str | None) -> str | None:
    parts = [f"({where})"] if where else []
    if dataset is not None:
        quoted = dataset.replace("'", "''")
        parts.append(f"dataset = '{quoted}'")
    return " AND ".join(parts) or None


def _unit_rows(vectors: Queries) -> Queries:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        raise QueryError("a query vector must be finite and not zero")
    return (vectors / norms).astype(np.float32)


def _id_array(ids: Collection[int]) -> Int64[ndarray, " x"]:
    return np.fromiter((int(i) for i in ids), dtype=np.int64, count=len(ids))


def _complete_words(
    lexical: Lexical, query: _Query, ids: Int64[ndarray, " n"], known: RankedList, *, exhausted: bool
) -> Float64[ndarray, " n"]:
    """The word score of every candidate. A list that ended early holds every match, so the rest scores 0."""
    assert query.text is not None
    scores, have = known.scatter(ids)
    if not exhausted and not have.all():
        scores[~have] = lexical.scores(query.text, ids[~have])
    return scores


def _order(
    ids: Int64[ndarray, " n"],
    clip: Float64[ndarray, " n"] | None,
    words: Float64[ndarray, " n"] | None,
    request: _Request,
) -> _Candidates:
    """Fuse, apply the threshold, and put the best first."""
    alone = clip if words is None else words
    assert alone is not None
    score = alone
    if clip is not None and words is not None:
        # Ranks tell apart what ties but for rounding; sums and products do not.
        score = fuse(ids, clip, coarse(words) if request.fusion == "rrf" else words, rule=request.fusion)
    order = best_first(ids, score)
    if request.min_score is not None:
        order = order[score[order] >= request.min_score]
    return _Candidates(
        ids=ids[order],
        score=score[order],
        clip=clip[order] if clip is not None else None,
        words=words[order] if words is not None and request.by != "tfidf" else None,
    )


def _standing(ranked: _Candidates, pair_id: int, *, of: int) -> Standing | None:
    (positions,) = np.nonzero(ranked.ids == pair_id)
    if not len(positions):  # by words alone, what shares no word is not even a candidate
        return Standing(rank=of, of=of, score=0.0, clip=None, clip_rank=None, bm25=0.0, bm25_rank=None)
    at = int(positions[0])

    def component(scores: Float64[ndarray, " n"] | None) -> tuple[float | None, int | None]:
        return (None, None) if scores is None else (float(scores[at]), int((scores > scores[at]).sum()) + 1)

    clip, clip_rank = component(ranked.clip)
    bm25, bm25_rank = component(ranked.words)
    return Standing(
        rank=at + 1,
        of=of,
        score=float(ranked.score[at]),
        clip=clip,
        clip_rank=clip_rank,
        bm25=bm25,
        bm25_rank=bm25_rank if bm25 else None,
    )


def _distinct_hits(ranked: _Candidates, rows: dict[int, StoredPair], *, k: int, window: int) -> list[Hit]:
    """Hits for the first k images among the first `window` candidates; further captions of an image are passed over."""
    hits: list[Hit] = []
    images: set[str] = set()
    for position, pair_id in enumerate(ranked.ids[:window].tolist()):
        pair = rows.get(pair_id)
        if pair is None or pair.sha256 in images:
            continue
        images.add(pair.sha256)
        hits.append(
            Hit(
                id=pair_id,
                rank=len(hits) + 1,
                score=float(ranked.score[position]),
                clip=float(ranked.clip[position]) if ranked.clip is not None else None,
                bm25=float(ranked.words[position]) if ranked.words is not None else None,
                caption=pair.caption,
                dataset=pair.dataset,
                image=pair.image,
                metadata=pair.metadata,
            )
        )
        if len(hits) == k:
            break
    return hits
