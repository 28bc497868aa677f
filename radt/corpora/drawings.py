"""The drawings corpus: things from outside the emoji font, so that a model can be shown what it knows nothing about.

Flat drawings, patterns, signs and plots composed of primitives by lot, and what scikit-learn brings with it: digits
written by hand and cuttings of two photographs. Each has a name of its own, so that it can be asked for by words.
`radt evaluate references` measures how well a model draws them from their pictures.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from numpy.random import Generator
from PIL import Image, ImageDraw

from index.errors import CorpusError
from radt.corpora.emoji import GROUNDS, Color, Rendition, render_rendition
from radt.corpora.img2dataset import Sample, Written, write_shards

SIDE = 256  # of a drawing; it is drawn twice as large and shrunk
KINDS_EACH = 9  # drawings of a kind
LEAST_DISTANCE = 34.0  # of any two that are painted (`distance`); the others are 27 apart at least
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
INKS: tuple[Color, ...] = (
    *((214, 39, 40), (255, 140, 20), (245, 205, 40), (60, 160, 70), (20, 165, 170), (45, 95, 210)),
    *((125, 50, 165), (235, 110, 175), (120, 75, 40), (110, 115, 120), (205, 185, 150), (25, 25, 30)),
)
PROJECT = "drawn by radt, Apache-2.0"
DIGITS = "scikit-learn, load_digits: E. Alpaydin, C. Kaynak, UCI handwritten digits, CC BY 4.0"
PHOTOGRAPHS = {
    "china.jpg": "scikit-learn, china.jpg by danielbuechele, CC BY 2.0",
    "flower.jpg": "scikit-learn, flower.jpg by vultilion, CC BY 2.0",
}
# Cuttings, as fractions of the photograph: left, top, side of its height.
CUTTINGS: tuple[tuple[str, str, tuple[float, float, float]], ...] = (
    ("china.jpg", "photograph of a temple roof", (0.30, 0.10, 0.75)),
    ("china.jpg", "photograph of a pillared hall", (0.36, 0.52, 0.40)),
    ("flower.jpg", "photograph of a dahlia", (0.20, 0.10, 0.85)),
    ("flower.jpg", "photograph of petals", (0.38, 0.30, 0.40)),
)

Paint = Callable[[ImageDraw.ImageDraw, Generator, Sequence[Color]], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Drawing:
    """One entity: a picture with straight alpha, a name of its own, and what kind of thing it is."""

    name: str
    kind: str
    license: str
    picture: Image.Image

    @property
    def caption(self) -> str:
        """As in `Tovaki: a house`."""
        return f"{self.name}: {self.kind}"


@cache
def load_drawings() -> tuple[Drawing, ...]:
    """All of them, always the same, no two alike."""
    pictures = [*_painted(), *_digits(), *_cuttings()]
    names = _names(len(pictures))
    return tuple(
        Drawing(name=name, kind=kind, license=license, picture=picture)
        for name, (kind, license, picture) in zip(names, pictures, strict=True)
    )


def drawing_rendition(drawing: Drawing, number: int) -> Rendition:
    """Rendition 0 is upright on white; the others are drawn by lot, as the emoji's are."""
    if number == 0:
        return Rendition(number=0, scale=0.86, angle=0.0, shift=(0.0, 0.0), ground_name="white", ground=GROUNDS[0][1])
    rng = _generator(drawing.name, number)
    scale = float(rng.uniform(0.68, 0.9))
    room = (1 - scale) / 2
    ground_name, ground = GROUNDS[int(rng.integers(len(GROUNDS)))]
    shift = float(rng.uniform(-room, room)), float(rng.uniform(-room, room))
    angle = float(rng.uniform(-6, 6))
    return Rendition(number=number, scale=scale, angle=angle, shift=shift, ground_name=ground_name, ground=ground)


