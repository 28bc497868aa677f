"""A loss that is no number any more stops training with one sentence, and the state saved before it stays as it was."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from radt.training.data import Batch
from radt.training.divergence import DivergedError, check_finite
from radt.training.loop import Objective
from radt.unet.unet import UNet
from tests.unit.test_loop import OBJECTIVE, assert_same_run, make_run, metrics


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@dataclass
class SpoiledAt:
    """An objective whose loss is multiplied by `factor` in one call."""

    call: int
    factor: float
    plain: Objective = OBJECTIVE
    calls: int = 0

    def loss(self, network: UNet, batch: Batch, generator: torch.Generator) -> Tensor:
        self.calls += 1
        loss = self.plain.loss(network, batch, generator)
        return loss * self.factor if self.calls == self.call else loss


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_run_stops_before_it_saves_what_is_spoiled(tmp_path: Path, factor: float) -> None:
    with pytest.raises(DivergedError, match=r"diverged at step 4: loss is (nan|inf).*holds the last good state"):
        make_run(tmp_path, objective=SpoiledAt(call=4, factor=factor)).train()  # step 4 is one to save at
    again = make_run(tmp_path)
    assert again.step == 2
    assert all(torch.isfinite(each).all() for each in again.network.state_dict().values())
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    again.train()
    make_run(tmp_path / "unbroken").train()
    assert_same_run(tmp_path, tmp_path / "unbroken")


def test_a_gradient_that_is_no_number_is_told_though_the_loss_is(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.network.conv_out.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(DivergedError, match=r"step 1: grad_norm is nan; no state was saved yet"):
        run.train()
    assert not run.state_path.exists()


def test_numbers_pass_and_leave_nothing_behind(tmp_path: Path) -> None:
    check_finite({"step": 1, "loss": 1e30}, state=tmp_path / "s", log=tmp_path / "m")
    assert not list(tmp_path.iterdir())
    with pytest.raises(DivergedError):
        check_finite({"step": 7, "loss": math.inf}, state=tmp_path / "s", log=tmp_path / "m")
    assert math.isinf(json.loads((tmp_path / "m").read_text())["loss"])
