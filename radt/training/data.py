"""Batches from a pack: noise in the neighbours, dropped conditions, varied colours (rows R13, I9).

A batch is a function of the pack, the seed and the step alone, so a resumed run sees exactly what an unbroken one
would have. Next on the main path: `radt/training/loop.py`.
"""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from index.errors import ConfigError
from radt.conditioning import NeighborBatch, TextCondition
from radt.neighbors import to_pixels
from radt.shapes import Pixels
from radt.training.pack import Pack


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How a batch is drawn. All `*_prob` are independent of each other."""

    batch_size: int = 64
    num_neighbors: int = 2
    candidates: int = 3  # neighbours are drawn from this many best candidates of a scene
    wrong_prob: float = 0.2  # each neighbour is replaced by a picture drawn from the whole pack
    missing_prob: float = 0.1  # each neighbour is left out
    drop_text_prob: float = 0.1
    drop_neighbors_prob: float = 0.1
    recolor_prob: float = 0.5  # red, green and blue of entity and neighbours are swapped alike
    mirror_prob: float = 0.25  # where the caption knows no left and right: entity and neighbours are mirrored alike

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_neighbors < 1:
            raise ConfigError(
                f"batch_size and num_neighbors must be at least 1, got {self.batch_size} and {self.num_neighbors}"
            )
        if self.num_neighbors > self.candidates:
            raise ConfigError(f"num_neighbors {self.num_neighbors} must be at most candidates {self.candidates}")
        for field in dataclasses.fields(self):
            if field.name.endswith("_prob") and not 0 <= getattr(self, field.name) <= 1:
                raise ConfigError(f"{field.name} is a probability from 0 to 1, got {getattr(self, field.name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One training step's input: clean pixels in [-1, 1] and what they are conditioned on."""

    x0: Pixels
    text: TextCondition
    neighbors: NeighborBatch


def draw_batch(pack: Pack, config: DataConfig, generator: torch.Generator) -> Batch:
    """Draw one batch on the generator's device, which must be the pack's."""
    b, device = config.batch_size, generator.device
    scenes = torch.randint(len(pack), (b,), generator=generator, device=device)
    chosen, present = _choose_neighbors(pack, config, scenes, generator)
    order = _channel_orders(b, config.recolor_prob, generator)
    layers = pack.layers[pack.scene_layer[scenes]]
    alpha = layers[..., 3:]
    entity = torch.gather(layers[..., :3], 3, order[:, None, None].expand(*layers.shape[:3], 3)).float()
    ground = pack.scene_ground[scenes][:, None, None].float()
    target = entity + ground * (1 - alpha.float() / 255)
    pictures = pack.pictures[chosen]
    pictures = torch.gather(pictures, 4, order[:, None, None, None].expand(*pictures.shape[:4], 3)).float()
    x0, pixels = to_pixels(target), to_pixels(pictures)
    mirrored = _chance(config.mirror_prob, (b,), generator) & pack.scene_mirrors[scenes]
    x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
    pixels = torch.where(mirrored[:, None, None, None, None], pixels.flip(-1), pixels)
    text = pack.scene_text.gather(scenes).drop(_chance(config.drop_text_prob, (b,), generator))
    present &= ~_chance(config.drop_neighbors_prob, (b, 1), generator)
    return Batch(
        x0=x0, text=text, neighbors=NeighborBatch(pixels=pixels, text=pack.picture_text.gather(chosen), mask=present)
    )


def _choose_neighbors(
    pack: Pack, config: DataConfig, scenes: Int[Tensor, " b"], generator: torch.Generator
) -> tuple[Int[Tensor, "b k"], Bool[Tensor, "b k"]]:
    """K of each scene's best candidates in random order, some replaced by wrong ones, some left out."""
    b, k = len(scenes), config.num_neighbors
    candidates = pack.scene_neighbors[scenes, : config.candidates]
    order = torch.rand(candidates.shape, generator=generator, device=generator.device).argsort(dim=1)[:, :k]
    chosen = candidates.gather(1, order)
    anything = torch.randint(len(pack.pictures), (b, k), generator=generator, device=generator.device)
    chosen = torch.where(_chance(config.wrong_prob, (b, k), generator), anything, chosen)
    present = (chosen >= 0) & ~_chance(config.missing_prob, (b, k), generator)
    return chosen.clamp(min=0), present


def _channel_orders(batch: int, prob: float, generator: torch.Generator) -> Int[Tensor, "b 3"]:
    """A random order of red, green and blue for some examples, the usual one for the rest.

    It makes new entities out of known ones, so that appearance is read from the neighbours and not remembered.
    """
    order = torch.rand(batch, 3, generator=generator, device=generator.device).argsort(dim=1)
    usual = torch.arange(3, device=generator.device).expand(batch, 3)
    return torch.where(_chance(prob, (batch, 1), generator), order, usual)


def _chance(prob: float, shape: tuple[int, ...], generator: torch.Generator) -> Bool[Tensor, "*shape"]:
    return torch.rand(shape, generator=generator, device=generator.device) < prob
