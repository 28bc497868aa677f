"""What people look at after a sweep of EmojiDrawBench: tables, a page in Markdown, a curve, and sheets of pictures."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from index.atomic import write_bytes
from index.errors import MissingExtraError
from radt.corpora.emoji import load_entities
from radt.evaluation.emoji_draw_kinds import BenchKind, Outcome, Prompt
from radt.evaluation.emoji_draw_sheet import marked
from radt.evaluation.emoji_draw_sweep import ROWS_KEPT, UNITS, Drawn, KindsBench, Point, SweepReport
from radt.evaluation.plain_results import JUDGES
from radt.evaluation.results import Cell, Estimate, Line, Plot, Result, Table, typed_command
from radt.evaluation.results import Picture as ResultPicture
from radt.evaluation.tables import cell_text, markdown_table
from radt.sheet import Picture, Row, Sheet, draw_sheet

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MEASURES = {
    "entity_top1": "entity top-1",
    "entity_top5": "entity top-5",
    "both_entities": "both entities",
    "ground": "ground",
    "place": "place",
    "count": "count",
    "size": "size",
    "agreement": "all facts",
    "all_right": "all right",
    "found": "neighbours found",
    "drew_shown": "drew what neighbours show",
    "copied": "copied",
}
FACTS = ("both_entities", "ground", "place", "count", "size")
CURVES = ("entity_top1", "both_entities", "ground", "place", "count", "size", "agreement")
AXES = {"k": "neighbours, K", "text-share": "share of the text, eta"}
TITLES = {
    "arms": "with retrieval, without, and with one neighbour wrong",
    "k": "over the number of neighbours",
    "text-share": "over the share of the text in guidance, eta",
    "by": "by what neighbours are found by",
    "neighbors": "over where the neighbours come from",
    "new-entity": "before and after the entities are added to the knowledge base",
}
ONCE_A_KIND = "Every kind asks for the same classes, so intervals are as wide as those of one prompt a class."
NAMES = {
    "with_retrieval": "with retrieval",
    "without_retrieval": "without",
    "with_one_wrong": "one wrong",
    "found": "found",
    "none": "none",
    "one_wrong": "found, one wrong",
    "swapped": "others' pictures, own captions",
    "removed": "found, entity removed",
    "by_hand": "right, by hand",
    "by_hand_one_wrong": "by hand, one wrong",
}


def tables(report: SweepReport) -> list[Table]:
    """A row a point and what the true scenes score: a table over all kinds, if there are several, and one for each.

    The three arms over several kinds begin with the table that is quoted: a row a kind.
    """
    made = []
    if len(report.kinds) > 1:
        overall = [report.overall[point.name] for point in report.points]
        made += [_by_kind(report)] if report.sweep == "arms" else []
        pooled = _table("Prompts of all kinds", overall, report, ceiling=report.ceiling["all"])
        made.append(replace(pooled, note=f"{pooled.note} {ONCE_A_KIND}"))
    for kind in report.kinds:
        found = [report.by_kind[point.name][kind] for point in report.points]
        made.append(_table(f"Prompts of kind {kind!r}", found, report, ceiling=report.ceiling[kind]))
    return made


def _by_kind(report: SweepReport) -> Table:
    """The entity in every arm, and what else is read off the first arm's pictures, with a row a kind."""
    first, *others = report.points
    rows = {kind: report.by_kind[first.name][kind] for kind in report.kinds}
    facts = [key for key in FACTS if any(key in row for row in rows.values())]
    cells: list[tuple[Cell, ...]] = [
        (
            kind,
            _estimate(row["entity_top1"]),
            *(_share(report.by_kind[point.name][kind]["entity_top1"]) for point in others),
            *(_share(row[key]) if key in row else None for key in facts),
        )
        for kind, row in rows.items()
    ]
    return Table(
        title="By kind of prompt",
        columns=("", MEASURES["entity_top1"], *(NAMES[p.name] for p in others), *(MEASURES[key] for key in facts)),
        rows=tuple(cells),
        note=f"{report.n} prompts of each kind: the entity in every arm, then what else is right with retrieval.",
    )


