"""Reference curves of the presets: loss, gradient and the worth of neighbours in runs that ended well.

Each lies in `curves/` as a small JSON file, made from a run by `tools/make_reference_curve.py`, and says which run.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Any

import numpy as np

from index.config import from_dict

POINTS = 50
SMOOTHED = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A stretch of a run: medians of what was logged in it, and between which values nine tenths of the losses lie."""

    images_seen: float
    loss: float
    loss_low: float
    loss_high: float
    grad_norm: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """What a probe read there (`radt/training/probe.py`)."""

    images_seen: float
    gain: float
    attention_right: float
    attention_wrong: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One run of a preset. `phase` is a folder of a distillation; `config` what the run was started with."""

    preset: str
    phase: str = ""
    source: str
    config: Mapping[str, Any]
    points: tuple[Point, ...]
    life: tuple[Life, ...] = ()

    @property
    def from_nothing(self) -> bool:
        """Whether the network began with random weights."""
        return self.config.get("start") is None

    def loss_at(self, images_seen: float) -> float | None:
        """Between two points; None before the first. Beyond the last it is the last."""
        return _between(images_seen, [(point.images_seen, point.loss) for point in self.points])

    def gain_at(self, images_seen: float) -> float | None:
        """The worth of neighbours, likewise."""
        return _between(images_seen, [(life.images_seen, life.gain) for life in self.life])


def load_curves(preset: str, phase: str = "") -> list[Curve]:
    """The curves of one preset and phase, in the order of their files' names; none where no run was kept."""
    folder = files("radt.training").joinpath("curves")
    texts = [each.read_text(encoding="utf-8") for each in sorted(folder.iterdir(), key=lambda each: each.name)]
    curves = [from_dict(Curve, json.loads(text)) for text in texts]
    return [curve for curve in curves if (curve.preset, curve.phase) == (preset, phase)]


def thin(lines: Sequence[Mapping[str, float]], points: int = POINTS) -> tuple[Point, ...]:
    """A run's metrics as few points, close together where training is young: bins that grow with the images seen.

    A bin takes lines around it in until it has `SMOOTHED`, so that no point is one batch's luck.
    """
    seen = np.array([line["images_seen"] for line in lines], dtype=float)
    edges = np.unique(np.searchsorted(seen, np.geomspace(seen[0], seen[-1], points + 1)))
    edges[-1] = len(lines)
    return tuple(_point(lines, start, end) for start, end in pairwise(edges.tolist()))


def _point(lines: Sequence[Mapping[str, float]], start: int, end: int) -> Point:
    around = max(0, SMOOTHED - (end - start) + 1) // 2
    taken = lines[max(0, start - around) : end + around]
    losses = [line["loss"] for line in taken]
    norms = [line["grad_norm"] for line in taken if "grad_norm" in line]
    low, high = np.quantile(losses, [0.05, 0.95]).tolist()
    return Point(
        images_seen=statistics.median(line["images_seen"] for line in lines[start:end]),
        loss=statistics.median(losses),
        loss_low=low,
        loss_high=high,
        grad_norm=statistics.median(norms) if norms else None,
    )


def _between(x: float, points: Sequence[tuple[float, float]]) -> float | None:
    if not points or x < points[0][0]:
        return None
    return float(np.interp(x, [place for place, _ in points], [value for _, value in points]))
