"""What a run folder holds, for whoever judges it: configuration, log, pack, and a curve to compare with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from index.config import from_dict, to_dict
from index.errors import ConfigError
from radt.presets import PRESETS
from radt.training.distill_run import DistillConfig
from radt.training.loop import METRICS_FILE
from radt.training.pack import Pack
from radt.training.probe import PROBE_FILE
from radt.training.reference import Curve, load_curves

Lines: TypeAlias = tuple[Mapping[str, float], ...]

NEEDED = ("step", "images_seen", "loss")  # of a line
_NONE = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """What one run, or one phase of a distillation, logged, and the curve it is held beside."""

    phase: str
    lines: Lines
    probes: Lines
    curve: Curve | None

    @property
    def images_seen(self) -> float:
        """At the last line that was logged."""
        return self.lines[-1]["images_seen"]


class RunFolder:
    """What lies in a run folder, read once and when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if not isinstance(self.raw, dict):
                raise ConfigError("its config.json holds no object")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} is no run folder ({error}): name one that `radt train` wrote") from error
        self.preset = nearest_preset(self.raw)
        self.config = _typed_config(self.raw, self.preset)

    @cached_property
    def histories(self) -> list[History]:
        """The run's own, or one for each phase."""
        places = [self.folder]
        if not (self.folder / METRICS_FILE).exists():
            places = sorted(self.folder.glob(f"*/{METRICS_FILE}"), key=lambda path: path.stat().st_mtime)
            places = [path.parent for path in places]
        found = []
        for place in places:
            lines = read_lines(place / METRICS_FILE)
            if lines:
                phase = "" if place == self.folder else place.name
                curve = choose_curve(load_curves(self.preset, phase), self.raw)
                probes = read_lines(place / PROBE_FILE)
                found.append(History(phase=phase, lines=lines, probes=probes, curve=curve))
        return found

    @cached_property
    def pack(self) -> Pack:
        """What it trains on."""
        named = self.config.pack_file if isinstance(self.config, DistillConfig) else None
        return Pack.load(self.folder / "pack.safetensors" if named is None else Path(named))


def read_lines(path: Path) -> Lines:
    """The whole lines of a metrics file, as far as they are metrics with a loss; none where there is no file."""
    found = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and all(isinstance(values.get(name), int | float) for name in NEEDED):
            found.append({name: value for name, value in values.items() if isinstance(value, int | float)})
    return tuple(found)


def nearest_preset(raw: Mapping[str, Any]) -> str:
    """The preset that a configuration has most fields in common with: the run does not keep its name."""
    ours = dotted(raw)

    def distance(name: str) -> int:
        theirs = dotted(to_dict(PRESETS[name]()))
        return sum(ours.get(key, _NONE) != theirs.get(key, _NONE) for key in ours.keys() | theirs.keys())

    return min(PRESETS, key=distance)


def choose_curve(curves: Sequence[Curve], raw: Mapping[str, Any]) -> Curve | None:
    """One of a run that began alike, from nothing or from trained weights, and learnt the same kind of answer.

    A run from trained weights that has no such curve is held beside one from nothing: it should be below. The loss of
    a CLIP is that of telling one pair from a batch of others, and a recogniser's batches are normalised by their own
    spread, so these are held beside one of as large a batch alone.
    """
    kind = ("prediction", "weighting", "batch_size")  # stages of the network keep their batch's size elsewhere
    alike = [curve for curve in curves if all(curve.config.get(name) == raw.get(name) for name in kind)]
    from_nothing = [curve for curve in alike if curve.from_nothing]
    began = from_nothing if raw.get("start") is None else [curve for curve in alike if not curve.from_nothing]
    return next(iter(began or from_nothing), None)


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _typed_config(raw: dict[str, Any], preset: str) -> Any:
    """The configuration, or, where this version cannot read it, a sentence that says so."""
    try:
        return from_dict(type(PRESETS[preset]()), raw)
    except ValueError as error:
        return f"of another version, so only what was logged is looked at: {error}"
