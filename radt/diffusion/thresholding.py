"""Keeping the clean image in range while guidance pushes it out (Saharia et al. 2022, Imagen, section 2.3; row I9).

A Threshold is a function (x0, step) -> x0; guidance applies one to its result.
"""

import math
from collections.abc import Callable

from einops import rearrange

from index.errors import ConfigError
from radt.diffusion.schedule import per_pixel
from radt.shapes import Pixels

Threshold = Callable[[Pixels, int], Pixels]


def static_threshold(x0: Pixels, step: int) -> Pixels:
    """Clip to [-1, 1], at every step alike."""
    return x0.clamp(-1, 1)


def dynamic_threshold(num_steps: int, *, percentile: float = 0.995) -> Threshold:
    """At every step but the last: clip each image to [-kappa, kappa] and divide by kappa; at the last, clip to [-1, 1].

    kappa = max(1, percentile of |x0|) of that image, by nearest rank, so that it is a value of the image itself.
    """
    if not 0 < percentile <= 1:
        raise ConfigError(f"percentile {percentile} must be above 0 and at most 1, as in 0.995")

    def threshold(x0: Pixels, step: int) -> Pixels:
        if step >= num_steps - 1:
            return static_threshold(x0, step)
        magnitudes = rearrange(x0.abs(), "b c h w -> b (c h w)")
        rank = math.ceil(percentile * magnitudes.shape[1])
        kappa = per_pixel(magnitudes.kthvalue(rank, dim=1).values.clamp(min=1))
        return x0.clamp(-kappa, kappa) / kappa

    return threshold


def no_threshold(x0: Pixels, step: int) -> Pixels:
    """Leave x0 as it is: for data that is not images, and for the closed forms of the tests."""
    return x0
