"""`radt evaluate retrieval`: does a knowledge base find what queries are known to be about, by which kind of search?

A line of the queries names the relevant pairs: by id, or by a condition on pairs as `--where` takes it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from index.errors import ConfigError, QueryError
from radt.evaluation import metrics
from radt.evaluation.metrics import Score
from radt.evaluation.results import Cell, Result, Table, typed_command
from radt.evaluation.tables import cell_of, cell_text
from radt.settings import By

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from index.knowledge_base import KnowledgeBase

DEPTH = 100  # hits among which the first relevant one is looked for
JSON_LINES = (".jsonl", ".ndjson")
FORM = "TEXT, a tab, and ids or a condition such as \"caption LIKE 'wolf%'\""
OnQuery = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A query, and which pairs are right: `ids`, or all that `where` selects."""

    text: str
    source: str
    ids: tuple[int, ...] = ()
    where: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalReport:
    """For every kind of search the scores by name: `recall@k`, `hit@k` and `mrr`, over as many queries."""

    kb: str
    queries: str
    n: int
    pairs: int
    relevant_median: float
    depth: int
    scores: dict[str, dict[str, Score]]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "kb": self.kb,
            "queries": self.queries,
            "n": self.n,
            "pairs": self.pairs,
            "relevant_median": self.relevant_median,
            "depth": self.depth,
            "scores": {
                by: {name: _score_json(score) for name, score in scores.items()} for by, scores in self.scores.items()
            },
        }


def _score_json(score: Score) -> dict[str, Any]:
    interval = None if score.low is None else [score.low, score.high]
    return {"value": score.value, "interval": interval, "interval_by": score.method, "n": score.n}


def read_questions(path: Path) -> list[Question]:
    """Queries with what is relevant to each. QueryError names the line that cannot be read.

    A line of a `.jsonl` file is an object with `query`, and `relevant` (ids) or `where`; of any other file TEXT, a tab,
    and ids, between blanks or commas, or a condition.
    """
    from index.commands.options import read_lines

    questions = []
    for count, line in enumerate(read_lines(path), start=1):
        source = f"query {count} of {str(path)!r}"
        question = _from_json(line, source) if path.suffix.lower() in JSON_LINES else _from_text(line, source)
        if not question.text or not (question.ids or question.where):
            raise QueryError(f"{source} says not which pairs are relevant: write {FORM}")
        questions.append(question)
    return questions


def _from_text(line: str, source: str) -> Question:
    text, _, rest = line.partition("\t")
    words = rest.replace(",", " ").split()
    if words and all(_is_id(word) for word in words):
        return Question(text=text.strip(), source=source, ids=tuple(map(int, words)))
    return Question(text=text.strip(), source=source, where=rest.strip() or None)


def _from_json(line: str, source: str) -> Question:
    try:
        values = json.loads(line)
        text, ids, where = values["query"], values.get("relevant", []), values.get("where")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QueryError(f'{source} is no object with "query" ({error!r})') from error
    ids = ids if isinstance(ids, list) else [ids]
    if not isinstance(text, str) or not all(_is_id(str(each)) for each in ids) or not isinstance(where, str | None):
        raise QueryError(f'{source} should have a text "query", and ids in "relevant" or a text "where"')
    return Question(text=text.strip(), source=source, ids=tuple(map(int, ids)), where=where)


def _is_id(word: str) -> bool:
    return word.isascii() and word.isdigit()


def relevant_ids(kb: "KnowledgeBase", question: Question) -> set[int]:
    """The pairs that are right. QueryError where one is not there, or a condition selects none."""
    if question.where is not None:
        found = {int(each) for each in kb.store.matching_ids(question.where)}
        if not found:
            raise QueryError(f"{question.source}: no pair fulfils {question.where!r}, so that nothing could be found")
        return found | set(question.ids)
    there = {pair.id for pair in kb.store.get(question.ids)}
    gone = [each for each in question.ids if each not in there]
    if gone:
        raise QueryError(f"{question.source}: there is no pair {gone[0]} in the knowledge base; was it built anew?")
    return there


