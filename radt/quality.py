"""Measures of a drawn picture (row I14): what its pixels are like, and how well it agrees with its prompt.

They compare pictures of one kind with one another; none of them says by itself that a picture is good.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

if TYPE_CHECKING:
    from PIL.Image import Image

    from index.embedder import Embedder

LUMA = np.array([0.299, 0.587, 0.114])  # of R, G, B (ITU-R BT.601)

RGB = UInt8[np.ndarray, "h w 3"]
Gray = Float[np.ndarray, "h w"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """All measures of one picture. `prompt_agreement` is None where there is no prompt or nobody asked."""

    prompt_agreement: float | None
    sharpness: float
    contrast: float
    colorfulness: float
    clipped: float

    def to_json(self) -> dict[str, float | None]:
        """Rounded to what is worth reading."""
        return {name: None if value is None else round(value, 4) for name, value in asdict(self).items()}


def measure(image: "Image", *, prompt_agreement: float | None = None) -> Quality:
    """Every measure of one picture."""
    rgb = np.asarray(image.convert("RGB"))
    return Quality(
        prompt_agreement=prompt_agreement,
        sharpness=sharpness(rgb),
        contrast=contrast(rgb),
        colorfulness=colorfulness(rgb),
        clipped=clipped(rgb),
    )


def prompt_agreements(embedder: "Embedder", prompt: str, images: Sequence["Image"]) -> list[float]:
    """The cosine of the prompt with each picture, in [-1, 1] (Radford et al. 2021, CLIP).

    CLIPScore (Hessel et al. 2021) is 2.5 times this, cut off at 0. Only values of one CLIP can be compared.
    """
    vectors = embedder.images([image.convert("RGB") for image in images])
    return [float(cosine) for cosine in vectors @ embedder.texts([prompt])[0]]


def sharpness(rgb: RGB) -> float:
    """The variance of the Laplacian of luma, in squared 8-bit levels (Pech-Pacheco et al. 2000); 0 of a flat picture.

    Inner pixels only; 0 where a picture has none. Noise counts as detail.
    """
    y = luma(rgb)
    if min(y.shape) < 3:
        return 0.0
    laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]
    return float(laplacian.var())


def contrast(rgb: RGB) -> float:
    """Root-mean-square contrast (Peli 1990, section 2): the standard deviation of luma in [0, 1], at most 0.5."""
    return float(luma(rgb).std() / 255)


def colorfulness(rgb: RGB) -> float:
    """Of opponent colours, in 8-bit levels (Hasler and Suesstrunk 2003, "Measuring colourfulness", section 7).

    sqrt(std_rg^2 + std_yb^2) + 0.3 sqrt(mean_rg^2 + mean_yb^2); 0 of a grey picture, about 109 "extremely colourful".
    """
    red, green, blue = np.moveaxis(rgb.astype(np.float64), -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def clipped(rgb: RGB) -> float:
    """The share of pixels with a channel at 0 or 255, where light or colour may have been cut off.

    Guidance that is too strong raises it (Saharia et al. 2022, Imagen, section 2.3, "train-test mismatch").
    """
    return float(((rgb == 0) | (rgb == 255)).any(axis=-1).mean())


def luma(rgb: RGB) -> Gray:
    """Brightness as seen, in 8-bit levels."""
    return rgb @ LUMA
