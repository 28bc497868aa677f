"""Every sampler beside diffusers' own scheduler: the same network, noise and times, and the same image to 1e-4.

diffusers counts whole training steps and takes its noise levels from a table, so the table is made from our schedule
at times 0.001, 0.002 ... 1. Both sides are given the network's raw v, so that the way from v to x0 is compared too.
"""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
)
from torch import Tensor, nn

from radt.conditioning import Condition
from radt.diffusion.denoiser import Denoiser
from radt.diffusion.samplers import SAMPLERS, draw_noise
from radt.diffusion.schedule import NoiseSchedule
from tests.networks import random_pixels, random_text, randomize

# diffusers makes numpy arrays of tensors in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TRAINING_STEPS = 1000
SEEDS = (5, 6)
TEXT = random_text(2)


class SmallNetwork(nn.Module):
    """A convolution network of random weights that reads x and the time, bent enough that solvers differ."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        randomize(self)

    def forward(self, x: Tensor, t: Tensor, *condition: Any, low_res: Any = None) -> Tensor:
        return self.leave(torch.sin(self.enter(x) + 3 * t[:, None, None, None]))


NETWORK = SmallNetwork()


def seeded() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def theirs(kind: type, schedule: NoiseSchedule, num_steps: int, **options: Any) -> Any:
    """A scheduler of diffusers with our noise levels, set to as many steps."""
    scheduler = kind(
        num_train_timesteps=TRAINING_STEPS, prediction_type="v_prediction", timestep_spacing="trailing", **options
    )
    times = torch.arange(1, TRAINING_STEPS + 1, dtype=torch.float64) / TRAINING_STEPS
    scheduler.alphas_cumprod = schedule.alpha(times).square()
    scheduler.set_timesteps(num_steps)
    return scheduler


def predict(x: Tensor, step: int | Tensor) -> Tensor:
    """The network's v at one of diffusers' steps."""
    return NETWORK(x, torch.full((len(x),), (int(step) + 1) / TRAINING_STEPS))


def ours(name: str, schedule: NoiseSchedule, num_steps: int, **options: Any) -> Tensor:
    denoiser, condition = Denoiser(NETWORK, schedule=schedule, prediction="v"), Condition(text=TEXT)
    return SAMPLERS[name](
        lambda x, t, step: denoiser(x, t, condition),
        random_pixels(2),
        schedule.time_steps(num_steps),
        schedule=schedule,
        generators=seeded(),
        **options,
    )


def run(scheduler: Any, **options: Any) -> Tensor:
    x = random_pixels(2)
    for step in scheduler.timesteps:
        x = scheduler.step(predict(x, step), step, x, **options).prev_sample
    return x


both_curves = pytest.mark.parametrize("schedule", [NoiseSchedule(curve="cosine"), NoiseSchedule(curve="linear")])
step_counts = pytest.mark.parametrize("num_steps", [4, 20])


@both_curves
@step_counts
@pytest.mark.parametrize("eta", [0.0, 0.6])
@torch.inference_mode()
def test_ddim(schedule: NoiseSchedule, num_steps: int, eta: float) -> None:
    scheduler = theirs(DDIMScheduler, schedule, num_steps, clip_sample=False)
    expected = run(scheduler, eta=eta, generator=seeded() if eta else None)
    torch.testing.assert_close(ours("ddim", schedule, num_steps, eta=eta), expected, rtol=1e-4, atol=1e-4)


@both_curves
@step_counts
@pytest.mark.parametrize(("gamma", "variance"), [(0.0, "fixed_small"), (1.0, "fixed_large")])
@torch.inference_mode()
def test_ancestral(schedule: NoiseSchedule, num_steps: int, gamma: float, variance: str) -> None:
    """DDPM's two variances are the ends of gamma. At the last step it adds noise and ours does not: x0 is compared."""
    scheduler = theirs(DDPMScheduler, schedule, num_steps, clip_sample=False, variance_type=variance)
    x, generators = random_pixels(2), seeded()
    for step in scheduler.timesteps[:-1]:
        x = scheduler.step(predict(x, step), step, x, generator=generators).prev_sample
    last = scheduler.timesteps[-1]
    expected = scheduler.step(predict(x, last), last, x, generator=generators).pred_original_sample
    torch.testing.assert_close(ours("ancestral", schedule, num_steps, gamma=gamma), expected, rtol=1e-4, atol=1e-4)


@both_curves
@step_counts
@torch.inference_mode()
def test_dpmpp_2m(schedule: NoiseSchedule, num_steps: int) -> None:
    scheduler = theirs(DPMSolverMultistepScheduler, schedule, num_steps, final_sigmas_type="zero")
    torch.testing.assert_close(ours("dpmpp_2m", schedule, num_steps), run(scheduler), rtol=1e-4, atol=1e-4)


@both_curves
@step_counts
@torch.inference_mode()
def test_heun(schedule: NoiseSchedule, num_steps: int) -> None:
    """Their singlestep solver of order 2 looks again at the end of a step when every noise level comes twice."""
    levels = theirs(DPMSolverMultistepScheduler, schedule, num_steps, final_sigmas_type="zero")
    scheduler = DPMSolverSinglestepScheduler(prediction_type="v_prediction", final_sigmas_type="zero")
    scheduler.set_timesteps(num_steps)
    sigmas, steps = levels.sigmas, levels.timesteps
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    scheduler.timesteps = torch.cat([steps[:1], steps[1:].repeat_interleave(2)])
    scheduler.order_list = [1, 2] * (num_steps - 1) + [1]
    x = random_pixels(2)
    for step in scheduler.timesteps:
        x = scheduler.step(predict(x, step), step, x).prev_sample
    torch.testing.assert_close(ours("heun", schedule, num_steps), x, rtol=1e-4, atol=1e-4)


@both_curves
@step_counts
@torch.inference_mode()
def test_stochastic(schedule: NoiseSchedule, num_steps: int) -> None:
    """They have no such sampler: their DDIM of half as many steps takes the long one, and noise is added by formula."""
    fine = theirs(DDIMScheduler, schedule, num_steps, clip_sample=False)
    coarse = theirs(DDIMScheduler, schedule, num_steps // 2, clip_sample=False)
    x, generators, size = random_pixels(2), seeded(), TRAINING_STEPS // num_steps
    for step in fine.timesteps[:-1]:
        far = coarse.step(predict(x, step), step, x).prev_sample
        clean = torch.ones((), dtype=torch.float64)
        ended = fine.alphas_cumprod[step - 2 * size] if step >= 2 * size else clean
        kept = fine.alphas_cumprod[step - size] / ended
        x = (kept.sqrt() * far + (1 - kept).sqrt() * draw_noise(x, generators)).float()
    last = fine.timesteps[-1]
    expected = fine.step(predict(x, last), last, x).pred_original_sample
    torch.testing.assert_close(ours("stochastic", schedule, num_steps), expected, rtol=1e-4, atol=1e-4)
