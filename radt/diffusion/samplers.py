"""Samplers: from noise at times[0] to an image at t = 0, as functions of a `Denoise` (rows R12, I8).

They know nothing of guidance, text or neighbours. Coefficients are computed in double precision from the schedule;
the last step returns the clean image itself. Image i uses `generators[i]` alone, so it does not depend on its batch.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from radt.diffusion.denoiser import Denoise
from radt.diffusion.schedule import NoiseSchedule, per_pixel
from radt.shapes import Pixels

OnStep = Callable[[int, Pixels], None]
Generators = Sequence[torch.Generator]
Fields = Sequence[Sequence[Hashable]]  # for each image, a label of the field that each step follows


def ignore(step: int, x0: Pixels) -> None:
    """The default `on_step`: nobody is watching."""


@runtime_checkable
class Sampler(Protocol):
    """What the entries of SAMPLERS have in common. `times` descends and ends in 0 (NoiseSchedule.time_steps).

    `branches` holds each image's plan (`radt.diffusion.guidance.Plan`), of which samplers ask only where it changes;
    None says nowhere. `on_step` is shown every step's clean image.
    """

    def __call__(
        self,
        denoise: Denoise,
        x: Pixels,
        times: Sequence[float],
        *,
        schedule: NoiseSchedule,
        generators: Generators,
        branches: Fields | None = None,
        on_step: OnStep = ignore,
    ) -> Pixels:
        """The image, in the range that `denoise` answers in."""
        ...


def sample_ancestral(
    denoise: Denoise,
    x: Pixels,
    times: Sequence[float],
    *,
    schedule: NoiseSchedule,
    generators: Generators,
    branches: Fields | None = None,
    on_step: OnStep = ignore,
    gamma: float = 0.0,
) -> Pixels:
    """Ancestral sampling with stochasticity gamma (Saharia et al. 2022, Imagen, equations 3 and 4; Ho et al. 2020).

    gamma in [0, 1] moves the variance from the posterior's (0, DDPM's beta-tilde) to the forward step's (1, beta).
    """
    for step, (t, t_next) in enumerate(pairwise(times)):
        x0 = denoise(x, t, step)
        on_step(step, x0)
        if t_next == 0:
            return x0
        alpha, alpha_next = schedule.alpha(t), schedule.alpha(t_next)
        sigma, sigma_next = schedule.sigma(t), schedule.sigma(t_next)
        kept = math.exp(schedule.log_snr(t) - schedule.log_snr(t_next))
        mean = kept * (alpha_next / alpha) * x + (1 - kept) * alpha_next * x0
        deviation = math.sqrt(1 - kept) * sigma_next ** (1 - gamma) * sigma**gamma
        x = mean + deviation * draw_noise(x, generators)
    return x


def sample_ddim(
    denoise: Denoise,
    x: Pixels,
    times: Sequence[float],
    *,
    schedule: NoiseSchedule,
    generators: Generators,
    branches: Fields | None = None,
    on_step: OnStep = ignore,
    eta: float = 0.0,
) -> Pixels:
    """DDIM (Song et al. 2021, equations 12 and 16). First order and deterministic at eta = 0; DDPM at eta = 1."""
    for step, (t, t_next) in enumerate(pairwise(times)):
        x0 = denoise(x, t, step)
        on_step(step, x0)
        if t_next == 0:
            return x0
        alpha, alpha_next = schedule.alpha(t), schedule.alpha(t_next)
        sigma, sigma_next = schedule.sigma(t), schedule.sigma(t_next)
        eps = (x - alpha * x0) / sigma
        fresh = eta * (sigma_next / sigma) * math.sqrt(1 - (alpha / alpha_next) ** 2)
        x = alpha_next * x0 + math.sqrt(sigma_next**2 - fresh**2) * eps
        if eta > 0:
            x = x + fresh * draw_noise(x, generators)
    return x


def sample_stochastic(
    denoise: Denoise,
    x: Pixels,
    times: Sequence[float],
    *,
    schedule: NoiseSchedule,
    generators: Generators,
    branches: Fields | None = None,
    on_step: OnStep = ignore,
) -> Pixels:
    """N-step stochastic sampling (Meng et al. 2023, On Distillation of Guided Diffusion Models, section 4; row I8).

    One deterministic step of twice the size, to the time after the next, then one step back with noise: the forward
    process from there to the next time. One call a step; the last goes straight to the clean image.
    """
    for step, (t, t_next) in enumerate(pairwise(times)):
        x0 = denoise(x, t, step)
        on_step(step, x0)
        if t_next == 0:
            return x0
        t_far = times[step + 2]
        if t_far == 0:
            far, kept, fresh = x0, schedule.alpha(t_next), schedule.sigma(t_next)
        else:
            far = step_by_x0(x, x0, t, t_far, schedule=schedule)
            kept = schedule.alpha(t_next) / schedule.alpha(t_far)
            fresh = schedule.sigma(t_next) * math.sqrt(-math.expm1(schedule.log_snr(t_next) - schedule.log_snr(t_far)))
        x = kept * far + fresh * draw_noise(x, generators)
    return x


def sample_dpmpp_2m(
    denoise: Denoise,
    x: Pixels,
    times: Sequence[float],
    *,
    schedule: NoiseSchedule,
    generators: Generators,
    branches: Fields | None = None,
    on_step: OnStep = ignore,
) -> Pixels:
    """DPM-Solver++ 2M (Lu et al. 2022, Algorithm 2): second order, deterministic, one call a step.

    It extrapolates x0 from the step before. Where an image's branch changes, that x0 belongs to another field, and the
    image takes one first-order step.
    """
    same = [same_branch(branches, step, x) for step in range(len(times) - 1)]  # copied to the device before any step
    x0_before, h_before = x, math.inf
    for step, (t, t_next) in enumerate(pairwise(times)):
        x0 = denoise(x, t, step)
        on_step(step, x0)
        if t_next == 0:
            return x0
        h = (schedule.log_snr(t_next) - schedule.log_snr(t)) / 2
        slope = per_pixel(same[step]) * (h / (2 * h_before))  # 0 at the first step
        x = step_by_x0(x, x0 + slope * (x0 - x0_before), t, t_next, schedule=schedule)
        x0_before, h_before = x0, h
    return x


def sample_heun(
    denoise: Denoise,
    x: Pixels,
    times: Sequence[float],
    *,
    schedule: NoiseSchedule,
    generators: Generators,
    branches: Fields | None = None,
    on_step: OnStep = ignore,
) -> Pixels:
    """Heun's rule on x0 in log-SNR: DPM-Solver++ 2S with r = 1 (Lu et al. 2022, Algorithm 1). Two calls a step.

    Both calls of a step pass the same `step`, hence the same branch. Second order and deterministic.
    """
    for step, (t, t_next) in enumerate(pairwise(times)):
        x0 = denoise(x, t, step)
        on_step(step, x0)
        if t_next == 0:
            return x0
        guess = step_by_x0(x, x0, t, t_next, schedule=schedule)
        x0_next = denoise(guess, t_next, step)
        x = step_by_x0(x, (x0 + x0_next) / 2, t, t_next, schedule=schedule)
    return x


SAMPLERS: dict[str, Sampler] = {
    "ancestral": sample_ancestral,
    "ddim": sample_ddim,
    "dpmpp_2m": sample_dpmpp_2m,
    "heun": sample_heun,
    "stochastic": sample_stochastic,
}


def step_by_x0(x: Pixels, x0: Pixels, t: float, t_next: float, *, schedule: NoiseSchedule) -> Pixels:
    """The exact solution of the probability-flow ODE from t to t_next if x0 stayed constant (Lu et al. 2022, eq. 9)."""
    h = (schedule.log_snr(t_next) - schedule.log_snr(t)) / 2
    return (schedule.sigma(t_next) / schedule.sigma(t)) * x - schedule.alpha(t_next) * math.expm1(-h) * x0


def same_branch(branches: Fields | None, step: int, x: Pixels) -> Tensor:
    """Per image, 1 where this step mixes what the step before did, else 0."""
    if branches is None or step == 0:
        return x.new_ones(len(x))
    return torch.tensor([plan[step] == plan[step - 1] for plan in branches], dtype=x.dtype, device=x.device)


def draw_noise(x: Pixels, generators: Generators) -> Pixels:
    """Unit noise of the shape of x, each image's from its own generator, drawn where the generator lives."""
    assert len(generators) == len(x), f"{len(x)} images need as many generators, got {len(generators)}"
    drawn = [torch.randn(x.shape[1:], generator=generator, device=generator.device) for generator in generators]
    noise = torch.stack(drawn)
    if x.is_cuda and not noise.is_cuda:
        noise = noise.pin_memory()  # the copy then waits for nothing
    return noise.to(device=x.device, dtype=x.dtype, non_blocking=True)
