"""Small networks with random weights, and random conditions for them."""

from typing import Any

import torch
from torch import Tensor, nn

from radt.conditioning import NeighborBatch, TextCondition
from radt.unet.unet import UNet, UNetConfig

TEXT_WIDTH, POOLED_WIDTH, IMAGE_SIZE = 12, 10, 16


def small_config(**changes: Any) -> UNetConfig:
    """Three levels on 16x16 pixels, neighbours in the encoder and the decoder, a text refiner."""
    fields: dict[str, Any] = {
        "image_size": IMAGE_SIZE,
        "text_width": TEXT_WIDTH,
        "pooled_width": POOLED_WIDTH,
        "channels": (16, 32, 32),
        "blocks": (1, 2, 1),
        "embedding_width": 24,
        "heads": 2,
        "neighbor_key_width": 8,
        "neighbor_value_width": 24,
        "text_layers": 1,
    }
    return UNetConfig(**(fields | changes))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomize(module: nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Move every parameter off its first value, so that what starts at zero does something too."""
    g = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=g))


def new_unet(seed: int = 0, **changes: Any) -> UNet:
    """A network as training starts from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet(small_config(**changes))


def random_unet(seed: int = 0, **changes: Any) -> UNet:
    """A network in which every branch does something."""
    unet = new_unet(seed, **changes)
    randomize(unet, seed)
    return unet.eval()


def random_text(*lead: int, seed: int = 0, num_tokens: int = 5, width: int = TEXT_WIDTH) -> TextCondition:
    """Texts of 1 to `num_tokens` tokens: the first has all, the last is short. Padding holds noise, as an encoder's."""
    g = generator(seed)
    lengths = torch.randint(1, num_tokens + 1, lead, generator=g)
    lengths.view(-1)[-1] = max(1, num_tokens - 2)
    lengths.view(-1)[0] = num_tokens
    return TextCondition(
        tokens=torch.randn(*lead, num_tokens, width, generator=g),
        mask=torch.arange(num_tokens) < lengths[..., None],
        pooled=torch.randn(*lead, POOLED_WIDTH, generator=g),
    )


def random_neighbors(b: int, k: int, *, seed: int = 0, mask: Tensor | None = None) -> NeighborBatch:
    return NeighborBatch(
        pixels=torch.rand(b, k, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator(seed)) * 2 - 1,
        text=random_text(b, k, seed=seed + 1),
        mask=torch.ones(b, k, dtype=torch.bool) if mask is None else mask,
    )


def random_pixels(b: int, seed: int = 0) -> Tensor:
    return torch.randn(b, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator(seed))


def choose(neighbors: NeighborBatch, places: list[int]) -> NeighborBatch:
    """The neighbours at these places, in this order."""
    text = neighbors.text
    return NeighborBatch(
        pixels=neighbors.pixels[:, places],
        text=TextCondition(tokens=text.tokens[:, places], mask=text.mask[:, places], pooled=text.pooled[:, places]),
        mask=neighbors.mask[:, places],
    )
