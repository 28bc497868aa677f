"""Axis letters and tensor aliases: b batch, c h w image, n text tokens, k neighbors, m neighbor tokens, d width."""

from jaxtyping import Bool, Float
from torch import Tensor

Pixels = Float[Tensor, "b c h w"]  # values in [-1, 1] at every module boundary
Features = Float[Tensor, "b c h w"]  # inside a network, any range
TextTokens = Float[Tensor, "b n d"]
TextMask = Bool[Tensor, "b n"]  # True = a real token
Pooled = Float[Tensor, "b d"]
NeighborPixels = Float[Tensor, "b k c h w"]
NeighborMask = Bool[Tensor, "b k"]  # True = attend
PerExample = Float[Tensor, " b"]  # the leading space keeps linters from reading it as a forward reference
