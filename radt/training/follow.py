"""What every training run does with its steps: log, save, stop between two of them or when they diverge."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

from radt.training.divergence import check_finite
from radt.training.interrupt import StopOnInterrupt
from radt.training.metrics import append_metrics

OnStep = Callable[[dict[str, float]], None]


@runtime_checkable
class Pace(Protocol):
    """How long a run is, and how often it logs and saves, in optimiser steps."""

    @property
    def num_steps(self) -> int:
        """How many steps the run has."""
        ...

    @property
    def log_every(self) -> int:
        """Steps from one logged step to the next."""
        ...

    @property
    def save_every(self) -> int:
        """Steps from one save to the next; the last step is saved, too."""
        ...


def follow(
    steps: Iterable[dict[str, float]],
    pace: Pace,
    *,
    state: Path,
    log: Path | None,
    save: Callable[[], None],
    on_step: OnStep = lambda _: None,
    on_save: Callable[[], None] = lambda: None,
) -> None:
    """Take steps to their end. At Ctrl-C the step in hand is finished and saved before the interruption goes on.

    Args:
        steps: takes one step each time it is asked, and says with which metrics; `step` among them counts from 1.
        pace: what is due when.
        state: the file that `save` writes, for the sentence about a run that diverged.
        log: where metrics are appended; None in a process that writes nothing.
        save: keeps the state after the step that was just taken.
        on_step: called with the metrics of every step.
        on_save: called after every save that was due, not after the one before an interruption.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
        DivergedError: the loss or the gradient is no number any more; the last state that was saved stays.
    """
    with StopOnInterrupt() as interrupt:
        for metrics in steps:
            step = int(metrics["step"])
            check_finite(metrics, state=state, log=log)
            if step % pace.log_every == 0 and log is not None:
                append_metrics(log, metrics)
            on_step(metrics)
            if interrupt.requested:
                save()
                raise KeyboardInterrupt
            if step % pace.save_every == 0 or step == pace.num_steps:
                save()
                on_save()
