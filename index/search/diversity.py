"""Diversity: maximal marginal relevance, which prefers a hit that adds something to a hit that repeats the last one."""

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from index.errors import QueryError


def check_diversity(diversity: float) -> None:
    """QueryError unless it lies in [0, 1]."""
    if not 0 <= diversity <= 1:
        raise QueryError(f"diversity lies between 0 (off) and 1 (relevance counts for nothing), got {diversity}")


def spread(
    scores: Float64[ndarray, " n"], vectors: Float32[ndarray, "n d"], *, diversity: float
) -> Int64[ndarray, " n"]:
    """Positions in the order of maximal marginal relevance (Carbonell and Goldstein 1998, section 2).

    Each place goes to the candidate with the greatest (1 - diversity) r - diversity s, where r is its score scaled to
    [0, 1] among the candidates and s its greatest cosine to those placed before it. The first place therefore goes to
    the best score whatever the diversity is, unless it is 1. Equal ones keep their order, so 0 sorts by score.
    `vectors` are unit rows.
    """
    check_diversity(diversity)
    relevance = (1 - diversity) * _scaled(scores)
    nearest = np.zeros(len(scores))  # of an empty selection; nothing is nearer to it than anything else
    left = np.ones(len(scores), dtype=bool)
    order = np.empty(len(scores), dtype=np.int64)
    for place in range(len(scores)):
        best = int(np.argmax(np.where(left, relevance - diversity * nearest, -np.inf)))
        order[place], left[best] = best, False
        similarity = vectors @ vectors[best]
        nearest = np.maximum(nearest, similarity) if place else similarity.astype(np.float64)
    return order


def _scaled(scores: Float64[ndarray, " n"]) -> Float64[ndarray, " n"]:
    """From 0 for the least to 1 for the greatest; all 1 when there is no difference."""
    low, high = scores.min(initial=np.inf), scores.max(initial=-np.inf)
    return (scores - low) / (high - low) if high > low else np.ones(len(scores))
