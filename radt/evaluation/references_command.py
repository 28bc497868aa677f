"""The command `radt evaluate references`; heavy imports wait until it runs."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from radt.evaluation.commands import Progress


def add_command(evaluate: typer.Typer, *, progress: Progress) -> None:
    """Put the command under `radt evaluate`."""

    @evaluate.command("references")
    def references(
        folder: Annotated[str, typer.Argument(help="Pictures with captions, or subfolders: two or more a thing.")],
        *,
        model: Annotated[Path | None, typer.Option("--model", help="Model folder. Default: the one inside.")] = None,
        k: Annotated[int | None, typer.Option("-k", min=1, help="Neighbours of a picture.")] = None,
        n: Annotated[
            int | None, typer.Option("-n", "--n", min=2, help="The first so many things. Default: all.")
        ] = None,
        seed: Annotated[int, typer.Option("--seed", min=0, help="Of noise and grounds.")] = 0,
        stages: Annotated[int | None, typer.Option("--stages", help="How many stages of the cascade.")] = None,
        out: Annotated[
            Path | None, typer.Option("--out", help="Keep result, sheets and the knowledge base here.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
    ) -> None:
        """Draw what a folder shows, in a style that no training saw, from all its pictures but one of each thing."""
        from radt.evaluation.references import evaluate_references, write_report
        from radt.evaluation.tables import table_lines

        settings: dict[str, Any] = {name: value for name, value in (("k", k), ("stages", stages)) if value is not None}
        with progress("drawing") as on_step:
            report = evaluate_references(
                folder,
                model=model,
                kb=None if out is None else out / "kb",
                out=out,
                settings=settings,
                n=n,
                seed=seed,
                on_step=on_step,
            )
        written = [] if out is None else write_report(report, out)
        if as_json:
            return typer.echo(json.dumps(report.to_json(), ensure_ascii=False))
        typer.echo("\n".join([*table_lines(report.table()), *map(str, written)]))
