"""Quality against network calls: every sampler on the shipped model, and fast twins, on held-out emoji (row I8, I10).

    radt corpus emoji emoji && radt index build emoji --kb kb
    python tools/bench_quality.py --kb kb --out runs/quality -n 100 [--fast runs/other/bundle]...

One prompt a held-out class and one seed a prompt, the same for all, drawn from the neighbours found for it. Two
measures: the share of pictures whose entity is recognised, as `radt evaluate emoji-draw` judges, and the squared
maximum mean discrepancy between the pictures and the true scenes in the model's own image embeddings (Binkowski et al.
2018: the unbiased estimate with a cubic kernel, times 1000). The model's own twin is measured, and those of other
models with `--fast`. Writes quality.md, quality.png and quality.json, after every point; the same command again goes on
from there.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from radt.diffusion.samplers import SAMPLERS
from radt.evaluation.emoji_draw import EmojiDrawBench, check, judge_facts, retrieve, verdict_shares
from radt.evaluation.emoji_recognizer import find_recognizer
from radt.evaluation.intervals import wilson
from radt.evaluation.plain_results import JUDGES
from radt.pipeline import DrawRequest, TextToImage
from radt.settings import GenerateSettings

CALLS = (4, 8, 16, 20, 50, 250)
REFERENCE = ("ancestral", 250)  # DDPM: what the others are measured by
COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#9c755f", "#edc948", "#76b7b2")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way of drawing, measured. `rows` are network rows a picture: a guided call has two, a twin's has one."""

    label: str
    steps: int
    calls: int
    rows: int
    top1: float
    discrepancy: float
    seconds: float  # a picture


@dataclass(frozen=True, kw_only=True)
class Way:
    """What is measured: a model asked in one way."""

    label: str
    model: TextToImage
    settings: GenerateSettings
    calls: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kb", required=True, help="the emoji corpus, built with the shipped model")
    parser.add_argument("--model", help="model folder; default: the one inside the package")
    parser.add_argument("--fast", action="append", default=[], help="a model with a twin; repeatable")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-n", type=int, default=100, help="held-out classes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS, help="network calls a picture")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--batch-size", type=int, default=20)
    given = parser.parse_args()
    model = TextToImage.load(given.model, kb=given.kb)
    own = [str(model.bundle.folder)] if any(model.bundle.twins) else []
    fast = [TextToImage.load(folder, kb=given.kb) for folder in (*own, *given.fast)]
    ways = [
        *plain_ways(model, given),
        *(way for number, each in enumerate(fast) for way in fast_ways(each, number, given)),
    ]
    size, _ = model.picture_size(ways[0].settings)
    bench = EmojiDrawBench.prepare(n=given.n, seed=given.seed, size=size, trained=find_recognizer())
    facts = {
        "n": given.n,
        "seed": given.seed,
        "model": model.digest,
        "fast": [each.digest for each in fast],
        "recognizer": judge_facts(bench.trained),
    }
    points = read_points(given.out, facts)
    for way in ways:
        if (way.label, way.calls) not in {(point.label, point.calls) for point in points}:
            points.append(measure(bench, way))
            print(as_row(points[-1], points, given.n), flush=True)
            write(given.out, points, facts)
    write(given.out, points, facts)
    print((given.out / "quality.md").read_text())


def plain_ways(model: TextToImage, given: argparse.Namespace) -> Iterator[Way]:
    """Every sampler at every number of calls, cheapest first."""
    for calls in sorted(given.calls):
        for sampler in given.samplers:
            steps = steps_of(sampler, calls)
            asked = model.settings(steps=steps, sampler=sampler, stages=1, batch_size=given.batch_size)
            yield Way(label=sampler, model=model, settings=asked, calls=calls_of(sampler, steps))


def fast_ways(model: TextToImage, number: int, given: argparse.Namespace) -> Iterator[Way]:
    """A twin at the steps it was distilled to; one that was not halved, at every number of calls."""
    twin = model.bundle.info.stages[0].fast
    if twin is None:
        raise SystemExit(f"{model.bundle.folder} has no fast twin of its first stage")
    name = "twin" if number == 0 else f"twin {number + 1}"
    own = {"fast": True, "stages": 1, "batch_size": given.batch_size}
    if twin.steps is not None:
        yield Way(label=f"{name} of {twin.steps}", model=model, settings=model.settings(**own), calls=twin.steps)
        return
    for calls in sorted(given.calls):
        asked = model.settings(**own, steps=calls, sampler="dpmpp_2m")
        yield Way(label=f"{name}, guided, dpmpp_2m", model=model, settings=asked, calls=calls)


def steps_of(sampler: str, calls: int) -> int:
    """The most steps for so many calls: Heun looks twice in every step but the last."""
    return (calls + 1) // 2 if sampler == "heun" else calls


def calls_of(sampler: str, steps: int) -> int:
    """Network calls for so many steps."""
    return 2 * steps - 1 if sampler == "heun" else steps


def measure(bench: EmojiDrawBench, way: Way) -> Point:
    """Draw every task once from the neighbours found for it, and judge."""
    kb = check(way.model, way.settings)
    found = retrieve(way.model, kb, bench.tasks, way.settings)
    requests = [
        DrawRequest(prompt=task.prompt, neighbors=[each.neighbor for each in shown], seed=task.seed)
        for task, shown in zip(bench.tasks, found, strict=True)
    ]
    start = time.perf_counter()
    pictures = np.stack([drawn.numpy() for drawn in way.model.draw_many(requests, settings=way.settings)])
    seconds = (time.perf_counter() - start) / len(requests)
    truths, drawn = (
        kb.embedder.images([Image.fromarray(picture) for picture in some]) for some in (bench.truths, pictures)
    )
    return Point(
        label=way.label,
        steps=way.settings.steps,
        calls=way.calls,
        rows=way.calls * (1 if way.settings.fast else 2),
        top1=verdict_shares(bench.tasks, bench.judge(pictures))["entity_top1"],
        discrepancy=1000 * discrepancy(truths, drawn),
        seconds=seconds,
    )


