"""Noise schedules in continuous time: t = 0 is the clean image, t = 1 is noise; always x_t = alpha x0 + sigma eps.

Every schedule is variance preserving (alpha^2 + sigma^2 = 1) and is defined by its log-SNR alone (Kingma et al. 2021,
Variational Diffusion Models, section 3.1). Next on the main path: `radt/diffusion/denoiser.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from einops import rearrange
from torch import Tensor

from index.errors import ConfigError
from radt.shapes import PerExample, Pixels

Curve = Literal["cosine", "linear"]
Time = TypeVar("Time", float, Tensor)

LOG_SNR_LIMIT = 20.0  # of the cosine curve, at both ends: alpha(1) = sigma(0) = 4.5e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseSchedule:
    """t -> alpha, sigma and log-SNR = log(alpha^2 / sigma^2), for floats and for tensors alike, in double precision."""

    curve: Curve = "cosine"

    def __post_init__(self) -> None:
        if self.curve not in get_args(Curve):
            raise ConfigError(
                f"curve {self.curve!r} is not a noise schedule; choose one of {', '.join(get_args(Curve))}"
            )

    def log_snr(self, t: Time) -> Time:
        """Strictly decreasing and finite on [0, 1]."""
        return _in_double(_LOG_SNR[self.curve], t)

    def alpha(self, t: Time) -> Time:
        """How much of x0 is in x_t."""
        return _in_double(lambda u: torch.sigmoid(_LOG_SNR[self.curve](u)).sqrt(), t)

    def sigma(self, t: Time) -> Time:
        """The standard deviation of the noise in x_t."""
        return _in_double(lambda u: torch.sigmoid(-_LOG_SNR[self.curve](u)).sqrt(), t)

    def add_noise(self, x0: Pixels, eps: Pixels, t: PerExample) -> Pixels:
        """x_t = alpha x0 + sigma eps, each example at its own time."""
        return per_pixel(self.alpha(t)) * x0 + per_pixel(self.sigma(t)) * eps

    def time_steps(self, num_steps: int, *, t_max: float = 1.0, t_min: float | None = None) -> list[float]:
        """`num_steps` + 1 times for `num_steps` network calls: from t_max evenly down to t_min, then 0.

        By default t_min = t_max / num_steps, which spaces all of them evenly.
        """
        t_min = t_max / max(num_steps, 1) if t_min is None else t_min
        if num_steps < 1:
            raise ConfigError(f"num_steps {num_steps} must be at least 1")
        if not 0 < t_min <= t_max <= 1:
            raise ConfigError(f"times must satisfy 0 < t_min <= t_max <= 1, got t_min {t_min} and t_max {t_max}")
        if num_steps == 1:
            return [t_max, 0.0]
        return [t_max + (t_min - t_max) * i / (num_steps - 1) for i in range(num_steps)] + [0.0]


def per_pixel(values: PerExample) -> Pixels:
    """One number an example, ready to multiply images."""
    return rearrange(values, "b -> b 1 1 1")


def _cosine_log_snr(t: Tensor) -> Tensor:
    """The angle of (alpha, sigma) grows linearly: alpha = cos(pi t / 2) (Nichol and Dhariwal 2021; row I6).

    The ends are drawn in by 4.5e-5 rad, so that the log-SNR stays finite and strictly monotone without clipping
    (Salimans and Ho 2022, appendix).
    """
    margin = math.atan(math.exp(-LOG_SNR_LIMIT / 2))
    angle = margin + t * (math.pi / 2 - 2 * margin)
    return -2 * torch.log(torch.tan(angle))


def _linear_log_snr(t: Tensor) -> Tensor:
    """The continuous form of DDPM's linear beta schedule (Ho et al. 2020): alpha^2 = exp(-1e-4 - 10 t^2)."""
    return -torch.log(torch.expm1(1e-4 + 10 * t**2))


_LOG_SNR: dict[Curve, Callable[[Tensor], Tensor]] = {"cosine": _cosine_log_snr, "linear": _linear_log_snr}


def _in_double(function: Callable[[Tensor], Tensor], t: Time) -> Time:
    """Apply `function` in float64, because near the ends float32 angles lose three digits of SNR; keep t's own type."""
    if isinstance(t, Tensor):
        return function(t.double()).to(t.dtype)
    return float(function(torch.tensor(t, dtype=torch.float64)))
