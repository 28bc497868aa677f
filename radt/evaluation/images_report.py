"""What people look at after `radt evaluate images`: a table, the same as Markdown, and a plot of every measure."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index.atomic import write_bytes
from index.errors import MissingExtraError
from index.text import writable
from radt.evaluation.extractors import HINT
from radt.evaluation.image_measures import LOWER_IS_BETTER, SHARES, Row
from radt.evaluation.image_set import PLOT
from radt.evaluation.images import ExtractorFacts, ImagesReport
from radt.evaluation.metrics import Score
from radt.evaluation.results import Picture, Result, Table, typed_command
from radt.evaluation.tables import cell_of, markdown_table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

COLUMNS = ("measure", "over", "value", "95 % interval", "N", "reals")
RESULTS, PAGE = "results.json", "results.md"
SHORT = 8  # digits of a digest
NAMED = 5  # pictures left out that are named
FROM_ZERO = ("fd", "kid", "cmmd", "density")
PANELS = 4  # beside each other
INK, POINT = "#24292f", "#0969da"


def print_report(report: ImagesReport, written: Sequence[Path] = ()) -> None:
    """Print the table and what belongs to it to stdout, and below it the files that were written."""
    from rich.console import Console

    console = Console()
    console.print(make_table(report))
    for line in (*remarks(report), *(writable(str(path)) for path in written)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def make_table(report: ImagesReport) -> "RichTable":
    """A row a score."""
    from rich import box
    from rich.table import Table as RichTable

    table = RichTable(*COLUMNS, box=box.SIMPLE)
    for cells in table_rows(report):
        table.add_row(*cells)
    return table


def table_rows(report: ImagesReport) -> list[tuple[str, ...]]:
    """The cells of `COLUMNS` as text. A number in brackets points to a note."""
    numbers = {note: number for number, note in enumerate(all_notes(report), start=1)}
    rows: list[tuple[str, ...]] = []
    for row in report.rows:
        marks = "".join(f" [{numbers[note]}]" for note in row.notes)
        real = "" if row.n_real is None else f"{row.n_real:,}"
        over = _over(report, row)
        rows.append((f"{row.title}{marks}", over, number(row.score.value), bounds(row.score), f"{row.n:,}", real))
    return rows


def _over(report: ImagesReport, row: Row) -> str:
    facts = report.facts_of(row)
    return "" if facts is None else _letter(report, facts)


def _letter(report: ImagesReport, facts: ExtractorFacts) -> str:
    """A letter for an extractor, and the beginning of its digest."""
    return f"{chr(ord('A') + report.extractors.index(facts))} {facts.digest[:SHORT]}"


def remarks(report: ImagesReport) -> list[str]:
    """What the table leaves out: extractors, notes, what was not measured, pictures left out."""
    lines = [
        f"{_letter(report, each)}: {each.name}, {each.width} features of {each.resize}" for each in report.extractors
    ]
    lines += [f"[{number}] {note}" for number, note in enumerate(all_notes(report), start=1)]
    for reason in dict.fromkeys(report.skipped.values()):
        those = ", ".join(measure for measure, why in report.skipped.items() if why == reason)
        lines.append(f"not measured: {those}: {reason}")
    for what, left_out in (("pictures", report.left_out), ("reals", report.left_out_real)):
        if left_out:
            named = "; ".join(f"{each.name} ({each.reason})" for each in left_out[:NAMED])
            more = f"; and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
            lines.append(f"left out, {len(left_out)} of the {what}: {named}{more}")
    return lines


def all_notes(report: ImagesReport) -> list[str]:
    """Each note once, in order."""
    return list(dict.fromkeys(note for row in report.rows for note in row.notes))


def number(value: float) -> str:
    """Four digits that count."""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def bounds(score: Score) -> str:
    """The interval, or a dash."""
    return "-" if score.low is None or score.high is None else f"{score.low:.3g} to {score.high:.3g}"


def _short_name(name: str) -> str:
    """Of a path its last part."""
    scheme, colon, rest = name.partition(":")
    return f"{scheme}{colon}{Path(rest).name if '/' in rest and Path(rest).exists() else rest}"


def need_matplotlib() -> None:
    """MissingExtraError without it, to be told before the work and not after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"the plot needs matplotlib, which is not installed: {HINT}") from error


