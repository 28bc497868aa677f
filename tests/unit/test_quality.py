"""Every measure of a picture on pictures whose measure is known."""

import numpy as np
import pytest
from PIL import Image

from radt.quality import clipped, colorfulness, contrast, luma, measure, prompt_agreements, sharpness
from tests.fakes import HashEmbedder


def flat(*color: int) -> np.ndarray:
    return np.full((6, 8, 3), color, dtype=np.uint8)


def halves(left: tuple[int, int, int], right: tuple[int, int, int]) -> np.ndarray:
    picture = flat(*left)
    picture[:, 4:] = right
    return picture


def test_a_flat_gray_picture_has_no_contrast_no_detail_and_no_colour() -> None:
    quality = measure(Image.fromarray(flat(128, 128, 128)))
    expected = {"prompt_agreement": None, "sharpness": 0, "contrast": 0, "colorfulness": 0, "clipped": 0}
    assert quality.to_json() == expected


def test_contrast_is_the_standard_deviation_of_light() -> None:
    assert contrast(halves((0, 0, 0), (255, 255, 255))) == pytest.approx(0.5)
    assert contrast(halves((100, 100, 100), (151, 151, 151))) == pytest.approx(0.1)


def test_colorfulness_by_hand() -> None:
    """One colour: no spread, so 0.3 times its distance from grey in the opponent plane; two opposite ones: spread."""
    assert colorfulness(flat(255, 0, 0)) == pytest.approx(0.3 * np.hypot(255, 127.5))
    assert colorfulness(halves((200, 100, 150), (100, 200, 150))) == pytest.approx(100)
    assert colorfulness(halves((10, 10, 10), (240, 240, 240))) == 0


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    """A checkerboard of a and b has the Laplacian +-4 (a - b); a ramp has none; light alone counts."""
    board = np.indices((9, 10)).sum(axis=0) % 2
    picture = np.repeat((100 + 20 * board)[..., None], 3, axis=-1).astype(np.uint8)
    inner = np.where(board[1:-1, 1:-1] == 1, -80.0, 80.0)
    assert sharpness(picture) == pytest.approx(inner.var()) == pytest.approx(80.0**2, rel=0.01)
    ramp = np.repeat(np.tile(np.arange(10), (5, 1))[..., None], 3, axis=-1).astype(np.uint8)
    assert sharpness(ramp) == pytest.approx(0, abs=1e-18)
    assert sharpness(picture[:2]) == 0


def test_sharpness_equals_a_sum_over_pixels() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    y = luma(rgb)
    slow = [
        y[r - 1, c] + y[r + 1, c] + y[r, c - 1] + y[r, c + 1] - 4 * y[r, c] for r in range(1, 6) for c in range(1, 8)
    ]
    assert sharpness(rgb) == pytest.approx(np.var(slow))


def test_clipped_counts_pixels_and_not_channels() -> None:
    picture = flat(1, 128, 254)
    picture[0, 0], picture[1, 1], picture[2, 2] = (0, 255, 0), (255, 7, 7), (7, 7, 0)
    assert clipped(picture) == pytest.approx(3 / 48)


def test_agreement_is_the_cosine_with_the_prompt() -> None:
    embedder = HashEmbedder()
    images = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    agreements = prompt_agreements(embedder, "a wolf", images)
    expected = [float(vector @ embedder.texts(["a wolf"])[0]) for vector in embedder.images(images)]
    assert agreements == pytest.approx(expected)
    assert measure(images[0], prompt_agreement=agreements[0]).to_json()["prompt_agreement"] == round(agreements[0], 4)
