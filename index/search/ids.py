"""Sets of ids, by sorting and bisection: numpy's own hash, and take 1.5 s for a million ids where these take 20 ms."""

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray


def distinct(*parts: Int64[ndarray, " _"]) -> Int64[ndarray, " n"]:
    """Every id that is in one of the parts, once; ascending."""
    ids = np.sort(np.concatenate(parts))
    is_first = np.ones(len(ids), dtype=bool)
    is_first[1:] = ids[1:] != ids[:-1]
    return ids[is_first]


def contains(ids: Int64[ndarray, " rows"], wanted: Int64[ndarray, "*n"]) -> Bool[ndarray, "*n"]:
    """Whether each wanted id is among ascending `ids`."""
    if not len(ids):
        return np.zeros(wanted.shape, dtype=bool)
    return ids[np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)] == wanted
