"""Text embeddings computed once for training (row I2): which captions a pack holds, and what it saves to have them.

A pack (`radt/training/pack.py`) holds every caption embedded, so that training needs no text encoder, not even its
packages. The captions themselves lie beside it in `captions.json`, for what does need them: this report, and
fine-tuning the text encoder afterwards (`text_tuning.py`).
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from index.atomic import write_bytes
from index.errors import CorpusError
from radt.conditioning import TextCondition
from radt.text_encoder import TextEncoder, Truncation
from radt.training.data import DataConfig, draw_batch
from radt.training.pack import Pack, TextTable

CAPTIONS = "captions.json"
TIMED_BATCHES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Captions:
    """The captions of a pack, in the order of its rows."""

    scenes: tuple[str, ...]
    pictures: tuple[str, ...]

    def save(self, folder: Path) -> None:
        """Write them beside the pack."""
        write_bytes(folder / CAPTIONS, json.dumps(asdict(self), ensure_ascii=False).encode())

    @classmethod
    def load(cls, folder: Path, pack: Pack) -> "Captions":
        """Read them; a CorpusError where they are missing or not those of the pack."""
        path = folder / CAPTIONS
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            captions = cls(scenes=tuple(values["scenes"]), pictures=tuple(values["pictures"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorpusError(
                f"{path} is missing or damaged ({error}); delete the pack beside it to make both again"
            ) from error
        if (len(captions.scenes), len(captions.pictures)) != (len(pack.scene_text), len(pack.picture_text)):
            raise CorpusError(f"{path} is not of the pack beside it; delete the pack to make both again")
        return captions


class CaptionRecorder:
    """A text encoder that notes what it is asked for, in order, and passes it on."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self.width, self.pooled_width = encoder.width, encoder.pooled_width
        self.fingerprint = encoder.fingerprint
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> TextCondition:
        """What the encoder makes of them."""
        self.texts += texts
        return self._encoder.encode(texts)

    def truncations(self, texts: Sequence[str]) -> list[Truncation]:
        """What the encoder cuts."""
        return self._encoder.truncations(texts)

    def captions(self, num_scenes: int) -> Captions:
        """A pack embeds its scenes' captions first, then its pictures'."""
        return Captions(scenes=tuple(self.texts[:num_scenes]), pictures=tuple(self.texts[num_scenes:]))


@dataclass(frozen=True, kw_only=True, slots=True)
class TextReport:
    """What it saves to have the text embedded once. Times are medians for the captions of one training batch."""

    captions: int
    captions_of_a_batch: int
    truncated: int
    bytes_in_pack: int  # before compression
    bytes_as_encoded: int  # float32, padded, as the text encoder gives them
    batch_from_pack_ms: float
    batch_from_encoder_ms: float
    num_steps: int

    @property
    def saved_seconds(self) -> float:
        """Over the whole of training."""
        return self.num_steps * (self.batch_from_encoder_ms - self.batch_from_pack_ms) / 1000

    @property
    def sentence(self) -> str:
        """For people."""
        cut = f"; {self.truncated} of them were longer than it reads" if self.truncated else ""
        return (
            f"{self.captions} captions are embedded, {self.bytes_in_pack / 1e6:.1f} MB instead of "
            f"{self.bytes_as_encoded / 1e6:.1f} MB{cut}; the {self.captions_of_a_batch} of a batch take "
            f"{self.batch_from_pack_ms:.1f} ms from the pack and {self.batch_from_encoder_ms:.1f} ms from the text "
            f"encoder, which over {self.num_steps} steps is {self.saved_seconds:.0f} s saved"
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {**asdict(self), "saved_seconds": round(self.saved_seconds, 1)}


def report_text(
    pack: Pack, captions: Captions, encoder: TextEncoder, *, data: DataConfig, num_steps: int
) -> TextReport:
    """Measure what the pack's embeddings save each batch and in all."""
    texts = [*captions.scenes, *captions.pictures]
    k = max(data.num_neighbors)
    size = data.batch_size * (1 + k)
    asked = [texts[place % len(texts)] for place in range(size)]
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randint(len(pack.scene_text), (data.batch_size,), generator=generator)
    pictures = torch.randint(len(pack.picture_text), (data.batch_size, k), generator=generator)
    draw_batch(pack, data, generator)  # warm
    return TextReport(
        captions=len(texts),
        captions_of_a_batch=size,
        truncated=len(encoder.truncations(texts)),
        bytes_in_pack=_table_bytes(pack.scene_text) + _table_bytes(pack.picture_text),
        bytes_as_encoded=len(texts) * _row_bytes(encoder.encode(texts[:1])),
        batch_from_pack_ms=_median_ms(lambda: (pack.scene_text.gather(scenes), pack.picture_text.gather(pictures))),
        batch_from_encoder_ms=_median_ms(lambda: encoder.encode(asked)),
        num_steps=num_steps,
    )


def _table_bytes(table: TextTable) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (table.tokens, table.scales, table.pooled))


def _row_bytes(condition: TextCondition) -> int:
    return 4 * (condition.tokens[0].numel() + condition.pooled[0].numel())


def _median_ms(work: Callable[[], object]) -> float:
    times = []
    for _ in range(TIMED_BATCHES):
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times), 3)
