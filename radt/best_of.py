"""`--best-of N`: of N pictures of a prompt keep the one that agrees with it best, by the model's own CLIP (row I14).

The candidates of picture i are the pictures that `-n` would draw with the seeds from `seed` + i N on. Each keeps its
own seed, so the one that is kept can be drawn again alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from radt.pipeline import GeneratedImage


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A picture that was drawn to choose from. `prompt_agreement`: `radt.quality.prompt_agreements`."""

    seed: int
    prompt_agreement: float


def seeds_of(position: int, *, seed: int, best_of: int) -> range:
    """The candidates' seeds of the picture at this position among the n of a prompt."""
    return range(seed + position * best_of, seed + (position + 1) * best_of)


def keep_best(pictures: Sequence["GeneratedImage"], agreements: Sequence[float]) -> "GeneratedImage":
    """The picture with the largest agreement, the first of equals, with all candidates in its record.

    Its times are those that all candidates took.
    """
    candidates = tuple(
        Candidate(seed=picture.seed, prompt_agreement=round(agreement, 6))
        for picture, agreement in zip(pictures, agreements, strict=True)
    )
    best = max(range(len(pictures)), key=lambda place: agreements[place])
    record = replace(pictures[best].record, candidates=candidates)
    return replace(pictures[best], record=record, timings_ms=added([picture.timings_ms for picture in pictures]))


def added(timings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What several pictures took together, part by part."""
    return {name: sum(each[name] for each in timings) for name in timings[0]}
