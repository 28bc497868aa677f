"""`radt index query`."""

import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from index.commands.options import (
    JsonOption,
    KbsOption,
    ModelOption,
    check_datasets,
    finite,
    open_all_for_query,
    print_json,
    print_json_as_it_comes,
    queries_progress,
    read_lines,
    say,
)
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
    """A question, what was found, and what was asked about that.

    If told, `terms` are the words that earned each hit's bm25, and `words` says how many captions have each word asked.
    """

    question: Question
    result: "SearchResult"
    terms: list[dict[str, float]]
    words: dict[str, int]
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
            document["words"] = self.words
            for hit, found, terms in zip(hits, self.result.hits, self.terms, strict=True):
                hit["terms"] = terms
                hit["ranks"] = {name: self.result.rank(name, found.id) for name in ("vector", "words")}
        return document


_JSON_HELP = (
    "--json prints query, kb, snapshot, asked (by, fusion, rank_constant, k, and the depth of each list), timings_ms "
    "and hits: each id (a string), rank, score, clip and bm25 (null: not asked for), caption, dataset, image (uri, "
    "offset, size) and metadata; kb with several knowledge bases, part with --decompose. Where they apply also "
    "shortfall, parts, note, exact (recall, vector_recall, missed, extra, timings_ms), why_not (id, stage, sentence, "
    "where it stands). --explain adds stages, words, searcher, and to each hit terms and ranks. With --queries these "
    "lie in queries, one for each line."
)
_SLOW_MS = 1000.0
_DEFAULTS = {"k": 5, "by": "hybrid", "fusion": "rrf", "diversity": 0.0, "decompose": "off"}


def add_query(app: typer.Typer, default_model: str | None) -> None:
    """Register `query`."""

    @app.command(epilog=_JSON_HELP)
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
            Path | None,
            typer.Option(exists=True, dir_okay=False, help="Ask every line of this file; stopped, it begins anew."),
        ] = None,
        where: Annotated[
            str | None, typer.Option(help="An SQL filter: width >= 256. A wrong one is told which fields there are.")
        ] = None,
        dataset: Annotated[list[str] | None, typer.Option(help="Only pairs of this dataset, or of these.")] = None,
        min_score: Annotated[float | None, typer.Option(callback=finite, help="Lowest score of a hit.")] = None,
        min_clip: Annotated[float | None, typer.Option(callback=finite, help="Lowest CLIP score of a hit.")] = None,
        min_bm25: Annotated[float | None, typer.Option(callback=finite, help="Lowest BM25 score of a hit.")] = None,
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
            str | None, typer.Option(help="Search the state that a build left: build-2, or its number; see `stats`.")
        ] = None,
        model: ModelOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Find the best pairs for a text, an image, a pair or a vector, and see why."""
        from index.commands.query_tables import print_answer

        ways = {"image": image, "id": pair, "random": is_random or None, "vector": vector, "queries": queries}
        _check_usage(text, ways, seed=seed, about_one=html is not None or why_not is not None)
        if is_random and seed is None:
            seed = secrets.randbelow(2**32)
        base = open_all_for_query(kbs, model, default_model, snapshot=snapshot)
        check_datasets(base, dataset)
        asked: dict[str, Any] = {"k": k, "by": by, "fusion": fusion, "where": where, "dataset": dataset}
        asked |= {"min_score": min_score, "min_clip": min_clip, "min_bm25": min_bm25}
        asked |= {"diversity": diversity, "decompose": decompose}
        head: dict[str, Any] = {"kb": kbs[0] if len(kbs) == 1 else kbs, "snapshot": base.store.version}
        if queries is not None:
            head["asked"] = _told(asked, by=by)
            _ask_all(base, read_lines(queries), asked, head=head, exact=exact, as_json=as_json, is_explained=explain)
            return
        if pair is not None or is_random:
            question = _like_a_pair(base, pair, text=text, seed=seed)
        else:
            question = _question(base, text, image=image, vector=vector)
        head["asked"] = _told(asked, by="clip" if by == "hybrid" and question.text is None else by)
        needs_terms = explain or html is not None or not as_json
        answer = _answer(base, question, asked, exact=exact, why_not=why_not, needs_terms=needs_terms)
        facts = _facts(base) if explain else {}
        if html is not None:
            more = {"exact": exact, "why_not": why_not, "explain": explain, "snapshot": snapshot, "model": model}
            repeat = _repeated(kbs, text, {**ways, "seed": seed, **asked, **more})
            like = _repeated(kbs, None, {"snapshot": snapshot, "model": model})
            _write_page(html, base, answer, asked, kbs=kbs, commands=(like, repeat))
            if not as_json:
                say(f"the page is {html}; open it in a browser")
        if as_json:
            print_json({**answer.to_json(head, is_explained=explain), **facts, **_note(base)})
        else:
            print_answer(answer, head, facts, hints=[] if explain or exact else _why_slow(base, answer.result))


def _check_usage(text: str | None, ways: Mapping[str, Any], *, seed: int | None, about_one: bool) -> None:
    """One way to ask at a time, and nothing that has no effect on it."""
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1 or (text is None and not given) or (text is not None and "queries" in given):
        raise typer.BadParameter("give a TEXT, or one of --image, --id, --random, --vector and --queries")
    if seed is not None and "random" not in given:
        raise typer.BadParameter("--seed goes with --random")
    if "queries" in given and about_one:
        raise typer.BadParameter("--html and --why-not are about one query, not about --queries")


def _told(asked: Mapping[str, Any], *, by: str) -> dict[str, Any]:
    """What the scores depend on, for who compares them with others; null: of no effect."""
    from index.search.fusion import RANK_CONSTANT
    from index.search.request import Request

    fusion = asked["fusion"] if by == "hybrid" else None
    constant = RANK_CONSTANT if fusion == "rrf" else None
    depth = Request(k=asked["k"], by="hybrid").depth
    return {"by": by, "fusion": fusion, "rank_constant": constant, "k": asked["k"], "depth": depth}


def _ask_all(
    base: "Base",
    lines: Sequence[str],
    asked: dict[str, Any],
    *,
    head: Mapping[str, Any],
    exact: bool,
    as_json: bool,
    is_explained: bool,
) -> None:
    """Every line, one after the other. JSON is written as it comes, so that many queries need no memory."""
    from index.commands.query_tables import print_answers

    def answers() -> Iterator[Answer]:
        with queries_progress(as_json, total=len(lines)) as on_query:
            for line in lines:
                question = Question(label=line, text=line)
                yield _answer(base, question, asked, exact=exact, why_not=None, needs_terms=is_explained)
                on_query(line)

    def last() -> dict[str, Any]:
        return {**(_facts(base) if is_explained else {}), **_note(base)}

    if as_json:
        documents = (answer.to_json({}, is_explained=is_explained) for answer in answers())
        print_json_as_it_comes(head, "queries", documents, last)
    else:
        print_answers(list(answers()))


def _why_slow(base: "Base", result: "SearchResult") -> list[str]:
    """Of a query that took long, the knowledge bases with many rows outside their searchers."""
    from index.search.explain import MANY_NEWER, describe_searcher, searcher_facts

    if sum(ms for clock, ms in result.timings_ms.items() if clock != "load") < _SLOW_MS:
        return []
    return [describe_searcher(fact) for fact in searcher_facts(base) if fact["newer"] > MANY_NEWER]


def _note(base: "Base") -> dict[str, str]:
    return {"note": base.note} if base.note else {}


def _question(base: "Base", text: str | None, *, image: Path | None, vector: Path | None) -> Question:
    """By words, by a picture or a vector, or by words and one of those."""
    if vector is not None:
        asked = {"vector": _read_vector(vector, dim=base.manifest.dim)}
        return Question(label=text or str(vector), text=text, asked=asked)
    if image is not None:
        return Question(label=text or str(image), text=text, asked={"image": _open_image(image)})
    return Question(label=text or "", text=text)


def _like_a_pair(base: "Base", pair: int | None, *, text: str | None, seed: int | None) -> Question:
    """By a pair's own vector; one drawn by `seed` if none is named."""
    import numpy as np

    label = ""
    if pair is None:
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
    from index.search.explain import exact_difference, term_scores, word_counts
    from index.search.explain import why_not as follow

    asked = {**asked, **question.asked}
    difference = exact_difference(base.query, question.text, **asked) if exact else None
    result = base.query(question.text, **asked) if difference is None else difference.exact
    lost = None
    if why_not is not None:
        lost = follow(base.retriever, why_not, question.text, result=result, **asked, exact=exact)
    terms = term_scores(base.retriever, question.text, result.hits) if needs_terms else []
    words = word_counts(base.retriever, question.text, result) if needs_terms else {}
    return Answer(question=question, result=result, terms=terms, words=words, exact=difference, why_not=lost)


