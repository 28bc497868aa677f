"""A whole run of every optimiser, killed and started again, is bit for bit the run that was not."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from radt.training.optim import OptimConfig
from tests.unit.test_loop import KilledError, assert_same_run, kill, make_run, stop_at


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings for a whole process, and refuses others."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", ["adam", "adafactor"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, name: Literal["adam", "adafactor"]) -> None:
    optim = OptimConfig(name=name, lr=3e-3, warmup_steps=2)
    make_run(tmp_path / "unbroken", optim=optim).train()
    with pytest.raises(KilledError):
        make_run(tmp_path / "killed", optim=optim).train(on_step=stop_at(3, kill))
    make_run(tmp_path / "killed", optim=optim).train()
    assert_same_run(tmp_path / "unbroken", tmp_path / "killed")
