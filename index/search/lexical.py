"""Search by words: BM25 over captions, by Lance's inverted index at scale and in memory for a batch, and TF-IDF.

All of them cut text with one tokenizer, Lance's own, and BM25 is one formula (`words.py`), so the same query means
the same terms and the same score to each; rank-bm25 is the reference that the tests hold them to.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from index.errors import KnowledgeBaseError, QueryError
from index.search.fusion import best_first
from index.search.ids import contains
from index.search.sizes import processors
from index.search.words import K1, B, Postings, Statistics, Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

    from index.row_map import RowMap
    from index.store import PairStore

FTS_NAME = "caption_words"
TFIDF_LIMIT = 1_000_000  # captions
_SPARE_TIES = 32  # fetched beyond what is asked for, to see whether the last place is shared
# Where a mask leaves fewer than a tenth of the rows, Lance scores them one by one: 15 ms for 50,000 of a million. A
# list of 5,000, of which most is then skipped, takes 7 ms; one of 20,000 takes 25.
_LONG_LIST = 10_000
_MANY_ROWS = 300_000
_KEPT_MASKS = 8  # of filters: sessions and batches ask for the same ones again
# Lance takes 2 GiB for each worker and a worker for each processor unless it is told. A caption needs about 0.4 KB
# while the index is built; what does not fit goes to disk as one more part, and every part costs each query a little.
_FTS_MEMORY_MIB = 2048
_FTS_WORKERS = 8
_WORD = re.compile(r"[^\W_]+")

Ranking = tuple[Int64[ndarray, " k"], Float64[ndarray, " k"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Subset:
    """The rows a filter leaves: the filter itself for who can push it down, its ids (ascending) for who cannot."""

    where: str
    ids: Int64[ndarray, " n"]


@runtime_checkable  # for the shape checks of the test run
class Lexical(Protocol):
    """Words in, ids and scores out. A caption that shares no word with the query has score 0 and is not listed."""

    def search(self, query: str, *, top_k: int, within: Subset | None = None) -> Ranking:
        """At most `top_k` ids and scores above 0, best first, equal ones (see `coarse`) in order of id."""
        ...

    def search_many(self, queries: Sequence[str], *, top_k: int, within: Subset | None = None) -> list[Ranking]:
        """`search` for each of the queries."""
        ...

    def scores(self, query: str, ids: Int64[ndarray, " n"]) -> Float64[ndarray, " n"]:
        """The scores of the named rows."""
        ...

    def scores_many(self, queries: Sequence[str], ids: Sequence[Int64[ndarray, " _"]]) -> list[Float64[ndarray, " _"]]:
        """`scores` for each of the queries, of rows of its own."""
        ...

    def contributions(self, query: str, pair_id: int) -> dict[str, float]:
        """What each matching term adds to the score of one row, in the order of the query."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mask:
    """The rows of a filter, for Lance."""

    rows: "RowMap"
    ids: Int64[ndarray, " n"]
    mask: bytes


