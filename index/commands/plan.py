"""`radt index plan`."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from index.commands.options import JsonOption, ModelOption, RamOption, RecallOption, print_json, print_table
from index.errors import ModelError

if TYPE_CHECKING:
    from index.ingest.plan import Count, Plan


def add_plan(app: typer.Typer, default_model: str | None) -> None:
    """Register `plan`."""

    @app.command()
    def plan(
        sources: Annotated[list[str], typer.Argument(help="What `build` is to be given.")],
        ram: RamOption = None,
        recall: RecallOption = None,
        model: ModelOption = None,
        searcher: Annotated[
            Literal["auto", "exact", "scann", "lance"], typer.Option(help="auto: what fits in --ram.")
        ] = "auto",
        workers: Annotated[int | None, typer.Option(min=1, help="Decoding threads; one a processor.")] = None,
        pairs: Annotated[int | None, typer.Option(min=1, help="Plan for so many pairs like these.")] = None,
        machines: Annotated[int, typer.Option(min=1, help="Machines like this one that share the pairs.")] = 1,
        allow_partial: Annotated[
            bool, typer.Option("--allow-partial/--no-allow-partial", help="Take shards that are not complete.")
        ] = False,
        as_json: JsonOption = False,
    ) -> None:
        """Say what a build will take: bytes on disk and in memory, hours, which searcher. Nothing is made."""
        from index.embedder import ClipEmbedder
        from index.ingest.plan import plan_sources
        from index.search.searcher import DEFAULT_RECALL
        from index.search.sizes import parse_bytes

        name = model or default_model
        if name is None:
            raise ModelError("say which model is to make the vectors: --model ViT-B-32, or a model's folder")
        budget = parse_bytes(ram) if ram else None
        count, costs, made = plan_sources(
            sources,
            ClipEmbedder.load(name),
            pairs=pairs,
            allow_partial=allow_partial,
            ram=budget,
            recall=recall or DEFAULT_RECALL,
            workers=workers,
            machines=machines,
            kind=searcher,
        )
        if as_json:
            from index.config import to_dict

            print_json({"sources": to_dict(count), "costs": to_dict(costs), "plan": made.to_json()})
        else:
            print_table("plan", _rows(count, made))


def _rows(count: "Count", plan: "Plan") -> list[tuple[str, str]]:
    from index.search.sizes import gigabytes

    structure = plan.structure
    about = "about " if count.is_estimate else ""
    layouts = ", ".join(f"{layout} ({number:,})" for layout, number in count.layouts.items())
    known = "pairs estimated by size" if count.pairs is None else f"{about}{count.pairs:,} pairs"
    rows = [
        ("sources", f"{layouts}, {gigabytes(count.bytes)}, {known}"),
        ("pairs", f"{plan.pairs:,}" + (f" on {plan.machines} machines" if plan.machines > 1 else "")),
        ("searcher", f"{structure.kind}{_form(structure)}: {structure.reason}"),
        ("expected recall@10", f"{plan.expected_recall:g}"),
        ("on disk", f"{gigabytes(plan.total_bytes)} ({_parts(plan.bytes)})"),
        ("in memory", f"{gigabytes(plan.memory['building'])} building, {gigabytes(plan.memory['serving'])} serving"),
        ("time", f"{_duration(3600 * plan.hours)} ({_times(plan.seconds)})"),
        ("pairs a second", f"{plan.pairs_per_second:,.0f}; held up by {plan.bottleneck}"),
        ("milliseconds a pair", ", ".join(f"{stage} {1e3 * value:.2f}" for stage, value in plan.stages.items())),
    ]
    each = " (each machine)" if plan.machines > 1 else ""
    rows = [(name + each if name in ("on disk", "in memory", "time") else name, value) for name, value in rows]
    if count.skipped:
        rows.insert(1, ("skipped", f"{count.skipped} shards that are not complete; --allow-partial takes them"))
    return rows + [("note", warning) for warning in plan.warnings]


def _form(structure: Any) -> str:
    if structure.kind != "scann":
        return ""
    shards = f" in {structure.shards} shards" if structure.shards > 1 else ""
    return f"{shards}, vectors {'in memory' if structure.vectors == 'memory' else 'on disk'}"


def _parts(sizes: dict[str, float]) -> str:
    from index.search.sizes import gigabytes

    return ", ".join(f"{name} {gigabytes(size)}" for name, size in sizes.items() if size)


def _times(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items() if value >= 0.05)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