def discrepancy(one: np.ndarray, two: np.ndarray) -> float:
    """Unbiased squared MMD of paired samples of unit vectors, kernel ((1 + x.y) / 2)^3; below 0 by chance alone.

    No row meets its own partner (Gretton et al. 2012, equation 4): a picture resembles the very scene it should show.
    """

    def mean_off_diagonal(a: np.ndarray, b: np.ndarray) -> float:
        kernel = ((1 + a.astype(np.float64) @ b.astype(np.float64).T) / 2) ** 3
        return float((kernel.sum() - kernel.trace()) / (len(a) * (len(a) - 1)))

    return mean_off_diagonal(one, one) + mean_off_diagonal(two, two) - 2 * mean_off_diagonal(one, two)


def read_points(out: Path, facts: dict[str, Any]) -> list[Point]:
    """What was measured before; it stops where that was of something else, which would be lost."""
    path = out / "quality.json"
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    if kept["facts"] != facts:
        raise SystemExit(f"{path} is of {kept['facts']} and this would be of {facts}: choose another --out")
    return [Point(**each) for each in kept["points"]]


def write(out: Path, points: Sequence[Point], facts: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    kept = {"facts": facts, "points": [asdict(point) for point in points]}
    (out / "quality.json").write_text(json.dumps(kept, indent=1) + "\n")
    head = (
        f"{facts['n']} held-out classes, one picture each, seed {facts['seed']}, model {facts['model']}, judged by "
        f"{JUDGES[facts['recognizer']['judge']]}\n\n"
        "| sampler | steps | calls | rows | entity top-1 | 95 % | of ancestral at 250 | MMD2 x 1000 | s a picture |\n"
        "|---|---:|---:|---:|---:|---|---:|---:|---:|\n"
    )
    ordered = sorted(points, key=lambda point: (point.label, point.calls))
    (out / "quality.md").write_text(head + "".join(as_row(each, points, facts["n"]) + "\n" for each in ordered))
    plot(points, facts["n"]).save(out / "quality.png")


def as_row(point: Point, points: Sequence[Point], n: int) -> str:
    reference = next((each.top1 for each in points if (each.label, each.calls) == REFERENCE), None)
    share = f"{point.top1 / reference:.2f}" if reference else ""
    low, high = wilson(point.top1, n)
    return (
        f"| {point.label} | {point.steps} | {point.calls} | {point.rows} | {point.top1:.2f} | {low:.2f}-{high:.2f} "
        f"| {share} | {point.discrepancy:.1f} | {point.seconds:.2f} |"
    )


def plot(points: Sequence[Point], n: int) -> Image.Image:
    """Two panels over the logarithm of the calls: the share recognised, and the discrepancy."""
    sheet = Image.new("RGB", (1240, 520), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((40, 16), f"Quality against network calls, {n} held-out classes", fill="black", font=font(20))
    labels = sorted({point.label for point in points})
    panel(draw, points, labels, left=70, value="top1", title="entity top-1", top_value=1.0)
    most = max([1.0, *(point.discrepancy for point in points)])
    panel(draw, points, labels, left=560, value="discrepancy", title="MMD2 x 1000, less is better", top_value=most)
    for place, label in enumerate(labels):
        y = 90 + 26 * place
        draw.line([(1040, y), (1070, y)], fill=color(place), width=4)
        draw.text((1080, y - 9), label, fill="black", font=font(14))
    return sheet


def panel(
    draw: ImageDraw.ImageDraw,
    points: Sequence[Point],
    labels: Sequence[str],
    *,
    left: int,
    value: str,
    title: str,
    top_value: float,
) -> None:
    width, top, bottom = 420, 90, 450
    low = math.log(min(point.calls for point in points))
    span = max(math.log(max(point.calls for point in points)) - low, 1e-9)

    def place(point: Point) -> tuple[float, float]:
        height = max(getattr(point, value), 0) / top_value  # an unbiased estimate of next to nothing may fall below 0
        return left + (math.log(point.calls) - low) / span * width, bottom - height * (bottom - top)

    draw.text((left, top - 34), title, fill="black", font=font(15))
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - share * (bottom - top)
        draw.line([(left, y), (left + width, y)], fill="#dddddd")
        draw.text((left - 46, y - 8), f"{share * top_value:.3g}", fill="#57606a", font=font(12))
    for calls in sorted({point.calls for point in points}):
        x = left + (math.log(calls) - low) / span * width
        if calls % 2 == 0:  # Heun's odd numbers would stand over these
            draw.text((x - 8, bottom + 8), str(calls), fill="#57606a", font=font(12))
    draw.text((left, bottom + 28), "network calls a picture", fill="#57606a", font=font(12))
    for number, label in enumerate(labels):
        own = [place(each) for each in sorted(points, key=lambda each: each.calls) if each.label == label]
        draw.line(own, fill=color(number), width=3)
        for x, y in own:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=color(number))


def color(place: int) -> str:
    return COLORS[place % len(COLORS)]


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


if __name__ == "__main__":
    main()
