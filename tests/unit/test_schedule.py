import math

import pytest
import torch

from index.errors import ConfigError
from radt.diffusion.schedule import NoiseSchedule


def test_cosine_is_the_cosine():
    schedule = NoiseSchedule()
    for t in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert schedule.alpha(t) == pytest.approx(math.cos(math.pi * t / 2), abs=1e-4)
        assert schedule.sigma(t) == pytest.approx(math.sin(math.pi * t / 2), abs=1e-4)
    assert schedule.log_snr(0.5) == pytest.approx(0, abs=1e-9)
    assert schedule.log_snr(0.0) == pytest.approx(20)
    assert schedule.log_snr(1.0) == pytest.approx(-20)


def test_linear_is_the_integral_of_linear_betas():
    # DDPM: beta(t) = 0.1 + 19.9 t over 1,000 steps of 1/1000, so -log alpha^2 is its integral; 10 t^2 is close to it.
    t = torch.tensor([0.3, 0.7, 1.0], dtype=torch.float64)
    integral = 0.1 * t + 19.9 * t**2 / 2
    ours = -2 * NoiseSchedule(curve="linear").alpha(t).log()
    assert torch.allclose(ours, integral, rtol=0.05)


def test_floats_and_tensors_agree_and_keep_their_type():
    schedule = NoiseSchedule()
    t = torch.tensor([0.999999], dtype=torch.float32)
    assert schedule.alpha(t).dtype == torch.float32
    assert float(schedule.alpha(t)) == pytest.approx(schedule.alpha(float(t)), rel=1e-6)


def test_add_noise_by_hand():
    x0, eps = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), 3.0)
    x = NoiseSchedule().add_noise(x0, eps, torch.tensor([0.0, 1 / 3]))
    assert x.flatten().tolist() == pytest.approx([2.0, 2 * math.sqrt(3) / 2 + 3 / 2], abs=2e-4)


def test_time_steps_by_hand():
    schedule = NoiseSchedule()
    assert schedule.time_steps(4) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert schedule.time_steps(3, t_max=0.9, t_min=0.1) == pytest.approx([0.9, 0.5, 0.1, 0.0])
    assert schedule.time_steps(1) == [1.0, 0.0]
    assert schedule.time_steps(7)[-1] == 0.0


@pytest.mark.parametrize(
    "arguments", [{"num_steps": 0}, {"num_steps": 4, "t_max": 1.5}, {"num_steps": 4, "t_min": 0.0}]
)
def test_impossible_times_are_refused(arguments):
    with pytest.raises(ConfigError):
        NoiseSchedule().time_steps(**arguments)


@pytest.mark.usefixtures("untyped_caller")
def test_unknown_curve_is_refused():
    with pytest.raises(ConfigError, match="quadratic"):
        NoiseSchedule(curve="quadratic")
