"""Where a build's time goes: every moment is put down to the stage that is waited for, and the largest is named."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Stage = Literal["read", "decode", "embed", "write"]
STAGES: tuple[Stage, ...] = get_args(Stage)
REMEDIES: dict[Stage, str] = {
    "read": "faster storage, or --engine ray on several machines",
    "decode": "raise --workers",
    "embed": "a GPU, or a smaller model",
    "write": "a faster disk",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A build so far. `seconds` since it began to read; `stages` are shares of 1, of all machines together.

    `matrix_share` is the images that were embedded beside those that the device could embed in that time if it did
    nothing but the network's matrix products, at the rate it reaches in a large plain one. None while that is not
    known: in the first seconds, without a GPU, and on Ray.
    """

    pairs: int
    shards: int
    shards_found: int | None  # to be done, in the sources listed so far; None: nothing is listed yet
    seconds: float
    stages: dict[Stage, float]
    matrix_share: float | None = None

    @property
    def pairs_per_second(self) -> float:
        """Since the start; 0 before it."""
        return self.pairs / self.seconds if self.seconds else 0.0

    @property
    def bottleneck(self) -> Stage | None:
        """The stage that the others wait for most; None before anything was waited for."""
        slowest: Stage = max(STAGES, key=self.stages.__getitem__)
        return slowest if self.stages[slowest] else None

    @property
    def seconds_left(self) -> float | None:
        """As long for each shard to come as for those that are done; None while that is not known."""
        if not self.shards_found or not self.shards:
            return None
        return self.seconds / self.shards * max(0, self.shards_found - self.shards)


class Meter:
    """A stopwatch that is always in one stage or stopped. One thread calls `enter` and `stop`, any may look."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
        self._now: tuple[Stage, float] | None = None  # the running stage and since when
        self._begun: float | None = None
        self._ended = 0.0
        self.pairs = 0
        self.images = 0  # embedded here
        self.most_images_per_second: float | None = None  # that the device could embed at best
        self.shards = 0
        self.shards_found: int | None = None
        self.note = ""  # what goes on instead, when it is none of the stages

    def enter(self, stage: Stage) -> None:
        """What follows is put down to `stage`."""
        self.stop()
        self._now = (stage, self._clock())
        self._begun = self._now[1] if self._begun is None else self._begun

    def expect(self, shards: int) -> None:
        """So many more are to be done, or fewer when negative."""
        self.shards_found = (self.shards_found or 0) + shards

    def stop(self) -> None:
        """What follows is put down to nothing."""
        if self._now is not None:
            (stage, since), self._ended = self._now, self._clock()
            self._now = None
            self._seconds[stage] += self._ended - since

    def add(self, seconds: Mapping[Stage, float], *, pairs: int) -> None:
        """A shard that was staged elsewhere, and how long each stage of it took there."""
        self._ended = self._clock()
        self._begun = self._ended - sum(seconds.values()) if self._begun is None else self._begun
        for stage, value in seconds.items():
            self._seconds[stage] += value
        self.pairs += pairs
        self.shards += 1

    @property
    def seconds(self) -> dict[Stage, float]:
        """Of each stage so far."""
        seconds, now = dict(self._seconds), self._now
        if now is not None:
            seconds[now[0]] += self._clock() - now[1]
        return seconds

    @property
    def progress(self) -> Progress:
        """As it is at this moment."""
        seconds = self.seconds
        total = sum(seconds.values())
        until = self._ended if self._now is None else self._clock()
        since_start = 0.0 if self._begun is None else until - self._begun
        at_best = since_start * (self.most_images_per_second or 0.0)
        return Progress(
            pairs=self.pairs,
            shards=self.shards,
            shards_found=self.shards_found,
            seconds=since_start,
            stages={stage: value / total if total else 0.0 for stage, value in seconds.items()},
            matrix_share=self.images / at_best if at_best else None,
        )


def matrix_words(share: float) -> str:
    """`matrix units 41 %`."""
    return f"matrix units {100 * share:.0f} %"


def progress_line(progress: Progress) -> str:
    """`12,400 pairs · 1,240 pairs/s · read 5 % decode 61 % embed 30 % write 4 % · bottleneck: decode (...)`."""
    parts = [f"{progress.pairs:,} pairs", f"{progress.pairs_per_second:,.0f} pairs/s"]
    if progress.shards_found is not None:
        parts.append(f"{progress.shards:,} of {progress.shards_found:,} shards")
    if progress.bottleneck is not None:
        parts.append(" ".join(f"{stage} {share:.0%}".replace("%", " %") for stage, share in progress.stages.items()))
        parts.append(f"bottleneck: {progress.bottleneck} ({REMEDIES[progress.bottleneck]})")
    if progress.matrix_share is not None:
        parts.append(matrix_words(progress.matrix_share))
    if progress.seconds_left is not None:
        minutes, seconds = divmod(round(progress.seconds_left), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
    return " \u00b7 ".join(parts)
