"""The place of what was asked for among all that it could be."""

import numpy as np
from jaxtyping import Float, Int


def ranks(scores: Float[np.ndarray, "n classes"], asked: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The place of each row's asked column by its score, from 1.

    One that is as good as the asked one goes before it, so that a judge that gives all the same is never right. Nor is
    one that gives no number: then the asked one comes last.
    """
    own = np.take_along_axis(scores, np.asarray(asked)[:, None], axis=1)
    return (~(scores < own)).sum(axis=1)


def rank_of(scores: Float[np.ndarray, " classes"], asked: int) -> int:
    """`ranks` of one row."""
    return int(ranks(scores[None], np.array([asked]))[0])
