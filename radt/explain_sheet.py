"""What `radt explain` shows: the picture, its neighbours, and heat maps of the attention between them, on one sheet."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from radt.copying import Match
from radt.explain import TIMES, Explanation, StageAttention
from radt.neighbors import Neighbor
from radt.sheet import INK, NOTE_SIZE, PICTURE, SCALE, SOFT, Picture, Row, Sheet, enlarge, load_font, write_sheet

SIDE = PICTURE * SCALE  # of a heat map, in device pixels: the sheet shows it as it is
COVER = 0.78  # how much of a picture the colours hide
SCALE_NOTE = ("100% is all attention", "that a place can pay;", "it may receive more")
HEAT = np.array(  # matplotlib's inferno at nine even steps (CC0): as light as it is hot, for every eye and in print
    [
        (0, 0, 4),
        (31, 12, 72),
        (85, 15, 109),
        (136, 34, 106),
        (186, 54, 85),
        (227, 89, 51),
        (249, 140, 10),
        (249, 201, 50),
        (252, 255, 164),
    ],
    dtype=np.float64,
)


def write_explanation(explanation: Explanation, out: Path) -> tuple[Path, Path]:
    """Write the sheet as a PNG and as an HTML beside it, which has every text in full. Returns (png, html)."""
    return write_sheet(make_sheet(explanation), out)


def make_sheet(explanation: Explanation) -> Sheet:
    """A row for the picture and one for each neighbour; two columns of heat maps for each stage."""
    record = explanation.record
    columns = [name for stage in explanation.stages for name in _column_names(stage)]
    return Sheet(
        title="Where a picture comes from",
        subtitle=(
            f"model {record.origin.model}, seed {record.seed}; attention is the mean over layers, heads and the times "
            f"{', '.join(f'{time:g}' for time in TIMES)} of the noise schedule"
        ),
        columns=("Picture and neighbours", *columns),
        rows=(_picture_row(explanation), *(_neighbor_row(explanation, j) for j, _ in enumerate(record.neighbors))),
    )


def heat_map(image: Image.Image, values: Float[Tensor, "h w"], top: float) -> Image.Image:
    """Colours that run from 0 to `top` over a picture in grey, faint enough for the colours to be read."""
    grey = np.asarray(enlarge(image, SIDE).convert("L").convert("RGB"), dtype=np.float64)
    share = Image.fromarray((values / max(top, 1e-9)).clamp(0, 1).float().numpy())
    heat = np.asarray(share.resize(grey.shape[1::-1], Image.Resampling.BILINEAR), dtype=np.float64)
    return Image.fromarray(((1 - COVER) * grey + COVER * colors_of(heat)).round().astype(np.uint8))


def colors_of(heat: np.ndarray) -> np.ndarray:
    """Colours of values from 0 to 1: between the steps of HEAT in a straight line; [..., 3] from 0 to 255."""
    steps = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(heat, steps, channel) for channel in HEAT.T], axis=-1)


def color_scale(top: float) -> Image.Image:
    """A bar of the colours, its ends and middle labelled, and what they are shares of."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    bar = np.repeat(colors_of(np.linspace(0, 1, SIDE))[None], SIDE // 8, axis=0).round().astype(np.uint8)
    image.paste(Image.fromarray(bar), (0, 0))
    draw, font = ImageDraw.Draw(image), load_font(NOTE_SIZE * SCALE)
    for place, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        draw.text((place * (SIDE - 1), SIDE // 8 + 8), f"{place * top:.0%}", fill=INK, font=font, anchor=anchor)
    for number, line in enumerate(SCALE_NOTE):
        draw.text((0, SIDE // 8 + (2 + number) * 15 * SCALE), line, fill=SOFT, font=font)
    return image


def _column_names(stage: StageAttention) -> tuple[str, str]:
    size = f"{stage.size[0]}x{stage.size[1]}"
    return f"{size}: looked from", f"{size}: looked at"


def _picture_row(explanation: Explanation) -> Row:
    asked = explanation.record.settings
    cells = [
        (
            Picture(
                image=explanation.image,
                lines=(f"seed {explanation.record.seed}", f"copy similarity {explanation.copy_similarity:.2f}"),
            ),
        )
    ]
    for stage in explanation.stages:
        together = stage.picture.sum(dim=0)
        said = (f"all neighbours {float(together.mean()):.0%}", "its own scale: 0 to 100%")
        cells.append((Picture(image=heat_map(explanation.image, together, 1.0), lines=said),))
        cells.append((Picture(image=color_scale(_top(stage)), lines=("the scale of all maps below",)),))
    note = (
        f"{asked.sampler} at {asked.steps} steps, text {asked.text_guidance:g}, neighbours "
        f"{asked.neighbor_guidance:g}, text share {asked.text_share:g}"
    )
    return Row(prompt=explanation.record.prompt, note=note, cells=tuple(cells))


def _neighbor_row(explanation: Explanation, j: int) -> Row:
    neighbor, match = explanation.record.neighbors[j], explanation.matches[j]
    cells = [(Picture(image=neighbor.image, lines=_facts(neighbor, match)),)]
    for stage in explanation.stages:
        top, line = _top(stage), f"attention {stage.shares[j]:.0%}"
        cells.append((Picture(image=heat_map(explanation.image, stage.picture[j], top), lines=(line,)),))
        cells.append((Picture(image=heat_map(neighbor.image, stage.neighbor[j], top), lines=(line,)),))
    return Row(prompt=neighbor.caption, note=neighbor.terms, cells=tuple(cells))


def _top(stage: StageAttention) -> float:
    """The hottest place of a stage: one scale for all neighbours, so that they can be compared."""
    return float(torch.maximum(stage.picture.max(), stage.neighbor.max()))


def _facts(neighbor: Neighbor, match: Match) -> tuple[str, ...]:
    """What a neighbour is, why it was taken, and how much of a copy of it the picture is."""
    asked = [] if neighbor.part is None else [f"for {neighbor.part}"]
    components = {"clip": neighbor.clip, "bm25": neighbor.bm25}
    scores = [f"{name} {value:.2f}" for name, value in components.items() if value not in (None, neighbor.score)]
    score = ["given by hand"] if neighbor.score is None else [f"score {neighbor.score:.4f}", ", ".join(scores)]
    return (
        neighbor.id,
        *asked,
        *filter(None, score),
        f"similarity {match.similarity:.2f}",
        f"at {match.scale:.2f} of its size",
    )
