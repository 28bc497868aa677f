"""Resizing pictures as tensors, one way wherever two stages of a cascade meet."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from radt.shapes import Pixels

Size = tuple[int, int]  # height and width


def resize(pixels: Pixels, size: Size) -> Float[Tensor, "b c _height _width"]:
    """Bilinear, averaging where it shrinks; the pixels themselves where the size is theirs already."""
    if pixels.shape[-2:] == size:
        return pixels
    resized: Tensor = interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
    return resized
