"""What `radt index query` shows to people: a table of hits, the waterfall of stages, and what was asked about them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from index.commands.options import escape
from index.search.explain import describe_searcher

if TYPE_CHECKING:
    from index.records import Hit
    from index.search.answer import Answer
    from index.search.explain import ExactDifference
    from index.search.retriever import SearchResult

_WORDS_SHOWN = 4  # of a hit
_LONGEST = 160  # characters of a caption
_LONG_MS = 5000.0  # from here on in seconds
_BAR = 20  # characters of the longest bar
_NUMBERS = {"score": 8, "hits": 6, "recall": 6, "ms": 9}  # and the characters of each


def print_answer(
    answer: "Answer", head: Mapping[str, Any], facts: Mapping[str, Any], *, hints: Sequence[str] = ()
) -> None:
    """One query: its hits, then what was asked about them. `facts` are there when it is explained."""
    console, result = Console(), answer.result
    console.print(f"[bold]{escape(answer.question.label)}[/bold]", highlight=False)
    if result.hits:
        console.print(_hit_table(result, answer.terms, with_ranks=bool(facts)))
    else:
        console.print("nothing found")
    if result.shortfall:
        console.print(escape(result.shortfall), highlight=False)
    load = result.timings_ms.get("load", 0.0)
    took = _took(sum(result.timings_ms.values()) - load) + f", and {_took(load)} to load" * (load > 1)
    console.print(
        f"[dim]{escape(_joined(head['kb']))}, snapshot {_joined(head['snapshot'])}, {took}[/dim]", highlight=False
    )
    for hint in hints:
        console.print(f"[dim]{escape(hint)}[/dim]", highlight=False)
    if "words" in result.lists and answer.question.text is not None and not answer.words:
        console.print("[dim]no word of the query is searched for: grammar words and signs are left out[/dim]")
    if facts:
        _print_facts(console, answer, facts)
        console.print(_waterfall(result))
    if answer.exact is not None:
        _print_difference(console, answer.exact)
    if answer.why_not is not None:
        stage, sentence = answer.why_not.stage, escape(answer.why_not.sentence)
        console.print(f"[bold]why not: {stage}[/bold]. {sentence}", highlight=False)


def print_answers(answers: "Iterable[Answer]") -> None:
    """Several queries: the best hit of each, printed when it is there and kept no longer.

    So each row is a table of its own, and columns have the same width whatever is in them.
    """
    console = Console()
    for place, answer in enumerate(answers):
        table = Table(show_header=place == 0, show_edge=False, pad_edge=False, expand=True)
        table.add_column("query", ratio=2)
        table.add_column("best hit", ratio=3)
        best, numbers = _best_hit(answer)
        for name in numbers:
            table.add_column(name, justify="right", no_wrap=True, width=_NUMBERS[name])
        table.add_row(escape(answer.question.label), escape(best), *numbers.values())
        console.print(table)


def _best_hit(answer: "Answer") -> tuple[str, dict[str, str]]:
    """A row of `print_answers`: the caption, and the numbers beside it by name."""
    hits, times = answer.result.hits, answer.result.timings_ms
    numbers = {"score": f"{hits[0].score:.4f}" if hits else "", "hits": f"{len(hits):,}"}
    if answer.exact is not None:
        numbers["recall"] = f"{answer.exact.recall:.2f}"
    numbers["ms"] = f"{sum(times.values()) - times.get('load', 0.0):.1f}"
    return _short(hits[0].caption) if hits else "nothing found", numbers


def _took(ms: float) -> str:
    return f"{ms:.1f} ms" if ms < _LONG_MS else f"{ms / 1e3:.1f} s"


def _joined(value: Any) -> str:
    """One, or what stands there for several knowledge bases."""
    return " + ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _hit_table(result: "SearchResult", terms: Sequence[Mapping[str, float]], *, with_ranks: bool) -> Table:
    """A row for each hit; a column that would be empty is left out."""
    hits, pairs = result.hits, list(zip(result.hits, terms, strict=True))
    columns = {
        "score": [f"{hit.score:.4f}" for hit in hits],
        "clip": [_clip(result, hit, with_rank=with_ranks) for hit in hits],
        "bm25, by word": [_bm25(result, hit, words, with_rank=with_ranks) for hit, words in pairs],
        "caption": [_short(hit.caption) for hit in hits],
        "for": [hit.part or "" for hit in hits],
        "dataset": [hit.dataset for hit in hits] if len({hit.dataset for hit in hits}) > 1 else [],
        "kb": [hit.kb or "" for hit in hits],
        "id": [str(hit.id) for hit in hits],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("", justify="right")
    for name in columns:
        is_number = name in ("score", "clip")
        table.add_column(
            name,
            justify="right" if is_number else "left",
            no_wrap=is_number or name == "id",
            ratio=1 if name == "caption" else None,
        )
    for place, hit in enumerate(hits):
        table.add_row(str(hit.rank), *(escape(cells[place]) for cells in columns.values()))
    return table


def _clip(result: "SearchResult", hit: "Hit", *, with_rank: bool) -> str:
    return "" if hit.clip is None else f"{hit.clip:.3f}{_rank(result, 'vector', hit, is_shown=with_rank)}"


def _bm25(result: "SearchResult", hit: "Hit", words: Mapping[str, float], *, with_rank: bool) -> str:
    if hit.bm25 is None:
        return ""
    return f"{hit.bm25:.2f}{_rank(result, 'words', hit, is_shown=with_rank)}{_words(words)}"


def _rank(result: "SearchResult", stage: str, hit: "Hit", *, is_shown: bool) -> str:
    """` (3)`: the place of a hit in the list of a stage."""
    place = result.rank(stage, hit.id) if is_shown else None
    return "" if place is None else f" ({place:,})"


def _short(caption: str) -> str:
    """A caption that leaves room for the others."""
    return caption if len(caption) <= _LONGEST else f"{caption[:_LONGEST]}..."


def _print_facts(console: Console, answer: "Answer", facts: Mapping[str, Any]) -> None:
    """Who searched each knowledge base, and how common the words of the query are."""
    found = facts["searcher"]
    for searcher in found if isinstance(found, list) else [found]:
        console.print(f"[dim]{describe_searcher(searcher)}[/dim]", highlight=False)
    if answer.words:
        counts = ", ".join(
            f"{word} in {count:,}" if count else f"{word} in none" for word, count in answer.words.items()
        )
        console.print(f"[dim]words of the query in captions: {escape(counts)}[/dim]", highlight=False)


def _words(terms: Mapping[str, float]) -> str:
    """` = wolf 3.1 + hill 1.2`, the heaviest words first."""
    if not terms:
        return ""
    heaviest = sorted(terms.items(), key=lambda item: -item[1])
    parts = [f"{word} {score:.1f}" for word, score in heaviest[:_WORDS_SHOWN]]
    return " = " + " + ".join([*parts, *(["..."] if len(heaviest) > _WORDS_SHOWN else [])])


def _waterfall(result: "SearchResult") -> Table:
    """Each stage with how many candidates it left, of all parts of the prompt together, and when it ran."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("stage")
    table.add_column(f"kept, of {len(result.parts)} parts" if len(result.parts) > 1 else "kept", justify="right")
    table.add_column("")
    table.add_column("ms", justify="right")
    table.add_column("")
    stages = [(name, None, result.timings_ms.get(name, 0.0)) for name in ("embed", "decompose")]
    rows = [row for row in stages if row[2] >= 0.05] + [(one.stage, one.kept, one.ms) for one in result.stages]
    total = sum(ms for _, _, ms in rows) or 1.0
    most = math.log1p(max((kept for _, kept, _ in rows if kept), default=1))  # from millions to a handful
    start = 0.0
    for name, kept, ms in rows:
        count = "" if kept is None else f"{kept:,}"
        left = Bar(most, 0, math.log1p(kept or 0), width=_BAR, color="blue")
        table.add_row(name, count, left, f"{ms:.1f}", Bar(total, start, start + ms, width=_BAR, color="magenta"))
        start += ms
    return table


def _print_difference(console: Console, exact: "ExactDifference") -> None:
    console.print(f"[bold]compared with every pair: recall {exact.recall:.2f}[/bold]; {exact.summary}", highlight=False)
    for fate, hit in exact.lines:
        console.print(f"  {fate}: {escape(_short(hit.caption))} [dim]{hit.id}[/dim]", highlight=False)
