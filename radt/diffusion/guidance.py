"""Interleaved classifier-free guidance (row R10): each step strengthens either the prompt or the neighbours.

Guidance turns a denoiser and a condition into a `Denoise`, which is all that a sampler sees. Next on the main path:
`radt/diffusion/samplers.py`.

With c_p the prompt, c_n the neighbours, and weights w_p, w_n >= 1:

    text step:       eps_p = w_p eps(x, c_p, c_n) - (w_p - 1) eps(x, c_n)
    neighbor step:   eps_n = w_n eps(x, c_p, c_n) - (w_n - 1) eps(x, c_p)

The code combines clean images instead. It is the same thing: at fixed x and t, eps = (x - alpha x0) / sigma is affine
in x0, and the two weights of each line add up to 1, so the combination of the x0s holds the combination of the eps.
"""

import math
from collections.abc import Container, Sequence
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from index.errors import ConfigError
from radt.conditioning import Condition, concatenate
from radt.diffusion.denoiser import Denoise, Denoiser
from radt.diffusion.schedule import per_pixel
from radt.diffusion.thresholding import Threshold, static_threshold
from radt.settings import BranchOrder
from radt.shapes import PerExample, Pixels

Branch = Literal["text", "neighbor"]
Plan = tuple[Branch, ...]  # one image's branch at every step


def interleaved(
    denoiser: Denoiser,
    condition: Condition,
    *,
    text_guidance: float,
    neighbor_guidance: float,
    branches: Sequence[Plan],
    threshold: Threshold = static_threshold,
    neighbor_steps: Container[int] | None = None,
) -> Denoise:
    """Guidance by row R10: w_p is `text_guidance`, w_n `neighbor_guidance`, and `branches` holds each image's plan.

    A step is one network call on a batch of twice the images, or of once the images where every weight is 1. Steps
    outside `neighbor_steps` (None = no limit, row R11) see no neighbours: c_n is null in both lines above.
    """
    check_scale("text_guidance", text_guidance)
    check_scale("neighbor_guidance", neighbor_guidance)
    is_text = torch.tensor([[branch == "text" for branch in plan] for plan in branches])  # image, step
    assert len(is_text) == condition.batch_size, f"{len(is_text)} plans for {condition.batch_size} images"
    pair = concatenate([condition, condition])  # made once, so that no step copies keys and values

    def denoise(x: Pixels, t: float, step: int) -> Pixels:
        sees_neighbors = pair.neighbors is not None and (neighbor_steps is None or step in neighbor_steps)
        given, both = (condition, pair) if sees_neighbors else (condition.without_neighbors(), pair.without_neighbors())
        # With c_n null the second line is w_n eps(x, c_p) - (w_n - 1) eps(x, c_p): its weight has no effect.
        weight = torch.where(is_text[:, step], text_guidance, neighbor_guidance if sees_neighbors else 1.0)
        if bool((weight == 1).all()):
            return threshold(denoiser(x, t, given), step)
        both = drop_in_second_half(both, text=is_text[:, step], neighbors=~is_text[:, step])
        return threshold(extrapolate(denoiser, x, t, both=both, weight=weight), step)

    return denoise


def classifier_free(
    denoiser: Denoiser, condition: Condition, *, guidance_scale: float, threshold: Threshold = static_threshold
) -> Denoise:
    """Plain guidance (Ho and Salimans 2022, equation 6): away from the prediction that is given nothing at all."""
    check_scale("guidance_scale", guidance_scale)
    everywhere = torch.ones(condition.batch_size, dtype=torch.bool)
    both = drop_in_second_half(concatenate([condition, condition]), text=everywhere, neighbors=everywhere)
    weight = torch.full((condition.batch_size,), float(guidance_scale))

    def denoise(x: Pixels, t: float, step: int) -> Pixels:
        if guidance_scale == 1:
            return threshold(denoiser(x, t, condition), step)
        return threshold(extrapolate(denoiser, x, t, both=both, weight=weight), step)

    return denoise


def extrapolate(denoiser: Denoiser, x: Pixels, t: float, *, both: Condition, weight: PerExample) -> Pixels:
    """Take w x0(first half of `both`) - (w - 1) x0(second half) in one network call; exactly the first where w = 1."""
    x0_given, x0_without = denoiser(torch.cat([x, x]), t, both).chunk(2)
    w = per_pixel(weight.to(x.device))
    return w * x0_given - (w - 1) * x0_without


def drop_in_second_half(pair: Condition, *, text: Bool[Tensor, " b"], neighbors: Bool[Tensor, " b"]) -> Condition:
    """Both branches' condition: whole in the first half of the batch, with the given rows dropped in the second."""
    device = pair.text.mask.device
    drop_text = torch.cat([torch.zeros_like(text), text]).to(device)
    drop_neighbors = torch.cat([torch.zeros_like(neighbors), neighbors]).to(device)
    return Condition(
        text=pair.text.drop(drop_text),
        neighbors=None if pair.neighbors is None else pair.neighbors.drop(drop_neighbors),
        low_res=pair.low_res,
    )


def plan_branches(num_steps: int, *, text_share: float, order: BranchOrder, generator: torch.Generator) -> Plan:
    """Choose one image's branches; `text_share` is eta, the user's dial from neighbours (0) to prompt (1).

    "coin" is the source's rule: each step draws R ~ U[0, 1] from the image's own generator, and R < eta strengthens
    the text. The other orders draw nothing and take exactly floor(num_steps * eta) text steps: spread evenly, or all
    in front, or all at the end.
    """
    if not 0 <= text_share <= 1:
        raise ConfigError(f"text_share {text_share} must lie between 0 (neighbours only) and 1 (text only)")
    num_text = math.floor(num_steps * text_share)
    if order == "coin":
        draws = torch.rand(num_steps, generator=generator, device=generator.device)
        is_text = (draws < text_share).tolist()
    elif order == "low_discrepancy":
        is_text = [is_text_step(step, text_share) for step in range(num_steps)]
    elif order == "text_first":
        is_text = [step < num_text for step in range(num_steps)]
    elif order == "neighbor_first":
        is_text = [step >= num_steps - num_text for step in range(num_steps)]
    else:
        raise ConfigError(f"order {order!r} is unknown; choose coin, low_discrepancy, text_first or neighbor_first")
    return tuple("text" if text else "neighbor" for text in is_text)


def is_text_step(step: int, text_share: float) -> bool:
    """Whether this step strengthens the text; spreads floor(n * share) text steps evenly over n steps."""
    return math.floor((step + 1) * text_share) > math.floor(step * text_share)


def check_scale(name: str, scale: float) -> None:
    """Weights below 1 would push away from what the user asked for."""
    if not scale >= 1:
        raise ConfigError(f"{name} {scale} must be at least 1 (1 = the plain conditional prediction)")