def _table(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    report: SweepReport,
    *,
    ceiling: Mapping[str, float],
) -> Table:
    keys = [key for key in MEASURES if any(key in row for row in rows)]
    columns = ("", *(MEASURES[key] for key in keys), "likeness to a neighbour", "s/picture")
    cells: list[tuple[Cell, ...]] = [
        (
            NAMES.get(point.name, point.name),
            *(_estimate(row[key]) if key in row else None for key in keys),
            row["copy_similarity"],
            row["seconds_per_image"],
        )
        for point, row in zip(report.points, rows, strict=True)
    ]
    cells.append(("true scenes", *(ceiling.get(key) for key in keys), None, None))
    return Table(title=title, columns=columns, rows=tuple(cells), note=_note(rows))


def _estimate(share: Mapping[str, float]) -> Estimate:
    return Estimate(value=share["value"], low=share["low"], high=share["high"])


def _share(share: Mapping[str, float]) -> str:
    """Two decimals, as the interval beside it has."""
    return f"{share['value']:.2f}"


def _note(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many prompts the shares are of; those that fewer prompts ask for are named."""
    note = f"{rows[0]['n']} prompts a row; 95 % intervals."
    fewer = {key: sorted({row[key]["n"] for row in rows if "n" in row.get(key, {})}) for key in MEASURES}
    told = [f"{MEASURES[key]} of {' or '.join(map(str, counts))}" for key, counts in fewer.items() if counts]
    return f"{note} Of fewer, those that ask for it: {', '.join(told)}." if told else note


def plot(report: SweepReport) -> Plot | None:
    """The curve over a number; None where points are names."""
    if any(point.x is None for point in report.points):
        return None
    x = tuple(float(point.x or 0) for point in report.points)
    lines = []
    for key in CURVES:
        found = [report.overall[point.name].get(key) for point in report.points]
        if all(found):
            y, low, high = (tuple(each[part] for each in found if each) for part in ("value", "low", "high"))
            lines.append(Line(name=MEASURES[key], x=x, y=y, low=low, high=high))
    return Plot(
        title=f"EmojiDrawBench {TITLES[report.sweep]}",
        x=AXES[report.sweep],
        y="share of the prompts that ask for it",
        lines=tuple(lines),
    )


def heading(report: SweepReport) -> str:
    """What was measured, at which size, and whether by fast twins."""
    size = report.facts["model"]["image_size"]
    twin = ", fast twins" if report.facts["settings"]["fast"] else ""
    return f"EmojiDrawBench {TITLES[report.sweep]}; {size}x{size}{twin}"


def to_result(report: SweepReport, out: Path, *, curve: str) -> Result:
    """As all results are stored, for `radt report`: the tables, the curve, and the sheets that lie in `out`."""
    drawn = plot(report)
    facts = {
        "model": f"{report.facts['model']['name']} ({report.facts['model']['digest'][:12]})",
        "knowledge base": f"{report.facts['kb']['pairs']} pairs",
        "prompts": f"{report.n} of each kind: {', '.join(report.kinds)}",
        "recogniser": f"{report.facts['recognizer']['digest']}, {report.facts['recognizer']['classes']} classes",
    }
    return Result(
        kind=f"emoji-draw-{report.sweep}",
        title=heading(report),
        command=typed_command(),
        facts=facts,
        tables=tuple(tables(report)),
        plots=() if drawn is None else (drawn,),
        pictures=(*([] if drawn else [ResultPicture(file=curve, title="Every measure")]), *sheets(report, out)),
        data=report.to_json(),
    )


def sheets(report: SweepReport, out: Path) -> list[ResultPicture]:
    """The sheets that were written as each point's prompts of one kind were done, as far as they are there.

    Whoever kept a point may have deleted its pictures, or had a version that wrote fewer.
    """
    found = []
    for kind in report.kinds:
        for point in report.points:
            file, title = f"{UNITS}/{point.name}.{kind}", f"{NAMES.get(point.name, point.name)}: {kind}"
            found.append(ResultPicture(file=f"{file}.png", title=title))
            if point.source == "found" and report.by_kind[point.name][kind]["all_right"]["value"] < 1:
                found.append(ResultPicture(file=f"{file}.failures.png", title=f"{title}, what went wrong"))
    return [picture for picture in found if (out / picture.file).is_file()]


def write_sweep(report: SweepReport, out: Path) -> list[Path]:
    """Write the curve, the page and, last, the results; each file whole. What was written."""
    curve = out / f"{report.sweep}.png"
    write_bytes(curve, draw_curve(report))
    page = out / f"{report.sweep}.md"
    write_bytes(page, markdown(report, out, curve=curve.name).encode())
    results = out / f"{report.sweep}.json"
    write_bytes(results, (json.dumps(report.to_json(), indent=1) + "\n").encode())
    return [curve, page, results, to_result(report, out, curve=curve.name).save(out)]


def markdown(report: SweepReport, out: Path, *, curve: str) -> str:
    """The tables and the curve as one page."""
    judge = JUDGES[report.facts["recognizer"]["judge"]]
    asked = report.facts["settings"]
    told = {"by": f"by {asked['by']}", "k": f"K = {asked['k']}", "text-share": f"eta = {asked['text_share']:g}"}
    search = ", ".join(text for name, text in told.items() if name != report.sweep)  # the points say what is swept
    parts = [
        f"# {heading(report)}\n",
        f"Model {report.facts['model']['name']}, {report.facts['kb']['pairs']:,} pairs, {report.n} held-out classes in "
        f"prompts of {len(report.kinds)} kinds, {search}, "
        f"{asked['sampler']} at {asked['steps']} steps, seed {asked['seed']}. The entity is judged by {judge}.\n",
        f"![{TITLES[report.sweep]}]({curve})\n",
    ]
    parts.extend(f"## {table.title}\n\n{markdown_table(table)}\n\n{table.note}\n" for table in tables(report))
    parts.extend(f"## {sheet.title}\n\n![{sheet.title}]({sheet.file})\n" for sheet in sheets(report, out))
    return "\n".join(parts)


def print_sweep(report: SweepReport, written: Sequence[Path] = ()) -> None:
    """Print the tables to stdout, and below them the files that were written."""
    from rich.console import Console

    console = Console()
    for table in tables(report):
        console.print(_turned(table))
    for path in written:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def _turned(table: Table) -> "RichTable":
    """With a column a point, which is narrower: intervals stand below the values."""
    from rich import box
    from rich.table import Table as RichTable

    made = RichTable("", *(str(row[0]) for row in table.rows), title=table.title, caption=table.note, box=box.SIMPLE)
    for place, name in enumerate(table.columns[1:], 1):
        cells = [row[place] for row in table.rows]
        texts = [
            f"{cell.value:.2f}\n[dim]{cell.low:.2f}-{cell.high:.2f}" if isinstance(cell, Estimate) else cell_text(cell)
            for cell in cells
        ]
        made.add_row(name, *texts)
    return made


def draw_curve(report: SweepReport) -> bytes:
    """Every measure over the points, with its interval: a PNG. Points that are names stand at equal distances."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("a curve needs matplotlib: pip install 'radt[eval]'") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = list(range(len(report.points)))
    is_named = any(point.x is None for point in report.points)
    for number, key in enumerate(CURVES):
        shown = [
            (place, report.overall[point.name].get(key)) for place, point in zip(places, report.points, strict=True)
        ]
        known = [(_x(report, place) + 0.0, each) for place, each in shown if each is not None]
        if not known:
            continue
        x = [at for at, _ in known]
        spread = (max(x) - min(x) or 1) * 0.006 * (number - len(CURVES) / 2)
        y = [each["value"] for _, each in known]
        errors = [
            [each["value"] - each["low"] for _, each in known],
            [each["high"] - each["value"] for _, each in known],
        ]
        axes.errorbar(
            [at + spread * (5 if is_named else 1) for at in x],
            y,
            yerr=errors,
            fmt="o" if is_named else "o-",  # no line where there is nothing between points
            markersize=4,
            capsize=2,
            label=MEASURES[key],
        )
    if is_named:
        axes.set_xticks(places, [NAMES.get(point.name, point.name) for point in report.points])
    else:
        axes.set_xticks([float(point.x or 0) for point in report.points])
        axes.set_xlabel(AXES[report.sweep])
    axes.set_ylim(-0.02, 1.04)
    axes.set_ylabel("share of the prompts that ask for it")
    axes.set_title(f"EmojiDrawBench {TITLES[report.sweep]}, n = {report.n} a kind", fontsize=11)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    buffer = io.BytesIO()
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _x(report: SweepReport, place: int) -> float:
    """Where a point stands: at its number where all have one, else one after the other."""
    if any(point.x is None for point in report.points):
        return float(place)
    return float(report.points[place].x or 0)


def write_unit_sheets(folder: Path, bench: KindsBench, drawn: Drawn, *, point: Point, kind: BenchKind) -> None:
    """One kind at one point: what was found, what was drawn and read, and the truth.

    A sheet of the first prompts, and one of the first that went wrong where neighbours were found.
    """
    prompts = bench.of_kind(kind)
    name, title = f"{point.name}.{kind}", f"{NAMES.get(point.name, point.name)}: prompts of kind {kind!r}"
    first = range(min(ROWS_KEPT, len(prompts)))
    told = f"the first {len(first)} of {len(prompts)}; a tick: every entity and every fact is right"
    _write_sheet(folder / f"{name}.png", bench, drawn, kind=kind, places=first, title=title, subtitle=told)
    wrong = [place for place, outcome in enumerate(drawn.outcomes) if not outcome.is_right]
    if point.source == "found" and wrong:
        first_of = f"the first {ROWS_KEPT} of " if len(wrong) > ROWS_KEPT else ""
        told = f"{first_of}the {len(wrong)} of {len(prompts)} that went wrong"
        places = wrong[:ROWS_KEPT]
        path = folder / f"{name}.failures.png"
        _write_sheet(path, bench, drawn, kind=kind, places=places, title=title, subtitle=told)


def _write_sheet(
    path: Path, bench: KindsBench, drawn: Drawn, *, kind: BenchKind, places: Sequence[int], title: str, subtitle: str
) -> None:
    prompts = bench.of_kind(kind)
    sheet = Sheet(
        title=title,
        subtitle=subtitle,
        columns=("Neighbours", "Drawn", "Truth"),
        rows=tuple(_row(bench, drawn, place, prompts[place]) for place in places),
    )
    buffer = io.BytesIO()
    draw_sheet(sheet).quantize(256).save(buffer, "PNG")  # a third of the bytes: a report shows them all
    write_bytes(path, buffer.getvalue())


def _row(bench: KindsBench, drawn: Drawn, place: int, prompt: Prompt) -> Row:
    outcome = drawn.outcomes[place]
    neighbors = tuple(
        Picture(
            image=marked(each.neighbor.original or each.neighbor.image, each.class_id in prompt.class_ids),
            lines=(each.neighbor.caption,),
        )
        for each in drawn.shown[place][:4]
    )
    picture = Picture(image=marked(Image.fromarray(drawn.pictures[place]), outcome.is_right), lines=told(outcome))
    truth = Picture(
        image=Image.fromarray(bench.truths[prompt.kind][place]),
        lines=(", ".join(entity.name for entity in prompt.entities),),
    )
    return Row(prompt=prompt.text, cells=(neighbors, (picture,), (truth,)), note=f"seed {prompt.seed}")


def told(outcome: Outcome) -> tuple[str, ...]:
    """What was read, in two or three lines."""
    names = {entity.class_id: entity.name for entity in reversed(load_entities())}
    wrong = [fact for fact, holds in outcome.agrees.items() if not holds]
    seen = ", ".join(names[guess] for guess in outcome.guesses) or "no figure"
    return (
        seen,
        f"{outcome.reading.count} on {outcome.reading.ground}, rank {' and '.join(map(str, outcome.ranks))}",
        *((f"wrong: {', '.join(wrong)}",) if wrong else ()),
    )
