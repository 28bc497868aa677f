"""Words: BM25 over captions, by Lance's inverted index at scale and by rank-bm25 as the exact reference, and TF-IDF.

All of them cut text with one tokenizer, Lance's own, so the same query means the same terms to each. BM25 is
Robertson's with k1 = 1.2, b = 0.75 and idf = ln(1 + (N - n + 0.5) / (n + 0.5)), which is what Lance computes.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from index.errors import KnowledgeBaseError, QueryError
from index.search.fusion import best_first

if TYPE_CHECKING:
    from index.store import PairStore

K1 = 1.2
B = 0.75
FTS_NAME = "caption_words"
TFIDF_LIMIT = 1_000_000  # captions
# Words that carry grammar and no subject. Captions are names and keywords, so "a" is rare in them and would outweigh
# the subject of "a wolf on a hill": of held-out emoji, 57 in 100 prompts found their own without this list, 91 with it.
STOP_WORDS = tuple("a an and are as at by for from in is it of on or the to with".split())  # noqa: SIM905 - one line
_SPARE_TIES = 32  # fetched beyond what is asked for, to see whether the last place is shared
_FTS_MEMORY_MIB = 2048  # Lance takes 2 GiB for each worker unless it is told a total

Ranking = tuple[Int64[ndarray, " k"], Float64[ndarray, " k"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """Splits at what is neither letter nor digit, lower-cases, folds accents, drops stop words; no stemming."""

    stop_words: tuple[str, ...] = STOP_WORDS

    def __call__(self, text: str) -> list[str]:
        """The terms of `text` in order, repeats included."""
        import lance

        return [token.text for token in lance.tokenize(text, **self.settings)]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of Lance's tokenizer, every one named because its defaults differ from LanceDB's."""
        return {
            "base_tokenizer": "simple",
            "language": "English",
            "max_token_length": None,
            "lower_case": True,
            "stem": False,
            "remove_stop_words": bool(self.stop_words),
            "custom_stop_words": list(self.stop_words) or None,
            "ascii_folding": True,
        }


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

    def scores(self, query: str, ids: Int64[ndarray, " n"]) -> Float64[ndarray, " n"]:
        """The scores of the named rows."""
        ...

    def contributions(self, query: str, pair_id: int) -> dict[str, float]:
        """What each matching term adds to the score of one row, in the order of the query."""
        ...


class LanceBM25:
    """BM25 from Lance's inverted index. Rows that came after the index was built are found and scored too."""

    def __init__(self, store: "PairStore"):
        self._store = store
        self._params = fts_params(store)

    def search(self, query: str, *, top_k: int, within: Subset | None = None) -> Ranking:
        """As `Lexical.search`, unless more than `8 top_k` captions tie for the last place: then Lance chooses."""
        where = within.where if within else None
        limit = top_k + _SPARE_TIES
        while True:
            ids, scores = self._match(query, where=where, limit=limit)
            level = coarse(scores)
            if len(ids) < limit or level[-1] < level[top_k - 1] or limit > 8 * top_k:
                return ids[:top_k], scores[:top_k]
            limit *= 2

    def scores(self, query: str, ids: Int64[ndarray, " n"]) -> Float64[ndarray, " n"]:
        """As `Lexical.scores`: the same query once more, kept to these rows; the corpus statistics stay whole."""
        scores = np.zeros(len(ids))
        if len(ids):
            where = f"id IN ({', '.join(map(str, ids.tolist()))})"
            found, values = self._match(query, where=where, limit=len(ids))
            by_id = np.argsort(ids)
            scores[by_id[np.searchsorted(ids, found, sorter=by_id)]] = values
        return scores

    def contributions(self, query: str, pair_id: int) -> dict[str, float]:
        """As `Lexical.contributions`. Lance tells only totals, so each term is asked for by itself."""
        terms = Counter(self._tokens(query))
        one = np.array([pair_id], dtype=np.int64)
        alone = {term: float(self.scores(term, one)[0]) * times for term, times in terms.items()}
        return {term: score for term, score in alone.items() if score > 0}

    def _tokens(self, text: str) -> list[str]:
        return Tokenizer(stop_words=tuple(self._params.get("custom_stop_words") or ()))(text)

    def _match(self, query: str, *, where: str | None, limit: int) -> Ranking:
        from lance.query import MatchQuery

        scanner = self._store.dataset.scanner(
            columns=["id", "_score"],
            full_text_query=MatchQuery(query, "caption"),
            filter=where,
            prefilter=True,
            limit=limit,
        )
        table = scanner.to_table()
        ids, scores = table["id"].to_numpy(), table["_score"].to_numpy().astype(np.float64)
        order = best_first(ids, coarse(scores))
        return ids[order], scores[order]


