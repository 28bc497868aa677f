"""Trace: where the time of a query went, and how many candidates each stage let through."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int64
from numpy import ndarray

_CLOCKS = ("load", "embed", "decompose", "filter", "vector", "lexical", "fuse", "diversity", "fetch")
_STAGES = {  # stage: the clock that ran in it
    "filter": "filter",
    "vector": "vector",
    "words": "lexical",
    "union": "fuse",
    "thresholds": "",
    "duplicates": "diversity",
    "k": "fetch",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One step from all pairs to the hits: how many were left after it, and the milliseconds it took."""

    stage: str
    kept: int
    ms: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"stage": self.stage, "kept": self.kept, "ms": round(self.ms, 3)}


class Trace:
    """Adds up wall time under a few names, and holds the counts of the last round; of all queries of a batch."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, float] = dict.fromkeys(_CLOCKS, 0.0)
        self.kept: dict[str, int] = {}
        self.depth = 0  # candidates that each list was asked for
        self.examined = 0  # rows that the search by vector looked at
        self.excluded = 0  # ids that may not be found
        self.lists: dict[str, list[Int64[ndarray, " _"]]] = {}  # of the last round, as `SearchResult.lists`

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a part of the work."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.milliseconds[name] += (time.perf_counter() - start) * 1e3

    def stages(self, *, matching: int, hits: int) -> list[Stage]:
        """The stages that this query went through, in order, from the rows that the filter leaves to the hits."""
        kept = {"filter": matching, **self.kept, "k": hits}
        return [
            Stage(stage=name, kept=kept[name], ms=self.milliseconds.get(clock, 0.0))
            for name, clock in _STAGES.items()
            if name in kept
        ]
