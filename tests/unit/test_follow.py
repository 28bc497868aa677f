"""What is due after which step of a run: logs, saves, and the end at Ctrl-C or at a loss that is no number."""

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from radt.training.divergence import DivergedError
from radt.training.follow import follow


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    num_steps: int = 7
    log_every: int = 2
    save_every: int = 3


class Run:
    """Counts its steps, and notes what was asked of it after which."""

    def __init__(self, folder: Path, *, spoiled: int | None = None, interrupted: int | None = None) -> None:
        self.state, self.log = folder / "state", folder / "metrics.jsonl"
        self.spoiled, self.interrupted = spoiled, interrupted
        self.step = 0
        self.saved: list[int] = []
        self.announced: list[int] = []

    def steps(self) -> Iterator[dict[str, float]]:
        for self.step in range(1, 8):
            if self.step == self.interrupted:
                signal.raise_signal(signal.SIGINT)
            yield {"step": self.step, "loss": float("nan") if self.step == self.spoiled else 0.5}

    def follow(self, *, log: bool = True) -> None:
        follow(
            self.steps(),
            Pace(),
            state=self.state,
            log=self.log if log else None,
            save=lambda: self.saved.append(self.step),
            on_save=lambda: self.announced.append(self.step),
        )

    @property
    def logged(self) -> list[int]:
        return [json.loads(line)["step"] for line in self.log.read_text().splitlines()]


def test_logs_and_saves_when_due_and_saves_the_last_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.follow()
    assert run.logged == [2, 4, 6]
    assert run.saved == run.announced == [3, 6, 7]


def test_ctrl_c_saves_the_step_in_hand_and_announces_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, interrupted=5)
    with pytest.raises(KeyboardInterrupt):
        run.follow()
    assert run.saved == [3, 5]
    assert run.announced == [3]


def test_a_loss_that_is_no_number_is_logged_and_never_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, spoiled=3)
    with pytest.raises(DivergedError, match="step 3"):
        run.follow()
    assert run.logged == [2, 3]
    assert run.saved == []


def test_a_process_without_a_log_writes_none(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.follow(log=False)
    assert not run.log.exists()
    assert run.saved == [3, 6, 7]