def write_drawings(
    out: Path,
    *,
    renditions: int = 4,
    size: int = 128,
    shard_size: int = 2000,
    on_item: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the corpus in img2dataset's layout. Whole shards are kept; `on_item` is told (done, total)."""
    if renditions < 1 or size < 8:
        raise CorpusError(f"renditions must be at least 1 and size at least 8, got {renditions} and {size}")
    drawings = load_drawings()

    def sample(i: int) -> Sample:
        drawing = drawings[i // renditions]
        placed = drawing_rendition(drawing, i % renditions)
        facts: dict[str, Any] = {
            "name": drawing.name,
            "kind": drawing.kind,
            "rendition": placed.number,
            "ground": placed.ground_name,
            "license": drawing.license,
        }
        pixels = render_rendition(drawing.picture, placed, size)
        return Sample(pixels=pixels, caption=drawing.caption, metadata=facts)

    recipe = {"corpus": "drawings", "version": 1, "renditions": renditions, "size": size}
    num = len(drawings) * renditions
    return write_shards(out, sample, num=num, shard_size=shard_size, recipe=recipe, on_item=on_item)


def distance(one: Image.Image, other: Image.Image) -> float:
    """Root mean square difference at 16x16 on gray, of 8 bits."""
    return float(np.sqrt(np.mean((_thumbnail(one) - _thumbnail(other)) ** 2)))


def _painted() -> list[tuple[str, str, Image.Image]]:
    """`KINDS_EACH` of every kind: lots are drawn until one is unlike all before."""
    kept: list[tuple[str, str, Image.Image]] = []
    thumbnails: list[Float[np.ndarray, "16 16 3"]] = []
    for kind, paint in PAINTERS.items():
        lot = found = 0
        while found < KINDS_EACH:
            picture = _paint(paint, _generator(kind, lot))
            lot += 1
            thumbnail = _thumbnail(picture)
            if all(np.sqrt(np.mean((thumbnail - other) ** 2)) >= LEAST_DISTANCE for other in thumbnails):
                kept.append((kind, PROJECT, picture))
                thumbnails.append(thumbnail)
                found += 1
    return kept


def _paint(paint: Paint, rng: Generator) -> Image.Image:
    canvas = Image.new("RGBA", (2 * SIDE, 2 * SIDE))
    colors = [INKS[i] for i in rng.permutation(len(INKS))]
    paint(ImageDraw.Draw(canvas), rng, colors)
    return _square(canvas).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _digits() -> list[tuple[str, str, Image.Image]]:
    """The first handwriting of each digit, dark on a card of its own colour."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = []
    for digit in range(10):
        ink = found.images[int(np.flatnonzero(found.target == digit)[0])] / 16
        card, pen = np.array(INKS[digit]), np.array(INKS[(digit + 6) % len(INKS)])
        pixels = card + (pen - card) * np.pad(ink, 1)[..., None]
        tile = Image.fromarray(pixels.round().astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pictures.append((f"handwritten digit {digit}", DIGITS, tile.convert("RGBA")))
    return pictures


def _cuttings() -> list[tuple[str, str, Image.Image]]:
    from sklearn.datasets import load_sample_image

    pictures = []
    for file, kind, (left, top, side) in CUTTINGS:
        whole = Image.fromarray(load_sample_image(file))
        edge = round(side * whole.height)
        x, y = round(left * whole.width), min(round(top * whole.height), whole.height - edge)
        tile = whole.crop((x, y, x + edge, y + edge)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        pictures.append((kind, PHOTOGRAPHS[file], tile.convert("RGBA")))
    return pictures


def _names(count: int) -> list[str]:
    """Words of three syllables that no two share the first two of."""
    rng = _generator("names", 0)
    names: dict[str, str] = {}
    while len(names) < count:
        lots = zip(rng.integers(len(CONSONANTS), size=3), rng.integers(len(VOWELS), size=3), strict=True)
        parts = [CONSONANTS[i] + VOWELS[j] for i, j in lots]
        names.setdefault("".join(parts[:2]), "".join(parts).capitalize())
    return list(names.values())


def _generator(*key: object) -> Generator:
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _square(canvas: Image.Image) -> Image.Image:
    """Cut to the ink and made square around it."""
    box = canvas.getchannel("A").getbbox()
    assert box is not None, "a drawing without ink"
    ink = canvas.crop(box)
    side = max(ink.size)
    square = Image.new("RGBA", (side, side))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square


def _thumbnail(picture: Image.Image) -> Float[np.ndarray, "16 16 3"]:
    small: UInt8[np.ndarray, "16 16 4"] = np.asarray(picture.resize((16, 16), Image.Resampling.BOX))
    alpha = small[..., 3:] / 255
    return small[..., :3] * alpha + 128 * (1 - alpha)


# The painters. A canvas is 512 pixels wide; the ink need not fill it.


def _circle(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, **how: Any) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), **how)


def _ring(x: float, y: float, r: float, count: int, *, turn: float = 0.0) -> list[tuple[float, float]]:
    angles = [turn + 2 * math.pi * i / count for i in range(count)]
    return [(x + r * math.sin(a), y - r * math.cos(a)) for a in angles]


def _monster(draw: ImageDraw.ImageDraw, rng: Generator, c: Sequence[Color]) -> None:
    form, eyes, horns = rng.integers(3), int(rng.integers(1, 4)), int(rng.integers(0, 4))
    for i in range(horns):
        x = 256 + (i - (horns - 1) / 2) * 110
        draw.polygon([(x - 34, 150), (x + 34, 150), (x, 30)], fill=c[1])
    body = (76, 110, 436, 480)
    if form == 0:
        draw.ellipse(body, fill=c[0])
    elif form == 1:
        draw.rounded_rectangle(body, 50, fill=c[0])
    else:
        draw.polygon([(256, 60), (470, 480), (42, 480)], fill=c[0])
    for i in range(eyes):
        x = 256 + (i - (eyes - 1) / 2) * 96
        _circle(draw, x, 250, 44, fill=(255, 255, 255))
        _circle(draw, x, 256, 20, fill=(20, 20, 20))
    draw.rectangle((166, 350, 346, 400), fill=c[2])


def _house(draw: ImageDraw.ImageDraw, rng: Generator, c: Sequence[Color]) -> None:
    top = int(rng.integers(160, 260))
    width = int(rng.integers(130, 220))
    draw.rectangle((256 - width, top, 256 + width, 490), fill=c[0])
    if rng.random() < 0.5:
        draw.polygon([(256 - width - 30, top), (256 + width + 30, top), (256, 20)], fill=c[1])
    else:
        draw.rectangle((256 - width - 30, top - 70, 256 + width + 30, top), fill=c[1])
    draw.rectangle((226, 370, 306, 490), fill=c[2])
    for x in (256 - width * 0.62, 256 + width * 0.62):
        draw.rectangle((x - 36, top + 50, x + 36, top + 122), fill=c[3])


def _tree(draw: ImageDraw.ImageDraw, rng: Generator, c: Sequence[Color]) -> None:
    draw.rectangle((226, 300, 286, 500), fill=c[1])
    form = rng.integers(3)
    if form == 0:
        for i in range(3):
            draw.polygon([(256, 20 + 90 * i), (130 - 30 * i, 190 + 90 * i), (382 + 30 * i, 190 + 90 * i)], fill=c[0])
    elif form == 1:
        _circle(draw, 256, 190, 170, fill=c[0])
    else:
        for x, y in [*_ring(256, 190, 100, 5), (256, 190)]:
            _circle(draw, x, y, 80, fill=c[0])
    for x, y in _ring(256, 215, 85, int(rng.integers(2, 7)), turn=float(rng.uniform(0, 6))):
        _circle(draw, x, y, 24, fill=c[2])


def _car(draw: ImageDraw.ImageDraw, rng: Generator, c: Sequence[Color]) -> None:
    left, right = sorted(rng.integers(60, 450, size=2).tolist())
    left, right = min(left, 200), max(right, 300)
    draw.rectangle((left, 120, right, 270), fill=c[1])
    draw.rectangle((left + 24, 146, right - 24, 236), fill=c[2])
    draw.rounded_rectangle((20, 230, 492, 370), 30, fill=c[0])
    for x in [120, 392] if rng.random() < 0.6 else [100, 256, 412]:
        _circle(draw, x, 375, 66, fill=(25, 25, 30))
        _circle(draw, x, 375, 30, fill=c[3])


def _shield(draw: ImageDraw.ImageDraw, rng: Generator, c: Sequence[Color]) -> None:
    draw.polygon([(60, 30), (452, 30), (452, 280), (256, 495), (60, 280)], fill=c[0])
    form = rng.integers(4)
    if form == 0:
        draw.rectangle((216, 30, 296, 440), fill=c[1])
        draw.rectangle((60, 150, 452, 230), fill=c[1])
    elif form == 1:
        draw.polygon([(60, 30), (170, 30), (452, 270), (400, 330), (60, 110)], fill=c[1])
    elif form == 2:
        draw.polygon([(60, 170), (256, 330), (452, 170), (452, 270), (256, 430), (60, 270)], fill=c[1])
    else:
        draw.polygon(_star(256, 215, 150, 60, count=5), fill=c[1])


def _star(x: float, y: float, outer: float, inner: float, *, count: int) -> list[tuple[float, float]]:
    far, near = _ring(x, y, outer, count), _ring(x, y, inner, count, turn=math.pi / count)
    return [point for pair in zip(far, near, strict=True) for point in pair]


def _emblem(draw: ImageDraw.ImageDraw, rng: Generator, c: Sequence[Color]) -> None:
    points = int(rng.integers(3, 9))
    _circle(draw, 256, 256, 240, fill=c[0])
    _circle(draw, 256, 256, 200, fill=c[1])
    draw.polygon(_star(256, 256, 190, float(rng.uniform(50, 130)), count=points), fill=c[2])
    _circle(draw, 256, 256, 40, fill=c[0])


def _gear(draw: ImageDraw.ImageDraw, rng: Generator, c: Sequence[Color]) -> None:
    for x, y in _ring(256, 256, 190, int(rng.integers(5, 11))):
        _circle(draw, x, y, 54, fill=c[0])
    _circle(draw, 256, 256, 190, fill=c[0])
    _circle(draw, 256, 256, float(rng.uniform(70, 140)), fill=c[1])
    _circle(draw, 256, 256, 36, fill=c[2])


def _gauge(draw: ImageDraw.ImageDraw, rng: Generator, c: Sequence[Color]) -> None:
    _circle(draw, 256, 256, 240, fill=c[0])
    _circle(draw, 256, 256, 205, fill=(250, 250, 245))
    split = float(rng.uniform(200, 330))
    draw.pieslice((70, 70, 442, 442), 135, split, fill=c[1])
    draw.pieslice((70, 70, 442, 442), split, 405, fill=c[2])
    _circle(draw, 256, 256, 110, fill=(250, 250, 245))
    angle = float(rng.uniform(-2.2, 2.2))
    draw.line([(256, 256), (256 + 190 * math.sin(angle), 256 - 190 * math.cos(angle))], fill=(25, 25, 30), width=26)


def _pie(draw: ImageDraw.ImageDraw, rng: Generator, c: Sequence[Color]) -> None:
    cuts = np.cumsum(rng.dirichlet(np.full(int(rng.integers(3, 6)), 2.5))) * 360
    start = 0.0
    for i, end in enumerate(cuts.tolist()):
        draw.pieslice((16, 16, 496, 496), start - 90, end - 90, fill=c[i])
        start = end


def _bars(draw: ImageDraw.ImageDraw, rng: Generator, c: Sequence[Color]) -> None:
    count = int(rng.integers(3, 6))
    width = 480 / count
    draw.rectangle((16, 16, 496, 496), fill=c[-1])
    for i in range(count):
        height = float(rng.uniform(90, 440))
        draw.rectangle((26 + width * i, 486 - height, width * (i + 1), 486), fill=c[i])


def _tile(draw: ImageDraw.ImageDraw, rng: Generator, c: Sequence[Color]) -> None:
    draw.rectangle((16, 16, 496, 496), fill=c[0])
    form, count = rng.integers(5), int(rng.integers(2, 5))
    step = 480 / count
    for i in range(count):
        for j in range(count):
            x, y = 16 + step * i, 16 + step * j
            if form == 0 and (i + j) % 2:
                draw.rectangle((x, y, x + step, y + step), fill=c[1])
            elif form == 1:
                _circle(draw, x + step / 2, y + step / 2, step * 0.36, fill=c[1 + (i + j) % 2])
            elif form == 2:
                draw.polygon([(x, y), (x + step, y), (x, y + step)], fill=c[1])
    if form == 3:
        for i in range(0, 2 * count, 2):
            draw.rectangle((16, 16 + step / 2 * i, 496, 16 + step / 2 * (i + 1)), fill=c[1])
    if form == 4:
        for i in range(count + 1):
            r = 240 * (1 - i / (count + 1))
            _circle(draw, 256, 256, r, fill=c[1 + i % 2])


def _fish(draw: ImageDraw.ImageDraw, rng: Generator, c: Sequence[Color]) -> None:
    height = int(rng.integers(90, 200))
    draw.polygon([(330, 256), (500, 256 - height * 0.8), (500, 256 + height * 0.8)], fill=c[1])
    draw.ellipse((16, 256 - height, 400, 256 + height), fill=c[0])
    for x in range(150, 330, 76):
        draw.rectangle((x, 256 - height * 0.72, x + 34, 256 + height * 0.72), fill=c[2])
    _circle(draw, 96, 230, 34, fill=(255, 255, 255))
    _circle(draw, 92, 230, 16, fill=(20, 20, 20))


def _arrows(draw: ImageDraw.ImageDraw, rng: Generator, c: Sequence[Color]) -> None:
    draw.rounded_rectangle((16, 16, 496, 496), 60, fill=c[0])
    for x, y in _ring(256, 256, 200, int(rng.integers(1, 5)), turn=float(rng.integers(8)) * math.pi / 4):
        draw.line([(256, 256), (x, y)], fill=c[1], width=60)
        _circle(draw, x, y, 56, fill=c[2])


PAINTERS: dict[str, Paint] = {
    "a monster": _monster,
    "a house": _house,
    "a tree": _tree,
    "a car": _car,
    "a shield": _shield,
    "an emblem": _emblem,
    "a gear wheel": _gear,
    "a gauge": _gauge,
    "a pie chart": _pie,
    "a bar chart": _bars,
    "a patterned tile": _tile,
    "a fish": _fish,
    "a road sign": _arrows,
}
