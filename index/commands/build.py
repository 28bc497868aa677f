"""`radt index build`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from index.commands.options import (
    DatasetOption,
    JsonOption,
    KbOption,
    ModelOption,
    WaitOption,
    names,
    print_json,
    print_table,
    say,
)
from index.errors import ModelError

if TYPE_CHECKING:
    from index.ingest.build import BuildReport
    from index.knowledge_base import KnowledgeBase
    from index.records import ShardRecord


def add_build(app: typer.Typer, default_model: str | None) -> None:
    """Register `build`."""

    @app.command()
    def build(
        sources: Annotated[list[str], typer.Argument(help="Tars, or folders of tars or of captioned images.")],
        kb: KbOption,
        model: ModelOption = None,
        dataset: DatasetOption = None,
        searcher: Annotated[
            Literal["auto", "exact", "scann", "lance"],
            typer.Option(help="auto: exact when small, else ScaNN or Lance."),
        ] = "auto",
        engine: Annotated[Literal["local"], typer.Option(help="Who runs the shards.")] = "local",
        workers: Annotated[
            int | None, typer.Option(min=1, help="Decoding threads; one a processor if not given.")
        ] = None,
        allow_partial: Annotated[
            bool, typer.Option("--allow-partial/--no-allow-partial", help="Take shards that are not complete.")
        ] = False,
        max_bad_fraction: Annotated[
            float, typer.Option(min=0.0, max=1.0, help="Share of bad samples above which the build fails.")
        ] = 0.1,
        seed: Annotated[int, typer.Option(help="Seed of the searcher's training.")] = 0,
        prune: Annotated[
            bool, typer.Option("--prune/--no-prune", help="Take out pairs of shards that the sources no longer have.")
        ] = False,
        wait: WaitOption = 0,
        as_json: JsonOption = False,
    ) -> None:
        """Bring pairs in: exactly once, whatever interrupts it. Run it again to go on, or to take in what changed."""
        from index.ingest.build import BuildConfig, check_sources
        from index.ingest.build import build as build_knowledge_base

        config = BuildConfig(
            dataset=dataset,
            searcher=searcher,
            allow_partial=allow_partial,
            max_bad_fraction=max_bad_fraction,
            workers=workers,
            seed=seed,
            prune=prune,
            wait=wait,
        )
        check_sources(sources, kb)  # before a model is loaded
        base = _open_or_create(kb, model, default_model)
        with _progress(as_json) as hooks:
            report = build_knowledge_base(base, sources, config, on_wait=say, **hooks)
        print_json(report.to_json()) if as_json else _print_report(report)


def _open_or_create(kb: Path, model: str | None, default_model: str | None) -> "KnowledgeBase":
    """A knowledge base keeps the model it was made with; one that is asked for by name must be that one."""
    from index.embedder import ClipEmbedder
    from index.knowledge_base import MANIFEST, KnowledgeBase

    if model is None and (kb / MANIFEST).exists():
        return KnowledgeBase.open(kb, models=names(default_model))
    name = model or default_model
    if name is None:
        raise ModelError(f"say which model is to make the vectors of {kb}: --model ViT-B-32, or a model's folder")
    return KnowledgeBase.create(kb, ClipEmbedder.load(name))


@contextmanager
def _progress(is_silent: bool) -> Iterator[dict[str, Callable[[Any], None]]]:
    """A line on stderr while it runs, on a terminal only: what to call with each batch and each shard."""
    if is_silent or not sys.stderr.isatty():
        yield {}
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.completed:.0f} images, {task.fields[shards]} shards stored")
    with Progress(SpinnerColumn(), text, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("build", total=None, shards=0)
        stored: list[ShardRecord] = []

        def on_batch(images: int) -> None:
            progress.update(task, advance=images)

        def on_shard(record: "ShardRecord") -> None:
            stored.append(record)
            progress.update(task, shards=len(stored))

        yield {"on_batch": on_batch, "on_shard": on_shard}


def _print_report(report: "BuildReport") -> None:
    rows = {
        "pairs": f"{report.pairs_total} ({report.pairs_added} added, {report.pairs_per_second:.0f}/s)",
        "quarantined": str(report.quarantined),
        "shards": f"{report.shards_done} read, {report.shards_unchanged} unchanged, {report.shards_skipped} skipped",
        "searcher": f"{report.searcher}, recall@10 {report.recall_at_10:.3f}",
        "size": f"{report.bytes / 1e6:.1f} MB",
        "seconds": f"{report.seconds:.1f}",
    }
    print_table(report.kb, list(rows.items()))
    for shard in report.skipped:
        print(f"skipped {shard.name}: {shard.reason}", file=sys.stderr)
