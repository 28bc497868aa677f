"""What a picture shows, read from its pixels alone: its ground, how many figures, where each stands, how large it is.

Nothing of the prompt is used. Ink is what differs from the ground, which is the colour of the border. One emoji may
be of several parts and two may touch, so figures are not connected parts: of all arrangements that scenes have (one
figure somewhere; two, three or four in their places, any of them missing) the one that fits the ink best is taken,
sooner where all its places show the same thing, or there is a gap between them. So a picture is read as having at most
four figures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage

from radt.corpora.emoji import Box
from radt.corpora.scenes import (
    ALONE_SIDE,
    COUNTED_CENTERS,
    COUNTED_SIDE,
    PALETTE,
    PLACED_SIDE,
    PLACES,
    RELATIONS,
    SIZED_SIDES,
    TWO_SIDE,
)
from radt.evaluation.color import border_color, lab_from_srgb, nearest_color

Point: TypeAlias = tuple[float, float]
Mask: TypeAlias = Bool[np.ndarray, "h w"]
Contrast: TypeAlias = Float[np.ndarray, "h w"]
Lab: TypeAlias = Float[np.ndarray, "h w 3"]

INK = 12.0  # CIE76 from the ground: less is not seen as another colour
LEAST_INK = 0.0015  # of the frame: smaller specks are noise
BLANK = 0.004  # of the frame: with less ink there is no figure
MISSING = 0.15  # what an empty place of an arrangement costs, in frames
TOLERANCE = 0.02  # of place and size each: differences below it say nothing
MARGIN = 1.06  # of a crop beyond the ink
SMALL, LARGE = (PLACED_SIDE + ALONE_SIDE) / 2, (ALONE_SIDE + SIZED_SIDES["large"]) / 2
ONE = 0.075  # what one figure costs beyond its misfit: where several fit as well and do not touch, there are several
ONE_OF_TWO_SQUARES = 0.05  # and where it is large and half as high as wide, or half as wide as high: hardly any is
TOUCHING = 0.14  # what several cost where the emptiest line between them is as full of ink as the others
ALIKE = 0.12  # what several gain where all their places show the very same
RELATED = 0.45  # the correlation of places from which on they gain: those of one figure are seldom more alike
CELLS = 12  # samples along each side of a place
NUDGES = (-1 / 32, 0.0, 1 / 32)  # by how much two of the same may stand otherwise in their places
BETWEEN = 0.025  # how far from the middle of the frame that line may lie


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure by its ink: `center` and `side`, the larger one of its sides, as fractions of the frame."""

    center: Point
    side: float

    @property
    def crop(self) -> Box:
        """A square around it, a little larger than it is; it may pass the edge of the frame."""
        (x, y), half = self.center, self.side * MARGIN / 2
        return x - half, y - half, x + half, y + half

    @property
    def place(self) -> str:
        """Where it stands, in the words of scenes: `left`, `top right`, `middle` and so on."""
        x, y = self.center
        column = "left" if x < 0.375 else "right" if x > 0.625 else ""
        row = "top" if y < 0.375 else "bottom" if y > 0.625 else ""
        return f"{row} {column}".strip() or "middle"

    @property
    def size(self) -> str:
        """`small`, `medium` or `large`; the bounds lie half-way between the sizes that scenes have."""
        return "small" if self.side < SMALL else "large" if self.side > LARGE else "medium"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a picture shows. Figures from the top, and from left to right."""

    ground: str
    figures: tuple[Figure, ...]

    @property
    def count(self) -> int:
        """How many figures there are."""
        return len(self.figures)

    @property
    def largest(self) -> Figure | None:
        """The largest figure, if there is any."""
        return max(self.figures, key=lambda figure: figure.side, default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrangement:
    """Places for several figures, all of one size, and the lines between them.

    Of a line at the middle of the frame: the axis it crosses (0: it lies, 1: it stands), and how far down or right it
    goes, as a fraction of the ink's outline.
    """

    centers: tuple[Point, ...]
    side: float
    lines: tuple[tuple[int, float], ...]


ARRANGEMENTS = (
    Arrangement(centers=COUNTED_CENTERS[2], side=(COUNTED_SIDE + TWO_SIDE) / 2, lines=((1, 1.0),)),
    Arrangement(centers=RELATIONS["above"], side=TWO_SIDE, lines=((0, 1.0),)),
    Arrangement(centers=COUNTED_CENTERS[3], side=COUNTED_SIDE, lines=((0, 1.0), (1, 0.48))),
    Arrangement(centers=COUNTED_CENTERS[4], side=COUNTED_SIDE, lines=((0, 1.0), (1, 1.0))),
)
SINGLE = (
    Figure(center=(0.5, 0.5), side=ALONE_SIDE),
    *(Figure(center=(0.5, 0.5), side=side) for side in SIZED_SIDES.values()),
    *(Figure(center=center, side=PLACED_SIDE) for center in PLACES.values()),
)


def read(picture: UInt8[np.ndarray, "h w 3"]) -> Reading:
    """Read a picture of any size. A blank one has no figures."""
    color = border_color(picture)
    ground = nearest_color(color, PALETTE)
    lab = lab_from_srgb(picture)
    contrast: Contrast = np.linalg.norm(lab - lab_from_srgb(color), axis=-1)  # to the eye: CIE76
    mask = ink(contrast)
    figures = [] if mask.mean() < BLANK else _figures(mask, contrast, lab)
    return Reading(ground=ground, figures=tuple(sorted(figures, key=lambda each: each.center[::-1])))


def ink(contrast: Contrast) -> Mask:
    """Where a picture differs from its ground to the eye, specks left out."""
    mask = contrast > INK
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    kept = np.bincount(labels.ravel(), minlength=count + 1) >= LEAST_INK * mask.size
    kept[0] = False
    return kept[labels]


def outline(mask: Mask) -> Figure | None:
    """The smallest upright box around the ink, as a figure; None where there is too little of it."""
    if mask.sum() < max(1, LEAST_INK * mask.size):
        return None
    height, width = mask.shape
    rows, columns = _spans(mask)
    top, bottom, left, right = rows.start / height, rows.stop / height, columns.start / width, columns.stop / width
    return Figure(center=((left + right) / 2, (top + bottom) / 2), side=max(right - left, bottom - top))


def _figures(mask: Mask, contrast: Contrast, lab: Lab) -> list[Figure]:
    """Those of the arrangement that fits the ink best."""
    whole = outline(mask)
    if whole is None:
        return []
    best, least = [whole], ONE + min(_misfit(whole, known) for known in SINGLE)
    rows, columns = _spans(mask)
    if whole.side > LARGE and min(rows.stop - rows.start, columns.stop - columns.start) < 0.6 * whole.side * len(mask):
        least += ONE_OF_TWO_SQUARES
    for arrangement in ARRANGEMENTS:
        figures, cost = _fitted(mask, contrast, lab, arrangement)
        if len(figures) > 1 and cost < least:
            best, least = figures, cost
    return best


def _fitted(mask: Mask, contrast: Contrast, lab: Lab, arrangement: Arrangement) -> tuple[list[Figure], float]:
    """Every pixel of ink belongs to the nearest place. The figures, and how far they are from as they should be."""
    parts = _distances(mask.shape, arrangement.centers).argmin(axis=0)
    found = [outline(mask & (parts == place)) for place in range(len(arrangement.centers))]
    costs = [
        MISSING if figure is None else _misfit(figure, Figure(center=center, side=arrangement.side))
        for figure, center in zip(found, arrangement.centers, strict=True)
    ]
    between = max(_ink_on_line(mask, contrast, *line) for line in arrangement.lines)
    alike = max(0.0, (_correlation(lab, arrangement) - RELATED) / (1 - RELATED))
    cost = sum(costs) / len(costs) + TOUCHING * between - ALIKE * alike
    return [figure for figure in found if figure is not None], cost


def _correlation(lab: Lab, arrangement: Arrangement) -> float:
    """How alike the places look, less their mean colours: the mean over pairs, each as it fits best. -1 to 1.

    Places within something of one colour have nothing in common but noise, and those of one large figure little.
    """
    shown = [_samples(lab, center, arrangement.side) for center in arrangement.centers]
    nudged = [
        [_samples(lab, (x + across, y + down), arrangement.side) for across in NUDGES for down in NUDGES]
        for x, y in arrangement.centers
    ]
    pairs = combinations(range(len(shown)), 2)
    return float(np.mean([max(float((shown[i] * other).sum()) for other in nudged[j]) for i, j in pairs]))


def _samples(lab: Lab, center: Point, side: float) -> Float[np.ndarray, "cells cells 3"]:
    """Colours on a grid over a place, less their mean and of length 1; 0 where there is but one colour."""
    offsets = ((np.arange(CELLS) + 0.5) / CELLS - 0.5) * side
    (x, y), (height, width) = center, lab.shape[:2]
    colors = lab[np.ix_(_cells(y + offsets, height), _cells(x + offsets, width))]
    colors = colors - colors.mean(axis=(0, 1))
    return colors / max(float(np.linalg.norm(colors)), 1e-6)


def _cells(where: Float[np.ndarray, " n"], size: int) -> Int[np.ndarray, " n"]:
    """The pixels in which points of the frame lie; those beyond it count for its edge."""
    return np.clip((where * size).astype(int), 0, size - 1)


def _ink_on_line(mask: Mask, contrast: Contrast, axis: int, extent: float) -> float:
    """How much ink there is on the emptiest line near the middle beside how much there is on all: 0 to 1."""
    # Relative to the typical contrast, so that a pixel half covered by ink counts half.
    amount = np.minimum(1.0, contrast / np.median(contrast[mask]))
    lines = amount[_spans(mask)].mean() or 1.0
    rows, columns = _spans(mask)
    along = columns if axis == 0 else rows
    along = slice(along.start, along.start + max(1, round(extent * (along.stop - along.start))))
    size = mask.shape[axis]
    reach = max(1, round(BETWEEN * size))
    across = slice(size // 2 - reach, size // 2 + reach)
    band = amount[across, along] if axis == 0 else amount[along, across].T
    return float(min(1.0, band.mean(axis=1).min() / lines))


def _spans(mask: Mask) -> tuple[slice, slice]:
    """Rows and columns between which all ink lies."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _misfit(figure: Figure, known: Figure) -> float:
    x, y = (abs(a - b) for a, b in zip(figure.center, known.center, strict=True))
    return sum(max(0.0, each - TOLERANCE) for each in (x, y, abs(figure.side - known.side)))


def _distances(shape: tuple[int, ...], centers: Sequence[Point]) -> Float[np.ndarray, "places h w"]:
    """Of every pixel from every place: the larger of the distances across and down, so that squares stay whole."""
    height, width = shape
    y, x = (np.arange(height) + 0.5)[:, None] / height, (np.arange(width) + 0.5)[None] / width
    return np.stack([np.maximum(abs(x - a), abs(y - b)) for a, b in centers])


def relation_holds(name: str, first: Figure, second: Figure) -> bool:
    """Whether `first` stands in a relation of scenes (`left of`, `above`, ...) to `second`: by their centres."""
    across, down = second.center[0] - first.center[0], second.center[1] - first.center[1]
    return RELATION_TESTS[name](across, down)


RELATION_TESTS: dict[str, Callable[[float, float], bool]] = {
    "left of": lambda across, down: across > abs(down),
    "right of": lambda across, down: -across > abs(down),
    "above": lambda across, down: down > abs(across),
    "below": lambda across, down: -down > abs(across),
}