def _facts(base: "Base") -> dict[str, Any]:
    from index.search.explain import searcher_facts

    facts = searcher_facts(base)
    return {"searcher": facts[0] if len(facts) == 1 else facts}


def _write_page(
    path: Path, base: "Base", answer: Answer, asked: Mapping[str, Any], *, kbs: Sequence[str], commands: tuple[str, str]
) -> None:
    """`commands`: to which the id of a pair is added, and the one that asks the same again."""
    from index.search.contact_sheet import write_contact_sheet
    from index.search.explain import searcher_facts, surroundings

    more = [] if answer.why_not is None else [answer.why_not.id]
    try:
        write_contact_sheet(
            path,
            answer.question.label,
            answer.result.hits,
            kb=" + ".join(kbs),
            snapshot=base.store.version,
            asked=asked,
            searchers=searcher_facts(base),
            query_image=answer.question.asked.get("image"),
            terms=answer.terms,
            words=answer.words,
            result=answer.result,
            around=surroundings(base, answer.result.hits, more=more),
            exact=answer.exact,
            why_not=answer.why_not,
            command=commands[0],
            repeat=commands[1],
        )
    except OSError as error:
        raise QueryError(f"cannot write {path}: {error.strerror or error}; name another file") from error


def _repeated(kbs: Sequence[str], text: str | None, options: Mapping[str, Any]) -> str:
    """What to type to ask the same again, from any folder."""
    words = ["radt", "index", "query", *([text] if text is not None else [])]
    for name, value in {"kb": list(map(_from_anywhere, kbs)), **options}.items():
        if value is None or value is False or value == _DEFAULTS.get(name):
            continue
        flag = "-k" if name == "k" else f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            words += [flag] if one is True else [flag, _from_anywhere(one) if isinstance(one, Path) else str(one)]
    return shlex.join(words)


def _from_anywhere(place: str | Path) -> str:
    """A folder, file or URL as it is called in any folder."""
    return str(place) if "://" in str(place) else str(Path(place).resolve())


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
    except (OSError, ValueError, EOFError) as error:  # numpy takes whatever it does not know for a pickle
        raise QueryError(
            f"cannot search by {path}: it is no array in a .npy file; numpy.save a vector of {dim} numbers there"
        ) from error
    if vector.size != dim or vector.dtype.kind not in "fiu":
        raise QueryError(f"{path} has {vector.dtype} of shape {vector.shape}; the vectors here are {dim} numbers")
    return vector.reshape(dim).astype(np.float32)
