"""Small layers the network is made of: time features, residual blocks, resizing by strided and folded convolution."""

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from radt.shapes import Features, PerExample


def zero_(layer: nn.Conv2d | nn.Linear) -> None:
    """Zero a last projection, so that the branch it ends starts as the identity (or as silence)."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of 16 channels: few enough to be cheap, many enough not to be a LayerNorm."""
    return nn.GroupNorm(max(1, channels // 16), channels)


def fourier_features(t: PerExample, width: int) -> Float[Tensor, "b width"]:
    """Sine and cosine of t in [0, 1] at `width / 2` frequencies from 1 to 1000 (Vaswani et al. 2017, section 3.5)."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000.0), width // 2, device=t.device))
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ResidualBlock(nn.Module):
    """GroupNorm, swish, conv, GroupNorm, swish, conv beside a 1x1 path (Imagen, figure A.27; SPEC row I11).

    The embedding of time and pooled text scales and shifts the second normalisation.
    """

    def __init__(self, in_channels: int, out_channels: int, embedding_width: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_width, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.path = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Features, embedding: Float[Tensor, "b e"]) -> Float[Tensor, "b out_c h w"]:
        """Same height and width, `out_channels` channels."""
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        scale, shift = rearrange(self.modulation(embedding), "b (two c) -> two b c 1 1", two=2)
        h = self.conv2(nn.functional.silu(self.norm2(h) * (1 + scale) + shift))
        return self.path(x) + h


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution: the last thing an up block does (Efficient U-Net)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Features) -> Float[Tensor, "b out_c 2*h 2*w"]:
        """Twice the height and width."""
        return self.conv(nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