class LanceBM25:
    """BM25 from Lance's inverted index, and rows that are newer than it from memory, under the index's statistics.

    Lance would score newer rows too, but under statistics of its own making, which change with the filter: one
    caption would have several scores.
    """

    def __init__(self, store: "PairStore"):
        self._store = store
        self._tokenizer = Tokenizer(stop_words=tuple(fts_params(store).get("custom_stop_words") or ()))
        self._frequencies: dict[str, int] = {}
        self._masks: dict[str, _Mask] = {}

    def search(self, query: str, *, top_k: int, within: Subset | None = None) -> Ranking:
        """As `Lexical.search`, unless more than `8 top_k` captions tie for the last place: then Lance chooses."""
        rows = self._store.row_map(top_k)
        if within is not None and rows is not None:
            picked = self._pick(query, rows, within, top_k=top_k)
            if picked is not None:
                return best_of([picked, self._search_tail(query, within)], top_k)
        for limit in (top_k + _SPARE_TIES, 8 * top_k + _SPARE_TIES):
            if rows is None:
                ids, scores = self._match_by_filter(query, within.where if within is not None else None, limit=limit)
            else:
                mask = self._mask(rows, within) if within is not None else None
                ids, scores = self._match_by_address(query, rows, mask, limit=limit)
            level = coarse(scores)
            if len(ids) < limit or level[-1] < level[top_k - 1]:
                break
        return best_of([(ids, scores), self._search_tail(query, within)], top_k)

    def search_many(self, queries: Sequence[str], *, top_k: int, within: Subset | None = None) -> list[Ranking]:
        """As `Lexical.search_many`, several at a time: Lance searches outside Python's lock."""
        return at_once(lambda query: self.search(query, top_k=top_k, within=within), queries)

    def search_among(self, corpus: Statistics, query: str, *, top_k: int, within: Subset | None = None) -> Ranking:
        """`search` under the statistics of a larger corpus that these captions are a part of.

        Lance ranks by statistics of its own. Under the larger ones no caption scores more than `bound` times what
        Lance gives it, so a list is long enough once its last caption, raised by that much, cannot reach the top.
        """
        bound = _most_gain(self.statistics(query), corpus)
        limit = top_k + _SPARE_TIES
        while True:
            ids, own = self.search(query, top_k=limit, within=within)
            ranking = best_of([(ids, self.scores(query, ids, corpus=corpus))], top_k)
            if len(ids) < limit or coarse(ranking[1])[-1] > bound * own[-1]:
                return ranking
            limit *= 4

    def scores(
        self, query: str, ids: Int64[ndarray, " n"], *, corpus: Statistics | None = None
    ) -> Float64[ndarray, " n"]:
        """As `Lexical.scores`, under the statistics of `corpus` if one is given."""
        if corpus is not None:
            return self._scores_among(corpus, query, ids)
        if not len(ids):
            return np.empty(0)
        rows = self._store.row_map(len(ids))
        if rows is None:
            found = self._match_by_filter(query, _id_in(ids), limit=len(ids))
        else:
            found = self._match_by_address(query, rows, rows.mask(ids), limit=len(ids))
        newer = self._search_tail(query, Subset(where="", ids=np.sort(ids)))
        scores, by_id = np.zeros(len(ids)), np.argsort(ids)
        for matching, values in (found, newer):
            scores[by_id[np.searchsorted(ids, matching, sorter=by_id)]] = values
        return scores

    def scores_many(self, queries: Sequence[str], ids: Sequence[Int64[ndarray, " _"]]) -> list[Float64[ndarray, " _"]]:
        """As `Lexical.scores_many`, several at a time."""
        return at_once(self.scores, queries, ids)

    def contributions(self, query: str, pair_id: int, *, corpus: Statistics | None = None) -> dict[str, float]:
        """As `Lexical.contributions`: Lance tells only totals, so they are computed from the caption."""
        caption = self._store.captions_of(np.array([pair_id], dtype=np.int64)).get(pair_id)
        if caption is None:
            return {}
        return (corpus or self.statistics(query)).contributions(self._tokenizer(query), self._tokenizer(caption))

    def statistics(self, query: str) -> Statistics:
        """What the index counted, for the terms of a query: removed captions until it is rebuilt, newer ones then."""
        terms = set(self._tokenizer(query))
        for term in terms - self._frequencies.keys():
            self._frequencies[term] = self._frequency(term, query)
        return replace(self._totals, frequencies={term: self._frequencies[term] for term in terms})

    def _pick(self, query: str, rows: "RowMap", within: Subset, *, top_k: int) -> Ranking | None:
        """The best of a filter, picked from a list of all rows; None where that is not faster or not long enough."""
        length = 3 * top_k * len(rows.ids) // max(1, 2 * len(within.ids))
        if len(rows.ids) <= _MANY_ROWS or length > _LONG_LIST:
            return None
        ids, scores = self._match_by_address(query, rows, None, limit=length)
        kept = contains(within.ids, ids)
        if len(ids) == length:
            level = coarse(scores)
            kept &= level > level[-1]  # of those that tie for the last place, some are missing
            if kept.sum() < top_k:
                return None
        return ids[kept], scores[kept]

    def _match_by_address(self, query: str, rows: "RowMap", mask: bytes | None, *, limit: int) -> Ranking:
        """The best that the index has, among all rows or those of a mask."""
        table = self._scan(
            query,
            ["_score"],
            limit=limit,
            dataset=rows.dataset,
            with_row_id=True,
            row_addr_allowlist=mask,
            row_addr_blocklist=rows.hidden,
        )
        ids, is_pair = rows.ids_at(table["_rowid"].to_numpy())
        return _sorted(ids[is_pair], table["_score"].to_numpy()[is_pair])

    def _match_by_filter(self, query: str, where: str | None, *, limit: int) -> Ranking:
        """The same without a map of the rows, by an SQL filter and the column of ids: slower."""
        table = self._scan(query, ["id", "_score"], limit=limit, filter=self._store.shown_where(where))
        return _sorted(table["id"].to_numpy(), table["_score"].to_numpy())

    def _mask(self, rows: "RowMap", within: Subset) -> bytes:
        """Kept, because it takes 0.5 s for half a million rows."""
        known = self._masks.get(within.where)
        # One of several stores may be asked for fewer rows than the filter leaves, see `JoinedBM25`.
        if known is None or known.rows is not rows or not np.array_equal(known.ids, within.ids):
            known = self._masks[within.where] = _Mask(rows=rows, ids=within.ids, mask=rows.mask(within.ids))
            for oldest in list(self._masks)[:-_KEPT_MASKS]:
                self._masks.pop(oldest, None)
        return known.mask

    def _scan(self, query: str, columns: list[str], *, limit: int, dataset: Any = None, **narrowed: Any) -> "pa.Table":
        from lance.query import MatchQuery

        scanner = (self._store.dataset if dataset is None else dataset).scanner(
            columns=columns,
            full_text_query=MatchQuery(query, "caption"),
            prefilter=True,
            limit=limit,
            fast_search=True,  # the index alone
            **narrowed,
        )
        return scanner.to_table()

    def _search_tail(self, query: str, within: Subset | None) -> Ranking:
        if not len(self._tail.ids):
            return np.empty(0, dtype=np.int64), np.empty(0)
        terms = self._tokenizer(query)
        scores = self._tail.scores(terms, self.statistics(query))
        return _listed(self._tail.ids, scores, top_k=len(scores), within=within)

    def _scores_among(self, corpus: Statistics, query: str, ids: Int64[ndarray, " n"]) -> Float64[ndarray, " n"]:
        terms = self._tokenizer(query)
        by_id = {
            pair_id: sum(corpus.contributions(terms, self._tokenizer(caption)).values())
            for pair_id, caption in self._store.captions_of(ids).items()
        }
        return np.array([by_id.get(pair_id, 0.0) for pair_id in ids.tolist()], dtype=np.float64)

    def _frequency(self, term: str, query: str) -> int:
        """Captions that have the term: Lance does not tell, but the score of any of them does."""
        # Lower case may hold marks at which the term would be cut once more, so the query's own spelling is tried too.
        spelled = next((word for word in (term, *_WORD.findall(query)) if self._tokenizer(word) == [term]), term)
        shown = self._store.shown_where(None)
        (best,) = self._scan(spelled, ["caption", "_score"], limit=1, filter=shown).to_pylist() or [None]
        terms = self._tokenizer(best["caption"]) if best is not None else []
        if term not in terms:  # nobody has it, or the index is not of these captions, which `radt index verify` finds
            return 0
        saturation = self._totals.saturation(np.array([terms.count(term)]), np.array([len(terms)]))
        return round((self._totals.num_docs + 1) / math.exp(best["_score"] / saturation[0]) - 0.5)

    @cached_property
    def _totals(self) -> Statistics:
        """Documents and their total length, which Lance keeps in its own files and does not tell either."""
        num_docs = sum(segment["num_docs"] for segment in _fts_stats(self._store)["indices"])
        return Statistics(num_docs=num_docs, total_length=_indexed_terms(self._store))

    @cached_property
    def _tail(self) -> Postings:
        """The rows that the index does not cover."""
        covered = {i for segment in _fts_segments(self._store) for i in segment.fragment_ids}
        dataset = self._store.dataset
        newer = [fragment for fragment in dataset.get_fragments() if fragment.fragment_id not in covered]
        if not newer:
            return Postings(np.empty(0, dtype=np.int64), [], tokenizer=self._tokenizer)
        rows = dataset.scanner(
            columns=["id", "caption"], filter=self._store.shown_where("kind = 'pair'"), fragments=newer
        ).to_table()
        return Postings(rows["id"].to_numpy(), rows["caption"].to_pylist(), tokenizer=self._tokenizer)


