"""What the stage above 32x32 adds: fidelity, colour and entities, over `--augmentation-level` and other neighbours.

    radt corpus emoji emoji && radt index build emoji --kb kb
    python tools/bench_upscaling.py --kb kb --out runs/upscaling -n 60

The stage draws held-out scenes twice. Over their own small pictures, which a perfect stage below would have drawn: the
peak signal-to-noise ratio to the true scene in dB, and the colour shift, the largest mean difference of a channel in
levels of 255 (the complaint of imagen-pytorch's users, lucidrains/imagen-pytorch#72). And over what the stage below
did draw: the share of pictures whose entity is recognised. Each with the neighbours found, with those of another
prompt, and with none; beside plain cubic enlargement. Writes upscaling.md, upscaling.png with the first scenes, and
the result that `radt report` reads.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from radt.cascade import augment, of_stage, sample_stage, stage_generator
from radt.conditioning import Condition, take_rows
from radt.evaluation.emoji_draw import EmojiDrawBench, check, judge_facts, retrieve, verdict_shares
from radt.evaluation.emoji_recognizer import find_recognizer
from radt.evaluation.plain_results import JUDGES, share
from radt.evaluation.results import Cell, Estimate, Picture, Result, Table, typed_command
from radt.evaluation.tables import cell_text, markdown_table
from radt.neighbors import Neighbor, from_pixels, to_pixels
from radt.pipeline import TextToImage
from radt.resizing import resize
from radt.settings import GenerateSettings
from radt.shapes import Pixels

LEVELS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
ARMS = ("none", "of another prompt", "found")
SHOWN = 8  # scenes of the picture


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """What every way of upscaling starts from: pictures of the stage's size, cubically enlarged, one a task."""

    truths: Pixels
    over_truth: Pixels
    over_drawn: Pixels
    conditions: dict[str, Condition]  # by arm


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    level: str
    neighbors: str
    fidelity: float
    shift: float
    top1: Estimate

    @property
    def cells(self) -> tuple[Cell, ...]:
        return (self.level, self.neighbors, self.fidelity, self.shift, self.top1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kb", required=True, help="the emoji corpus, built with the shipped model")
    parser.add_argument("--model", help="model folder; default: the one inside the package")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=60, help="held-out classes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS)
    parser.add_argument("--batch-size", type=int, default=20)
    given = parser.parse_args()
    if given.n < 2:
        parser.error("prompts exchange neighbours, so it needs two of them: -n 2")
    model = TextToImage.load(given.model, kb=given.kb, device="cpu")
    settings = model.settings(batch_size=given.batch_size)
    bench = EmojiDrawBench.prepare(n=given.n, seed=given.seed, size=model.size[0], trained=find_recognizer())
    judge = JUDGES[judge_facts(bench.trained)["judge"]]
    own_level = settings.augmentation_level
    shown_level = own_level if own_level in given.levels else given.levels[0]
    prepared, seeds = prepare(model, bench, settings), [task.seed for task in bench.tasks]
    rows = [measured(bench, prepared, prepared.over_truth, prepared.over_drawn, level="cubic", neighbors="")]
    shown = [prepared.over_drawn]
    for level in given.levels:
        for arm in ARMS:
            asked = replace(settings, augmentation_level=level)
            pictures = [
                upscale(model, below, prepared.conditions[arm], settings=asked, seeds=seeds)
                for below in (prepared.over_truth, prepared.over_drawn)
            ]
            rows.append(measured(bench, prepared, *pictures, level=f"{level:g}", neighbors=arm))
            print(*map(cell_text, rows[-1].cells), sep="  ", flush=True)
            if level == shown_level:
                shown.append(pictures[1])
    given.out.mkdir(parents=True, exist_ok=True)
    measures = Table(
        title="By augmentation level and neighbours",
        columns=("augmentation level", "neighbours", "PSNR, dB", "colour shift", "entity top-1"),
        rows=tuple(row.cells for row in rows),
        note=(
            f"{given.n} held-out classes, one picture each, seed {given.seed}, model {model.digest}; signal and colour "
            f"over true small pictures, the entity over drawn ones, judged by {judge}."
        ),
    )
    page = f"{measures.note}\n\n{markdown_table(measures)}\n"
    (given.out / "upscaling.md").write_text(page)
    draw_sheet([*shown, prepared.truths]).save(given.out / "upscaling.png")
    Result(
        kind="upscaling",
        title="What the stage above 32x32 adds",
        command=typed_command(),
        facts={"model": f"{model.name} ({model.digest[:12]})", "classes": given.n, "seed": given.seed},
        tables=(measures,),
        pictures=(Picture(file="upscaling.png", title=f"The first scenes, at level {shown_level:g}"),),
    ).save(given.out)
    print(page)


def prepare(model: TextToImage, bench: EmojiDrawBench, settings: GenerateSettings) -> Prepared:
    """Look neighbours up, draw the stage below once, and encode what the stage above is asked with."""
    found = retrieve(model, check(model, settings), bench.tasks, settings)
    right: list[list[Neighbor]] = [[each.neighbor for each in row] for row in found]
    wrong = [*right[1:], right[0]]
    prompts, seeds = [task.prompt for task in bench.tasks], [task.seed for task in bench.tasks]
    below, stage = replace(settings, stages=len(model.cascade.stages) - 1), model.cascade.stages[-1]
    size, small = stage.size, model.cascade.stages[-2].size
    drawn = []
    for start in range(0, len(seeds), settings.batch_size):
        some = slice(start, start + settings.batch_size)
        asked = model.encode_many(prompts[some], right[some], settings=below)
        drawn.append(model.cascade.sample(asked, below, seeds[some]))
    truths = torch.stack([to_pixels(torch.from_numpy(truth)) for truth in bench.truths])
    nobody: list[list[Neighbor]] = [[] for _ in right]
    arms = dict(zip(ARMS, (nobody, wrong, right), strict=True))
    return Prepared(
        truths=truths,
        over_truth=resize(resize(truths, small), size),
        over_drawn=resize(torch.cat(drawn), size),
        conditions={
            arm: model.encode_many(prompts, neighbors, settings=settings)[-1] for arm, neighbors in arms.items()
        },
    )


def upscale(
    model: TextToImage, below: Pixels, condition: Condition, *, settings: GenerateSettings, seeds: Sequence[int]
) -> Pixels:
    """The last stage over these pictures, each from the noise of its own seed."""
    number, stage = len(model.cascade.stages) - 1, model.cascade.stages[-1]
    drawn = []
    for start in range(0, len(below), settings.batch_size):
        rows = list(range(start, min(start + settings.batch_size, len(below))))
        generators = [stage_generator(seeds[row], number) for row in rows]
        low_res = augment(below[rows], settings.augmentation_level, schedule=stage.info.schedule, generators=generators)
        asked = replace(take_rows(condition, rows), low_res=low_res)
        with torch.inference_mode():
            drawn.append(sample_stage(stage, asked, of_stage(settings, number), generators=generators))
    return torch.cat(drawn)


def measured(
    bench: EmojiDrawBench, prepared: Prepared, over_truth: Pixels, over_drawn: Pixels, *, level: str, neighbors: str
) -> Row:
    """The three measures of one way."""
    error = (over_truth - prepared.truths).square().mean(dim=(1, 2, 3))
    difference = (over_truth - prepared.over_truth).mean(dim=(2, 3)).abs().amax(dim=1)
    verdicts = bench.judge(from_pixels(over_drawn).numpy())
    return Row(
        level=level,
        neighbors=neighbors,
        fidelity=float((10 * torch.log10(4 / error)).mean()),  # pixels span [-1, 1], so the peak is 2
        shift=float(difference.mean()) * 127.5,
        top1=share(verdict_shares(bench.tasks, verdicts)["entity_top1"], len(bench.tasks)),
    )


def draw_sheet(columns: Sequence[Pixels]) -> Image.Image:
    """The first scenes, a row each: enlarged, with each arm's neighbours, and the truth."""
    names = ["the stage below", *(f"neighbours: {arm}" for arm in ARMS), "the true scene"][-len(columns) :]
    cells = np.concatenate([from_pixels(column[:SHOWN]).numpy() for column in columns], axis=2)  # rows of pictures
    picture = Image.fromarray(np.ascontiguousarray(cells.reshape(-1, *cells.shape[2:])))
    picture = picture.resize((picture.width * 3 // 2, picture.height * 3 // 2), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (picture.width, picture.height + 28), "white")
    sheet.paste(picture, (0, 28))
    for place, name in enumerate(names):
        x = place * picture.width // len(columns) + 6
        ImageDraw.Draw(sheet).text((x, 6), name, fill="black", font=ImageFont.load_default(12))
    return sheet


if __name__ == "__main__":
    main()
