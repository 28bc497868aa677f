"""`radt index query`."""

import secrets
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
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
    from index.search.answer import Answer, Question
    from index.search.joined import JoinedKnowledgeBase
    from index.search.retriever import SearchResult

    Base: TypeAlias = KnowledgeBase | JoinedKnowledgeBase

_By = Literal["hybrid", "clip", "bm25", "tfidf"]
_Fusion = Literal["rrf", "sum", "product"]
_Decompose = Literal["off", "phrases", "terms"]


@dataclass(frozen=True, kw_only=True)
class QueryOptions:
    """How a query is asked, whatever it looks for: arguments of `Retriever.search` by name, and their defaults here."""

    k: int = 5
    by: _By = "hybrid"
    fusion: _Fusion = "rrf"
    where: str | None = None
    dataset: Sequence[str] | None = None
    min_score: float | None = None
    min_clip: float | None = None
    min_bm25: float | None = None
    diversity: float = 0.0
    decompose: _Decompose = "off"

    def search(self) -> dict[str, Any]:
        """All of them."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def given(self) -> dict[str, Any]:
        """Those that say something."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}

    def told(self, answer: "Answer") -> dict[str, Any]:
        """What the scores of an answer depend on, for who compares them with others; null: of no effect."""
        from index.search.fusion import RANK_CONSTANT

        by = "clip" if self.by == "hybrid" and answer.question.text is None else self.by
        fusion = self.fusion if by == "hybrid" else None
        constant = RANK_CONSTANT if fusion == "rrf" else None
        return {"by": by, "fusion": fusion, "rank_constant": constant, "k": self.k, "depth": answer.result.depth}


_JSON_HELP = (
    "--json prints query, kb, snapshot, asked (by, fusion, rank_constant, k, and the depth of each list), timings_ms "
    "and hits: each id (a string), rank, score, clip and bm25 (null: not asked for), caption, dataset, image (uri, "
    "offset, size) and metadata; kb with several knowledge bases, part with --decompose. Where they apply also "
    "shortfall, parts, note, exact (recall, vector_recall, missed, extra, timings_ms), why_not (id, stage, sentence, "
    "where it stands). --explain adds stages, words, searcher, and to each hit terms and ranks. With --queries these "
    "lie in queries, one for each line; snapshot and asked in one where they are not those of the first."
)
_SLOW_MS = 1000.0


def add_query(app: typer.Typer, default_model: str | None) -> None:
    """Register `query`."""

    @app.command(epilog=_JSON_HELP)
    def query(
        kbs: KbsOption,
        text: Annotated[str | None, typer.Argument(help="What to look for.")] = None,
        k: Annotated[int, typer.Option("-k", min=1, help="How many hits.")] = QueryOptions.k,
        by: Annotated[_By, typer.Option(help="What to compare by.")] = QueryOptions.by,
        fusion: Annotated[_Fusion, typer.Option(help="How hybrid joins the two.")] = QueryOptions.fusion,
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
        ] = QueryOptions.diversity,
        decompose: Annotated[
            _Decompose, typer.Option(help="Find neighbours of every thing that the text names.")
        ] = QueryOptions.decompose,
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
        from index.search.answer import ask

        ways = {"image": image, "id": pair, "random": is_random or None, "vector": vector, "queries": queries}
        _check_usage(text, ways, seed=seed, about_one=html is not None or why_not is not None)
        options = QueryOptions(
            k=k,
            by=by,
            fusion=fusion,
            where=where,
            dataset=dataset,
            min_score=min_score,
            min_clip=min_clip,
            min_bm25=min_bm25,
            diversity=diversity,
            decompose=decompose,
        )
        base = open_all_for_query(kbs, model, default_model, snapshot=snapshot)
        check_datasets(base, dataset)
        if queries is not None:
            _ask_all(base, read_lines(queries), options, kbs=kbs, exact=exact, as_json=as_json, is_explained=explain)
            return
        if is_random and seed is None:
            seed = secrets.randbelow(2**32)
        if pair is not None or is_random:
            question = _like_a_pair(base, pair, text=text, seed=seed)
        else:
            question = _question(base, text, image=image, vector=vector)
        with_words = explain or html is not None or not as_json
        with base.held():
            answer = ask(base, question, options.search(), exact=exact, lost=why_not, with_words=with_words)
            facts = _facts(base) if explain else {}
            if html is not None:
                state = {"snapshot": snapshot, "model": model}
                more = {"seed": seed, "exact": exact, "why_not": why_not, "explain": explain}
                repeat = _repeated(kbs, text, {**ways, **options.given(), **more, **state})
                _write_page(html, base, answer, kbs=kbs, command=_repeated(kbs, None, state), repeat=repeat)
        if html is not None and not as_json:
            say(f"the page is {html}; open it in a browser")
        head = _head(kbs, options, answer)
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


