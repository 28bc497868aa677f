"""Colours as people see them apart: CIE L*a*b* from sRGB, and the name of the nearest colour of a palette."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Num, UInt8

# Linear sRGB to CIE XYZ (IEC 61966-2-1); the rows add up to the white point D65.
XYZ_FROM_RGB = np.array([
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
])
WHITE = XYZ_FROM_RGB.sum(axis=1)


def lab_from_srgb(rgb: Num[np.ndarray, "*batch 3"]) -> Float[np.ndarray, "*batch 3"]:
    """CIE L*a*b* (D65) of sRGB colours in 0 to 255 (CIE 15:2004, section 8.2.1). Distances are CIE76 differences."""
    encoded = rgb / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    ratio = linear @ XYZ_FROM_RGB.T / WHITE
    delta = 6 / 29
    f = np.where(ratio > delta**3, np.cbrt(ratio), ratio / (3 * delta**2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def nearest_color(rgb: Num[np.ndarray, " 3"], palette: Mapping[str, Sequence[int]]) -> str:
    """The name of the palette's colour that looks most like `rgb`."""
    differences = lab_from_srgb(np.array(list(palette.values()))) - lab_from_srgb(rgb)
    return list(palette)[int(np.linalg.norm(differences, axis=1).argmin())]


def border_color(picture: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, " 3"]:
    """The median of the outermost ring of pixels, channel by channel."""
    ring = [picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]]
    return np.median(np.concatenate(ring), axis=0)
