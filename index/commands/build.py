"""`radt index build`."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from index.commands.options import (
    DatasetOption,
    JsonOption,
    RamOption,
    RecallOption,
    WaitOption,
    names,
    print_json,
    print_table,
    say,
    usage_of,
)
from index.errors import ModelError

if TYPE_CHECKING:
    from index.ingest.build import BuildReport
    from index.ingest.meter import Meter
    from index.ingest.parts import Part
    from index.knowledge_base import KnowledgeBase

_SHOWN = 20  # skipped shards; --json has all of them


def add_build(app: typer.Typer, default_model: str | None) -> None:
    """Register `build`."""

    @app.command()
    def build(
        sources: Annotated[list[str], typer.Argument(help="Folders, files or patterns, here or in a bucket.")],
        kb: Annotated[Path, typer.Option("--kb", help="Folder of the knowledge base; made where there is none.")],
        model: Annotated[
            str | None,
            typer.Option(
                help="What makes the vectors: an open_clip name (NAME or NAME/WEIGHTS), or a model folder or bundle. A "
                "knowledge base keeps its first."
            ),
        ] = None,
        dataset: DatasetOption = None,
        searcher: Annotated[
            Literal["auto", "exact", "scann", "lance"],
            typer.Option(help="auto: exact when small, else ScaNN or Lance."),
        ] = "auto",
        engine: Annotated[
            Literal["local", "ray"], typer.Option(help="Who runs the shards: this process, or a Ray cluster.")
        ] = "local",
        ray_address: Annotated[
            str | None, typer.Option(metavar="HOST:PORT", help="Of the cluster, if Ray does not find it by itself.")
        ] = None,
        workers: Annotated[
            int | None,
            typer.Option(min=1, help="Decoding threads, or workers of Ray; as the machines have processors or GPUs."),
        ] = None,
        part: Annotated[
            str | None,
            typer.Option(
                metavar="I/N",
                callback=usage_of(_parse_part),
                help="Only the I-th of N shares of the shards, beside the other N-1 builds.",
            ),
        ] = None,
        copy_images: Annotated[
            bool,
            typer.Option(
                "--copy-images/--no-copy-images", help="Keep the images of shards read now: their sources may go."
            ),
        ] = False,
        thumbnails: Annotated[
            int | None,
            typer.Option(min=1, metavar="N", help="Keep JPEGs of at most N pixels a side, of shards read now."),
        ] = None,
        allow_partial: Annotated[
            bool, typer.Option("--allow-partial/--no-allow-partial", help="Take shards that are not complete.")
        ] = False,
        max_bad_fraction: Annotated[
            float,
            typer.Option(
                min=0.0,
                max=1.0,
                help="Share of bad samples above which the build fails: in the end, or after any shard from 10,000 on.",
            ),
        ] = 0.1,
        recall: RecallOption = None,
        min_recall: Annotated[
            float | None,
            typer.Option(
                min=0.01, max=1.0, help="Fail (exit 1) when the searcher, once measured, finds less of the true ten."
            ),
        ] = None,
        ram: RamOption = None,
        seed: Annotated[int, typer.Option(help="Seed of the searcher's training.")] = 0,
        duplicates: Annotated[
            bool | None,
            typer.Option(
                "--duplicates/--no-duplicates",
                help="Find which pictures are alike; not given: as before, at first yes.",
            ),
        ] = None,
        prune: Annotated[
            bool, typer.Option("--prune/--no-prune", help="Take out pairs of shards that the sources no longer have.")
        ] = False,
        wait: WaitOption = 0,
        as_json: JsonOption = False,
    ) -> None:
        """Bring pairs in: exactly once, whatever interrupts it. Run it again to go on, or to take in what changed."""
        from index.ingest.build import BuildConfig, check_sources
        from index.ingest.build import build as build_knowledge_base
        from index.ingest.decode import KeepImages
        from index.ingest.meter import Meter
        from index.ingest.parts import Part
        from index.search.sizes import parse_bytes

        if ray_address is not None and engine != "ray":
            raise typer.BadParameter("--ray-address goes with --engine ray")
        if prune and part is not None:
            raise typer.BadParameter("--prune looks at all shards, and --part at its own: prune without --part")
        config = BuildConfig(
            dataset=dataset,
            searcher=searcher,
            recall=recall,
            min_recall=min_recall,
            ram=parse_bytes(ram) if ram else None,
            allow_partial=allow_partial,
            max_bad_fraction=max_bad_fraction,
            engine=engine,
            ray_address=ray_address,
            workers=workers,
            part=Part.parse(part) if part else None,
            keep=KeepImages(copy=copy_images, thumbnail=thumbnails),
            seed=seed,
            duplicates=duplicates,
            prune=prune,
            wait=wait,
        )
        check_sources(sources, kb)  # before a model is loaded
        base = _open_or_create(kb, model, default_model)
        meter = Meter()
        with _live_line(meter, is_silent=as_json):
            report = build_knowledge_base(base, sources, config, on_wait=say, meter=meter)
        print_json(report.to_json()) if as_json else _print_report(report)


def _parse_part(text: str) -> "Part":
    from index.ingest.parts import Part

    return Part.parse(text)


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
def _live_line(meter: "Meter", *, is_silent: bool) -> Iterator[None]:
    """A line on stderr while it runs, on a terminal only: how fast it goes, and what holds it up."""
    if is_silent or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TimeElapsedColumn
    from rich.text import Text

    from index.ingest.meter import progress_line

    class Line(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(meter.note or progress_line(meter.progress))

    columns = (SpinnerColumn(), TimeElapsedColumn(), Line())
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as progress:
        progress.add_task("build", total=None)
        yield


def _print_report(report: "BuildReport") -> None:
    from index.search.sizes import gigabytes

    shards = f"{report.shards_done} read, {report.shards_unchanged} unchanged, {report.shards_skipped} skipped"
    again = f", {report.pairs_replaced:,} read again" if report.pairs_replaced else ""
    again += f", {report.pairs_forbidden:,} turned away: taken down before" if report.pairs_forbidden else ""
    rows = {
        "pairs": f"{report.pairs_total:,} ({report.pairs_added:,} added{again}, {report.pairs_per_second:,.0f}/s)",
        "quarantined": f"{report.quarantined:,}",
        "shards": shards + (f", {report.shards_pruned} pruned" if report.shards_pruned else ""),
        "layouts": ", ".join(f"{layout} ({count})" for layout, count in report.layouts.items()),
        "searcher": f"{report.searcher}, recall@10 {report.recall_at_10:.3f}" if report.searcher else "not yet",
        "size": gigabytes(report.bytes),
        "seconds": f"{report.seconds:.1f}",
        "waiting": _waiting(report),
    }
    print_table(report.kb, list(rows.items()))
    if report.warning:
        say(f"warning: {report.warning}")
    for shard in report.skipped[:_SHOWN]:
        say(f"skipped {shard.name}: {shard.reason}")
    if len(report.skipped) > _SHOWN:
        say(f"... and {len(report.skipped) - _SHOWN:,} more; --json has all of them")
    for note in report.notes:
        say(f"note: {note}")
    kb = shlex.quote(report.kb)
    if report.quarantined:
        say(f"what is in quarantine, and why: radt index stats --quarantine --kb {kb}")
    if report.pairs_added and report.searcher:
        say(f"ask it: radt index query TEXT --kb {kb}")


def _waiting(report: "BuildReport") -> str:
    """What the time until all was read in went to, and what would shorten it."""
    from index.ingest.meter import REMEDIES, matrix_words

    if report.bottleneck is None or not report.shards_done:
        return "nothing to do"
    shares = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in report.stages.items())
    matrices = "" if report.matrix_share is None else f"; {matrix_words(report.matrix_share)}"
    return f"{shares}; bottleneck: {report.bottleneck} ({REMEDIES[report.bottleneck]}){matrices}"
