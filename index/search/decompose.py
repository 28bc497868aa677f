"""Decomposition: a prompt that names two things gets neighbours of both, not K neighbours of the more striking one.

`phrases` cuts the prompt into the things it names, each of which is then asked for by itself. `cover_terms` asks once
and takes hits so that together their captions have all the prompt's rare words. Both leave out what only says where
things are and on which ground: "a dove on a pink background" asks for a dove, and not for pink hearts.

Both things that a prompt names among the first two hits, and the one thing of a prompt that names one, on 300 prompts
of each kind about emoji that no model was trained on (`tools/bench_decompose.py`, 2026-11-21, 7,480 pairs):

    by bm25     off 0.000, 0.873    phrases 0.963, 0.987    terms 0.953, 0.987
    by hybrid   off 0.037, 0.563    phrases 0.227, 0.593    terms 0.923, 0.967

`phrases` also asks for one of a thing, of any size: of 180 prompts such as "three doves" or "2 x dove", words found the
dove for 0.76 while the number was asked for too, and find it for 0.98 (2026-11-22, by bm25, first two hits).

The shipped model's vectors hardly know an emoji that it was not trained on; `phrases` leaves the ranking to the fused
score all the same, while `terms` overrules it by what the captions say.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

from index.search.lexical import Lexical
from index.search.words import Statistics, Tokenizer

Decompose = Literal["off", "phrases", "terms"]

RARE_SHARE = 0.05  # of the captions: a word that more of them have names no particular thing
_RARE_CAPTIONS = 20  # in a small corpus every word is in a large share of the captions
_COVERING = 30  # captions, best first, among which one with all words of a phrase is looked for
_DISCOUNT = 0.1  # what the weight of a term is multiplied by each time a hit covers it

_RELATIONS = (
    "to the left of",
    "on the left of",
    "left of",
    "to the right of",
    "on the right of",
    "right of",
    "in front of",
    "on top of",
    "next to",
    "close to",
    "beside",
    "behind",
    "above",
    "over",
    "below",
    "underneath",
    "under",
    "beneath",
    "near",
    "and",
    "with",
)
_SETTINGS = ("up at", "down at", "on", "in", "at", "to(?= the)", "against", "inside")
_SPLIT = re.compile(
    rf"\s*,?\s*(?<![\w-])(?P<relation>{'|'.join(_RELATIONS)})(?![\w-])\s*"
    rf"|\s*,?\s*(?<![\w-])(?P<setting>{'|'.join(_SETTINGS)})(?![\w-])\s*"
    r"|\s*(?P<comma>[,;])\s*",
    re.IGNORECASE,
)
_OPENING = re.compile(
    r"^\s*(?:an?\s+|the\s+)?(?:picture|photo|photograph|image|drawing|painting|illustration)s?\s+of\s+", re.IGNORECASE
)
_WORD = re.compile(r"[^\W_]+")
_ARTICLES = frozenset({"a", "an", "the"})
# The basic colour terms of English (Berlin and Kay 1969), and what else a ground is often said to be.
_COLORS = frozenset(
    (  # noqa: SIM905 - one line
        "black white red green yellow blue brown purple pink orange gray grey teal cyan magenta violet beige plain"
    ).split()
)
_PLACES = frozenset("left right top bottom middle center centre".split())  # noqa: SIM905
_GROUNDS = frozenset("ground background foreground backdrop corner side".split())  # noqa: SIM905
_NUMBERS = "one two three four five six seven eight nine ten"
_COUNTS = frozenset(f"{_NUMBERS} times x".split())
_HOW_MANY_OR_LARGE = re.compile(
    r"^\s*(?:(?:an?|the)\s+)?"
    rf"(?:(?:{'|'.join(_NUMBERS.split())}|\d+)(?:\s*[x\u00d7](?=\s)|\s+of\b:?)?|several|(?:pair|couple|dozen)\s+of"
    r"|small|little|tiny|large|big|huge)\s+(?=\S)",
    re.IGNORECASE,
)
_IRREGULAR = {"men": "man", "women": "woman", "people": "person", "children": "child", "feet": "foot", "mice": "mouse"}
_PLURALS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stretch of a prompt between two splits, and the words before it that split it off ("" at the beginning)."""

    text: str
    before: str = ""
    kind: Literal["relation", "setting", "comma", "first"] = "first"

    @property
    def is_ground(self) -> bool:
        """Whether it says no more than where something is, how often, or on what colour."""
        words = [word for word in _WORD.findall(self.text.lower()) if word not in _ARTICLES]
        if not words or words[-1] in _GROUNDS:
            return True
        if not _COLORS.union(_PLACES, _COUNTS).issuperset(words):
            return False
        return self.kind in ("setting", "comma")  # "an orange" may be a fruit, "on orange" is a colour


@runtime_checkable
class CountedWords(Lexical, Protocol):
    """A search by words that also tells how many captions have each word."""

    def statistics(self, query: str) -> Statistics:
        """Of the whole corpus, with the frequency of every term of the query."""
        ...