class RankBM25:
    """BM25 over captions held in memory, exact: what rank-bm25 computes, with Lance's idf.

    rank-bm25 visits every caption for every term. `search` adds up the same numbers from posting lists instead;
    `reference` is rank-bm25's own sum, for the test that they agree.
    """

    def __init__(self, ids: Int64[ndarray, " n"], captions: Sequence[str], *, tokenizer: Tokenizer | None = None):
        self._tokenizer = tokenizer or Tokenizer()
        self._postings = Postings(ids, captions, tokenizer=self._tokenizer)
        self._statistics = self._postings.statistics()
        self._seen: dict[str, tuple[Int64[ndarray, " m"], Float64[ndarray, " m"]]] = {}

    def search(self, query: str, *, top_k: int, within: Subset | None = None) -> Ranking:
        """As `Lexical.search`."""
        return _listed(self._postings.ids, self._all_scores(query), top_k=top_k, within=within)

    def search_many(self, queries: Sequence[str], *, top_k: int, within: Subset | None = None) -> list[Ranking]:
        """As `Lexical.search_many`."""
        return [self.search(query, top_k=top_k, within=within) for query in queries]

    def scores(self, query: str, ids: Int64[ndarray, " n"]) -> Float64[ndarray, " n"]:
        """As `Lexical.scores`."""
        return self._all_scores(query)[positions_of(self._postings.ids, ids)]

    def scores_many(self, queries: Sequence[str], ids: Sequence[Int64[ndarray, " _"]]) -> list[Float64[ndarray, " _"]]:
        """As `Lexical.scores_many`."""
        return [self.scores(query, each) for query, each in zip(queries, ids, strict=True)]

    def contributions(self, query: str, pair_id: int) -> dict[str, float]:
        """As `Lexical.contributions`."""
        position = positions_of(self._postings.ids, np.array([pair_id], dtype=np.int64))[0]
        parts: dict[str, float] = {}
        for term, times in Counter(self._tokenizer(query)).items():
            documents, scores = self._scored(term)
            at = np.searchsorted(documents, position)
            if at < len(documents) and documents[at] == position:
                parts[term] = float(scores[at]) * times
        return parts

    def statistics(self, query: str) -> Statistics:
        """As `LanceBM25.statistics`, of every term there is: `query` does not matter."""
        return self._statistics

    def reference(self, query: str) -> Ranking:
        """Ids and scores of every row as rank-bm25 itself computes them: slow, obvious, the twin of `search`."""
        scores = np.zeros(len(self._postings.ids))
        documents = self._postings.documents()
        # Lance does not count a caption without a term ("!!!") among the N documents; nor is it counted here.
        wordy = [position for position, terms in enumerate(documents) if terms]
        if wordy:
            scores[wordy] = self._okapi.get_scores(self._tokenizer(query))
        return self._postings.ids, scores

    @cached_property
    def _okapi(self) -> Any:
        from rank_bm25 import BM25Okapi

        okapi = BM25Okapi([terms for terms in self._postings.documents() if terms], k1=K1, b=B)
        # rank-bm25's own idf goes below 0 for a term in more than half of the captions.
        okapi.idf = {term: self._statistics.idf(term) for term in okapi.idf}
        return okapi

    def _all_scores(self, query: str) -> Float64[ndarray, " n"]:
        total = np.zeros(len(self._postings.ids))
        for term, times in Counter(self._tokenizer(query)).items():
            documents, scores = self._scored(term)
            total[documents] += times * scores
        return total

    def _scored(self, term: str) -> tuple[Int64[ndarray, " m"], Float64[ndarray, " m"]]:
        """The captions that have the term and what it adds to each, kept for the next query that has it."""
        if term not in self._seen:
            self._seen[term] = self._postings.scored(term, self._statistics)
        return self._seen[term]


