"""Saved state: what is written comes back bit for bit, and a broken file is one sentence."""

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from index.errors import UserError
from radt.training.checkpoint import (
    CheckpointError,
    load_optimizer,
    load_state,
    optimizer_tensors,
    save_state,
    with_prefix,
    without_prefix,
)
from tests.networks import generator


def test_round_trip(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4, generator=generator()),
        "b": torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last),
        "half": torch.randn(5).half(),
        "count": torch.tensor(3.0),
    }
    save_state(tmp_path / "state", tensors, {"step": 7, "name": "x"})
    again, facts = load_state(tmp_path / "state")
    assert facts == {"step": 7, "name": "x"}
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == tensors[name].dtype for name in again)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_prefixes_keep_names_apart() -> None:
    one, two = {"a.b": torch.zeros(1), "a": torch.ones(1)}, {"a": torch.full((1,), 2.0)}
    file = with_prefix("network", one) | with_prefix("ema", two)
    assert without_prefix("network", file).keys() == one.keys()
    assert without_prefix("ema", file)["a"] == 2
    assert without_prefix("net", file) == {}


def test_an_optimizer_goes_on_as_if_never_stopped() -> None:
    def problem() -> tuple[nn.Parameter, torch.optim.AdamW]:
        weights = nn.Parameter(torch.ones(4))
        return weights, torch.optim.AdamW([{"params": [weights], "lr": 0.1}])

    def step(weights: nn.Parameter, optimizer: torch.optim.AdamW, number: int) -> None:
        optimizer.zero_grad()
        (weights * torch.arange(4) * number).square().sum().backward()
        optimizer.step()

    weights, optimizer = problem()
    for number in range(3):
        step(weights, optimizer, number)
    saved = optimizer_tensors(optimizer)
    again, other = problem()
    again.data.copy_(weights.data)
    load_optimizer(other, {name: tensor.clone() for name, tensor in saved.items()})
    for number in range(3, 6):
        step(weights, optimizer, number)
        step(again, other, number)
    assert torch.equal(weights, again)
    assert optimizer_tensors(other).keys() == saved.keys() == {"0.step", "0.exp_avg", "0.exp_avg_sq"}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_one_sentence(tmp_path: Path, share: float) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.zeros(100)}, {"step": 1})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError) as caught:
        load_state(path)
    assert str(path) in str(caught.value)
    assert "delete it to start this run again" in str(caught.value)


def test_a_file_of_another_kind_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("not safetensors at all, but long enough")
    with pytest.raises(CheckpointError):
        load_state(tmp_path / "state")


@pytest.fixture
def _full_disk() -> Iterator[None]:
    """Files may not grow beyond a kilobyte."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_state(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    save_state(tmp_path / "state", {"a": torch.zeros(1)}, {"step": 1})
    request.getfixturevalue("_full_disk")
    with pytest.raises(UserError, match="make room"):
        save_state(tmp_path / "state", {"a": torch.zeros(1000)}, {"step": 2})
    assert load_state(tmp_path / "state")[1] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
