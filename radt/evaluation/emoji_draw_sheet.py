"""What people look at after emoji-draw: a table for the terminal, and sheets of every picture with its verdict."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from index.atomic import write_bytes
from radt.evaluation.emoji_draw import Arm, ArmName, Drawing, EmojiDrawReport, Task, averages
from radt.evaluation.intervals import wilson
from radt.evaluation.plain_results import EMOJI_DRAW, EMOJI_DRAW_TITLE, JUDGES, emoji_draw_facts, emoji_draw_table
from radt.evaluation.results import Picture as ResultPicture
from radt.evaluation.results import Result, typed_command
from radt.sheet import Picture, Row, Sheet, enlarge, write_sheet

if TYPE_CHECKING:
    from rich.table import Table

ROWS_A_SHEET = 20
PICTURE_SIDE = 256
TICK = (((0.2, 0.55), (0.42, 0.76), (0.8, 0.26)),)  # strokes within the mark's square
CROSS = (((0.25, 0.25), (0.75, 0.75)), ((0.25, 0.75), (0.75, 0.25)))
RIGHT, WRONG = "#1a7f37", "#cf222e"
ARM_TITLES: dict[ArmName, str] = {
    "with_retrieval": "with retrieval",
    "without_retrieval": "without",
    "with_one_wrong": "one wrong",
}
SHARE_TITLES = {
    "entity_top1": "entity top-1",
    "entity_top5": "entity top-5",
    "entity_top1_by_pixels": "top-1 by pixels",
    "entity_top5_by_pixels": "top-5 by pixels",
    "ground_color": "ground colour",
    "right_neighbor": "saw a right one",
    "drew_wrong_neighbor": "drew a wrong one",
}


def make_table(report: EmojiDrawReport) -> "Table":
    """The figures of the three arms with their 95 % intervals; retrieval and the ceiling stand below."""
    from rich import box
    from rich.table import Table

    found, asked = report.retrieval_shares(), report.settings
    ceiling = report.ceiling
    table = Table(
        "",
        *ARM_TITLES.values(),
        title=f"emoji-draw: {report.n} held-out classes, model {report.model['name']}",
        caption=(
            f"retrieval by {asked.by}, decompose {asked.decompose}, k = {asked.k}: recall {found['recall_at_k']:.2f}, "
            f"precision {found['precision_at_k']:.2f}, all right {found['all_right']:.2f}. The true scenes score "
            f"{ceiling['entity_top1']:.2f}, {ceiling['entity_top5']:.2f} and {ceiling['ground_color']:.2f}. "
            f"The entity is judged by {JUDGES[report.judge['judge']]}."
        ),
        box=box.SIMPLE,
    )
    shares = [report.shares(name) for name in ARM_TITLES]
    for key, title in SHARE_TITLES.items():
        table.add_row(title, *(_with_interval(share[key], report.n) for share in shares))
    arms = [report.arms[name] for name in ARM_TITLES]
    table.add_row("copy similarity", *map(_copy_similarity, arms))
    table.add_row("seconds a picture", *(f"{arm.seconds / report.n:.2f}" for arm in arms))
    return table


def print_table(report: EmojiDrawReport, written: Sequence[Path] = ()) -> None:
    """Print `make_table` to stdout, and below it the files that `write_results` wrote."""
    from rich.console import Console

    console = Console()
    console.print(make_table(report))
    for path in written:
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def write_results(report: EmojiDrawReport, out: Path) -> list[Path]:
    """Write sheets of twenty prompts each, PNG and HTML; the result for `radt report`; and, last, `results.json`.

    Each file whole; returns what was written. Sheets of an earlier and larger run in the same folder are deleted.
    """
    sheets = list(make_sheets(report))
    written = [path for number, sheet in enumerate(sheets, 1) for path in write_sheet(sheet, _sheet_path(out, number))]
    for old in set(out.glob("sheet_*.png")) | set(out.glob("sheet_*.html")):
        if old not in written:
            old.unlink()
    stored = to_result(report, sheets).save(out)
    results = out / "results.json"
    write_bytes(results, (json.dumps(report.to_json(), indent=2) + "\n").encode())
    return [*written, stored, results]


def to_result(report: EmojiDrawReport, sheets: Sequence[Sheet]) -> Result:
    """As all results are stored, for `radt report`, with the command that was typed and who judged."""
    values = report.to_json()
    shown = [ResultPicture(file=_sheet_path(Path(), i).name, title=sheet.title) for i, sheet in enumerate(sheets, 1)]
    return Result(
        kind=EMOJI_DRAW,
        title=EMOJI_DRAW_TITLE,
        command=typed_command(),
        facts=emoji_draw_facts(values),
        tables=(emoji_draw_table(values),),
        pictures=tuple(shown),
        data=values,
    )


def make_sheets(report: EmojiDrawReport) -> Iterator[Sheet]:
    """A row a prompt: what was found, the three pictures with their verdicts, what led astray, and the truth."""
    rows = [_row(report, place) for place in range(report.n)]
    columns = ("Neighbours found", "With retrieval", "Without", "One wrong neighbour", "Drawn with it", "Truth")
    for start in range(0, report.n, ROWS_A_SHEET):
        some = rows[start : start + ROWS_A_SHEET]
        yield Sheet(
            title=f"emoji-draw, prompts {start + 1} to {start + len(some)} of {report.n}",
            subtitle=_subtitle(report),
            columns=columns,
            rows=tuple(some),
        )


def _row(report: EmojiDrawReport, place: int) -> Row:
    task = report.tasks[place]
    drawn = {name: report.arms[name].drawings[place] for name in ARM_TITLES}
    found, misled = drawn["with_retrieval"], drawn["with_one_wrong"]
    before = {each.neighbor.id for each in found.shown}
    return Row(
        prompt=task.prompt,
        note=f"seed {task.seed}",
        cells=(
            _neighbors(task, found),
            (_picture(task, found),),
            (_picture(task, drawn["without_retrieval"]),),
            tuple(
                Picture(image=each.neighbor.original or each.neighbor.image, lines=(each.neighbor.caption,))
                for each in misled.shown
                if each.neighbor.id not in before
            ),
            (_picture(task, misled),),
            (Picture(image=Image.fromarray(report.truths[place]), lines=(task.entity.name,)),),
        ),
    )


def _neighbors(task: Task, drawing: Drawing) -> tuple[Picture, ...]:
    return tuple(
        Picture(
            image=marked(each.neighbor.original or each.neighbor.image, each.class_id == task.entity.class_id),
            lines=(each.neighbor.caption,),
        )
        for each in drawing.shown
    )


def _picture(task: Task, drawing: Drawing) -> Picture:
    verdict = drawing.verdict
    ground = "" if verdict.ground == task.scene.ground else f", ground {verdict.ground}"
    return Picture(
        image=marked(Image.fromarray(drawing.picture), verdict.rank == 1),
        lines=(verdict.guess.name, f"rank {verdict.rank}{ground}"),
    )


def marked(image: Image.Image, good: bool) -> Image.Image:  # noqa: FBT001 - the mark is the argument
    """The picture at the sheet's size with a tick or a cross in its lower right corner."""
    picture = enlarge(image, PICTURE_SIDE)
    side = PICTURE_SIDE // 7
    left, top = picture.width - side, picture.height - side
    pen = ImageDraw.Draw(picture)
    pen.rectangle([left, top, picture.width, picture.height], fill=RIGHT if good else WRONG)
    for stroke in TICK if good else CROSS:
        pen.line([(left + x * side, top + y * side) for x, y in stroke], fill="white", width=side // 7, joint="curve")
    return picture


def _subtitle(report: EmojiDrawReport) -> str:
    asked = report.settings
    top1 = ", ".join(f"{title} {report.shares(name)['entity_top1']:.2f}" for name, title in ARM_TITLES.items())
    return (
        f"model {report.model['name']}, {asked.sampler} at {asked.steps} steps; entity top-1 over all prompts: {top1}"
    )


def _sheet_path(out: Path, number: int) -> Path:
    return out / f"sheet_{number:02d}.png"


def _with_interval(share: float, n: int) -> str:
    low, high = wilson(share, n)
    return f"{share:.2f} ({low:.2f}-{high:.2f})"


def _copy_similarity(arm: Arm) -> str:
    mean = averages(arm)["copy_similarity"]
    return "-" if mean is None else f"{mean:.2f}"
