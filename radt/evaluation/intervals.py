"""Confidence intervals for measured shares."""

import math
from statistics import NormalDist
from typing import TypeAlias

Interval: TypeAlias = tuple[float, float]


def wilson(share: float, n: int, *, confidence: float = 0.95) -> Interval:
    """The score interval of a binomial share (Wilson 1927, equation 5; Brown, Cai and DasGupta 2001, section 3.1.1).

    `n` is the number of independent trials. Unlike share +- 1.96 standard errors it stays within [0, 1] and has a
    width at shares of 0 and 1.
    """
    assert 0 <= share <= 1, share
    assert n > 0, n
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # The bounds touch the share at 0 and 1, where rounding would push them past it.
    return max(0.0, min(share, center - reach)), min(1.0, max(share, center + reach))
