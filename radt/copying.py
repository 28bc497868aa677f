"""How like its references a picture is, wherever and however large they stand in it; and not keeping a copy (row N2).

A copy is looked for by normalised cross-correlation over every shift, at scales from half to twice, over the part where
picture and neighbour overlap (Padfield 2012, "Masked object registration in the Fourier domain"; here both are
rectangles, so that only the products need a Fourier transform). Turned and mirrored copies are not found.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from index.errors import ConfigError
from radt.neighbors import RGB8, Neighbor, to_pixels
from radt.resizing import Size, resize

if TYPE_CHECKING:
    from radt.pipeline import GeneratedImage

WARN_ABOVE = 0.95  # no pair of 400 pairs of different emoji is, nor any of 40 pictures of the demonstration model
MAX_REDRAWS = 4
LONGEST = 64  # pixels: larger pictures are compared shrunk to this
LARGEST_SCALE = 2.0  # and its inverse is the smallest
SCALE_STEPS = 4  # to each doubling; the best scale is then refined by halving the step twice
LEAST_OVERLAP = 0.5  # of the smaller of the two areas
FLAT = 2.0  # levels of 255: a part that deviates less from its mean is flat, and like nothing

Planes = Float[Tensor, "3 _h _w"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """Where a neighbour fits a picture best: `similarity` in [0, 1], 1 for a copy up to brightness and contrast.

    `scale` is the neighbour's size there beside its own, `top` and `left` the place of its upper left corner; all as
    fractions of the picture's height and width, negative where it begins outside.
    """

    similarity: float = 0.0
    scale: float = 1.0
    top: float = 0.0
    left: float = 0.0

    def to_json(self) -> dict[str, float]:
        """Its fields."""
        return {"similarity": self.similarity, "scale": self.scale, "top": self.top, "left": self.left}


def best_match(picture: RGB8, reference: RGB8) -> Match:
    """The best fit of a reference of the picture's own shape over all shifts and scales; similarity 0 if it is flat."""
    a, b = _planes(picture), _planes(reference)
    coarse = [2 ** (step / SCALE_STEPS) for step in range(-SCALE_STEPS, SCALE_STEPS + 1)]
    best = max((match_at(a, b, scale) for scale in coarse), key=_by_similarity)
    for halvings in (1, 2):
        finer = 2 ** (0.5**halvings / SCALE_STEPS)
        around = [scale for scale in (best.scale / finer, best.scale * finer) if _is_allowed(scale)]
        best = max([best, *(match_at(a, b, scale) for scale in around)], key=_by_similarity)
    return best


def match_at(picture: Planes, reference: Planes, scale: float) -> Match:
    """The best shift at one scale. Whichever is to be the smaller is shrunk; nothing is enlarged."""
    if scale <= 1:
        a, b = picture, _shrink(reference, scale)
    else:
        a, b = _shrink(picture, 1 / scale), reference
    table = correlations(a, b)
    place = int(table.argmax())
    row, column = place // table.shape[1] - (b.shape[1] - 1), place % table.shape[1] - (b.shape[2] - 1)
    return Match(
        similarity=round(min(1.0, float(table.flatten()[place])), 4),
        scale=scale,
        top=round(row / a.shape[1], 4),
        left=round(column / a.shape[2], 4),
    )


def correlations(a: Planes, b: Planes) -> Float[Tensor, "_rows _columns"]:
    """Correlation of `a` with `b` moved by every shift: sum_c cov_c / sqrt(sum_c var_c(a) sum_c var_c(b)), at least 0.

    Each channel's mean is taken over the overlap alone, so that equal grounds count for nothing. Entry (i, j) moves `b`
    down by i - (its height - 1) and right by j - (its width - 1). 0 where the overlap is too small, or flat in either.
    """
    a, b = _centred(a), _centred(b)
    size = (a.shape[1] + b.shape[1] - 1, a.shape[2] + b.shape[2] - 1)
    turned = b.flip(1, 2)  # a convolution with it is a correlation
    spectra = torch.fft.rfft2(a, s=size) * torch.fft.rfft2(turned, s=size)
    products = torch.fft.irfft2(spectra.sum(dim=0), s=size)
    count = window_sums(torch.ones_like(a[:1]), b.shape[1:])[0]
    sums_a, sums_b = window_sums(_with_squares(a), b.shape[1:]), window_sums(_with_squares(turned), a.shape[1:])
    covariance = products - (sums_a[:3] * sums_b[:3]).sum(dim=0) / count
    variance_a = sums_a[3] - sums_a[:3].square().sum(dim=0) / count
    variance_b = sums_b[3] - sums_b[:3].square().sum(dim=0) / count
    least = 3 * count * (2 * FLAT / 255) ** 2  # pixels run from -1 to 1
    enough = count >= LEAST_OVERLAP * min(a[0].numel(), b[0].numel())
    is_sound = enough & (variance_a > least) & (variance_b > least)
    scale = (variance_a.clamp(min=1e-12) * variance_b.clamp(min=1e-12)).sqrt()
    return torch.where(is_sound, covariance / scale, 0.0).clamp(min=0)


