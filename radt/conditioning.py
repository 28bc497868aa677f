"""What a network is conditioned on: text and neighbours as tensors, with the nulls that guidance needs.

Next on the main path: `radt/unet/unet.py`, which turns a NeighborBatch into a NeighborKV and reads it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from radt.shapes import NeighborMask, NeighborPixels, PerExample, Pixels

T = TypeVar("T")

Keys = Float[Tensor, "b heads _m _e"]  # all positions of all neighbours, then the sink; both differ by level


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCondition:
    """Contextual text embeddings (attended to) and a pooled vector (added to the time embedding).

    The leading axes are the batch, or batch and neighbour. A row whose mask is all False is the null text:
    no token is attended to and the network's own null vector stands in for the pooled one.
    """

    tokens: Float[Tensor, "*b n d"]
    mask: Bool[Tensor, "*b n"]
    pooled: Float[Tensor, "*b p"]

    def drop(self, where: Bool[Tensor, "*b"]) -> "TextCondition":
        """The same batch with the null text in the rows where `where` is True."""
        return dataclasses.replace(self, mask=self.mask & ~where[..., None])


@dataclass(frozen=True, kw_only=True, slots=True)
class NeighborBatch:
    """Retrieved pairs as tensors: pixels in [-1, 1] and the caption of each. `mask` False = no neighbour there."""

    pixels: NeighborPixels
    text: TextCondition
    mask: NeighborMask


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedNeighbors:
    """Neighbours as the encoder leaves them: what does not yet depend on their places among the K.

    `maps` has one entry a level that some layer reads, finest first; `captions` and `caption_mask` as in NeighborKV.
    """

    maps: tuple[Float[Tensor, "b k _c _h _w"], ...]
    captions: Float[Tensor, "b k n r"]
    caption_mask: Bool[Tensor, "b k n"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NeighborKV:
    """The neighbours' keys and values, one pair for each attention layer: data, computed once a request (row N5).

    They depend on neither x_t, t nor the prompt, so every step, guidance branch and sample reads the same ones.
    `captions` are the captions' tokens in the space where prompt and caption are compared.
    """

    keys: tuple[Keys, ...]
    values: tuple[Keys, ...]
    captions: Float[Tensor, "b k n r"]
    caption_mask: Bool[Tensor, "b k n"]
    mask: NeighborMask

    def drop(self, where: Bool[Tensor, " b"]) -> "NeighborKV":
        """The same batch with no neighbours in the rows where `where` is True."""
        return dataclasses.replace(self, mask=self.mask & ~where[:, None])


@dataclass(frozen=True, kw_only=True, slots=True)
class LowResolution:
    """The picture that a super-resolution stage draws over: at that stage's own size, with noise added (row I4).

    `level` is the time of the noise schedule that the noise belongs to: 0 is none (noise conditioning augmentation,
    Saharia et al. 2022, section 2.5).
    """

    pixels: Pixels
    level: PerExample


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidanceInput:
    """The guidance that a distilled network imitates: the weights w_p and w_n, at least 1, and eta in [0, 1].

    Not part of a Condition: nothing is drawn from it, and guidance never drops it (Meng et al. 2023, section 3.1).
    """

    text_guidance: PerExample
    neighbor_guidance: PerExample
    text_share: PerExample


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """Everything one network call is conditioned on. `neighbors` None skips the neighbour layers altogether.

    `low_res` is None at the first stage of a cascade, which has no picture to draw over. Guidance never drops it.
    `negative` is the text that stands in the place of the null where guidance drops the text; None is the null itself.
    """

    text: TextCondition
    neighbors: NeighborKV | None = None
    low_res: LowResolution | None = None
    negative: TextCondition | None = None

    @property
    def batch_size(self) -> int:
        """How many images."""
        return len(self.text.mask)

    def without_neighbors(self) -> "Condition":
        """The same text, and the neighbour layers skipped."""
        return dataclasses.replace(self, neighbors=None)

    def drop_text(self) -> "Condition":
        """c_n alone: every row's text replaced by the null."""
        everywhere = torch.ones(self.text.mask.shape[:-1], dtype=torch.bool, device=self.text.mask.device)
        return dataclasses.replace(self, text=self.text.drop(everywhere))

    def drop_neighbors(self) -> "Condition":
        """c_p alone. The neighbours stay as masked rows so that both branches fit one batched call."""
        if self.neighbors is None:
            return self
        everywhere = torch.ones(len(self.neighbors.mask), dtype=torch.bool, device=self.neighbors.mask.device)
        return dataclasses.replace(self, neighbors=self.neighbors.drop(everywhere))


def map_tensors(function: Callable[..., Tensor], *records: T) -> T:
    """Apply `function` to the tensors that stand in the same place of each record (a dataclass tree)."""
    first = records[0]
    if isinstance(first, Tensor):
        return function(*records)  # type: ignore[return-value]
    if isinstance(first, tuple):
        return tuple(map_tensors(function, *items) for items in zip(*records, strict=True))  # type: ignore[return-value]
    if first is None:
        assert all(record is None for record in records), (
            "some records have neighbors or a picture below, some have none"
        )
        return first
    values: dict[str, Any] = {
        field.name: map_tensors(function, *(getattr(record, field.name) for record in records))
        for field in dataclasses.fields(first)  # type: ignore[arg-type]
    }
    return dataclasses.replace(first, **values)  # type: ignore[type-var]


def concatenate(records: Sequence[T]) -> T:
    """Stack batches of the same shape along the batch axis: the guidance branches of one step become one call."""
    return map_tensors(lambda *tensors: torch.cat(tensors), *records)


def to_device(record: T, device: torch.device | str) -> T:
    """The same record with every tensor on `device`."""
    return map_tensors(lambda tensor: tensor.to(device), record)


def take_rows(record: T, places: Sequence[int]) -> T:
    """The rows of a batch at these places, in this order; a place may come again."""
    return map_tensors(lambda tensor: tensor[list(places)], record)
