"""The trained recogniser of emoji, for use: which class a picture shows, and features of what it looks like.

It is trained apart (`radt/training/recognizer.py`) on glyphs of all entities, held-out ones too, and lies outside of
every bundle. Beside it `recognizer.py` judges by pixels, has learned nothing, and must be told where to look.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int, UInt8
from torch import Tensor

from index.errors import ModelError
from radt.recognizer_network import CONFIG_FILE, HOW_TO_TRAIN, RecognizerNetwork, load_recognizer, to_frame

CHUNK = 256  # pictures a network call
FOLDER = Path(__file__).parent.parent / "models" / "emoji-recognizer"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EmojiRecognizer:
    """A trained network. `classes` are class ids in the order of its logits; `digest` names its weights."""

    network: RecognizerNetwork
    classes: tuple[int, ...]
    digest: str
    folder: Path

    @classmethod
    def load(cls, folder: str | Path | None = None, *, device: str = "cpu") -> "EmojiRecognizer":
        """Load a folder that training left; None: the one inside the package. ModelError where there is none."""
        found = FOLDER if folder is None else Path(folder)
        if not (found / CONFIG_FILE).is_file():
            raise ModelError(f"there is no emoji recogniser in {found}: {HOW_TO_TRAIN}, and name the folder it prints")
        network, classes, digest = load_recognizer(found)
        return cls(network=network.to(device), classes=classes, digest=digest, folder=found)

    @staticmethod
    def is_installed() -> bool:
        """Whether one lies inside the package."""
        return (FOLDER / CONFIG_FILE).is_file()

    def features(self, pictures: UInt8[np.ndarray, "n h w 3"]) -> Float32[np.ndarray, "n d"]:
        """What each picture looks like: the layer before the classes. Any size; one emoji should fill most of it."""
        return self._run(pictures, features=True)

    def logits(self, pictures: UInt8[np.ndarray, "n h w 3"]) -> Float32[np.ndarray, "n classes"]:
        """A score for every class, in the order of `classes`; their softmax is a probability."""
        return self._run(pictures, features=False)

    def columns(self, class_ids: Int[np.ndarray, " n"] | list[int]) -> Int[np.ndarray, " n"]:
        """Where classes stand among the logits."""
        assert np.isin(class_ids, self.classes).all(), f"some of {class_ids} are not among the recogniser's classes"
        return np.searchsorted(self.classes, class_ids)

    def check_knows(self, class_ids: Iterable[int]) -> None:
        """ModelError where it was not trained on all of these classes, so that it cannot judge them."""
        unknown = sorted(set(class_ids) - set(self.classes))
        if unknown:
            raise ModelError(
                f"the emoji recogniser in {self.folder} knows {len(self.classes)} classes, and {len(unknown)} of those "
                f"asked for are not among them, the first is {unknown[0]}; {HOW_TO_TRAIN}"
            )

    def _run(self, pictures: UInt8[np.ndarray, "n h w 3"], *, features: bool) -> Float32[np.ndarray, "n d"]:
        parts = [part.cpu().numpy() for part in self._parts(pictures, features=features)]
        width = self.network.config.feature_width if features else len(self.classes)
        return np.concatenate(parts) if parts else np.zeros((0, width), np.float32)

    def _parts(self, pictures: UInt8[np.ndarray, "n h w 3"], *, features: bool) -> Iterator[Tensor]:
        device = self.network.to_classes.weight.device
        with torch.inference_mode():
            for start in range(0, len(pictures), CHUNK):
                pixels = to_frame(pictures[start : start + CHUNK], self.network.config.image_size).to(device)
                yield self.network.features(pixels) if features else self.network(pixels)


def find_recognizer(folder: str | Path | None = None) -> EmojiRecognizer | None:
    """The recogniser that is named, else the one inside the package, else None."""
    return EmojiRecognizer.load(folder) if folder is not None or EmojiRecognizer.is_installed() else None
