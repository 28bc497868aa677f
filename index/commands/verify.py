"""`radt index verify`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from index.commands.options import JsonOption, KbOption, ModelOption, escape, open_for_query, print_json, say

if TYPE_CHECKING:
    from index.verify import Verification

_SHOWN = 20  # failures; --json has all of them


def add_verify(app: typer.Typer, default_model: str | None) -> None:
    """Register `verify`."""

    @app.command()
    def verify(
        kb: KbOption,
        sample: Annotated[
            int | None, typer.Option(min=1, metavar="N", help="How many rows, drawn at random; 256 if not given.")
        ] = None,
        every: Annotated[bool, typer.Option("--all/--no-all", help="Every row, and every shard.")] = False,
        seed: Annotated[int, typer.Option(help="Draws the rows.")] = 0,
        model: ModelOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Check that id, vector, caption and image belong together, and that searches find them. Exit 1 if not."""
        from index.verify import SAMPLE
        from index.verify import verify as verify_knowledge_base

        if every and sample is not None:
            raise typer.BadParameter("give --sample or --all, not both")
        sample = None if every else sample or SAMPLE
        base = open_for_query(kb, model, default_model)
        rows = min(sample or len(base), len(base))
        with _progress(rows, is_silent=as_json) as advance:
            report = verify_knowledge_base(base, sample=sample, seed=seed, on_rows=advance)
        print_json(report.to_json()) if as_json else _print(report)
        if not report.is_sound:
            raise typer.Exit(1)


@contextmanager
def _progress(rows: int, *, is_silent: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress

    off = is_silent or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=off) as progress:
        task = progress.add_task("rows", total=rows)
        yield lambda done: progress.advance(task, done)


def _print(report: "Verification") -> None:
    from rich.console import Console
    from rich.table import Table

    from index.verify import LINKS

    table = Table("link", "what must hold", "checked", "wrong", title=escape(f"{report.sampled:,} rows of {report.kb}"))
    for link, meaning in LINKS.items():
        failed = report.failed(link)
        checked = f"{report.checked[link]:,}" if report.checked[link] or link not in report.notes else "-"
        table.add_row(link, meaning, checked, f"[red]{failed:,}[/red]" if failed else "0")
    console = Console()
    console.print(table)
    for link, note in report.notes.items():
        console.print(escape(f"{link}: {note}"))
    for failure in report.failures[:_SHOWN]:
        console.print(escape(f"{failure.link}: {f'{failure.id}: ' if failure.id is not None else ''}{failure.what}"))
    if len(report.failures) > _SHOWN:
        console.print(f"... and {len(report.failures) - _SHOWN:,} more; --json has all of them")
    if report.unreadable:
        console.print(escape(f"not readable: {len(report.unreadable):,}, such as {report.unreadable[0]}"))
    console.print("sound" if report.is_sound else f"[red]{len(report.failures):,} broken[/red]")
    if not report.is_sound:
        say("take broken pairs down with `radt index remove --id ID`, or build again in another folder")
