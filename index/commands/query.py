"""`radt index query`."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from index.commands.options import JsonOption, KbsOption, ModelOption, open_all_for_query, print_json, read_lines, say
from index.errors import QueryError

if TYPE_CHECKING:
    from index.knowledge_base import KnowledgeBase
    from index.search.explain import ExactDifference, WhyNot
    from index.search.joined import JoinedKnowledgeBase
    from index.search.retriever import SearchResult

    Base: TypeAlias = KnowledgeBase | JoinedKnowledgeBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is looked for: its name for people, its words, and what stands in for them on the CLIP side."""

    label: str
    text: str | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A question, what was found, which words earned each hit's bm25 if told, and what was asked about that."""

    question: Question
    result: "SearchResult"
    terms: list[dict[str, float]]
    exact: "ExactDifference | None" = None
    why_not: "WhyNot | None" = None

    def to_json(self, head: Mapping[str, Any], *, is_explained: bool) -> dict[str, Any]:
        """As DESIGN fixes it, and what was asked for beyond that."""
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
            for hit, found, terms in zip(hits, self.result.hits, self.terms, strict=True):
                hit["terms"] = terms
                hit["ranks"] = {name: self.result.rank(name, found.id) for name in ("vector", "words")}
        return document


def add_query(app: typer.Typer, default_model: str | None) -> None:
    """Register `query`."""

    @app.command()
    def query(
        kbs: KbsOption,
        text: Annotated[str | None, typer.Argument(help="What to look for.")] = None,
        k: Annotated[int, typer.Option("-k", min=1, help="How many hits.")] = 5,
        by: Annotated[Literal["hybrid", "clip", "bm25", "tfidf"], typer.Option(help="What to compare by.")] = "hybrid",
        fusion: Annotated[Literal["rrf", "sum", "product"], typer.Option(help="How hybrid joins the two.")] = "rrf",
        image: Annotated[
            Path | None, typer.Option(exists=True, dir_okay=False, help="Look for what is like it.")
        ] = None,
        pair: Annotated[int | None, typer.Option("--id", help="Look for what is like this pair.")] = None,
        is_random: Annotated[
            bool, typer.Option("--random/--no-random", help="Look for what is like a pair drawn at random.")
        ] = False,
        seed: Annotated[int | None, typer.Option(min=0, help="Seed of --random; drawn and told if not given.")] = None,
        vector: Annotated[
            Path | None, typer.Option(exists=True, dir_okay=False, help="Look for what is near the vector in a .npy.")
        ] = None,
        queries: Annotated[
            Path | None, typer.Option(exists=True, dir_okay=False, help="Ask every line of this file.")
        ] = None,
        where: Annotated[str | None, typer.Option(help="An SQL filter: width >= 256.")] = None,
        dataset: Annotated[list[str] | None, typer.Option(help="Only pairs of this dataset, or of these.")] = None,
        min_score: Annotated[float | None, typer.Option(help="Lowest score of a hit.")] = None,
        min_clip: Annotated[float | None, typer.Option(help="Lowest CLIP score of a hit.")] = None,
        min_bm25: Annotated[float | None, typer.Option(help="Lowest BM25 score of a hit.")] = None,
        diversity: Annotated[
            float, typer.Option(min=0.0, max=1.0, help="Prefer hits unlike those above: 0 off, 1 at any cost.")
        ] = 0.0,
        decompose: Annotated[
            Literal["off", "phrases", "terms"], typer.Option(help="Find neighbours of every thing that the text names.")
        ] = "off",
        exact: Annotated[
            bool, typer.Option("--exact/--no-exact", help="Compare every pair, and show what that changes.")
        ] = False,
        why_not: Annotated[int | None, typer.Option(help="Say which stage lost this pair.")] = None,
        explain: Annotated[
            bool, typer.Option("--explain/--no-explain", help="Show the stages with their times, and who searched.")
        ] = False,
        html: Annotated[Path | None, typer.Option(help="Write a page: click a hit for all that is known.")] = None,
        snapshot: Annotated[
            str | None, typer.Option(help="Search the state that a build left: build-2. `stats` lists them.")
        ] = None,
        model: ModelOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Find the best pairs for a text, an image, a pair or a vector, and see why."""
        from index.commands.query_tables import print_answer, print_answers

        ways = sum((image is not None, pair is not None, is_random, vector is not None, queries is not None))
        if ways > 1 or (text is None and not ways) or (text is not None and queries is not None):
            raise typer.BadParameter("give a TEXT, or one of --image, --id, --random, --vector and --queries")
        if seed is not None and not is_random:
            raise typer.BadParameter("--seed goes with --random")
        if queries is not None and (html is not None or why_not is not None):
            raise typer.BadParameter("--html and --why-not are about one query, not about --queries")
        base = open_all_for_query(kbs, model, default_model, snapshot=snapshot)
        asked: dict[str, Any] = {"k": k, "by": by, "fusion": fusion, "where": where, "dataset": dataset}
        asked |= {"min_score": min_score, "min_clip": min_clip, "min_bm25": min_bm25}
        asked |= {"diversity": diversity, "decompose": decompose}
        if queries is not None:
            questions = [Question(label=line, text=line) for line in read_lines(queries)]
        elif pair is not None or is_random:
            questions = [_like_a_pair(base, pair, text=text, seed=seed)]
        else:
            questions = [_question(base, text, image=image, vector=vector)]
        needs_terms = explain or html is not None or not (as_json or queries is not None)
        more: dict[str, Any] = {"exact": exact, "why_not": why_not, "needs_terms": needs_terms}
        answers = [_answer(base, question, asked, **more) for question in questions]
        head = {"kb": kbs[0] if len(kbs) == 1 else kbs, "snapshot": base.store.version}
        facts = _facts(base) if explain else {}
        if html is not None:
            _write_page(html, base, answers[0], kbs, is_silent=as_json)
        if queries is not None:
            several = [answer.to_json({}, is_explained=explain) for answer in answers]
            print_json({**head, "queries": several, **facts}) if as_json else print_answers(answers)
        elif as_json:
            print_json({**answers[0].to_json(head, is_explained=explain), **facts})
        else:
            print_answer(answers[0], head, facts)


def _question(base: "Base", text: str | None, *, image: Path | None, vector: Path | None) -> Question:
    """By words, by a picture or a vector, or by words and one of those."""
    if vector is not None:
        asked = {"vector": _read_vector(vector, dim=base.manifest.dim)}
        return Question(label=text or str(vector), text=text, asked=asked)
    if image is not None:
        return Question(label=text or str(image), text=text, asked={"image": _open_image(image)})
    return Question(label=text or "", text=text)


def _like_a_pair(base: "Base", pair: int | None, *, text: str | None, seed: int | None) -> Question:
    """By a pair's own vector; one drawn at random if none is named."""
    import numpy as np

    label = ""
    if pair is None:
        seed = secrets.randbelow(2**32) if seed is None else seed
        ids = np.sort(base.store.matching_ids())
        if not len(ids):
            raise QueryError("there is no pair to draw: the knowledge base is empty")
        pair = int(np.random.default_rng(seed).choice(ids))
        label = f" (--random --seed {seed})"
    return Question(
        label=text or f"{pair}{label}", text=text, asked={"vector": base.show(pair).vector, "exclude": [pair]}
    )


def _answer(
    base: "Base", question: Question, asked: dict[str, Any], *, exact: bool, why_not: int | None, needs_terms: bool
) -> Answer:
    from index.search.explain import exact_difference, term_scores
    from index.search.explain import why_not as follow

    asked = {**asked, **question.asked}
    difference = exact_difference(base.query, question.text, **asked) if exact else None
    result = base.query(question.text, **asked) if difference is None else difference.exact
    lost = None
    if why_not is not None:
        lost = follow(base.retriever, why_not, question.text, result=result, **asked, exact=exact)
    terms = term_scores(base.retriever, question.text, result.hits) if needs_terms else []
    return Answer(question=question, result=result, terms=terms, exact=difference, why_not=lost)


def _facts(base: "Base") -> dict[str, Any]:
    from index.search.explain import searcher_facts

    facts = searcher_facts(base)
    return {"searcher": facts[0] if len(facts) == 1 else facts}


def _write_page(path: Path, base: "Base", answer: Answer, kbs: Sequence[str], *, is_silent: bool) -> None:
    from index.search.contact_sheet import write_contact_sheet
    from index.search.explain import surroundings

    more = [] if answer.why_not is None else [answer.why_not.id]
    try:
        write_contact_sheet(
            path,
            answer.question.label,
            answer.result.hits,
            kb=" + ".join(kbs),
            query_image=answer.question.asked.get("image"),
            terms=answer.terms,
            result=answer.result,
            around=surroundings(base, answer.result.hits, more=more),
            exact=answer.exact,
            why_not=answer.why_not,
            command=_command(kbs),
        )
    except OSError as error:
        raise QueryError(f"cannot write {path}: {error.strerror or error}; name another file") from error
    if not is_silent:
        say(f"the page is {path}; open it in a browser")


def _command(kbs: Sequence[str]) -> str:
    """What to type to ask the same knowledge base again, from any folder."""
    import shlex

    places = [kb if "://" in kb else str(Path(kb).resolve()) for kb in kbs]
    return " ".join(["radt index query", *(f"--kb {shlex.quote(place)}" for place in places)])


def _open_image(path: Path) -> Any:
    from index.embedder import decode_image
    from index.errors import CorpusError

    try:
        return decode_image(path.read_bytes())
    except CorpusError as error:
        raise QueryError(f"cannot search by {path}: {error}") from error


def _read_vector(path: Path, *, dim: int) -> Any:
    import numpy as np

    try:
        vector = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise QueryError(f"cannot search by {path}: {error}; numpy.save a vector of {dim} numbers there") from error
    if vector.size != dim or vector.dtype.kind not in "fiu":
        raise QueryError(f"{path} has {vector.dtype} of shape {vector.shape}; the vectors here are {dim} numbers")
    return vector.reshape(dim).astype(np.float32)
