"""The meter: arithmetic with a clock of ours, and the real pipeline with one stage made slow."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from index.ingest.engines import run_local
from index.ingest.meter import STAGES, Meter, Progress, Stage, progress_line
from index.store import PairStore
from tests.fakes import HashEmbedder, pairs_of, shard_of


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_every_moment_belongs_to_one_stage() -> None:
    clock = Clock()
    meter = Meter(clock)
    assert meter.progress.bottleneck is None
    stages: tuple[tuple[Stage, float], ...] = (("read", 1), ("embed", 4), ("read", 1), ("write", 2), ("decode", 2))
    for stage, seconds in stages:
        meter.enter(stage)
        clock.now += seconds
    assert meter.progress.stages == {"read": 0.2, "decode": 0.2, "embed": 0.4, "write": 0.2}  # while one is running
    meter.stop()
    clock.now += 50
    meter.stop()
    assert meter.progress.stages == {"read": 0.2, "decode": 0.2, "embed": 0.4, "write": 0.2}
    assert meter.progress.seconds == 10
    assert meter.progress.bottleneck == "embed"


def test_rate_and_time_left() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.enter("embed")
    clock.now += 10
    meter.pairs, meter.shards = 500, 2
    assert meter.progress.pairs_per_second == 50
    assert meter.progress.seconds_left is None  # nobody has said how many there are
    meter.shards_found = 5
    assert meter.progress.seconds_left == 15
    meter.shards = 5
    assert meter.progress.seconds_left == 0


def test_the_share_of_what_the_device_could_do() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.enter("embed")
    clock.now += 10
    meter.images = 500
    assert meter.progress.matrix_share is None
    meter.most_images_per_second = 200.0
    assert meter.progress.matrix_share == 0.25


def test_work_done_elsewhere_is_added_up() -> None:
    clock = Clock()
    meter = Meter(clock)
    for seconds in ({"read": 1.0, "embed": 3.0}, {"read": 1.0, "embed": 3.0, "write": 2.0}):
        clock.now += 4
        meter.add(seconds, pairs=100)  # type: ignore[arg-type]
    assert meter.progress.stages == {"read": 0.2, "decode": 0.0, "embed": 0.6, "write": 0.2}
    assert (meter.progress.pairs, meter.progress.shards) == (200, 2)
    assert meter.progress.seconds == 8


def test_the_line() -> None:
    stages: dict[Stage, float] = {"read": 0.05, "decode": 0.61, "embed": 0.30, "write": 0.04}
    progress = Progress(pairs=12_400, shards=31, shards_found=None, seconds=10, stages=stages)
    assert progress_line(progress) == (
        "12,400 pairs \u00b7 1,240 pairs/s \u00b7 read 5 % decode 61 % embed 30 % write 4 % \u00b7 "
        "bottleneck: decode (raise --workers)"
    )
    known = Progress(pairs=12_400, shards=31, shards_found=11_191, seconds=10, stages=stages)
    assert progress_line(known).endswith(" \u00b7 1:00:00 left")
    assert "31 of 11,191 shards" in progress_line(known)
    measured = Progress(pairs=12_400, shards=31, shards_found=None, seconds=10, stages=stages, matrix_share=0.412)
    assert progress_line(measured).endswith("bottleneck: decode (raise --workers) \u00b7 matrix units 41 %")
    nothing = Progress(pairs=0, shards=0, shards_found=None, seconds=0, stages=dict.fromkeys(STAGES, 0.0))
    assert progress_line(nothing) == "0 pairs \u00b7 0 pairs/s"


# The pipeline, with a stage that sleeps


class Sleepy(HashEmbedder):
    """Cheap but for the naps; batches of 16, so that there are many."""

    def __init__(self, *, prepare: float = 0.0, embed: float = 0.0):
        super().__init__()
        self._naps = (prepare, embed)

    def prepare(self, image: PIL.Image.Image) -> np.ndarray:
        time.sleep(self._naps[0])
        return super().prepare(image)

    def embed(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        time.sleep(self._naps[1])
        return super().embed(prepared)

    def batch_rows(self) -> int:
        return 16


def slowly(samples: Sequence[Any], seconds: float) -> Iterator[Any]:
    for sample in samples:
        time.sleep(seconds)
        yield sample


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, workers: int, **naps: float) -> Meter:
    """Four shards of 32 pairs."""
    monkeypatch.setattr("index.ingest.decode.CHUNK_SAMPLES", 4)
    store = PairStore.create(tmp_path, dim=32)
    stage = store.stage

    def slow_stage(*args: Any, **kwargs: Any) -> list[Any]:
        time.sleep(naps.get("write", 0))
        return stage(*args, **kwargs)

    monkeypatch.setattr(store, "stage", slow_stage)
    meter = Meter()
    embedder = Sleepy(prepare=naps.get("decode", 0.0), embed=naps.get("embed", 0.0))
    shards = [shard_of(f"{i}.tar", slowly(pairs_of(f"{i}.tar", 32), naps.get("read", 0.0))) for i in range(4)]
    with store.lock():
        for _ in run_local(
            ((shard, "", "x") for shard in shards),
            embedder=embedder,
            store=store,
            claim=lambda rows: None,
            on_batch=lambda images: None,
            workers=workers,
            meter=meter,
        ):
            time.sleep(naps.get("commit", 0.0))
    return meter


@pytest.mark.parametrize(
    ("naps", "slowest"),
    [
        ({"read": 0.005}, "read"),
        ({"decode": 0.005}, "decode"),
        ({"embed": 0.1}, "embed"),
        ({"write": 0.2}, "write"),
        ({"commit": 0.2}, "write"),
        # A decoder that works for a third of the time idles all the same: more of them would not help.
        ({"read": 0.015, "decode": 0.005}, "read"),
    ],
)
def test_the_slow_stage_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: dict[str, float], slowest: Stage
) -> None:
    progress = run(tmp_path, monkeypatch, workers=1, **naps).progress
    assert progress.bottleneck == slowest, progress
    assert progress.stages[slowest] > 0.5, progress
    assert sum(progress.stages.values()) == pytest.approx(1)
    assert (progress.pairs, progress.shards) == (128, 4)
