"""`radt index neighbors`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from index.commands.options import (
    JsonOption,
    ModelOption,
    open_for_query,
    print_json,
    print_table,
    say,
)

if TYPE_CHECKING:
    from index.search.neighbors import NeighborsConfig, NeighborsReport


def add_neighbors(app: typer.Typer, default_model: str | None) -> None:
    """Register `neighbors`."""

    @app.command()
    def neighbors(
        source: Annotated[str, typer.Argument(help="Training pairs, in any layout that `build` reads.")],
        kb: Annotated[str, typer.Option("--kb", help="Folder or URL of the knowledge base.")],
        out: Annotated[Path, typer.Option(dir_okay=False, help="The Parquet file to write.")],
        k: Annotated[int, typer.Option("-k", min=1, help="How many neighbours of each pair.")] = 8,
        by: Annotated[Literal["hybrid", "clip", "bm25"], typer.Option(help="What to compare by.")] = "hybrid",
        fusion: Annotated[Literal["rrf", "sum", "product"], typer.Option(help="How hybrid joins the two.")] = "rrf",
        ask_with: Annotated[
            Literal["caption", "image"], typer.Option("--query", help="What stands for the pair on the CLIP side.")
        ] = "caption",
        exclude_group: Annotated[
            bool, typer.Option("--exclude-group/--include-own", help="Leave out what shows its own picture.")
        ] = True,
        where: Annotated[str | None, typer.Option(help="An SQL filter on the neighbours: width >= 256.")] = None,
        dataset: Annotated[
            str | None, typer.Option(help="What `build` called the dataset of these pairs: it is a part of their ids.")
        ] = None,
        allow_partial: Annotated[
            bool, typer.Option("--allow-partial/--no-allow-partial", help="Take shards that are not complete.")
        ] = False,
        model: ModelOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Write the K neighbours of every training pair, none showing its picture. Run it again to go on."""
        from index.search.neighbors import NeighborsConfig, write_neighbors

        config = NeighborsConfig(k=k, by=by, fusion=fusion, query=ask_with, exclude_group=exclude_group, where=where)
        base = open_for_query(kb, model, default_model)
        with _progress(as_json) as hooks:
            report = write_neighbors(base, source, out, config, dataset=dataset, allow_partial=allow_partial, **hooks)
        print_json({"kb": kb, **report.to_json()}) if as_json else _print_report(report, config)


@contextmanager
def _progress(is_silent: bool) -> Iterator[dict[str, Callable[[Any], None]]]:
    """A line on stderr while it runs, on a terminal only."""
    if is_silent or not sys.stderr.isatty():
        yield {}
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.completed:.0f} pairs, {task.fields[shards]} shards done")
    with Progress(SpinnerColumn(), text, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("neighbors", total=None, shards=0)
        done: list[str] = []

        def on_shard(shard: str) -> None:
            done.append(shard)
            progress.update(task, shards=len(done))

        yield {"on_pairs": lambda pairs: progress.update(task, advance=pairs), "on_shard": on_shard}


def _print_report(report: "NeighborsReport", config: "NeighborsConfig") -> None:
    rows = {
        "pairs": f"{report.pairs:,}, {report.short:,} of them with fewer than {config.k} neighbours",
        "shards": f"{report.shards_done:,} done, {report.shards_kept:,} done before, {len(report.skipped):,} skipped",
        "unreadable": f"{report.bad:,}",
        "snapshot": str(report.snapshot),
        "seconds": f"{report.seconds:.1f}",
    }
    print_table(report.out, list(rows.items()))
    if report.warning:
        say(report.warning)
    for shard in report.skipped:
        say(f"skipped {shard.name}: {shard.reason}")
