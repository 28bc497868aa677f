"""The training loss: time-reweighted squared error (rows R13, I6), and the times it is taken at."""

from typing import Literal

import torch
from einops import reduce

from radt.diffusion.denoiser import Prediction, target
from radt.diffusion.schedule import NoiseSchedule
from radt.shapes import PerExample, Pixels

Weighting = Literal["x0", "eps", "v", "min_snr"]

MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, section 4


def diffusion_loss(
    network_output: Pixels,
    *,
    x0: Pixels,
    eps: Pixels,
    t: PerExample,
    schedule: NoiseSchedule,
    prediction: Prediction,
    weighting: Weighting,
) -> PerExample:
    """w_t |x0_hat - x0|^2, the mean over each example's pixels; 0 exactly for the true answer. float32.

    It is computed on the network's own output, where the same error has another weight, because going through x0
    would divide by an alpha near 0. With `weighting` equal to `prediction` the factor is 1: plain squared error.
    """
    error = network_output.float() - target(x0, eps, t, schedule=schedule, prediction=prediction)
    snr = schedule.log_snr(t).exp()
    factor = time_weight(snr, weighting) / time_weight(snr, prediction)
    return factor * reduce(error**2, "b c h w -> b", "mean")


def time_weight(snr: PerExample, weighting: Weighting) -> PerExample:
    """w_t on the squared error of x0 (Salimans and Ho 2022, section 4; Hang et al. 2023, Min-SNR).

    |eps_hat - eps|^2 = SNR |x0_hat - x0|^2 and |v_hat - v|^2 = (SNR + 1) |x0_hat - x0|^2.
    """
    if weighting == "x0":
        return torch.ones_like(snr)
    if weighting == "eps":
        return snr
    if weighting == "v":
        return snr + 1
    return snr.clamp(max=MIN_SNR_GAMMA)


def sample_times(generator: torch.Generator, batch: int) -> PerExample:
    """Uniform times in [0, 1], one in each of `batch` equal cells, in random order (Kingma et al. 2021, appendix I.1).

    One draw shifts them all, so each is uniform by itself while the batch covers every noise level. On the
    generator's device.
    """
    device = generator.device
    shift = torch.rand(1, generator=generator, device=device)
    cells = torch.randperm(batch, generator=generator, device=device)
    return (cells + shift) / batch


def shift_times(t: PerExample, shift: float) -> PerExample:
    """Times in [0, 1], moved towards noise: s t / (1 + (s - 1) t) (Esser et al. 2024, equation 23). 1 leaves them."""
    return shift * t / (1 + (shift - 1) * t)