class Corpus:
    """What the captions of a knowledge base say of the words of a prompt."""

    def __init__(self, lexical: CountedWords):
        self._lexical = lexical
        self._tokenizer = Tokenizer()

    def terms(self, text: str) -> list[str]:
        """The terms of a text in order, without repeats."""
        return list(dict.fromkeys(self._tokenizer(text)))

    def statistics(self, text: str) -> Statistics:
        """Frequencies of the terms of a text."""
        return self._lexical.statistics(text)

    def knows(self, word: str) -> bool:
        """Whether a caption has this word."""
        found = self.statistics(word)
        return any(found.frequencies.get(term, 0) for term in self.terms(word))

    def names_something(self, text: str) -> bool:
        """Whether one of its words is known to the captions, and rare among them."""
        found = self.statistics(text)
        limit = max(_RARE_CAPTIONS, RARE_SHARE * found.num_docs)
        return any(0 < found.frequencies.get(term, 0) <= limit for term in self.terms(text))

    def covers(self, text: str) -> bool:
        """Whether one caption has all words of a text: then it is one thing, or a picture of all of them."""
        terms, found = self.terms(text), self.statistics(text)
        if not terms or any(not found.frequencies.get(term, 0) for term in terms):
            return False
        ids, _ = self._lexical.search(text, top_k=_COVERING)
        for term in sorted(terms, key=lambda term: found.frequencies[term]):  # the rarest leaves the fewest to look at
            ids = ids[self._lexical.scores(term, ids) > 0]
            if not len(ids):
                return False
        return True

    def having(self, terms: Sequence[str], ids: Int64[ndarray, " n"]) -> Bool[ndarray, "terms n"]:
        """Which captions have which term."""
        return np.stack([self._lexical.scores(term, ids) > 0 for term in terms])


def pieces(text: str) -> list[Piece]:
    """The prompt cut at commas, at prepositions and at what says how two things lie; "of" cuts nothing."""
    text = _OPENING.sub("", text).strip()
    found: list[Piece] = []
    start, before, kind = 0, "", "first"
    for match in [*_SPLIT.finditer(text), None]:
        end = match.start() if match else len(text)
        if match is None or text[start:end].strip():  # "ON! arrow" begins with its own name, not with a preposition
            found.append(Piece(text=text[start:end].strip(), before=before, kind=kind))  # type: ignore[arg-type]
            if match:
                start, before, kind = match.end(), match.group(), str(match.lastgroup)
    return found


def subject(text: str) -> str:
    """The prompt without what is only ground: the text that `cover_terms` is asked about."""
    return ", ".join(piece.text for piece in pieces(text) if not piece.is_ground) or text


def phrases(text: str, corpus: Corpus) -> list[str]:
    """The things that a prompt names, in its order, but not how many and how large; itself when it names nothing known.

    A cut is kept when both sides have a rare word that the captions know, and no caption has all words of both: the
    prompt then names something that no pair shows. So "a wolf left of a flag of Chad" is cut, and "a cat with wry
    smile" is not where an emoji is called so.
    """
    named = [piece for piece in pieces(text) if not piece.is_ground]
    things = [replace(piece, text=in_singular(bare(piece.text, corpus), corpus)) for piece in named]
    # What one caption has goes together first: in "a page, left of a man with veil", "a man" alone says too little.
    things = _joined(things, lambda former, piece: corpus.covers(former.text + piece.before + piece.text))
    things = _joined(things, lambda *both: not all(corpus.names_something(piece.text) for piece in both))
    return [piece.text for piece in things] or [text]


def bare(text: str, corpus: Corpus) -> str:
    """A thing without how many and how large in front, which no pair of one thing shows: "two small dogs", "3 x dog".

    They stay where a caption says them too, such as that of the emoji "two hearts", and where nothing known is left.
    """
    rest = text
    while (match := _HOW_MANY_OR_LARGE.match(rest)) and not corpus.covers(in_singular(rest, corpus)):
        rest = rest[match.end() :]
    return rest if any(corpus.knows(_singular(word, corpus)) for word in _WORD.findall(rest)) else text


def in_singular(text: str, corpus: Corpus) -> str:
    """A thing as a caption has it: "money bags" as "money bag", but "hearts" where some caption has hearts."""
    if corpus.covers(text):
        return text
    every = _WORD.sub(lambda match: _singular(match.group(), corpus), text)
    if corpus.covers(every):
        return every
    return _WORD.sub(lambda match: match[0] if corpus.knows(match[0]) else _singular(match[0], corpus), text)


def _singular(word: str, corpus: Corpus) -> str:
    """The singular that a caption has; the word itself where none has one."""
    lower = word.lower()
    forms = [lower.removesuffix(end) + start for end, start in _PLURALS if lower.endswith(end)]
    return next((form for form in (_IRREGULAR.get(lower, ""), *forms) if form and corpus.knows(form)), word)


def _joined(things: Sequence[Piece], belong: Callable[[Piece, Piece], bool]) -> list[Piece]:
    """The same pieces, neighbours that belong together made one."""
    joined: list[Piece] = []
    for piece in things:
        if joined and belong(joined[-1], piece):
            joined[-1] = replace(joined[-1], text=joined[-1].text + piece.before + piece.text)
        else:
            joined.append(piece)
    return joined


def cover_terms(has: Bool[ndarray, "terms n"], weights: Float64[ndarray, " terms"]) -> Int64[ndarray, " n"]:
    """Candidates in the order of greedy weighted coverage; equal ones keep the order in which they come.

    Each place goes to the candidate whose caption has the most weight, and the weights of the terms it has shrink to a
    tenth: the next place goes to another thing, and a thing's second picture comes before no thing's first.
    """
    remaining = weights.copy()
    left = np.ones(has.shape[1], dtype=bool)
    order = np.empty(has.shape[1], dtype=np.int64)
    for place in range(len(order)):
        gains = np.round(np.where(left, remaining @ has, -np.inf), 9)  # a sum's rounding must not tell equals apart
        best = int(np.argmax(gains))
        order[place], left[best] = best, False
        remaining[has[:, best]] *= _DISCOUNT
    return order
