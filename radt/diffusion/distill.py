"""Progressive distillation of a guided denoiser (row I10): what the student is taught, and how it is asked afterwards.

Two phases (Meng et al. 2023, On Distillation of Guided Diffusion Models, section 3). First a network that is told the
guidance learns to answer in one row what the teacher combines of three (`guided_x0`). Then a student of N steps
learns to do in one DDIM step what its teacher does in two, again and again (`two_steps_as_one`; Salimans and Ho 2022,
Algorithm 2). The run itself is `radt/training/distill_run.py`.

eta is an input too, and a step has no branch any more, so the student learns their average, eta x0_text + (1 - eta)
x0_neighbor. It is the mean of the source's coin, hence what least squares would make of branches drawn by lot, with
less noise; and it is where interleaving goes as steps become many, for the field of an ODE that alternates quickly
acts as its mean. It depends on no number of steps and on no order of branches.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from radt.conditioning import Condition, GuidanceInput, LowResolution, NeighborKV, TextCondition, concatenate
from radt.diffusion.denoiser import Denoise, Denoiser, Network
from radt.diffusion.guidance import OnCall
from radt.diffusion.schedule import NoiseSchedule, per_pixel
from radt.diffusion.thresholding import Threshold, static_threshold
from radt.shapes import PerExample, Pixels

TimesToX0 = Callable[[Pixels, PerExample], Pixels]  # a denoiser, each example at a time of its own


def guided_x0(teacher: Denoiser, x: Pixels, t: PerExample, *, condition: Condition, guidance: GuidanceInput) -> Pixels:
    """What interleaved guidance answers on average over its branches, each clipped to [-1, 1] as in sampling.

    Three rows an example in one call: with everything, without the text, without the neighbours (row R10).
    """
    rows = concatenate([condition, condition.drop_text(), condition.drop_neighbors()])
    given, without_text, without_neighbors = teacher(torch.cat([x, x, x]), t.repeat(3), rows).chunk(3)
    w_p, w_n, eta = (per_pixel(dial) for dial in _dials(guidance))
    text = (w_p * given - (w_p - 1) * without_text).clamp(-1, 1)
    neighbor = (w_n * given - (w_n - 1) * without_neighbors).clamp(-1, 1)
    return eta * text + (1 - eta) * neighbor


def two_steps_as_one(
    denoise: TimesToX0, x: Pixels, t: PerExample, t_next: PerExample, *, schedule: NoiseSchedule
) -> Pixels:
    """The x0 with which one DDIM step from t to t_next lands where two steps of `denoise` do, by way of their middle.

    Salimans and Ho 2022, Algorithm 2: x0 = (z'' - (sigma''/sigma) z) / (alpha'' - (sigma''/sigma) alpha). Written out,
    that is a weighted mean of the teacher's two answers, which loses no digits and stays in their range.
    """
    middle = (t + t_next) / 2
    first = denoise(x, t)
    second = denoise(ddim_step(x, first, t, middle, schedule=schedule), middle)
    start, half, end = (schedule.log_snr(time) / 2 for time in (t, middle, t_next))
    share = torch.expm1(half - end) / torch.expm1(start - end)
    share = torch.where(t_next == 0, 1.0, share)  # there a sampler returns x0 itself
    return torch.lerp(first, second, per_pixel(share))


def ddim_step(x: Pixels, x0: Pixels, t: PerExample, t_next: PerExample, *, schedule: NoiseSchedule) -> Pixels:
    """One deterministic step to t_next > 0 (Song et al. 2021, equation 12), each example between times of its own."""
    shrink = schedule.sigma(t_next) / schedule.sigma(t)
    return per_pixel(shrink) * x + per_pixel(schedule.alpha(t_next) - shrink * schedule.alpha(t)) * x0


def told(network: Callable[..., Pixels], guidance: GuidanceInput) -> Network:
    """A network with a `guidance` input (`radt.unet.unet.UNet`), told the same guidance at every call."""

    def call(
        x: Pixels,
        t: PerExample,
        text: TextCondition,
        neighbors: NeighborKV | None = None,
        *,
        low_res: LowResolution | None = None,
    ) -> Pixels:
        return network(x, t, text, neighbors, low_res=low_res, guidance=guidance)

    return call


def one_row(
    denoiser: Denoiser,
    condition: Condition,
    *,
    threshold: Threshold = static_threshold,
    on_call: OnCall = lambda rows: None,
) -> Denoise:
    """A denoiser that was `told` its guidance, as samplers take it: one row an image, where guidance takes two."""

    def denoise(x: Pixels, t: float, step: int) -> Pixels:
        on_call([1] * len(x))
        return threshold(denoiser(x, t, condition), step)

    return denoise


def same_guidance(
    count: int, *, text_guidance: float, neighbor_guidance: float, text_share: float, device: torch.device
) -> GuidanceInput:
    """One request's guidance for each of `count` images."""
    dials = (text_guidance, neighbor_guidance, text_share)
    return _guidance([torch.full((count,), float(dial), device=device) for dial in dials])


def random_guidance(count: int, *, highest: float, generator: torch.Generator) -> GuidanceInput:
    """Weights uniform from 1 to `highest` and eta uniform from 0 to 1, on the generator's device."""
    uniform = torch.rand(3, count, generator=generator, device=generator.device)
    return _guidance([1 + (highest - 1) * uniform[0], 1 + (highest - 1) * uniform[1], uniform[2]])


def _guidance(dials: Sequence[Tensor]) -> GuidanceInput:
    return GuidanceInput(text_guidance=dials[0], neighbor_guidance=dials[1], text_share=dials[2])


def _dials(guidance: GuidanceInput) -> tuple[Tensor, Tensor, Tensor]:
    return guidance.text_guidance, guidance.neighbor_guidance, guidance.text_share