class TfIdf:
    """Cosine of TF-IDF vectors (scikit-learn's, smooth idf, unit length), in memory."""

    def __init__(self, ids: Int64[ndarray, " n"], captions: Sequence[str], *, tokenizer: Tokenizer | None = None):
        if len(ids) > TFIDF_LIMIT:
            raise QueryError(
                f"TF-IDF is held in memory and stops at {TFIDF_LIMIT:,} captions, this knowledge base has "
                f"{len(ids):,}; use --by bm25"
            )
        from sklearn.feature_extraction.text import TfidfVectorizer

        order = np.argsort(ids)
        self._ids: Int64[ndarray, " n"] = ids[order]
        self._tokenizer = tokenizer or Tokenizer()
        self._vectorizer = TfidfVectorizer(analyzer=self._tokenizer)
        self._terms: Any = None  # sparse [terms, captions]; None when no caption has a term
        in_order = [captions[position] for position in order.tolist()]
        if any(map(self._tokenizer, in_order)):
            self._terms = self._vectorizer.fit_transform(in_order).T.tocsr()

    def search(self, query: str, *, top_k: int, within: Subset | None = None) -> Ranking:
        """As `Lexical.search`."""
        return _listed(self._ids, self._all_scores(query), top_k=top_k, within=within)

    def search_many(self, queries: Sequence[str], *, top_k: int, within: Subset | None = None) -> list[Ranking]:
        """As `Lexical.search_many`."""
        return [self.search(query, top_k=top_k, within=within) for query in queries]

    def scores(self, query: str, ids: Int64[ndarray, " n"]) -> Float64[ndarray, " n"]:
        """As `Lexical.scores`."""
        return self._all_scores(query)[positions_of(self._ids, ids)]

    def scores_many(self, queries: Sequence[str], ids: Sequence[Int64[ndarray, " _"]]) -> list[Float64[ndarray, " _"]]:
        """As `Lexical.scores_many`."""
        return [self.scores(query, each) for query, each in zip(queries, ids, strict=True)]

    def contributions(self, query: str, pair_id: int) -> dict[str, float]:
        """As `Lexical.contributions`."""
        position = positions_of(self._ids, np.array([pair_id], dtype=np.int64))[0]
        if self._terms is None:
            return {}
        weights = self._vectorizer.transform([query])
        parts: dict[str, float] = {}
        for term in dict.fromkeys(self._tokenizer(query)):
            column = self._vectorizer.vocabulary_.get(term)
            if column is not None and self._terms[column, position]:
                parts[term] = float(weights[0, column] * self._terms[column, position])
        return parts

    def _all_scores(self, query: str) -> Float64[ndarray, " n"]:
        if self._terms is None:
            return np.zeros(len(self._ids))
        return (self._vectorizer.transform([query]) @ self._terms).toarray()[0]


