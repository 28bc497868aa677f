"""Retriever: a query in, fused hits out. Embed, search by vector and by words, fuse, arrange, fetch.

Candidates are the union of the best max(10 k, 100) of both lists, with both scores exact for every one of them. The
searcher is a snapshot: rows newer than it are compared one by one, and ids that are gone never come back. What can be
asked is in `request.py`; `scoring.py` makes candidates of lists, and `arrange.py` puts them in the order of the hits.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from index.errors import KnowledgeBaseError, QueryError
from index.records import Hit, ShownPair
from index.search.arrange import arrange
from index.search.candidates import Candidates
from index.search.decompose import Corpus, CountedWords, Decompose, phrases, subject
from index.search.duplicates import Duplicates
from index.search.fusion import FusionRule
from index.search.ids import contains, distinct
from index.search.lexical import Lexical
from index.search.request import (
    Asked,
    Bounds,
    By,
    Query,
    Request,
    check_request,
    checked_by,
    condition,
    id_array,
    unit_rows,
)
from index.search.scoring import complete_words, fused, is_final, without_excluded
from index.search.searcher import NO_ID, Ids, Queries, Scores, Searcher, padded
from index.search.trace import Stage, Trace
from index.search.view import Found, LooksAhead, RankedList, StoreView, View

if TYPE_CHECKING:
    import PIL.Image

    from index.embedder import Embedder
    from index.store import PairStore

_EMBED_BATCH = 256
_MOST_CANDIDATES = 1 << 23  # of the queries answered at once: about 100 bytes each


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """Hits, best first; where the time went, in milliseconds; and the stages that candidates went through.

    `timings_ms` has load (of model and searcher, at first), embed, decompose, filter, vector, lexical, fuse, diversity
    and fetch. `matching` rows pass the filter, `examined` were looked at by the search by vector. Each list was asked
    for `depth` candidates, for more than at first where those made too few hits. `shortfall` says why there are fewer
    than k hits, `parts` what the prompt was decomposed into. `lists` has the ids that were left after vector, words,
    union, thresholds and duplicates, in order: one list, or one for each part of the prompt.
    """

    hits: list[Hit]
    timings_ms: dict[str, float]
    stages: list[Stage] = field(default_factory=list)
    matching: int = 0
    examined: int = 0
    depth: int = 0
    shortfall: str | None = None
    parts: list[str] = field(default_factory=list)
    lists: dict[str, list[Int64[ndarray, " _"]]] = field(default_factory=dict, repr=False)

    def rank(self, stage: str, pair_id: int) -> int | None:
        """The place of a pair, from 1, in the list that a stage left (the best, of several); None when in none."""
        found = [np.nonzero(ids == pair_id)[0] for ids in self.lists.get(stage, [])]
        return min((int(places[0]) + 1 for places in found if len(places)), default=None)


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


class Retriever:
    """Finds pairs by CLIP, by words, or by both. Reads the store at its present version, whatever the searcher knew."""

    def __init__(
        self,
        store: "PairStore",
        searcher: Searcher,
        embedder: "Embedder | None" = None,
        *,
        duplicates: Duplicates | None = None,
    ):
        self.store = store
        self._make_view: Callable[[], View] = lambda: StoreView(store, searcher, duplicates)
        self._embedder = embedder
        self._view: View | None = None

    @classmethod
    def over(cls, store: Any, make_view: Callable[[], View], embedder: "Embedder | None" = None) -> "Retriever":
        """Search what `make_view` shows. `store` answers `version` and `shown` as a PairStore does."""
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
        dataset: str | Sequence[str] | None = None,
        min_score: float | None = None,
        min_clip: float | None = None,
        min_bm25: float | None = None,
        exclude: Collection[int] = (),
        exclude_group_of: Collection[int] = (),
        exact: bool = False,
        diversity: float = 0.0,
        decompose: Decompose = "off",
    ) -> SearchResult:
        """The k best pairs with distinct images, by text, by image, by a vector, or by text and one of those.

        An image or a vector takes the text's place on the CLIP side; the text then speaks through its words only.
        Without text, `hybrid` means `clip`. `min_score` is a bound on the fused score, `min_clip` and `min_bm25` on
        the raw components. `exclude_group_of` excludes pairs and all duplicates of theirs. `exact` compares every
        pair. `diversity` in [0, 1] trades score for difference from the hits above (see `spread`), and `decompose`
        gives a text that names several things neighbours of each (see `decompose.py`).
        """
        trace = Trace()
        has_vector = image is not None or vector is not None
        by = checked_by(by, text, has_vector=has_vector)
        if decompose != "off" and has_vector:
            raise QueryError("decompose splits a text; give no image and no vector with it")
        view = self._current()
        request = self._request(
            view,
            trace,
            k=k,
            by=by,
            fusion=fusion,
            where=where,
            dataset=dataset,
            bounds=Bounds(score=min_score, clip=min_clip, bm25=min_bm25),
            exact=exact,
            diversity=diversity,
            decompose=decompose,
        )
        excluded = distinct(id_array(exclude), view.repeats_of(id_array(exclude_group_of)))
        if has_vector or text is None:
            row = self._query_vector(image, vector, trace) if request.uses_clip else None
            asked = Asked(queries=[Query(text=text, vector=row, exclude=excluded)])
        else:
            (asked,) = self._asked([text], None, [excluded], request, view=view, trace=trace)
        (hits,) = self._answer([asked], request, view, trace, lexical=view.lexical(by))
        matching = _rows(request, view)
        return SearchResult(
            hits=hits,
            timings_ms=trace.milliseconds,
            stages=trace.stages(matching=matching, hits=len(hits)),
            matching=matching,
            examined=trace.examined,
            depth=trace.depth,
            shortfall=_shortfall(len(hits), request, trace, matching=matching),
            parts=asked.labels,
            lists=trace.lists,
        )

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
        dataset: str | Sequence[str] | None = None,
    ) -> Standing | None:
        """Where a pair stands when every pair is compared; None when it is not there, or the filter takes it away."""
        trace = Trace()
        has_vector = image is not None or vector is not None
        by = checked_by(by, text, has_vector=has_vector)
        view = self._current()
        request = self._request(view, trace, k=1, by=by, fusion=fusion, exact=True, where=where, dataset=dataset)
        among = view.ids if request.subset is None else request.subset.ids
        if pair_id not in among:
            return None
        row = None
        if request.uses_clip:
            row = self._query_vector(image, vector, trace) if has_vector else self._embed([str(text)], trace)[0]
        query = Query(text=text, vector=row, exclude=id_array(()))
        (ranked,) = self._rank([query], request, view, trace, depth=len(among), lexical=view.lexical(by))
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
        dataset: str | Sequence[str] | None = None,
        min_score: float | None = None,
        min_clip: float | None = None,
        min_bm25: float | None = None,
        exclude: Sequence[Collection[int]] | None = None,
        exclude_group_of: Sequence[Collection[int]] | None = None,
        exact: bool = False,
        diversity: float = 0.0,
        decompose: Decompose = "off",
    ) -> list[list[Hit]]:
        """`search` for many texts at once, embedded and searched in batches.

        `exclude` and `exclude_group_of` have one entry for each text. `vectors`, unit rows, stand in for the embedded
        texts.
        """
        if vectors is not None and len(vectors) != len(texts):
            raise QueryError(f"{len(texts)} texts need as many vectors, got {len(vectors)}")
        _check_lengths(f"{len(texts)} texts", len(texts), exclude, exclude_group_of)
        if decompose != "off" and vectors is not None:
            raise QueryError("decompose splits a text; give no vectors with it")
        if not texts:
            return []
        for text in texts:
            checked_by(by, text, has_vector=vectors is not None)
        trace, view = Trace(), self._current()
        request = self._request(
            view,
            trace,
            k=k,
            by=by,
            fusion=fusion,
            where=where,
            dataset=dataset,
            bounds=Bounds(score=min_score, clip=min_clip, bm25=min_bm25),
            exact=exact,
            diversity=diversity,
            decompose=decompose,
        )
        rows = unit_rows(vectors) if vectors is not None else None
        excluded = _exclusions(view, len(texts), exclude, exclude_group_of)
        asked = self._asked(texts, rows, excluded, request, view=view, trace=trace)
        return self._answer(asked, request, view, trace, lexical=view.lexical(by, many=len(texts) > 1))

    def nearest(
        self,
        vectors: Queries,
        *,
        k: int = 5,
        where: str | None = None,
        dataset: str | Sequence[str] | None = None,
        exclude: Sequence[Collection[int]] | None = None,
        exclude_group_of: Sequence[Collection[int]] | None = None,
        exact: bool = False,
    ) -> tuple[Ids, Scores]:
        """The k nearest pairs of each vector, as arrays: for many queries whose rows nobody wants to read.

        `vectors` float32 [q, d] are compared at length one. Gives ids int64 [q, k], best first, and inner products
        float32 [q, k]; where there are fewer than k, the rest of a row is -1 and -inf. What was removed, is new, is
        filtered out or excluded is obeyed as in `search_many`; unlike there, several pairs may show one picture.
        QueryError for a vector that is zero or not finite, or for a filter that does not parse.
        """
        _check_lengths(f"{len(vectors)} vectors", len(vectors), exclude, exclude_group_of)
        trace, view = Trace(), self._current()
        request = self._request(view, trace, k=k, by="clip", where=where, dataset=dataset, exact=exact)
        rows = unit_rows(vectors)
        excluded = _exclusions(view, len(rows), exclude, exclude_group_of)
        if not len(rows) or not _rows(request, view):
            return padded(len(rows), k)
        spare = max(map(len, excluded))
        found = view.search(rows, top_k=k + spare, subset=request.subset, exact=exact)
        return _first(found, excluded, k=k)

    @property
    def view(self) -> View:
        """What is searched now."""
        return self._current()

    # From the words of the caller to a request

    def _request(
        self,
        view: View,
        trace: Trace,
        *,
        k: int,
        by: By,
        where: str | None = None,
        dataset: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Request:
        request = Request(k=k, by=by, **options)
        check_request(request)
        if not len(view.ids):
            raise KnowledgeBaseError(
                "the knowledge base is empty; add pairs with `radt index build` or `radt index add`"
            )
        wanted = condition(where, dataset)
        if wanted is None:
            return request
        with trace("filter"):
            return replace(request, subset=view.subset(wanted))

    def _asked(
        self,
        texts: Sequence[str],
        rows: Queries | None,
        excluded: Sequence[Int64[ndarray, " _"]],
        request: Request,
        *,
        view: View,
        trace: Trace,
    ) -> list[Asked]:
        """Every text as what is searched for: itself, or what it is decomposed into; embedded unless `rows` are."""
        parts, corpus = [[text] for text in texts], None
        if request.decompose != "off":
            with trace("decompose"):
                corpus = _corpus(view, many=len(texts) > 1)
                cut = phrases if request.decompose == "phrases" else lambda text, corpus: [subject(text)]
                parts = [cut(text, corpus) for text in texts]
        if request.uses_clip and rows is None:
            rows = self._embed([part for each in parts for part in each], trace)
        vectors = iter(rows if rows is not None else ())
        return [
            Asked(
                queries=[
                    Query(text=part, vector=next(vectors) if request.uses_clip else None, exclude=exclude)
                    for part in each
                ],
                labels=each if corpus is not None else [],
                corpus=corpus,
            )
            for each, exclude in zip(parts, excluded, strict=True)
        ]

    def _query_vector(
        self, image: "PIL.Image.Image | None", vector: Float32[ndarray, " d"] | None, trace: Trace
    ) -> Float32[ndarray, " d"]:
        if vector is not None:
            if image is not None:
                raise QueryError("give an image or a vector to search by, not both")
            return unit_rows(np.asarray(vector, dtype=np.float32)[None])[0]
        assert image is not None
        embedder = self._ready_embedder(trace)
        with trace("embed"):
            return embedder.images([image])[0]

    def _embed(self, texts: Sequence[str], trace: Trace) -> Queries:
        embedder = self._ready_embedder(trace)
        starts = range(0, len(texts), _EMBED_BATCH)
        with trace("embed"):
            return np.concatenate([embedder.texts(list(texts[start : start + _EMBED_BATCH])) for start in starts])

    def _ready_embedder(self, trace: Trace) -> "Embedder":
        """The embedder, its model loaded."""
        from index.embedder import DeferredEmbedder

        if self._embedder is None:
            raise QueryError(
                "searching by CLIP needs the model the knowledge base was built with; name it with --model"
            )
        if isinstance(self._embedder, DeferredEmbedder):
            with trace("load"):
                self._embedder.load_now()
        return self._embedder

    # From a request to hits

    def _answer(
        self, asked: Sequence[Asked], request: Request, view: View, trace: Trace, *, lexical: Lexical
    ) -> list[list[Hit]]:
        rows, depth = _rows(request, view), _depth(request, view)
        answers: list[list[Hit]] = [[] for _ in asked]
        pending = list(range(len(asked))) if rows else []
        while pending:
            trace.depth = depth
            _expect(view, [query for p in pending for query in asked[p].queries], request, depth=depth)
            short: list[int] = []
            at_once = max(1, min(_EMBED_BATCH, _MOST_CANDIDATES // depth))
            for start in range(0, len(pending), at_once):
                some = pending[start : start + at_once]
                queries = [query for position in some for query in asked[position].queries]
                ranked = iter(self._rank(queries, request, view, trace, depth=depth, lexical=lexical))
                own = [[next(ranked) for _ in asked[position].queries] for position in some]
                with trace("diversity"):
                    arranged = [arrange(asked[p], lists, request, view) for p, lists in zip(some, own, strict=True)]
                trace.kept["duplicates"] = sum(map(len, arranged))
                trace.lists["duplicates"] = [candidates.ids for candidates in arranged]
                with trace("fetch"):
                    fetched = self._fetch(arranged, request.k, trace)
                for position, candidates, hits in zip(some, arranged, fetched, strict=True):
                    answers[position] = hits
                    if len(hits) < request.k and not candidates.is_final:
                        short.append(position)
            # Many captions of few images can use up the candidates before there are k images, and so can a bound.
            pending = short if depth < rows else []
            depth *= 4
        _expect(view, [], request, depth=depth)
        return answers

    def _rank(
        self, queries: Sequence[Query], request: Request, view: View, trace: Trace, *, depth: int, lexical: Lexical
    ) -> list[Candidates]:
        """Score and order the candidates of every query."""
        vectors = (
            np.stack([query.vector for query in queries if query.vector is not None]) if request.uses_clip else None
        )
        by_vector = [RankedList()] * len(queries)
        by_words = [RankedList()] * len(queries)
        if vectors is not None:
            if load := view.late(subset=request.subset, exact=request.exact):
                with trace("load"):
                    load()
            with trace("vector"):
                by_vector = _search_vectors(vectors, queries, request, view, trace=trace, depth=depth)
        if request.uses_words:
            with trace("lexical"):
                by_words = _search_words(queries, lexical, request, trace=trace, depth=depth)
        ids = [distinct(one.ids, other.ids) for one, other in zip(by_vector, by_words, strict=True)]
        clips: list[Float64[ndarray, " n"]] | None = None
        words: list[Float64[ndarray, " n"]] | None = None
        if vectors is not None:
            with trace("vector"):
                clips = view.complete_clip(vectors, ids, by_vector)
        if request.uses_words:
            with trace("lexical"):
                words = complete_words(lexical, queries, ids, by_words, depth=depth)
        with trace("fuse"):
            ranked = [
                replace(
                    fused(i, clips[n] if clips else None, words[n] if words else None, request),
                    is_final=is_final(by_vector[n], by_words[n], request, depth=depth),
                )
                for n, i in enumerate(ids)
            ]
            trace.kept["union"] = sum(map(len, ranked))
            trace.lists["union"] = [candidates.ids for candidates in ranked]
            if request.bounds:
                ranked = [request.bounds.keep(candidates) for candidates in ranked]
                trace.kept["thresholds"] = sum(map(len, ranked))
                trace.lists["thresholds"] = [candidates.ids for candidates in ranked]
        return ranked

    def _fetch(self, ranked: Sequence[Candidates], k: int, trace: Trace) -> list[list[Hit]]:
        """The first k candidates of each query that show different images."""
        rows: dict[int, ShownPair] = {}
        hits: list[list[Hit]] = [[] for _ in ranked]
        pending, window = list(range(len(ranked))), k
        repeats = [0] * len(ranked)
        while pending:
            wanted = {i for p in pending for i in ranked[p].ids[:window].tolist()} - rows.keys()
            rows.update((pair.id, pair) for pair in self.store.shown(sorted(wanted)))
            for p in pending:
                hits[p], repeats[p] = _distinct_hits(ranked[p], rows, k=k, window=window)
            pending = [p for p in pending if len(hits[p]) < k and window < len(ranked[p])]
            window *= 2
        trace.kept["duplicates"] -= sum(repeats)
        return hits

    def _current(self) -> View:
        if self._view is None or self._view.version != self.store.version:
            self._view = self._make_view()
        return self._view


def _rows(request: Request, view: View) -> int:
    """Pairs that may be found."""
    return len(view.ids) if request.subset is None else len(request.subset.ids)


def _depth(request: Request, view: View) -> int:
    """Candidates of each list. A fused rank counts all that rank higher in either list, so exact fusion needs all."""
    return _rows(request, view) if request.exact and request.by == "hybrid" else request.depth


def _check_lengths(what: str, num: int, exclude: Sequence[Any] | None, exclude_group_of: Sequence[Any] | None) -> None:
    for name, given in (("lists of excluded ids", exclude), ("lists of excluded groups", exclude_group_of)):
        if given is not None and len(given) != num:
            raise QueryError(f"{what} need as many {name}, got {len(given)}")


def _exclusions(
    view: View,
    num: int,
    exclude: Sequence[Collection[int]] | None,
    exclude_group_of: Sequence[Collection[int]] | None,
) -> list[Int64[ndarray, " _"]]:
    if exclude is None and exclude_group_of is None:
        return [id_array(())] * num
    return [
        distinct(
            id_array(exclude[i] if exclude is not None else ()),
            view.repeats_of(id_array(exclude_group_of[i] if exclude_group_of is not None else ())),
        )
        for i in range(num)
    ]


def _expect(view: View, queries: Sequence[Query], request: Request, *, depth: int) -> None:
    """Tell the view what it will be asked, where several searches are to come and that is of use to it."""
    if not isinstance(view, LooksAhead) or not request.uses_clip or request.exact:
        return
    if len(queries) <= _EMBED_BATCH:
        view.expect(None)
        return
    vectors = np.stack([query.vector for query in queries if query.vector is not None])
    spare = max(len(query.exclude) for query in queries)
    view.expect(vectors, top_k=depth + spare, subset=request.subset, recall_at=request.recall_at(depth) + spare)


def _search_vectors(
    vectors: Queries, queries: Sequence[Query], request: Request, view: View, *, trace: Trace, depth: int
) -> list[RankedList]:
    spare = max(len(query.exclude) for query in queries)
    found = view.search(
        vectors,
        top_k=depth + spare,
        subset=request.subset,
        exact=request.exact,
        recall_at=request.recall_at(depth) + spare,
    )
    trace.examined = found.examined
    listed = [
        RankedList(ids=i[i >= 0], scores=s[i >= 0].astype(np.float64))
        for i, s in zip(found.ids, found.scores, strict=True)
    ]
    return without_excluded(listed, queries, trace, "vector", depth=depth)


def _search_words(
    queries: Sequence[Query], lexical: Lexical, request: Request, *, trace: Trace, depth: int
) -> list[RankedList]:
    top_k = depth + max(len(query.exclude) for query in queries)
    texts = [query.text or "" for query in queries]
    rankings = lexical.search_many(texts, top_k=top_k, within=request.subset)
    listed = [RankedList(ids=ids, scores=scores) for ids, scores in rankings]
    return without_excluded(listed, queries, trace, "words", depth=depth)


def _first(found: Found, excluded: Sequence[Int64[ndarray, " _"]], *, k: int) -> tuple[Ids, Scores]:
    """The best k of each query that it does not exclude, padded."""
    kept = found.ids >= 0
    for row, gone in enumerate(excluded):
        if len(gone):
            kept[row] &= ~contains(gone, found.ids[row])
    if kept.all() and kept.shape[1] == k:
        return found.ids, found.scores
    order = np.argsort(~kept, axis=1, kind="stable")[:, :k]  # those that stay come first, in their order
    kept = np.take_along_axis(kept, order, axis=1)
    ids, scores = padded(len(kept), k)
    ids[:, : kept.shape[1]] = np.where(kept, np.take_along_axis(found.ids, order, axis=1), NO_ID)
    scores[:, : kept.shape[1]] = np.where(kept, np.take_along_axis(found.scores, order, axis=1), -np.inf)
    return ids, scores


def _corpus(view: View, *, many: bool) -> Corpus:
    lexical = view.lexical("bm25", many=many)
    assert isinstance(lexical, CountedWords), type(lexical)
    return Corpus(lexical)


def _standing(ranked: Candidates, pair_id: int, *, of: int) -> Standing | None:
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


def _distinct_hits(ranked: Candidates, rows: dict[int, ShownPair], *, k: int, window: int) -> tuple[list[Hit], int]:
    """Hits for the first k images among the first `window` candidates, and how many were passed over as shown."""
    hits: list[Hit] = []
    images: set[str] = set()
    repeats = 0
    for position, pair_id in enumerate(ranked.ids[:window].tolist()):
        pair = rows.get(pair_id)
        if pair is None:
            continue
        if pair.sha256 is not None and pair.sha256 in images:
            repeats += 1
            continue
        images.add(pair.sha256 or "")
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
                part=ranked.label(position),
            )
        )
        if len(hits) == k:
            break
    return hits, repeats


def _shortfall(found: int, request: Request, trace: Trace, *, matching: int) -> str | None:
    """Why there are fewer than k hits; None when there are k."""
    if found >= request.k:
        return None
    union, kept = trace.kept.get("union", 0), trace.kept.get("thresholds", trace.kept.get("union", 0))
    reasons = []
    if matching < request.k:
        whole = "the filter leaves" if request.subset is not None else "the knowledge base has"
        reasons.append(f"{whole} {_count(matching, 'pair')}")
    elif not request.uses_clip and union < request.k:
        reasons.append(f"{_count(union, 'caption')} {'shares' if union == 1 else 'share'} a word with the query")
    if trace.excluded:
        reasons.append(f"{_count(trace.excluded, 'pair')} excluded")
    if union > kept:
        reasons.append(f"{request.bounds.names()} leaves out {_count(union - kept, 'candidate')}")
    if repeats := kept - trace.kept.get("duplicates", kept):
        reasons.append(f"{_count(repeats, 'duplicate')} of shown images")
    return f"{found} of {request.k} hits: {'; '.join(reasons)}" if reasons else f"{found} of {request.k} hits"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
