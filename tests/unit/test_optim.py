"""Optimiser groups and the learning rate, by hand."""

from typing import Any

import pytest

from index.errors import ConfigError
from radt.training.optim import OptimConfig, learning_rate, make_optimizer
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


def test_a_longer_run_only_lengthens_the_constant_stretch() -> None:
    """Before the cool-down of the shorter run both have the same rates, so it may be resumed as the longer one."""
    short, long = ([learning_rate(step, n, CONFIG) for step in range(n)] for n in (40, 100))
    assert short[:30] == long[:30]
    assert all(rate == 1.0 for rate in long[30:75])
    assert long[75] == 1.0
    assert long[76] < 1.0


@pytest.mark.parametrize("changes", [{"betas": (0.9,)}, {"warmup_steps": -1}, {"cooldown_share": 1.5}])
def test_impossible_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OptimConfig(**changes)