def window_sums(x: Float[Tensor, "c _h _w"], window: Sequence[int]) -> Float[Tensor, "c _rows _columns"]:
    """Sums of x under a window in every place where the two touch."""
    return _touching(x.shape[1], window[0]).to(x) @ x @ _touching(x.shape[2], window[1]).to(x).T


def _touching(length: int, window: int) -> Bool[Tensor, "_places length"]:
    """Which positions a window covers as it slides over a line, from the first touch to the last."""
    begin = torch.arange(1 - window, length)[:, None]
    positions = torch.arange(length)
    return (begin <= positions) & (positions < begin + window)


def _with_squares(x: Planes) -> Float[Tensor, "4 _h _w"]:
    return torch.cat([x, x.square().sum(dim=0, keepdim=True)])


def _planes(rgb: RGB8) -> Planes:
    pixels = to_pixels(rgb).double()
    return _shrink(pixels, min(1.0, LONGEST / max(pixels.shape[1:])))


def _shrink(x: Planes, scale: float) -> Planes:
    size: Size = max(1, round(x.shape[1] * scale)), max(1, round(x.shape[2] * scale))
    return resize(x[None], size)[0]


def _centred(x: Planes) -> Planes:
    """Less its mean, which changes no correlation and keeps the differences of large sums exact."""
    return x - x.mean(dim=(1, 2), keepdim=True)


def _is_allowed(scale: float) -> bool:
    return 1 / LARGEST_SCALE <= scale <= LARGEST_SCALE


def _by_similarity(match: Match) -> float:
    return match.similarity


def copy_similarity(picture: RGB8, neighbors: Sequence[Neighbor]) -> float | None:
    """The largest similarity to a neighbour over shifts and scales, in [0, 1]; None without neighbours (row N2)."""
    return most_similar(with_similarity(neighbors, picture))


def with_similarity(neighbors: Sequence[Neighbor], picture: RGB8) -> tuple[Neighbor, ...]:
    """The neighbours, each with its similarity to this picture."""
    size = picture.shape[0], picture.shape[1]
    return tuple(replace(each, similarity=best_match(picture, each.at(size)).similarity) for each in neighbors)


def most_similar(neighbors: Sequence[Neighbor]) -> float | None:
    """The largest similarity noted; None where none is."""
    return max((each.similarity for each in neighbors if each.similarity is not None), default=None)


def nearest(neighbors: Sequence[Neighbor]) -> Neighbor:
    """The neighbour that the picture is most like."""
    return max(neighbors, key=lambda each: each.similarity or 0.0)


def is_copy(picture: "GeneratedImage", limit: float) -> bool:
    """Whether it is more like a neighbour than the limit allows."""
    similarity = picture.record.copy_similarity
    return similarity is not None and similarity > limit


def warning(picture: "GeneratedImage", name: str) -> str | None:
    """One sentence about a picture close to a copy; None for any other."""
    if not is_copy(picture, WARN_ABOVE):
        return None
    source = nearest(picture.neighbors)
    return (
        f"{name} is nearly a copy of {_named(source)}: similarity {source.similarity:.2f}, above {WARN_ABOVE:g}; "
        f"--max-copy {WARN_ABOVE:g} would draw it again from another seed"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A picture that stayed above the limit from every seed tried; `nearest` is of the least similar of them."""

    prompt: str
    seeds: tuple[int, ...]
    limit: float
    nearest: Neighbor

    @property
    def sentence(self) -> str:
        """What happened and what to do."""
        return (
            f"no picture of {self.prompt!r} was saved: each of seeds {', '.join(map(str, self.seeds))} came out above "
            f"--max-copy {self.limit:g}, the least similar at {self.nearest.similarity:.2f} to {_named(self.nearest)}; "
            f"raise --max-copy, or leave that pair out with --exclude"
        )

    def to_json(self) -> dict[str, Any]:
        """For `--json`: what was asked, what was tried, and how near the best attempt came."""
        return {
            "prompt": self.prompt,
            "seeds": list(self.seeds),
            "max_copy": self.limit,
            "copy_similarity": self.nearest.similarity,
            "nearest": self.nearest.id,
        }


def first_below(
    limit: float, picture: "GeneratedImage", redraws: Iterable["GeneratedImage"]
) -> "GeneratedImage | Refused":
    """The picture, or the first of its `redraws` (drawn as they are asked for) that is not above the limit."""
    tried = []
    for each in chain([picture], redraws):
        if not is_copy(each, limit):
            return each
        tried.append(each)
    least = min((nearest(each.neighbors) for each in tried), key=lambda each: each.similarity or 0.0)
    return Refused(prompt=picture.prompt, seeds=tuple(each.seed for each in tried), limit=limit, nearest=least)


def check_limit(limit: float) -> None:
    """A similarity lies between 0 and 1."""
    if not 0 <= limit <= 1:
        raise ConfigError(f"max_copy is a similarity between 0 and 1 (1 refuses nothing), got {limit}")


def _named(neighbor: Neighbor) -> str:
    words = neighbor.caption if len(neighbor.caption) <= 40 else f"{neighbor.caption[:37].rstrip()}..."
    return f"neighbour {neighbor.id} ({words})"
