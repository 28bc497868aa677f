"""Training that has gone wrong stops at once, with one sentence, and leaves the last good state where it is."""

import math
from collections.abc import Mapping
from pathlib import Path

from index.errors import UserError
from radt.training.metrics import append_metrics

REMEDY = "lower optim.lr, or train in full precision, with another --out; `radt doctor` on this one shows the way here"


class DivergedError(UserError):
    """The loss or the gradient is not a number any more, so nothing that comes after is of use."""


def check_finite(metrics: Mapping[str, float], *, state: Path, log: Path | None = None) -> None:
    """Raise a DivergedError at a loss or gradient that is infinite or NaN, and put the line into `log`.

    Call it before anything is saved into `state`. Gradients are averaged over processes, so all stop at one step.
    """
    spoiled = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics.get(name, 0.0))]
    if not spoiled:
        return
    if log is not None:
        append_metrics(log, metrics)
    what = " and ".join(f"{name} is {metrics[name]}" for name in spoiled)
    kept = f"{state} holds the last good state" if state.exists() else "no state was saved yet"
    raise DivergedError(f"training diverged at step {int(metrics['step'])}: {what}; {kept}. To go on, {REMEDY}")
