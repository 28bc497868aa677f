"""Words: how text is cut into terms, what BM25 knows of a corpus, and posting lists of captions in memory.

BM25 is Robertson's with k1 = 1.2, b = 0.75 and idf = ln(1 + (N - n + 0.5) / (n + 0.5)), which is what Lance computes.
Next: `lexical.py`, which searches with it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

K1 = 1.2
B = 0.75
# Words that carry grammar and no subject. Captions are names and keywords, so "a" is rare in them and would outweigh
# the subject of "a wolf on a hill": of held-out emoji, 57 in 100 prompts found their own without this list, 91 with it.
STOP_WORDS = tuple("a an and are as at by for from in is it of on or the to with".split())  # noqa: SIM905 - one line
COMMON_SHARE = 0.2  # of the captions; a term that more of them have tells them apart no better than a stop word


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
class Statistics:
    """What BM25 knows of a corpus. A caption without a term ("!!!") is no document, as Lance counts.

    Those of several corpora add up to those of all of them together.
    """

    num_docs: int
    total_length: int  # terms, repeats included
    frequencies: Mapping[str, int] = field(default_factory=dict)  # captions that have the term; 0 when it is not named

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            num_docs=self.num_docs + other.num_docs,
            total_length=self.total_length + other.total_length,
            frequencies=Counter(self.frequencies) + Counter(other.frequencies),
        )

    @property
    def average_length(self) -> float:
        """Terms in a caption; 1 where there are none."""
        return self.total_length / self.num_docs if self.total_length else 1.0

    def idf(self, term: str) -> float:
        """Inverse document frequency as Lance and Lucene have it; never below 0."""
        n = self.frequencies.get(term, 0)
        return math.log(1 + (self.num_docs - n + 0.5) / (n + 0.5))

    def saturation(
        self, counts: Int64[ndarray, " n"], lengths: Int64[ndarray, " n"] | Float64[ndarray, " n"]
    ) -> Float64[ndarray, " n"]:
        """What idf is multiplied by: grows with the count of the term in a caption, falls with the caption's length."""
        return counts * (K1 + 1) / (counts + K1 * (1 - B + B * lengths / self.average_length))

    def contributions(self, query: Sequence[str], caption: Sequence[str]) -> dict[str, float]:
        """What each matching term adds to the BM25 of a caption, both cut into terms; in the order of the query."""
        found = Counter(caption)
        terms = {term: times for term, times in Counter(query).items() if term in found}
        counts = np.array([found[term] for term in terms], dtype=np.int64)
        parts = self.saturation(counts, np.full(len(counts), len(caption)))
        return {t: times * self.idf(t) * float(part) for (t, times), part in zip(terms.items(), parts, strict=True)}


class Postings:
    """Captions in memory, by term: which of them have it, and how often."""

    def __init__(self, ids: Int64[ndarray, " n"], captions: Sequence[str], *, tokenizer: Tokenizer):
        order = np.argsort(ids)
        self.ids: Int64[ndarray, " n"] = ids[order]
        lists: dict[str, list[tuple[int, int]]] = {}
        lengths = []
        for document, position in enumerate(order.tolist()):
            terms = tokenizer(captions[position])
            lengths.append(len(terms))
            for term, count in Counter(terms).items():
                lists.setdefault(term, []).append((document, count))
        self.lengths: Int64[ndarray, " n"] = np.array(lengths, dtype=np.int64)
        self._lists = {term: np.array(pairs, dtype=np.int64).T for term, pairs in lists.items()}

    def find(self, term: str) -> tuple[Int64[ndarray, " m"], Int64[ndarray, " m"]]:
        """The positions in `ids` of the captions that have the term, ascending, and how often each has it."""
        none = np.empty(0, dtype=np.int64)
        documents, counts = self._lists.get(term, (none, none))
        return documents, counts

    def statistics(self) -> Statistics:
        """Of these captions, every term of theirs included."""
        return Statistics(
            num_docs=int(np.count_nonzero(self.lengths)),
            total_length=int(self.lengths.sum()),
            frequencies={term: pairs.shape[1] for term, pairs in self._lists.items()},
        )

    def scored(self, term: str, statistics: Statistics) -> tuple[Int64[ndarray, " m"], Float64[ndarray, " m"]]:
        """The positions of the captions that have the term, and what it adds to the BM25 of each."""
        documents, counts = self.find(term)
        return documents, statistics.idf(term) * statistics.saturation(counts, self.lengths[documents])

    def scores(self, query: Sequence[str], statistics: Statistics) -> Float64[ndarray, " n"]:
        """BM25 of every caption for a query cut into terms, in the order of `ids`."""
        total = np.zeros(len(self.ids))
        for term, times in Counter(query).items():
            documents, scores = self.scored(term, statistics)
            total[documents] += times * scores
        return total

    def documents(self) -> list[list[str]]:
        """The terms of every caption, in the order of `ids` and within a caption in any order."""
        documents: list[list[str]] = [[] for _ in self.ids]
        for term, (positions, counts) in self._lists.items():
            for position, count in zip(positions.tolist(), counts.tolist(), strict=True):
                documents[position] += [term] * count
        return documents


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionReport:
    """What in the captions hurts a search by words. Shares are of all captions."""

    captions: int
    without_words: float  # share that no query can find by words
    duplicates: float  # share that says, letter for letter, what an earlier caption says
    common_terms: dict[str, float]  # terms in more than `COMMON_SHARE` of the captions, most frequent first


def report_captions(captions: Sequence[str], *, tokenizer: Tokenizer | None = None) -> CaptionReport:
    """Look for junk: boilerplate terms, captions without a word, captions that repeat each other."""
    cut = tokenizer or Tokenizer()
    frequencies: Counter[str] = Counter()
    silent = 0
    for caption in captions:
        terms = set(cut(caption))
        silent += not terms
        frequencies.update(terms)
    total = max(1, len(captions))
    return CaptionReport(
        captions=len(captions),
        without_words=silent / total,
        duplicates=(len(captions) - len(set(captions))) / total,
        common_terms={t: n / total for t, n in frequencies.most_common() if n > COMMON_SHARE * total},
    )