def build_fts(store: "PairStore", *, tokenizer: Tokenizer | None = None) -> None:
    """Build Lance's inverted index on the captions, or rebuild it when rows were added or removed since.

    Lance can fold new rows in, but it keeps removed ones in its statistics; a rebuild is exact, and takes seconds for
    a million captions.
    """
    tokenizer = tokenizer or Tokenizer()
    with store.lock():
        if not store.count() or _is_fresh(store, tokenizer):
            return
        store.dataset.create_scalar_index(
            "caption",
            "INVERTED",
            name=FTS_NAME,
            replace=True,
            with_position=False,
            memory_limit=_FTS_MEMORY_MIB,
            num_workers=min(_FTS_WORKERS, processors()),
            **tokenizer.settings,
        )
        store.refresh()


def has_fts(store: "PairStore") -> bool:
    """Whether the captions have an inverted index."""
    return any(description.name == FTS_NAME for description in store.dataset.describe_indices())


def fts_params(store: "PairStore") -> dict[str, Any]:
    """The tokenizer settings the inverted index was built with."""
    if not has_fts(store):
        raise KnowledgeBaseError("the captions have no word index yet; build it with `radt index compact`")
    return dict(_fts_stats(store)["indices"][0]["params"])


def at_once(function: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
    """`map`, with a thread for each processor: Lance works outside Python's lock."""
    if len(columns[0]) < 2:
        return list(map(function, *columns))
    with ThreadPoolExecutor(min(len(columns[0]), processors())) as pool:
        return list(pool.map(function, *columns))


def coarse(scores: Float64[ndarray, " n"]) -> Float64[ndarray, " n"]:
    """Rounded to 16 significant bits, for ordering: scores that tie must not be told apart by someone's rounding.

    Lance sums in float32, in an order of its own.
    """
    mantissa, exponent = np.frexp(scores)
    return np.ldexp(np.round(mantissa * 2.0**16), exponent - 16)


def positions_of(ids: Int64[ndarray, " n"], wanted: Int64[ndarray, " k"]) -> Int64[ndarray, " k"]:
    """Where each wanted id lies in ascending `ids`. KnowledgeBaseError for one that is not there."""
    positions = np.searchsorted(ids, wanted)
    missing = (
        (positions == len(ids)) | (ids[np.minimum(positions, len(ids) - 1)] != wanted) if len(ids) else wanted >= 0
    )
    if missing.any():
        raise KnowledgeBaseError(f"id {wanted[missing][0]} is not in the knowledge base; see `radt index stats`")
    return positions


def _fts_stats(store: "PairStore") -> dict[str, Any]:
    return dict(store.dataset.stats.index_stats(FTS_NAME))


def _fts_segments(store: "PairStore") -> list[Any]:
    (description,) = (each for each in store.dataset.describe_indices() if each.name == FTS_NAME)
    return list(description.segments)


def _indexed_terms(store: "PairStore") -> int:
    """Terms in all captions of the index, repeats included. Lance keeps the number in its files (format 2)."""
    from lance.file import LanceFileReader

    total = 0
    for segment in _fts_segments(store):
        folder = f"{store.dataset.uri}/_indices/{segment.uuid}"
        parts = json.loads(LanceFileReader(f"{folder}/metadata.lance").metadata().schema.metadata[b"partitions"])
        for part in parts:
            documents = LanceFileReader(f"{folder}/part_{part}_docs.lance").metadata().schema
            total += int(documents.metadata[b"total_tokens"])
    return total


def _is_fresh(store: "PairStore", tokenizer: Tokenizer) -> bool:
    if not has_fts(store):
        return False
    try:
        stats = _fts_stats(store)
    except OSError:  # a file of it is missing: to build it again is the remedy
        return False
    known = sum(part["num_docs"] for part in stats["indices"])
    params = stats["indices"][0]["params"]
    same_words = all(params.get(name) == value for name, value in tokenizer.settings.items())
    # A removal leaves a tombstone row behind, which is not indexed yet; captions without a term are never counted.
    return same_words and stats["num_unindexed_rows"] == 0 and known <= store.count()


def _most_gain(own: Statistics, corpus: Statistics) -> float:
    """What a caption's score can grow by at most, as a factor, from one corpus's statistics to another's.

    Idf changes by a factor that depends on the term alone. The saturation grows when the average caption is longer
    there, by less than the ratio of the lengths: (f + c + d l / a) / (f + c + d l / b) < b / a for b > a.
    """
    terms = [corpus.idf(term) / own.idf(term) for term, n in own.frequencies.items() if n]
    return max(terms, default=1.0) * max(1.0, corpus.average_length / own.average_length)


def _sorted(ids: Int64[ndarray, " n"], scores: Float32[ndarray, " n"]) -> Ranking:
    exact = scores.astype(np.float64)
    order = best_first(ids, coarse(exact))
    return ids[order], exact[order]


def _id_in(ids: Int64[ndarray, " n"]) -> str:
    return f"id IN ({', '.join(map(str, ids.tolist()))})" if len(ids) else "false"


def best_of(rankings: Sequence[tuple[Int64[ndarray, " _"], Float64[ndarray, " _"]]], top_k: int) -> Ranking:
    """The best of several rankings of different captions."""
    ids = np.concatenate([ids for ids, _ in rankings])
    scores = np.concatenate([scores for _, scores in rankings])
    order = best_first(ids, coarse(scores))[:top_k]
    return ids[order], scores[order]


def _listed(ids: Int64[ndarray, " n"], scores: Float64[ndarray, " n"], *, top_k: int, within: Subset | None) -> Ranking:
    (positions,) = np.nonzero(scores > 0)
    if within is not None:
        positions = positions[contains(within.ids, ids[positions])]
    level = coarse(scores[positions])
    if len(positions) > top_k:
        # Every score equal to the last one wanted stays in, so that ties are broken by id and not by chance.
        last = np.partition(level, len(positions) - top_k)[len(positions) - top_k]
        positions, level = positions[level >= last], level[level >= last]
    best = positions[best_first(ids[positions], level)][:top_k]
    return ids[best], scores[best]