def write_report(report: ImagesReport, out: Path) -> list[Path]:
    """Write `results.json`, `results.md`, `plot.png` and the result for `radt report`, each whole. What was written."""
    plot = draw_plot(report)
    written = [out / PLOT, out / PAGE, out / RESULTS]
    document = {**report.to_json(), "command": typed_command()}
    for path, content in zip(written, (plot, _page(report).encode(), _json(document)), strict=True):
        write_bytes(path, content)
    _result(report, document).save(out)
    return written


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _page(report: ImagesReport) -> str:
    """The report in Markdown."""
    beside = "" if report.real is None else f", beside {report.n_real:,} of `{report.real}`"
    lines = [f"# Pictures of `{report.source}`", "", f"N = {report.n:,}{beside}. `{typed_command()}`", ""]
    lines += [markdown_table(Table(title="Measures", columns=COLUMNS, rows=tuple(table_rows(report)))), ""]
    lines += [f"- {line}" for line in remarks(report)]
    lines += ["", f"![every measure with its 95 % interval]({PLOT})", ""]
    return "\n".join(lines)


def _result(report: ImagesReport, document: dict[str, Any]) -> Result:
    rows = tuple(
        (
            title,  # with the numbers of its notes
            over,
            cell_of(row.score),
            row.n,
            row.n_real,
        )
        for row, (title, over, *_) in zip(report.rows, table_rows(report), strict=True)
    )
    table = Table(
        title="Measures",
        columns=("measure", "over", "value", "N", "reals"),
        rows=rows,
        note=". ".join(remarks(report)),
    )
    return Result(
        kind="images",
        title=f"Measures of pictures: {Path(report.source).name}",
        command=typed_command(),
        facts={"pictures": report.source, "N": report.n, "real": report.real, "reals": report.n_real},
        tables=(table,),
        pictures=(Picture(file=PLOT, title="Every measure with its 95 % interval"),),
        data=document,
    )


def draw_plot(report: ImagesReport) -> bytes:
    """A PNG: a panel for each measure, in it a point for each extractor, with its interval."""
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:  # distances over two extractors are two different numbers: each has its own axis
        groups.setdefault((row.title, "" if row.measure in SHARES else row.extractor), []).append(row)
    across = min(PANELS, len(groups))
    down = -(-len(groups) // across)
    tallest = max(map(len, groups.values()))
    figure = Figure(figsize=(3.3 * across, (1.2 + 0.25 * tallest) * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel, rows in zip(panels, groups.values(), strict=False):
        _draw_panel(panel, rows)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def _draw_panel(panel: Any, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        score = row.score
        if score.low is not None and score.high is not None:
            ends = [score.low, score.high]
            panel.plot(ends, [place, place], color=POINT, alpha=0.45, linewidth=5, solid_capstyle="butt")
        panel.plot([score.value], [place], "o", color=INK, markersize=5)
        panel.annotate(
            number(score.value),
            (score.value, place),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    first = rows[0]
    better = "lower" if first.measure in LOWER_IS_BETTER else "higher"
    panel.set_title(f"{first.title}, N = {first.n:,}\n{better} is better", fontsize=9, color=INK)
    panel.set_yticks(range(len(rows)), [_short_name(row.extractor) for row in rows], fontsize=7)
    panel.set_ylim(len(rows) - 0.4, -0.8)
    if first.measure in SHARES:
        panel.set_xlim(-0.05, 1.05)
    else:
        panel.margins(x=0.25)
        if first.measure in FROM_ZERO:
            panel.set_xlim(left=min([0.0, *(row.score.low or 0.0 for row in rows)]))
        panel.locator_params(axis="x", nbins=4)
        panel.ticklabel_format(axis="x", useOffset=False)
    panel.tick_params(axis="x", labelsize=7)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.grid(axis="x", alpha=0.25)
