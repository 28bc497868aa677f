"""Which emoji does a picture show? Told by comparing its pixels with every emoji drawn in the same place.

It has seen nothing and learned nothing, so no model can have been trained towards it, and held-out entities are as
well known to it as any other. It knows where to look and on which ground: it judges what was drawn there.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float64, Int, UInt8

from radt.corpora.emoji import Box, Color, Entity, compose, placement_layer
from radt.corpora.scenes import Glyphs
from radt.evaluation.ranking import ranks

CHUNK_BYTES = 64 * 2**20


class Recognizer:
    """Ranks the classes of `entities` by the pixel distance of their best member, all drawn in `box`.

    `classes` names the columns of its answers: class ids, ascending.
    """

    def __init__(self, glyphs: Glyphs, entities: Sequence[Entity], *, box: Box, size: int) -> None:
        self.entities = sorted(entities, key=lambda entity: entity.class_id)
        members = np.array([entity.class_id for entity in self.entities])
        self.classes, self._starts = np.unique(members, return_index=True)
        self._window = window(box, size)
        self._layers = np.stack([
            placement_layer(glyphs[entity.position], box, size)[self._window] for entity in self.entities
        ])

    def distances(
        self, pictures: UInt8[np.ndarray, "n size size 3"], ground: Color
    ) -> Float64[np.ndarray, "n entities"]:
        """Squared pixel distance of each picture's box from every entity's on `ground`, exact, in `entities` order."""
        shown = _rows(pictures[(slice(None), *self._window)])
        parts = [_squared_distances(shown, _rows(compose(layers, ground))) for layers in self._chunks()]
        return np.concatenate(parts, axis=1)

    def by_class(self, distances: Float64[np.ndarray, "n entities"]) -> Float64[np.ndarray, "n classes"]:
        """Each class's best member."""
        return np.minimum.reduceat(distances, self._starts, axis=1)

    def ranks(self, distances: Float64[np.ndarray, "n entities"], class_ids: Sequence[int]) -> Int[np.ndarray, " n"]:
        """The place of each picture's asked class, from 1. A class that is as near as the asked one goes before it."""
        assert np.isin(class_ids, self.classes).all(), f"some of {class_ids} are not among the candidates"
        return ranks(-self.by_class(distances), np.searchsorted(self.classes, class_ids))

    def _chunks(self) -> Iterator[UInt8[np.ndarray, "chunk h w 4"]]:
        count = max(1, CHUNK_BYTES // (8 * self._layers[0].size))
        for start in range(0, len(self._layers), count):
            yield self._layers[start : start + count]


def window(box: Box, size: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels that a box touches in a square frame."""
    left, top, right, bottom = (edge * size for edge in box)
    return (
        slice(max(0, math.floor(top)), min(size, math.ceil(bottom))),
        slice(max(0, math.floor(left)), min(size, math.ceil(right))),
    )


def _rows(pictures: UInt8[np.ndarray, "n h w 3"]) -> Float64[np.ndarray, "n values"]:
    return pictures.reshape(len(pictures), -1).astype(np.float64)


def _squared_distances(
    a: Float64[np.ndarray, "n values"], b: Float64[np.ndarray, "m values"]
) -> Float64[np.ndarray, "n m"]:
    """By the binomial formula: whole numbers far below 2**53, so that nothing is rounded."""
    return (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
