"""Post-processing by hand: what each step makes of a few pixels, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from index.errors import ConfigError
from radt.postprocess import STEPS, apply_post, parse_post
from radt.settings import GenerateSettings


def gray(*rows: list[int]) -> Image.Image:
    return Image.fromarray(np.array(rows, dtype=np.uint8)).convert("RGB")


def test_contrast_moves_away_from_the_mean_and_brightness_from_black() -> None:
    image = gray([90, 110], [90, 110])
    assert np.asarray(apply_post(image, "contrast=2"))[0, :, 0].tolist() == [80, 120]
    assert np.asarray(apply_post(image, "contrast=0"))[0, :, 0].tolist() == [100, 100]
    assert np.asarray(apply_post(image, "brightness=2"))[0, :, 0].tolist() == [180, 220]
    assert np.asarray(apply_post(image, "brightness=0"))[0, :, 0].tolist() == [0, 0]


def test_saturation_moves_a_pixel_away_from_its_own_gray() -> None:
    image = Image.new("RGB", (1, 1), (200, 100, 100))
    luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 100)
    assert apply_post(image, "saturation=0").getpixel((0, 0)) == (luma, luma, luma)
    half = apply_post(image, "saturation=0.5").getpixel((0, 0))
    assert half == pytest.approx([(200 + luma) / 2, (100 + luma) / 2, (100 + luma) / 2], abs=1)
    assert apply_post(gray([50]), "saturation=3").getpixel((0, 0)) == (50, 50, 50)


def test_sharpening_adds_the_difference_to_the_smoothed_picture() -> None:
    """One bright pixel: smoothing leaves it (8 x 100 + 5 x 113) / 13 = 105, so amount 0.5 adds (113 - 105) / 2."""
    image = gray([100] * 3, [100, 113, 100], [100] * 3)
    assert np.asarray(apply_post(image, "sharpen=0.5"))[1, 1, 0] == 117
    flat = gray(*[[80] * 4] * 4)
    assert apply_post(flat, "sharpen=2").tobytes() == flat.tobytes()


@pytest.mark.parametrize("nothing", ["sharpen=0", "contrast=1", "brightness=1", "saturation=1"])
def test_every_step_has_an_amount_that_changes_nothing(nothing: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    assert apply_post(noise, nothing).tobytes() == noise.tobytes()


def test_steps_are_done_in_the_order_written() -> None:
    image = gray([90, 110])
    one, two = apply_post(image, "brightness=2, contrast=0"), apply_post(image, "contrast=0,brightness=2")
    assert parse_post("brightness=2, contrast=0") == (("brightness", 2.0), ("contrast", 0.0))
    assert one.getpixel((0, 0)) == two.getpixel((0, 0)) == (200, 200, 200)
    dark = apply_post(image, "brightness=0,contrast=2")
    assert dark.getpixel((1, 0)) == (0, 0, 0) != apply_post(image, "contrast=2").getpixel((1, 0))


@pytest.mark.parametrize("text", ["", "blur=1", "sharpen", "sharpen=", "sharpen=-1", "contrast=nan", "contrast=1,,"])
def test_what_is_not_a_step_is_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerateSettings(post=text)
    message = str(caught.value)
    assert "post" in message
    assert "\n" not in message
    assert all(name in message for name in STEPS) or "0 or more" in message
