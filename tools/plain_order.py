"""The same network in the order that other U-Nets have: downsampling after a block's convolutions, upsampling before.

It is what the Efficient U-Net's order is measured against (Saharia et al. 2022, Imagen, appendix B.1), in
`bench_unet.py` and `tests/unit/test_unet_claims.py`. Parameters and their names are the same; attention runs at the
same sizes; only the size at which residual blocks run differs. Without neighbours.
"""

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, pixel_shuffle, pixel_unshuffle, silu

from radt.conditioning import TextCondition
from radt.unet.layers import ResidualBlock
from radt.unet.unet import DecoderLevel, EncoderLevel, UNet


class PlainOrder(UNet):
    """A UNet whose blocks below the first level run at twice the height and width."""

    def forward(self, x: Tensor, t: Tensor, text: TextCondition) -> Tensor:
        """The raw prediction, shape of x."""
        embedding = self.embedding(t, text, None)
        h = pixel_unshuffle(x, self.config.fold)
        skips = []
        for level, encoder in enumerate(self.encoder):
            h, skip = down(cast(EncoderLevel, encoder), h, embedding, text, is_first=level == 0)
            skips.append(skip)
        for level in reversed(range(len(self.decoder))):
            h = up(cast(DecoderLevel, self.decoder[level]), h, skips[level], embedding, text=text, is_last=level == 0)
        return pixel_shuffle(self.conv_out(silu(self.norm_out(h))), self.config.fold)


def down(
    level: EncoderLevel, h: Tensor, embedding: Tensor, text: TextCondition, *, is_first: bool
) -> tuple[Tensor, Tensor]:
    """Convolutions at the size that comes in, then half of it; the skip is taken before."""
    h = conv2d(h, level.enter.weight, level.enter.bias, padding=1)
    for block in level.blocks:
        h = cast(ResidualBlock, block)(h, embedding)
    halved = h if is_first else avg_pool2d(h, 2)
    return halved if level.attention is None else level.attention(halved, text), h


def up(
    level: DecoderLevel, h: Tensor, skip: Tensor, embedding: Tensor, *, text: TextCondition, is_last: bool
) -> Tensor:
    """Attention, twice the size, then the skip and the convolutions."""
    h = h if level.attention is None else level.attention(h, text)
    h = h if is_last else interpolate(h, scale_factor=2, mode="nearest")
    h = level.merge(torch.cat([h, skip * 2**-0.5], dim=1), embedding)
    for block in level.blocks:
        h = cast(ResidualBlock, block)(h, embedding)
    return h if is_last else level.leave.conv(h)