def _head(kbs: Sequence[str], options: QueryOptions, answer: "Answer") -> dict[str, Any]:
    """What was searched, and how."""
    return {"kb": kbs[0] if len(kbs) == 1 else kbs, "snapshot": answer.snapshot, "asked": options.told(answer)}


def _ask_all(
    base: "Base",
    lines: Sequence[str],
    options: QueryOptions,
    *,
    kbs: Sequence[str],
    exact: bool,
    as_json: bool,
    is_explained: bool,
) -> None:
    """Every line, one after the other and of one state. Each is told when it is answered, and kept no longer."""
    from index.commands.query_tables import print_answers
    from index.search.answer import Question, ask

    def answers() -> "Iterator[Answer]":
        is_silent = as_json or sys.stdout.isatty()  # rows that come are progress enough
        with base.held(), queries_progress(is_silent, total=len(lines)) as on_query:
            for place, line in enumerate(lines):
                question, is_warm = Question(label=line, text=line), place > 0
                yield ask(base, question, options.search(), exact=exact, with_words=is_explained, is_warm=is_warm)
                on_query(line)

    def last() -> dict[str, Any]:
        return {**(_facts(base) if is_explained else {}), **_note(base)}

    if not as_json:
        print_answers(answers())
        return
    coming = answers()
    first = next(coming)
    head = _head(kbs, options, first)

    def document(answer: "Answer") -> dict[str, Any]:
        own = {name: value for name, value in _head(kbs, options, answer).items() if value != head[name]}
        return answer.to_json(own, is_explained=is_explained)

    print_json_as_it_comes(head, "queries", map(document, chain([first], coming)), last)


def _why_slow(base: "Base", result: "SearchResult") -> list[str]:
    """Of a query that took long, the knowledge bases with many rows outside their searchers."""
    from index.search.explain import MANY_NEWER, describe_searcher, searcher_facts

    if sum(ms for clock, ms in result.timings_ms.items() if clock != "load") < _SLOW_MS:
        return []
    return [describe_searcher(fact) for fact in searcher_facts(base) if fact["newer"] > MANY_NEWER]


def _note(base: "Base") -> dict[str, str]:
    return {"note": base.note} if base.note else {}


def _question(base: "Base", text: str | None, *, image: Path | None, vector: Path | None) -> "Question":
    """By words, by a picture or a vector, or by words and one of those."""
    from index.search.answer import Question

    if vector is not None:
        return Question(label=text or str(vector), text=text, vector=_read_vector(vector, dim=base.manifest.dim))
    if image is not None:
        return Question(label=text or str(image), text=text, image=_open_image(image))
    return Question(label=text or "", text=text)


def _like_a_pair(base: "Base", pair: int | None, *, text: str | None, seed: int | None) -> "Question":
    """By a pair's own vector; one drawn by `seed` if none is named."""
    import numpy as np

    from index.search.answer import Question

    label = ""
    if pair is None:
        ids = np.sort(base.store.matching_ids())
        if not len(ids):
            raise QueryError("there is no pair to draw: the knowledge base is empty")
        pair = int(np.random.default_rng(seed).choice(ids))
        label = f" (--random --seed {seed})"
    return Question(label=text or f"{pair}{label}", text=text, vector=base.show(pair).vector, exclude=(pair,))


def _facts(base: "Base") -> dict[str, Any]:
    from index.search.explain import searcher_facts

    facts = searcher_facts(base)
    return {"searcher": facts[0] if len(facts) == 1 else facts}


def _write_page(path: Path, base: "Base", answer: "Answer", *, kbs: Sequence[str], command: str, repeat: str) -> None:
    """`command` is the one to which the id of a pair is added, `repeat` the one that asks the same again."""
    from index.search.contact_sheet import Searched, write_contact_sheet
    from index.search.explain import searcher_facts, surroundings

    searched = Searched(kb=" + ".join(kbs), searchers=searcher_facts(base), command=command, repeat=repeat)
    more = [] if answer.why_not is None else [answer.why_not.id]
    around = surroundings(base, answer.result.hits, more=more)
    try:
        write_contact_sheet(path, answer, searched=searched, around=around)
    except OSError as error:
        raise QueryError(f"cannot write {path}: {error.strerror or error}; name another file") from error


def _repeated(kbs: Sequence[str], text: str | None, options: Mapping[str, Any]) -> str:
    """What to type to ask the same again, from any folder."""
    words = ["radt", "index", "query", *([text] if text is not None else [])]
    for name, value in {"kb": list(map(_from_anywhere, kbs)), **options}.items():
        if value is None or value is False:
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
