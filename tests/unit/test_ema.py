"""The average of the weights, by closed forms."""

import pytest
import torch
from torch import nn

from radt.training.ema import Ema

LATE = 10**7  # where the warm-up of the decay is over


def network(value: float) -> nn.Linear:
    layer = nn.Linear(3, 2)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


def average_of(ema: Ema) -> float:
    values = torch.cat([tensor.flatten() for tensor in ema.state().values()])
    assert (values - values[0]).abs().max() < 1e-6
    return float(values[0])


def test_starts_at_the_weights_and_does_not_follow_them_by_itself() -> None:
    layer = network(1.0)
    ema = Ema(layer, 0.9)
    nn.init.zeros_(layer.weight)
    assert average_of(ema) == 1


def test_decay_zero_copies() -> None:
    ema = Ema(network(1.0), 0.0)
    ema.update(network(5.0), 0)
    assert average_of(ema) == 5


def test_decay_one_freezes_once_the_start_is_over() -> None:
    ema = Ema(network(1.0), 1.0)
    ema.update(network(5.0), LATE)
    assert average_of(ema) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("step", [0, 1, 7, 90])
def test_the_start_is_forgotten(step: int) -> None:
    """The decay is (1 + step) / (10 + step) while that is less."""
    ema = Ema(network(1.0), 0.999)
    ema.update(network(5.0), step)
    decay = (1 + step) / (10 + step)
    assert average_of(ema) == pytest.approx(decay * 1 + (1 - decay) * 5, rel=1e-6)


def test_many_updates_are_the_geometric_sum() -> None:
    ema = Ema(network(1.0), 0.9)
    for value in (2.0, 3.0, 4.0):
        ema.update(network(value), LATE)
    assert average_of(ema) == pytest.approx(0.9**3 + 0.1 * (0.81 * 2 + 0.9 * 3 + 4), rel=1e-6)


def test_averages_in_float32_and_goes_on_from_saved_ones() -> None:
    ema = Ema(network(1.0).to(torch.bfloat16), 0.9)
    assert all(tensor.dtype == torch.float32 for tensor in ema.state().values())
    saved = {name: torch.full_like(tensor, 7.0) for name, tensor in ema.state().items()}
    ema.load(saved)
    ema.update(network(8.0).to(torch.bfloat16), LATE)
    assert average_of(ema) == pytest.approx(7.1, rel=1e-6)
    assert all(bool((tensor == 7).all()) for tensor in saved.values())  # its own copy
