"""What is done to a picture after it was drawn (row I14): `--post sharpen=0.3,contrast=1.1`, by Pillow.

The steps are a setting like the others, so that they travel in the PNG and `radt replay` repeats them.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from index.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

Step = tuple[str, float]  # name and amount


def parse_post(text: str) -> tuple[Step, ...]:
    """`NAME=AMOUNT,NAME=AMOUNT`, in the order in which they will be done. A ConfigError lists the names there are."""
    return tuple(_parse_step(part.strip()) for part in text.split(","))


def apply_post(image: "Image", text: str) -> "Image":
    """The picture after all steps of `text`: RGB of the same size, rounded to 8 bits after each."""
    for name, amount in parse_post(text):
        image = STEPS[name](image, amount)
    return image


def sharpen(image: "Image", amount: float) -> "Image":
    """Away from the smoothed picture: x + amount (x - smooth(x)); 0 changes nothing.

    Extrapolation, as are the steps below (Haeberli and Voorhies 1994, "Image processing by interpolation and
    extrapolation"). Pillow's `smooth` is a 3x3 mean with 5 of 13 in the middle, and leaves the outermost ring alone.
    """
    from PIL import ImageEnhance

    return ImageEnhance.Sharpness(image).enhance(1 + amount)


def contrast(image: "Image", factor: float) -> "Image":
    """Away from the picture's mean grey m by m + factor (x - m); 1 changes nothing, 0 is flat grey."""
    from PIL import ImageEnhance

    return ImageEnhance.Contrast(image).enhance(factor)


def brightness(image: "Image", factor: float) -> "Image":
    """Every channel times `factor`; 1 changes nothing, 0 is black."""
    from PIL import ImageEnhance

    return ImageEnhance.Brightness(image).enhance(factor)


def saturation(image: "Image", factor: float) -> "Image":
    """Away from each pixel's own grey g by g + factor (x - g); 1 changes nothing, 0 is black and white."""
    from PIL import ImageEnhance

    return ImageEnhance.Color(image).enhance(factor)


STEPS: dict[str, Callable[["Image", float], "Image"]] = {
    "sharpen": sharpen,
    "contrast": contrast,
    "brightness": brightness,
    "saturation": saturation,
}


def _parse_step(text: str) -> Step:
    name, separator, number = text.partition("=")
    if name not in STEPS or not separator:
        raise ConfigError(f"post is NAME=AMOUNT,... with the names {', '.join(STEPS)}; got {text!r}")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if not (math.isfinite(amount) and amount >= 0):
        raise ConfigError(f"post: the amount of {name} is a number, 0 or more, got {number!r}")
    return name, amount