class RankBM25:
    """BM25 over captions held in memory, exact: rank-bm25's statistics with Lance's constants.

    rank-bm25 visits every caption for every term. `search` adds up the same numbers from posting lists instead;
    `reference` is rank-bm25's own sum, for the test that they agree.
    """

    def __init__(self, ids: Int64[ndarray, " n"], captions: Sequence[str], *, tokenizer: Tokenizer | None = None):
        from rank_bm25 import BM25Okapi

        order = np.argsort(ids)
        self._ids: Int64[ndarray, " n"] = ids[order]
        self._tokenizer = tokenizer or Tokenizer()
        documents = [self._tokenizer(captions[position]) for position in order.tolist()]
        # Lance does not count a caption without a term ("!!!") among the N documents; nor is it counted here.
        self._wordy = np.array([position for position, terms in enumerate(documents) if terms], dtype=np.int64)
        self._okapi: Any = None
        self._postings: dict[str, tuple[Int64[ndarray, " m"], Float64[ndarray, " m"]]] = {}
        if len(self._wordy):
            self._okapi = BM25Okapi([terms for terms in documents if terms], k1=K1, b=B)
            self._okapi.idf = _inverse_frequencies(self._okapi.doc_freqs)
            self._postings = _postings(self._okapi, self._wordy)

    def search(self, query: str, *, top_k: int, within: Subset | None = None) -> Ranking:
        """As `Lexical.search`."""
        return _listed(self._ids, self._all_scores(query), top_k=top_k, within=within)

    def scores(self, query: str, ids: Int64[ndarray, " n"]) -> Float64[ndarray, " n"]:
        """As `Lexical.scores`."""
        return self._all_scores(query)[positions_of(self._ids, ids)]

    def contributions(self, query: str, pair_id: int) -> dict[str, float]:
        """As `Lexical.contributions`."""
        position = positions_of(self._ids, np.array([pair_id], dtype=np.int64))[0]
        parts: dict[str, float] = {}
        for term, times in Counter(self._tokenizer(query)).items():
            documents, scores = self._postings.get(term, (np.empty(0, np.int64), np.empty(0)))
            at = np.searchsorted(documents, position)
            if at < len(documents) and documents[at] == position:
                parts[term] = float(scores[at]) * times
        return parts

    def reference(self, query: str) -> Ranking:
        """Ids and scores of every row as rank-bm25 itself computes them: slow, obvious, the twin of `search`."""
        scores = np.zeros(len(self._ids))
        if self._okapi is not None:
            scores[self._wordy] = self._okapi.get_scores(self._tokenizer(query))
        return self._ids, scores

    def _all_scores(self, query: str) -> Float64[ndarray, " n"]:
        total = np.zeros(len(self._ids))
        for term in self._tokenizer(query):
            if term in self._postings:
                documents, scores = self._postings[term]
                total[documents] += scores
        return total


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

    def scores(self, query: str, ids: Int64[ndarray, " n"]) -> Float64[ndarray, " n"]:
        """As `Lexical.scores`."""
        return self._all_scores(query)[positions_of(self._ids, ids)]

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


def _is_fresh(store: "PairStore", tokenizer: Tokenizer) -> bool:
    if not has_fts(store):
        return False
    stats = _fts_stats(store)
    known = sum(part["num_docs"] for part in stats["indices"])
    params = stats["indices"][0]["params"]
    same_words = all(params.get(name) == value for name, value in tokenizer.settings.items())
    # A removal leaves a tombstone row behind, which is not indexed yet; captions without a term are never counted.
    return same_words and stats["num_unindexed_rows"] == 0 and known <= store.count()


def _listed(ids: Int64[ndarray, " n"], scores: Float64[ndarray, " n"], *, top_k: int, within: Subset | None) -> Ranking:
    listed = scores > 0
    if within is not None:
        listed &= np.isin(ids, within.ids, assume_unique=True)
    (positions,) = np.nonzero(listed)
    level = coarse(scores[positions])
    if len(positions) > top_k:
        # Every score equal to the last one wanted stays in, so that ties are broken by id and not by chance.
        last = np.partition(level, len(positions) - top_k)[len(positions) - top_k]
        positions, level = positions[level >= last], level[level >= last]
    best = positions[best_first(ids[positions], level)][:top_k]
    return ids[best], scores[best]


def _inverse_frequencies(term_counts: Sequence[dict[str, int]]) -> dict[str, float]:
    """Idf as Lance and Lucene have it; rank-bm25's own goes below 0 for a term in more than half of the captions."""
    frequencies = Counter(chain.from_iterable(term_counts))
    total = len(term_counts)
    return {term: math.log(1 + (total - n + 0.5) / (n + 0.5)) for term, n in frequencies.items()}


def _postings(
    okapi: Any, positions_of_documents: Int64[ndarray, " n"]
) -> dict[str, tuple[Int64[ndarray, " m"], Float64[ndarray, " m"]]]:
    """For each term the captions that have it, ascending, and its score in each: rank-bm25's formula, done once."""
    lists: dict[str, list[tuple[int, int]]] = {}
    for document, counts in enumerate(okapi.doc_freqs):
        for term, count in counts.items():
            lists.setdefault(term, []).append((document, count))
    lengths = np.asarray(okapi.doc_len, dtype=np.float64)
    norms = K1 * (1 - B + B * lengths / okapi.avgdl)
    postings = {}
    for term, pairs in lists.items():
        documents, counts = np.array(pairs, dtype=np.int64).T
        scores = okapi.idf[term] * counts * (K1 + 1) / (counts + norms[documents])
        postings[term] = (positions_of_documents[documents], scores)
    return postings
