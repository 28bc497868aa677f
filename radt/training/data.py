"""Batches from a pack: noise in the neighbours, dropped conditions, entities that never were (rows R13, I9).

A batch is a function of the pack, the seed and the step alone, so a resumed run sees exactly what an unbroken one
would have. Next on the main path: `radt/training/loop.py`.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from index.errors import ConfigError
from radt.conditioning import NeighborBatch, TextCondition
from radt.neighbors import to_pixels
from radt.shapes import Pixels
from radt.training.pack import Pack

JITTER_SCALE, JITTER_ANGLE, JITTER_SHIFT = 1.25, math.radians(10), 0.08  # at most; a shift in fractions of the frame


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How a batch is drawn. All `*_prob` are independent of each other.

    Entity and neighbours are recoloured, inverted, mirrored and turned alike. It makes hundreds of entities out of each
    known one, so that appearance is read from the neighbours and not remembered.
    """

    batch_size: int = 64
    num_neighbors: tuple[int, ...] = (1, 2, 2, 4)  # K of a batch is one of these
    candidates: int = 3  # neighbours are drawn from this many best candidates of a scene, or from K if that is more
    wrong_prob: float = 0.2  # each neighbour is replaced by a picture drawn from the whole pack
    missing_prob: float = 0.1  # each neighbour is left out
    drop_text_prob: float = 0.1
    drop_neighbors_prob: float = 0.1
    recolor_prob: float = 0.5  # red, green and blue change places
    invert_prob: float = 0.3  # each of them is inverted, or not
    mirror_prob: float = 0.3  # where the caption knows no left and right
    turn_prob: float = 0.3  # by a quarter, a half or three quarters, where nothing stands in a certain place
    jitter_prob: float = 0.5  # each neighbour is scaled, turned a little and shifted by itself

    def __post_init__(self) -> None:
        for name in ("batch_size", "candidates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.num_neighbors or min(self.num_neighbors) < 1:
            raise ConfigError(f"num_neighbors names the counts to choose from, each at least 1: {self.num_neighbors}")
        for field in dataclasses.fields(self):
            if field.name.endswith("_prob") and not 0 <= getattr(self, field.name) <= 1:
                raise ConfigError(f"{field.name} is a probability from 0 to 1, got {getattr(self, field.name)}")

    @property
    def most_candidates(self) -> int:
        """How many candidates of a scene a pack must hold."""
        return max(self.candidates, *self.num_neighbors)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One training step's input: clean pixels in [-1, 1] and what they are conditioned on."""

    x0: Pixels
    text: TextCondition
    neighbors: NeighborBatch


def draw_batch(pack: Pack, config: DataConfig, generator: torch.Generator) -> Batch:
    """Draw one batch on the generator's device, which must be the pack's."""
    b, device = config.batch_size, generator.device
    counts = torch.tensor(config.num_neighbors)
    k = int(counts[torch.randint(len(counts), (), generator=generator, device=device).cpu()])
    scenes = torch.randint(len(pack), (b,), generator=generator, device=device)
    chosen, present = _choose_neighbors(pack, config, scenes, k=k, generator=generator)
    colors = _draw_colors(b, config, generator)
    layers = pack.layers[pack.scene_layer[scenes]]
    alpha = layers[..., 3:].float()
    ground = pack.scene_ground[scenes][:, None, None].float()
    x0 = to_pixels(colors.apply(layers[..., :3], alpha) + ground * (1 - alpha / 255))
    pixels = to_pixels(colors.apply(pack.pictures[chosen], torch.full((1,), 255.0, device=device)))
    mirrored = _chance(config.mirror_prob, (b,), generator) & pack.scene_mirrors[scenes]
    turns = torch.randint(1, 4, (b,), generator=generator, device=device)
    turns *= _chance(config.turn_prob, (b,), generator) & pack.scene_turns[scenes]
    x0, pixels = (_turn(_mirror(each, mirrored), turns) for each in (x0, pixels))
    pixels = _jitter(pixels, config.jitter_prob, generator)
    text = pack.scene_text.gather(scenes).drop(_chance(config.drop_text_prob, (b,), generator))
    present &= ~_chance(config.drop_neighbors_prob, (b, 1), generator)
    return Batch(
        x0=x0, text=text, neighbors=NeighborBatch(pixels=pixels, text=pack.picture_text.gather(chosen), mask=present)
    )


def _choose_neighbors(
    pack: Pack, config: DataConfig, scenes: Int[Tensor, " b"], *, k: int, generator: torch.Generator
) -> tuple[Int[Tensor, "b k"], Bool[Tensor, "b k"]]:
    """K of each scene's best candidates in random order, some replaced by wrong ones, some left out."""
    b = len(scenes)
    candidates = pack.scene_neighbors[scenes, : max(k, config.candidates)]
    order = torch.rand(candidates.shape, generator=generator, device=generator.device).argsort(dim=1)[:, :k]
    chosen = candidates.gather(1, order)
    anything = torch.randint(len(pack.pictures), (b, k), generator=generator, device=generator.device)
    chosen = torch.where(_chance(config.wrong_prob, (b, k), generator), anything, chosen)
    present = (chosen >= 0) & ~_chance(config.missing_prob, (b, k), generator)
    return chosen.clamp(min=0), present


@dataclass(frozen=True, kw_only=True, slots=True)
class _Colors:
    """What becomes of red, green and blue in each example: their order, and which are inverted."""

    order: Int[Tensor, "b 3"]
    inverted: Bool[Tensor, "b 3"]

    def apply(self, rgb: UInt8[Tensor, "b *n 3"], full: Float[Tensor, "*any 1"]) -> Float[Tensor, "b *n 3"]:
        """Channels from 0 to `full`, which is alpha where they are premultiplied."""
        between = (1,) * (rgb.ndim - 2)
        order = self.order.view(len(rgb), *between, 3).expand(rgb.shape)
        changed = torch.gather(rgb, rgb.ndim - 1, order).float()
        return torch.where(self.inverted.view(len(rgb), *between, 3), full - changed, changed)


def _draw_colors(batch: int, config: DataConfig, generator: torch.Generator) -> _Colors:
    """A random order of red, green and blue for some examples, and some of them inverted; the rest as they are."""
    order = torch.rand(batch, 3, generator=generator, device=generator.device).argsort(dim=1)
    usual = torch.arange(3, device=generator.device).expand(batch, 3)
    inverted = _chance(0.5, (batch, 3), generator) & _chance(config.invert_prob, (batch, 1), generator)
    return _Colors(
        order=torch.where(_chance(config.recolor_prob, (batch, 1), generator), order, usual), inverted=inverted
    )


def _mirror(pixels: Float[Tensor, "b *k c h w"], mirrored: Bool[Tensor, " b"]) -> Float[Tensor, "b *k c h w"]:
    return torch.where(_like(mirrored, pixels), pixels.flip(-1), pixels)


def _turn(pixels: Float[Tensor, "b *k c h w"], quarters: Int[Tensor, " b"]) -> Float[Tensor, "b *k c h w"]:
    """Turn each example by its number of quarters. What is not square can be turned by a half at most."""
    square = pixels.shape[-1] == pixels.shape[-2]
    turned = pixels
    for quarter in (1, 2, 3) if square else (2,):
        turned = torch.where(_like(quarters == quarter, pixels), pixels.rot90(quarter, (-2, -1)), turned)
    return turned


def _jitter(pixels: Float[Tensor, "b k c h w"], prob: float, generator: torch.Generator) -> Float[Tensor, "b k c h w"]:
    """Scale, turn and shift some pictures, each by itself; what comes into the frame repeats its edge."""
    flat = pixels.flatten(0, 1)
    lots = 2 * torch.rand(4, len(flat), generator=generator, device=generator.device) - 1
    scale, angle, shift = JITTER_SCALE ** lots[0], JITTER_ANGLE * lots[1], 2 * JITTER_SHIFT * lots[2:]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(-1, 2, 3)
    grid = affine_grid(rows, list(flat.shape), align_corners=False)
    moved = grid_sample(flat, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(-1, 1)
    return torch.where(_like(_chance(prob, (len(flat),), generator), flat), moved, flat).view(pixels.shape)


def _like(each: Tensor, pixels: Tensor) -> Tensor:
    """One number an example, shaped so that it meets all of the example's pixels."""
    return each.view(len(each), *(1,) * (pixels.ndim - 1))


def _chance(prob: float, shape: tuple[int, ...], generator: torch.Generator) -> Bool[Tensor, "*shape"]:
    return torch.rand(shape, generator=generator, device=generator.device) < prob
