"""Question and Answer: what a user looks for, and what was found with all that explains it.

`radt index query` prints an answer as a table or as JSON; `contact_sheet.py` makes a page of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Float32
from numpy import ndarray

from index.search.explain import ExactDifference, WhyNot, exact_difference, term_scores, why_not, word_counts
from index.search.retriever import SearchResult

if TYPE_CHECKING:
    import PIL.Image

    from index.knowledge_base import KnowledgeBase
    from index.search.joined import JoinedKnowledgeBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is looked for: its name for people, its words, and what stands in for them on the CLIP side."""

    label: str
    text: str | None = None
    image: "PIL.Image.Image | None" = None
    vector: Float32[ndarray, " d"] | None = None
    exclude: tuple[int, ...] = ()

    def search(self) -> dict[str, Any]:
        """As the arguments of `Retriever.search` that go with its text."""
        given = {"image": self.image, "vector": self.vector, "exclude": self.exclude or None}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A question, what was found in one state of the knowledge base, and what was asked about that.

    `asked` are the other arguments of the search. If told, `terms` are the words that earned each hit's bm25, and
    `words` says how many captions have each word asked.
    """

    question: Question
    result: SearchResult
    asked: Mapping[str, Any] = field(default_factory=dict)
    snapshot: int | tuple[int, ...] | None = None
    terms: Sequence[Mapping[str, float]] = ()
    words: Mapping[str, int] = field(default_factory=dict)
    exact: ExactDifference | None = None
    why_not: WhyNot | None = None

    def to_json(self, head: Mapping[str, Any], *, is_explained: bool) -> dict[str, Any]:
        """As DESIGN fixes it, and what was asked for beyond that; `head` says what was searched, and how."""
        hits = [hit.to_json() for hit in self.result.hits]
        document = {
            "query": self.question.label,
            **head,
            "timings_ms": {name: round(ms, 3) for name, ms in self.result.timings_ms.items()},
            "hits": hits,
        }
        if self.result.shortfall:
            document["shortfall"] = self.result.shortfall
        if self.result.parts:
            document["parts"] = self.result.parts
        if self.exact is not None:
            document["exact"] = self.exact.to_json()
        if self.why_not is not None:
            document["why_not"] = self.why_not.to_json()
        if is_explained:
            document["stages"] = [stage.to_json() for stage in self.result.stages]
            document["words"] = self.words
            for hit, found, terms in zip(hits, self.result.hits, self.terms, strict=True):
                hit["terms"] = terms
                hit["ranks"] = {name: self.result.rank(name, found.id) for name in ("vector", "words")}
        return document


def ask(
    base: "KnowledgeBase | JoinedKnowledgeBase",
    question: Question,
    asked: Mapping[str, Any],
    *,
    exact: bool = False,
    lost: int | None = None,
    with_words: bool = True,
    is_warm: bool = False,
) -> Answer:
    """Answer a question. `asked` are the arguments of `Retriever.search` but for those of the question and `exact`.

    `exact` answers by comparing every pair, and tells what that changes (see `exact_difference`, also for `is_warm`);
    `lost` is a pair of which it is told why it is no hit. Inside `base.held()` all of it is of one state.
    """
    whole = {**asked, **question.search()}
    difference = exact_difference(base.query, question.text, is_warm=is_warm, **whole) if exact else None
    result = base.query(question.text, **whole) if difference is None else difference.exact
    snapshot, retriever = base.store.version, base.retriever
    told = why_not(retriever, lost, question.text, result=result, **whole, exact=exact) if lost is not None else None
    return Answer(
        question=question,
        result=result,
        asked=asked,
        snapshot=snapshot,
        terms=term_scores(retriever, question.text, result.hits) if with_words else [],
        words=word_counts(retriever, question.text, result) if with_words else {},
        exact=difference,
        why_not=told,
    )
