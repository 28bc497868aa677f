"""Fusion: from raw CLIP and BM25 scores of the same candidates to one score each. Pure functions, no state.

Every rule sees the candidates as three parallel arrays, `ids`, `clip` and `bm25`. The order of the arrays never
matters: equal scores are ordered by id, so a result can be reproduced. Next on the main path: retriever.py.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

from index.errors import ConfigError, QueryError
from index.search.ids import distinct

FusionRule = Literal["rrf", "sum", "product"]

RANK_CONSTANT = 60  # Cormack, Clarke and Buettcher 2009, section 2: fixed there by experiment, and everywhere since
EQUAL_WEIGHTS = (1.0, 1.0)


def fuse(
    ids: Int64[ndarray, " n"],
    clip: Float64[ndarray, " n"],
    bm25: Float64[ndarray, " n"],
    *,
    rule: FusionRule = "rrf",
    weights: Sequence[float] = EQUAL_WEIGHTS,
) -> Float64[ndarray, " n"]:
    """One score for each candidate. `weights` are for (clip, bm25), finite and not negative.

    With equal weights of 1, `sum` lies in [0, 2], `product` in [0, 1] and `rrf` in (0, 2 / 61].
    """
    _check_candidates(ids, clip, bm25)
    _check_weights(weights)
    if rule == "sum":
        return fuse_sum(clip, bm25, weights=weights)
    if rule == "product":
        return fuse_product(clip, bm25, weights=weights)
    if rule == "rrf":
        everyone = np.ones(len(ids), dtype=bool)
        # A caption that shares no word with the query is not in the lexical list at all, so it has no rank there.
        return fuse_ranks([rank(ids, clip, listed=everyone), rank(ids, bm25, listed=bm25 > 0)], weights=weights)
    raise ConfigError(f"fusion is one of {', '.join(get_args(FusionRule))}, got {rule!r}")


def normalize_clip(clip: Float64[ndarray, " n"]) -> Float64[ndarray, " n"]:
    """Inner products of unit vectors into [0, 1]: a negative cosine says no more than "unrelated"."""
    return np.maximum(clip, 0.0)


def normalize_bm25(bm25: Float64[ndarray, " n"]) -> Float64[ndarray, " n"]:
    """BM25 has no upper bound, so it is taken relative to the best candidate of this query; all 0 stays 0."""
    best = bm25.max(initial=0.0)
    return bm25 / best if best > 0 else np.zeros_like(bm25)


def fuse_sum(
    clip: Float64[ndarray, " n"], bm25: Float64[ndarray, " n"], *, weights: Sequence[float] = EQUAL_WEIGHTS
) -> Float64[ndarray, " n"]:
    """w_c c + w_b b of the normalised scores: either kind of evidence is enough."""
    clip_weight, bm25_weight = weights
    return clip_weight * normalize_clip(clip) + bm25_weight * normalize_bm25(bm25)


def fuse_product(
    clip: Float64[ndarray, " n"], bm25: Float64[ndarray, " n"], *, weights: Sequence[float] = EQUAL_WEIGHTS
) -> Float64[ndarray, " n"]:
    """c^w_c b^w_b of the normalised scores: both kinds of evidence are needed, and a weight of 0 drops one."""
    clip_weight, bm25_weight = weights
    return normalize_clip(clip) ** clip_weight * normalize_bm25(bm25) ** bm25_weight


def rank(
    ids: Int64[ndarray, " n"], scores: Float64[ndarray, " n"], *, listed: Bool[ndarray, " n"]
) -> Float64[ndarray, " n"]:
    """Rank from 1 among the listed candidates, best score first, ties by id; infinite for those not listed."""
    ranks = np.full(len(ids), math.inf)
    (positions,) = np.nonzero(listed)
    ranks[positions[best_first(ids[positions], scores[positions])]] = np.arange(1, len(positions) + 1)
    return ranks


def fuse_ranks(
    ranks: Sequence[Float64[ndarray, " n"]], *, weights: Sequence[float], rank_constant: float = RANK_CONSTANT
) -> Float64[ndarray, " n"]:
    """Reciprocal rank fusion, sum of w / (K + rank) over the lists (Cormack et al. 2009, equation 1)."""
    if len(weights) != len(ranks):
        raise QueryError(f"{len(ranks)} ranked lists need as many weights, got {len(weights)}")
    if not rank_constant > 0:
        raise ConfigError(f"the rank constant of reciprocal rank fusion must be above 0, got {rank_constant}")
    # 1 / inf is 0, so a list in which a candidate has no rank adds nothing to it.
    return np.sum([weight / (rank_constant + r) for weight, r in zip(weights, ranks, strict=True)], axis=0)


def best_first(ids: Int64[ndarray, " n"], scores: Float64[ndarray, " n"]) -> Int64[ndarray, " n"]:
    """Positions in order of descending score; equal scores in order of ascending id."""
    return np.lexsort((ids, -scores))


def _check_candidates(ids: Int64[ndarray, " n"], clip: Float64[ndarray, " n"], bm25: Float64[ndarray, " n"]) -> None:
    assert len(ids) == len(clip) == len(bm25), (len(ids), len(clip), len(bm25))
    assert len(distinct(ids)) == len(ids), "a candidate appears twice"
    if not (np.isfinite(clip).all() and np.isfinite(bm25).all()):
        raise QueryError(
            "a candidate's score is not a finite number; check the knowledge base with `radt index verify`"
        )


def _check_weights(weights: Sequence[float]) -> None:
    if len(weights) != 2:
        raise ConfigError(f"fusion takes two weights, for clip and bm25, got {len(weights)}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ConfigError(f"fusion weights must be finite and not negative, got {tuple(weights)}")
    if not any(weights):
        raise ConfigError("at least one fusion weight must be above 0")
