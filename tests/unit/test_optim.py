"""Optimiser groups and the learning rate, by hand."""

import copy
from typing import Any, Literal

import pytest
import torch

from index.errors import ConfigError
from radt.training.checkpoint import load_optimizer, optimizer_tensors
from radt.training.optim import OptimConfig, learning_rate, make_optimizer
from radt.unet.unet import UNet
from tests.networks import new_unet

CONFIG = OptimConfig(lr=1.0, warmup_steps=4, cooldown_share=0.25)


def test_groups_hold_every_parameter_once_and_only_matrices_decay() -> None:
    unet = new_unet()
    optimizer = make_optimizer(unet, OptimConfig(weight_decay=0.3, betas=(0.8, 0.95)))
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in unet.parameters()}
    for group in optimizer.param_groups:
        assert all((parameter.ndim > 1) == (group["weight_decay"] == 0.3) for parameter in group["params"])
        assert group["weight_decay"] in (0.3, 0.0)
        assert tuple(group["betas"]) == (0.8, 0.95)
        assert group["params"]


def test_learning_rate_by_hand() -> None:
    rates = [learning_rate(step, 20, CONFIG) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:16] == [1.0] * 12
    assert rates[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_no_warm_up_and_no_cool_down() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=0, cooldown_share=0.0)
    assert [learning_rate(step, 3, config) for step in range(4)] == [2.0, 2.0, 2.0, 0.0]


def test_a_longer_run_cools_down_longer_and_later() -> None:
    """Before the cool-down of the shorter run both have the same rates, so it may be resumed as the longer one."""
    short, long = ([learning_rate(step, n, CONFIG) for step in range(n)] for n in (40, 100))
    assert short[:30] == long[:30]
    assert all(rate == 1.0 for rate in long[30:75])
    assert long[75] == 1.0
    assert long[76] < 1.0
    assert (sum(rate < 1 for rate in short[4:]), sum(rate < 1 for rate in long[4:])) == (9, 24)


@pytest.mark.parametrize(
    "changes",
    [
        {"betas": (0.9,)},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": float("inf")},
        {"lr": float("nan")},
        {"weight_decay": -0.1},
        {"warmup_steps": -1},
        {"cooldown_share": 1.5},
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        OptimConfig(**changes)


def test_the_name_chooses_the_optimiser() -> None:
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "adafactor": torch.optim.Adafactor}
    for name, kind in kinds.items():
        optimizer = make_optimizer(new_unet(), OptimConfig(name=name, weight_decay=0.3))
        assert type(optimizer) is kind
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        assert decays == ([0.0, 0.0] if name == "adam" else [0.3, 0.0])
    assert OptimConfig().name == "adamw"


def test_adafactor_keeps_rows_and_columns_where_adam_keeps_two_of_every_weight() -> None:
    def kept(name: Literal["adamw", "adam", "adafactor"]) -> int:
        layer = torch.nn.Linear(40, 30, bias=False)
        optimizer = make_optimizer(layer, OptimConfig(name=name))
        layer(torch.randn(2, 40)).sum().backward()
        optimizer.step()
        return sum(tensor.numel() for slot, tensor in optimizer_tensors(optimizer).items() if not slot.endswith("step"))

    assert (kept("adamw"), kept("adam"), kept("adafactor")) == (2400, 2400, 70)


def test_the_first_step_of_adafactor_moves_a_matrix_by_a_share_of_its_own_size() -> None:
    """Equal gradients: the update is 1 everywhere, and lr times the root mean square of the weights scales it."""
    layer = torch.nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.5)
    optimizer = make_optimizer(layer, OptimConfig(name="adafactor", lr=0.1, weight_decay=0.0))
    layer.weight.grad = torch.full((2, 3), 7.0)
    optimizer.step()
    assert torch.allclose(layer.weight, torch.full((2, 3), 0.5 - 0.1 * 0.5), atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adafactor"])
def test_every_optimiser_goes_on_from_its_saved_state_to_the_same_bits(name: Literal["adam", "adafactor"]) -> None:
    """As test_loop proves of AdamW for whole runs: state saved, loaded into another, and three more steps."""

    def step(unet: UNet, optimizer: torch.optim.Optimizer, number: int) -> None:
        optimizer.zero_grad()
        sum((p * number - 0.1).square().sum() for p in unet.parameters()).backward()
        optimizer.step()

    unet = new_unet()
    optimizer = make_optimizer(unet, OptimConfig(name=name))
    for number in range(1, 4):
        step(unet, optimizer, number)
    again = copy.deepcopy(unet)
    other = make_optimizer(again, OptimConfig(name=name))
    load_optimizer(other, {slot: tensor.clone() for slot, tensor in optimizer_tensors(optimizer).items()})
    for number in range(4, 7):
        step(unet, optimizer, number)
        step(again, other, number)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), again.parameters(), strict=True))
    first, second = optimizer_tensors(optimizer), optimizer_tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[slot], second[slot]) for slot in first)
