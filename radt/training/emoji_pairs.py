"""Image-caption pairs for contrastive training, made as they are needed from the emoji of the training split.

Half of a batch is single emoji as the corpus draws them, half is scenes. No two pairs of a batch show the same
equivalence class, so that every other caption of the batch is a true negative.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8
from numpy.random import Generator

from index.errors import ConfigError
from radt.corpora.emoji import GROUNDS, Entity, GlyphRenderer, Layer, compose, rendition, rendition_layer
from radt.corpora.scenes import render_scene, sample_scene

T = TypeVar("T")

ENTITIES_PER_SCENE = 2  # a scene has one or two: each gets two of its own to choose from


class EmojiPairs:
    """Batches of pictures and captions. A batch depends on seed and step alone, so a resumed run sees the same."""

    def __init__(
        self, entities: Sequence[Entity], glyphs: GlyphRenderer, *, image_size: int, renditions: int, seed: int
    ) -> None:
        assert not any(entity.held_out for entity in entities), "held-out entities must not reach training"
        self._classes = _by_class([entity for entity in entities if glyphs.draws(entity)])
        self._glyphs = glyphs
        self._image_size = image_size
        self._seed = seed
        self._layers: dict[int, Layer] = {
            entity.position: np.stack([
                rendition_layer(glyphs.glyph(entity), rendition(entity, number), image_size)
                for number in range(renditions)
            ])
            for members in self._classes
            for entity in members
        }

    def batch(self, step: int, batch_size: int) -> tuple[UInt8[np.ndarray, "b h w 3"], list[str]]:
        """The pairs of one step: RGB pictures and their captions, single emoji first."""
        num_scenes = batch_size // 2
        num_single = batch_size - num_scenes
        if (needed := num_single + ENTITIES_PER_SCENE * num_scenes) > len(self._classes):
            raise ConfigError(
                f"batch_size {batch_size} needs {needed} emoji that look different, there are {len(self._classes)}: "
                f"give a smaller one"
            )
        rng = np.random.default_rng((self._seed, step))
        drawn = iter([_pick(rng, self._classes[i]) for i in rng.permutation(len(self._classes))[:needed]])
        pairs = [self._single(rng, next(drawn)) for _ in range(num_single)]
        pairs += [self._scene(rng, (next(drawn), next(drawn))) for _ in range(num_scenes)]
        return np.stack([picture for picture, _ in pairs]), [caption for _, caption in pairs]

    def _single(self, rng: Generator, entity: Entity) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
        _, ground = _pick(rng, GROUNDS)
        layers = self._layers[entity.position]
        return compose(layers[rng.integers(len(layers))], ground), vary_caption(rng, entity)

    def _scene(self, rng: Generator, entities: Sequence[Entity]) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
        scene = sample_scene(rng, entities)
        return render_scene(scene, self._glyphs, self._image_size), scene.caption


def vary_caption(rng: Generator, entity: Entity) -> str:
    """A caption as a person might type it: the name alone, or with some keywords, in any order of words."""
    kept = [keyword for keyword in entity.keywords if rng.random() < 0.5]
    rng.shuffle(kept)
    form = rng.random()
    if form < 0.35 or not kept:
        return entity.name
    if form < 0.45:
        return ", ".join(kept)
    if form < 0.8:
        return f"{entity.name}: {', '.join(kept)}"
    words = " ".join([entity.name, *kept]).split()
    rng.shuffle(words)
    return " ".join(words)


def vocabulary_captions(entities: Sequence[Entity], *, num_scenes: int, seed: int) -> Iterator[str]:
    """The text from which the tokenizer learns its pieces: names, keywords and scene captions of `entities`."""
    assert not any(entity.held_out for entity in entities), "held-out entities must not reach the tokenizer"
    for entity in entities:
        yield f"{entity.name}: {', '.join(entity.keywords)}"
    rng = np.random.default_rng(seed)
    for _ in range(num_scenes):
        yield sample_scene(rng, entities).caption


def _by_class(entities: Sequence[Entity]) -> list[list[Entity]]:
    classes: dict[int, list[Entity]] = {}
    for entity in entities:
        classes.setdefault(entity.class_id, []).append(entity)
    return list(classes.values())


def _pick(rng: Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]
