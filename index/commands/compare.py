"""`radt index compare`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from index.commands.options import (
    JsonOption,
    ModelOption,
    escape,
    open_all_for_query,
    print_json,
    queries_progress,
    read_lines,
    say,
)

if TYPE_CHECKING:
    from index.search.compare import Difference

_By = Literal["hybrid", "clip", "bm25", "tfidf"]
_Fusion = Literal["rrf", "sum", "product"]
_ROWS = 20  # queries in the table


def add_compare(app: typer.Typer, default_model: str | None) -> None:
    """Register `compare`."""

    @app.command()
    def compare(
        kb_a: Annotated[str, typer.Argument(help="Folder or URL of a knowledge base.")],
        kb_b: Annotated[str, typer.Argument(help="Another, or the same one asked otherwise.")],
        queries: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="A file of queries, one a line.")],
        k: Annotated[int, typer.Option("-k", min=1, help="How many hits.")] = 10,
        by: Annotated[_By, typer.Option(help="What to compare by.")] = "hybrid",
        by_b: Annotated[_By | None, typer.Option(help="The same for the second side, if it differs.")] = None,
        fusion: Annotated[_Fusion, typer.Option(help="How hybrid joins the two.")] = "rrf",
        fusion_b: Annotated[_Fusion | None, typer.Option(help="The same for the second side, if it differs.")] = None,
        exact_b: Annotated[
            bool, typer.Option("--exact-b/--no-exact-b", help="The second side compares every pair.")
        ] = False,
        snapshot_a: Annotated[str | None, typer.Option(help="Ask the first as a build has left it: build-2.")] = None,
        snapshot_b: Annotated[str | None, typer.Option(help="The same for the second.")] = None,
        where: Annotated[str | None, typer.Option(help="An SQL filter for both: width >= 256.")] = None,
        html: Annotated[Path | None, typer.Option(help="Write the pictures side by side.")] = None,
        model: ModelOption = None,
        as_json: JsonOption = False,
    ) -> None:
        """Ask two knowledge bases the same, or one in two ways, and show where they differ."""
        from index.search.compare import Side, summarize
        from index.search.compare import compare as compare_sides
        from index.search.compare_sheet import write_compare_sheet

        asked_b = {"by": by_b or by, "fusion": fusion_b or fusion, "where": where, "exact": exact_b}
        one = open_all_for_query([kb_a], model, default_model, snapshot=snapshot_a)
        other = open_all_for_query([kb_b], model, default_model, snapshot=snapshot_b)
        if one.manifest.fingerprint == other.manifest.fingerprint:
            other.embedder = one.embedder  # so that the model is loaded once
        a = Side(kb=one, asked={"by": by, "fusion": fusion, "where": where})
        b = Side(kb=other, asked=asked_b)
        lines = read_lines(queries)
        with queries_progress(as_json, total=len(lines)) as on_query:
            differences = compare_sides(a, b, lines, k=k, on_query=on_query)
        summary = summarize(differences)
        alike = (f"k {k}", f"where {where}" if where else "")
        names = (
            _name(kb_a, by, fusion, snapshot_a or "", *alike),
            _name(kb_b, by_b or by, fusion_b or fusion, snapshot_b or "", "exact" * exact_b, *alike),
        )
        if html is not None:
            write_compare_sheet(html, a, b, differences, names=names, summary=summary)
            if not as_json:
                say(f"the page is {html}; open it in a browser")
        if as_json:
            document = {"kb_a": kb_a, "kb_b": kb_b, "k": k, "summary": summary}
            print_json({**document, "queries": [one.to_json() for one in differences]})
        else:
            _print(differences, summary, names)


def _name(kb: str, by: str, fusion: str, *more: str) -> str:
    return ", ".join([f"{kb} by {by}", *(word for word in (fusion * (by == "hybrid"), *more) if word)])


def _print(differences: "Sequence[Difference]", summary: dict[str, Any], names: tuple[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"A: {names[0]}\nB: {names[1]}", markup=False, highlight=False)
    table = Table("query", caption=f"the {_ROWS} least alike" if len(differences) > _ROWS else None)
    for name in ("overlap", "rbo", "shift", "ms A", "ms B"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("best hit of A only")
    table.add_column("best hit of B only")
    for one in differences[:_ROWS]:
        shift = "" if one.shift is None else f"{one.shift:+.4f}"
        numbers = (f"{one.overlap:.2f}", f"{one.rbo:.2f}", shift, f"{one.ms_a:.1f}", f"{one.ms_b:.1f}")
        best = [f"{hits[0].rank} {hits[0].caption}" if hits else "" for hits in (one.only_a, one.only_b)]
        table.add_row(escape(one.query), *numbers, *map(escape, best))
    console.print(table)
    console.print(
        f"{summary['queries']} queries, {summary['identical']} answered alike, {summary['disjoint']} with nothing "
        f"shared; median overlap {summary['overlap_median']:.2f}, rbo {summary['rbo_median']:.2f}, "
        f"{summary['ms_median_a']:.1f} ms and {summary['ms_median_b']:.1f} ms",
        highlight=False,
    )
