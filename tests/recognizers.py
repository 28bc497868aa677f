"""A recogniser for tests that needs no training: it compares a crop with every emoji drawn on the crop's own ground."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from radt.corpora.emoji import Entity, compose, placement_layer
from radt.corpora.scenes import Glyphs
from radt.evaluation.color import border_color
from radt.evaluation.emoji_recognizer import EmojiRecognizer
from radt.evaluation.reading import MARGIN
from radt.recognizer_network import RecognizerConfig, RecognizerNetwork

SIDE = 32


class TemplateRecognizer(EmojiRecognizer):
    """Right about true scenes, however they are placed."""

    def logits(self, pictures: np.ndarray) -> np.ndarray:
        layers = self.network.get_buffer("layers").numpy()
        rows = [
            -((compose(layers, border_color(picture).astype(np.uint8)) - picture.astype(float)) ** 2).mean((1, 2, 3))
            for picture in pictures
        ]
        return np.stack(rows).astype(np.float32) if rows else np.zeros((0, len(self.classes)), np.float32)


def template_recognizer(glyphs: Glyphs, entities: Sequence[Entity]) -> TemplateRecognizer:
    """One that knows these entities, by the first of each class."""
    first = {entity.class_id: entity for entity in sorted(entities, key=lambda e: (e.class_id, -e.position))}
    inset = (1 - 1 / MARGIN) / 2
    box = (inset, inset, 1 - inset, 1 - inset)
    layers = np.stack([placement_layer(glyphs[entity.position], box, SIDE) for _, entity in sorted(first.items())])
    network = RecognizerNetwork(RecognizerConfig(image_size=SIDE, widths=(4,), feature_width=4), len(first))
    network.register_buffer("layers", torch.from_numpy(layers))
    return TemplateRecognizer(network=network, classes=tuple(sorted(first)), digest="templates", folder=Path())
