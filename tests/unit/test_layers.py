"""The small layers: what they start as, and the closed forms of what they compute."""

import math

import torch
from torch import nn

from radt.unet.layers import ResidualBlock, Upsample, fourier_features, group_norm, zero_
from tests.networks import generator, randomize


def random_map(b: int, channels: int, side: int = 4) -> torch.Tensor:
    return torch.randn(b, channels, side, side, generator=generator())


def test_fourier_features_are_sines_of_frequencies_from_1_to_1000() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    features = fourier_features(t, 6)
    for i in range(3):
        frequency = 1000 ** (i / 2)
        torch.testing.assert_close(features[:, i], torch.sin(t * frequency), atol=5e-4, rtol=0)
        torch.testing.assert_close(features[:, 3 + i], torch.cos(t * frequency), atol=5e-4, rtol=0)
    torch.testing.assert_close(features[0], torch.tensor([0.0, 0, 0, 1, 1, 1]))


def test_groups_have_sixteen_channels() -> None:
    assert [group_norm(channels).num_groups for channels in (8, 16, 32, 128)] == [1, 1, 2, 8]


def test_zero_silences_with_and_without_bias() -> None:
    for layer in (nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.Conv2d(4, 4, 1, bias=False)):
        zero_(layer)
        assert all(not parameter.any() for parameter in layer.parameters())


def test_residual_block_is_its_path_when_its_last_convolution_is_zero() -> None:
    x, embedding = random_map(2, 16), torch.randn(2, 6, generator=generator(1))
    same, wider = ResidualBlock(16, 16, 6), ResidualBlock(16, 32, 6)
    for block in (same, wider):
        zero_(block.conv2)
    assert torch.equal(same(x, embedding), x)
    assert torch.equal(wider(x, embedding), wider.path(x))


def test_the_embedding_scales_and_shifts_the_second_norm() -> None:
    block = ResidualBlock(16, 16, 6)
    randomize(block)
    x, embedding = random_map(1, 16), torch.randn(1, 6, generator=generator(1))
    scale, shift = block.modulation(embedding)[0].chunk(2)
    h = block.norm2(block.conv1(nn.functional.silu(block.norm1(x))))
    h = nn.functional.silu(h * (1 + scale[:, None, None]) + shift[:, None, None])
    torch.testing.assert_close(block(x, embedding), x + block.conv2(h))


def test_upsample_doubles_and_repeats() -> None:
    layer = Upsample(2, 2)
    nn.init.dirac_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    x = random_map(1, 2)
    up = layer(x)
    assert up.shape == (1, 2, 8, 8)
    for row in range(2):
        for column in range(2):
            torch.testing.assert_close(up[:, :, row::2, column::2], x)
    assert math.isclose(up.mean().item(), x.mean().item(), abs_tol=1e-6)