def evaluate_retrieval(
    kb: "KnowledgeBase",
    questions: Sequence[Question],
    *,
    by: Sequence[str] = ("clip", "bm25", "hybrid"),
    ks: Sequence[int] = (1, 5, 10),
    depth: int = DEPTH,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    queries: str = "",
    on_query: OnQuery = lambda done, total: None,
) -> RetrievalReport:
    """Ask every question in every way. `options` are further arguments of `KnowledgeBase.search`.

    Each k is asked for by itself, as a user does: fused ranks and diverse hits come from as many candidates as k needs,
    so that the first k of more hits may be others. Hits have distinct pictures: of relevant pairs that show the very
    same one, at most one is found.
    """
    _check(by, ks, depth)
    relevant = [relevant_ids(kb, question) for question in questions]
    scores: dict[str, dict[str, Score]] = {}
    total = len(by) * len(questions)
    for part, way in enumerate(by):
        found: dict[int, list[list[int]]] = {k: [] for k in (*ks, depth)}
        for place, question in enumerate(questions):
            for k, ids in found.items():
                ids.append([hit.id for hit in kb.search(question.text, k=k, by=way, **(options or {}))])
            on_query(part * len(questions) + place + 1, total)
        scores[way] = dict(_scores(found, relevant, ks, depth=depth, seed=seed))
    return RetrievalReport(
        kb=kb.name,
        queries=queries,
        n=len(questions),
        pairs=len(kb),
        relevant_median=float(np.median([len(each) for each in relevant])),
        depth=depth,
        scores=scores,
    )


def _check(by: Sequence[str], ks: Sequence[int], depth: int) -> None:
    unknown = [way for way in by if way not in get_args(By)]
    if unknown or not by:
        raise ConfigError(f"one searches by {', '.join(get_args(By))}, got {unknown[0] if unknown else 'none'!r}")
    if not ks or min(*ks, depth) < 1:
        raise ConfigError(f"k and depth are 1 or more, got {', '.join(map(str, ks)) or 'no k'} and {depth}")


def _scores(
    found: Mapping[int, list[list[int]]], relevant: list[set[int]], ks: Sequence[int], *, depth: int, seed: int
) -> Iterator[tuple[str, Score]]:
    for k in ks:
        yield f"recall@{k}", metrics.mean_score(metrics.recalls(found[k], relevant, k), seed=seed)
        yield f"hit@{k}", metrics.mean_score(metrics.hits(found[k], relevant, k), seed=seed)
    ranks = metrics.reciprocal_ranks(found[depth], relevant)
    yield "mrr", metrics.mean_score(ranks, seed=seed)


# What people look at


def make_table(report: RetrievalReport) -> "RichTable":
    """A row a measure, a column a kind of search."""
    from rich import box
    from rich.table import Table as RichTable

    ways = list(report.scores)
    table = RichTable("", *ways, title=_title(report), caption=_caption(report), box=box.SIMPLE)
    for name in next(iter(report.scores.values())):
        table.add_row(name, *(cell_text(cell_of(report.scores[way][name])) for way in ways))
    return table


def print_report(report: RetrievalReport, written: Sequence[Path] = ()) -> None:
    """The table to stdout, and below it the files that were written."""
    from rich.console import Console

    console = Console()
    console.print(make_table(report))
    for path in written:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def write_report(report: RetrievalReport, out: Path) -> list[Path]:
    """Write the result for `radt report`, with everything in it."""
    names = next(iter(report.scores.values()))
    rows: list[tuple[Cell, ...]] = [
        (name, *(cell_of(report.scores[way][name]) for way in report.scores)) for name in names
    ]
    table = Table(title=_title(report), columns=("", *report.scores), rows=tuple(rows), note=_caption(report))
    result = Result(
        kind="retrieval",
        title="Retrieval",
        command=typed_command(),
        facts={"kb": report.kb, "pairs": report.pairs, "queries": report.queries, "N": report.n},
        tables=(table,),
        data=report.to_json(),
    )
    return [result.save(out)]


def _title(report: RetrievalReport) -> str:
    return f"{report.n:,} queries to {report.pairs:,} pairs"


def _caption(report: RetrievalReport) -> str:
    return (
        f"recall: share of the relevant pairs found (their number is {report.relevant_median:g} in the median); hit: "
        f"any of them found; mrr: 1 / rank of the first, among {report.depth} hits. In brackets 95 % intervals."
    )
