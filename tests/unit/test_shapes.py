"""The aliases say which tensors they take: a channel axis or a bool too few is no picture and no mask."""

import pytest
import torch
from torch import Tensor

from radt.shapes import Features, NeighborMask, NeighborPixels, PerExample, Pixels, Pooled, TextMask, TextTokens


@pytest.mark.parametrize(
    ("alias", "good", "bad"),
    [
        (Pixels, torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4)),
        (Pixels, torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)),
        (Features, torch.zeros(2, 3, 4, 4), torch.zeros(2, 16, 3)),
        (TextTokens, torch.zeros(2, 5, 8), torch.zeros(2, 8)),
        (TextMask, torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 5)),
        (Pooled, torch.zeros(2, 8), torch.zeros(2)),
        (NeighborPixels, torch.zeros(2, 2, 3, 4, 4), torch.zeros(4, 3, 4, 4)),
        (NeighborMask, torch.ones(2, 2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)),
        (PerExample, torch.zeros(2), torch.zeros(2, 1)),
    ],
)
def test_alias(alias: type, good: Tensor, bad: Tensor) -> None:
    assert isinstance(good, alias)
    assert not isinstance(bad, alias)
