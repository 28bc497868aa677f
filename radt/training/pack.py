"""The training pack: everything a generator trains on, in one file: training needs only torch (DESIGN section 3).

Neighbours are looked up when the pack is made. A scene's pictures are kept as layers above a ground, so that colours
can be varied in training; text is kept as embeddings of the frozen encoder (row I2), eight bits a number.
Next on the main path: `radt/training/data.py`, which draws batches from a pack.
"""

import dataclasses
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from index.errors import CorpusError
from radt.conditioning import TextCondition, to_device
from radt.resizing import Size
from radt.training.checkpoint import write_tensors

FORMAT = 3
SMALLEST_SCALE = 2.0**-14  # the smallest normal float16


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTable:
    """Embedded captions, ragged: caption i owns tokens `starts[i]` to `starts[i + 1]`. Eight bits a number."""

    tokens: Int[Tensor, "t d"]  # int8
    scales: Tensor  # float16 [t], so that tokens * scales is the embedding
    starts: Int[Tensor, " n_plus_1"]
    pooled: Tensor  # float16 [n, p]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def gather(self, rows: Int[Tensor, "*b"]) -> TextCondition:
        """The captions of these rows, float32, padded to the longest of them."""
        first, last = self.starts[rows], self.starts[rows + 1]
        length = int((last - first).max())
        offsets = torch.arange(length, device=rows.device)
        mask = offsets < (last - first)[..., None]
        places = (first[..., None] + offsets).clamp(max=len(self.tokens) - 1)
        tokens = self.tokens[places].float() * self.scales[places][..., None].float()
        return TextCondition(tokens=tokens * mask[..., None], mask=mask, pooled=self.pooled[rows].float())

    @staticmethod
    def from_conditions(conditions: Sequence[TextCondition]) -> "TextTable":
        """Pack the batches of a text encoder's output."""
        kept = [text.tokens[text.mask] for text in conditions]
        lengths = torch.cat([text.mask.sum(dim=1) for text in conditions])
        tokens = torch.cat(kept).float()
        # Rounded to half first, so that the error of a number is at most half a step of the scale it is read with.
        scales = (tokens.abs().amax(dim=1) / 127).clamp(min=SMALLEST_SCALE).half()
        return TextTable(
            tokens=(tokens / scales[:, None].float()).round().clamp(-127, 127).to(torch.int8),
            scales=scales,
            starts=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
            pooled=torch.cat([text.pooled for text in conditions]).half(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """S scenes and the M knowledge-base pictures that are their neighbours, K candidates a scene."""

    layers: UInt8[Tensor, "l h w 4"]  # premultiplied RGBA, each drawn once however many scenes show it
    scene_layer: Int[Tensor, " s"]
    scene_ground: UInt8[Tensor, "s 3"]
    scene_mirrors: Bool[Tensor, " s"]  # whether its mirror image fits the same caption
    scene_turns: Bool[Tensor, " s"]  # whether it does turned, too
    scene_text: TextTable
    scene_neighbors: Int[Tensor, "s k"]  # rows of `pictures`, best first; -1 = none
    pictures: UInt8[Tensor, "m h w 3"]
    picture_text: TextTable

    def __len__(self) -> int:
        return len(self.scene_layer)

    @property
    def size(self) -> Size:
        """Height and width of its pictures."""
        return self.layers.shape[1], self.layers.shape[2]

    def to(self, device: torch.device | str) -> "Pack":
        """The whole pack on a device."""
        return to_device(self, device)

    def save(self, path: Path, facts: dict[str, str]) -> None:
        """Write one safetensors file, each tensor compressed, `facts` (where it came from) in its metadata; atomic.

        LZMA, because renditions of one caption and pictures of one entity repeat each other beyond deflate's window:
        the demonstration's pack is 20 MB so, and 31 MB with its pictures deflated.
        """
        named = _named_tensors(self)
        shapes = {
            name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)} for name, t in named.items()
        }
        packed = {name: _compress(tensor) for name, tensor in named.items()}
        write_tensors(path, packed, {**facts, "format": str(FORMAT), "tensors": json.dumps(shapes)})

    @staticmethod
    def load(path: Path) -> "Pack":
        """Read a pack. A file of another kind or format is a CorpusError."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise CorpusError(f"{path} is not a training pack ({error}); delete it to make it again") from error
        if metadata.get("format") != str(FORMAT):
            raise CorpusError(
                f"{path} has pack format {metadata.get('format')}, not {FORMAT}; delete it to make it again"
            )
        try:
            kinds = json.loads(metadata["tensors"])
            return _from_named_tensors({name: _decompress(t, **kinds[name]) for name, t in tensors.items()})
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, lzma.LZMAError) as error:
            raise CorpusError(f"{path} is a damaged training pack ({error}); delete it to make it again") from error


def read_facts(path: Path) -> dict[str, str]:
    """Where a pack came from, without reading the pack."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _compress(tensor: Tensor) -> UInt8[Tensor, " n"]:
    return torch.frombuffer(bytearray(lzma.compress(tensor.contiguous().numpy().tobytes())), dtype=torch.uint8)


def _decompress(packed: UInt8[Tensor, " n"], dtype: str, shape: Sequence[int]) -> Tensor:
    raw = bytearray(lzma.decompress(packed.numpy().tobytes()))
    return torch.frombuffer(raw, dtype=getattr(torch, dtype)).reshape(shape)


def _from_named_tensors(tensors: dict[str, Tensor]) -> Pack:
    fields: dict[str, Any] = dict(tensors)
    parts = [part.name for part in dataclasses.fields(TextTable)]
    for name in ("scene_text", "picture_text"):
        fields[name] = TextTable(**{part: fields.pop(f"{name}.{part}") for part in parts})
    return Pack(**fields)


def _named_tensors(pack: Pack) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for field in dataclasses.fields(pack):
        value = getattr(pack, field.name)
        if isinstance(value, TextTable):
            named |= {f"{field.name}.{part.name}": getattr(value, part.name) for part in dataclasses.fields(value)}
        else:
            named[field.name] = value
    return named
