import math

import pytest
import torch
from torch import Tensor

from radt.copying import FLAT, LEAST_OVERLAP, best_match, correlations
from radt.resizing import resize
from tests.networks import generator

SIDE = 48


def smooth(seed: int, side: int = SIDE) -> Tensor:
    """Coloured clouds: noise of a few cells, enlarged; like nothing but itself. 8-bit, [side, side, 3]."""
    cells = torch.rand(1, 3, 9, 9, generator=generator(seed))
    return to_bytes(torch.nn.functional.interpolate(cells, size=(side, side), mode="bicubic")[0])


def to_bytes(planes: Tensor) -> Tensor:
    return (planes.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)


def shrunk(picture: Tensor, side: int) -> Tensor:
    planes = picture.permute(2, 0, 1)[None] / 255
    return to_bytes(resize(planes, (side, side))[0])


def slow_correlation(a: Tensor, b: Tensor, down: int, right: int) -> float:
    """Pair up the pixels that fall on each other; centre each channel; divide the inner product by both norms."""
    pairs = [
        (a[:, i, j], b[:, i - down, j - right])
        for i in range(a.shape[1])
        for j in range(a.shape[2])
        if 0 <= i - down < b.shape[1] and 0 <= j - right < b.shape[2]
    ]
    if len(pairs) < LEAST_OVERLAP * min(a[0].numel(), b[0].numel()):
        return 0.0
    x, y = (torch.stack(side) - torch.stack(side).mean(dim=0) for side in zip(*pairs, strict=True))
    if min(x.square().mean(), y.square().mean()).sqrt() * 255 / 2 < FLAT:
        return 0.0
    return max(0.0, float((x * y).sum() / (x.norm() * y.norm())))


def test_every_shift_is_the_correlation_of_what_overlaps_written_out() -> None:
    a = torch.randn(3, 5, 7, generator=generator(1), dtype=torch.float64)
    b = torch.randn(3, 4, 6, generator=generator(2), dtype=torch.float64) + 3
    a[:, :, 3:] = 0.25  # a flat part
    table = correlations(a, b)
    assert table.shape == (5 + 4 - 1, 7 + 6 - 1)
    expected = [[slow_correlation(a, b, i - 3, j - 5) for j in range(12)] for i in range(8)]
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    assert (table == 0).any()
    assert (table > 0.1).any()


def test_a_copy_is_1_in_its_place_whatever_its_brightness_and_contrast() -> None:
    picture = smooth(1)
    match = best_match((picture * 0.5 + 40).to(torch.uint8), picture)
    assert match.similarity == pytest.approx(1, abs=1e-3)
    assert (match.scale, match.top, match.left) == (1, 0, 0)


@pytest.mark.parametrize(("down", "right"), [(6, -9), (-12, 3), (0, 20)])
def test_a_shifted_copy_is_1_and_is_placed(down: int, right: int) -> None:
    large = smooth(2, 2 * SIDE)
    picture = large[20 : 20 + SIDE, 20 : 20 + SIDE]
    reference = large[20 + down : 20 + down + SIDE, 20 + right : 20 + right + SIDE]
    match = best_match(picture, reference)
    assert match.similarity == pytest.approx(1, abs=1e-3)
    assert (match.scale, match.top, match.left) == (1, down / SIDE, pytest.approx(right / SIDE, abs=1e-4))


@pytest.mark.parametrize("side", [24, 29, 34, 41])
def test_a_reference_drawn_small_somewhere_is_found(side: int) -> None:
    reference, picture = smooth(3), smooth(4)
    picture[5 : 5 + side, 2 : 2 + side] = shrunk(reference, side)
    match = best_match(picture, reference)
    assert match.similarity > 0.95
    assert match.scale == pytest.approx(side / SIDE, rel=0.07)
    assert (match.top, match.left) == (pytest.approx(5 / SIDE, abs=0.06), pytest.approx(2 / SIDE, abs=0.06))


@pytest.mark.parametrize("side", [60, 75, 96])
def test_a_detail_of_a_reference_drawn_large_is_found(side: int) -> None:
    large = smooth(5, side)
    picture, reference = large[3 : 3 + SIDE, 9 : 9 + SIDE], shrunk(large, SIDE)
    match = best_match(picture, reference)
    assert match.similarity > 0.95
    assert match.scale == pytest.approx(side / SIDE, rel=0.07)
    assert (match.top, match.left) == (pytest.approx(-3 / SIDE, abs=0.06), pytest.approx(-9 / SIDE, abs=0.06))


def test_noise_is_like_nothing_and_a_flat_picture_not_even_like_another() -> None:
    noise = [torch.randint(0, 256, (SIDE, SIDE, 3), generator=generator(i), dtype=torch.uint8) for i in range(2)]
    assert best_match(*noise).similarity < 0.15
    flat = torch.tensor([250, 120, 10], dtype=torch.uint8).expand(SIDE, SIDE, 3)
    for other in (noise[0], smooth(1), flat):
        assert best_match(flat, other).similarity == 0
        assert best_match(other, flat).similarity == 0


def test_unlike_pictures_stay_below_a_copy() -> None:
    assert max(best_match(smooth(i), smooth(i + 1)).similarity for i in range(10, 14)) < 0.7


def test_large_pictures_are_compared_small() -> None:
    match = best_match(smooth(6, 256), smooth(6, 256))
    assert match.similarity == 1
    assert math.isclose(match.scale, 1)
