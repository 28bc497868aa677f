"""Where a picture comes from: what it looked at in each neighbour, and from where (row N1).

A PNG of `radt generate` carries its neighbours, so this needs the PNG and the model, and no knowledge base. Attention
is measured in calls of its own, after the fact: the finished picture is noised to a few times of the schedule, and
every stage is asked once at each. Next: `radt/explain_sheet.py` draws what is found.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from index.errors import UserError
from radt.cascade import Stage, augment, stage_generator
from radt.conditioning import Condition
from radt.copying import Match, best_match
from radt.diffusion.samplers import draw_noise
from radt.neighbors import to_pixels, to_rgb8
from radt.provenance import Record, load_drawer, read_png
from radt.resizing import Size, resize
from radt.shapes import Pixels
from radt.sheet import sheet_paths

if TYPE_CHECKING:
    from radt.pipeline import TextToImage

TIMES = (0.2, 0.5, 0.8)  # of the noise schedule, 0 clean and 1 noise: details, shapes, layout; averaged
GRID = 8  # cells a side of the maps in the JSON

Maps = Float[Tensor, "k _h _w"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StageAttention:
    """What one stage looked at, mean over its neighbour layers, their heads, and TIMES; maps are of the stage's size.

    `picture` is the share of each pixel's attention that a neighbour got. `neighbor` is the attention that fell on each
    pixel of it, as a multiple of one picture's pixel's whole attention. The mean of either is the neighbour's share.
    """

    name: str
    picture: Maps
    neighbor: Maps

    @property
    def size(self) -> Size:
        """Height and width of the stage's pictures."""
        return self.picture.shape[1], self.picture.shape[2]

    @property
    def shares(self) -> list[float]:
        """Of each neighbour; they sum to at most 1, and the rest is attention that no neighbour earned."""
        return self.picture.mean(dim=(1, 2)).tolist()

    def to_json(self) -> dict[str, Any]:
        """Shares, and both maps as rows of GRID x GRID cells whose mean is the share."""
        shares = [round(share, 4) for share in self.shares]
        return {
            "name": self.name,
            "size": list(self.size),
            "unclaimed": round(1 - sum(self.shares), 4),
            "neighbors": [
                {"attention": share, "picture": _cells(picture), "neighbor": _cells(neighbor)}
                for share, picture, neighbor in zip(shares, self.picture, self.neighbor, strict=True)
            ],
        }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Explanation:
    """A picture, its record, what every stage looked at, and where each neighbour fits the picture best."""

    path: Path
    image: Image.Image
    record: Record
    stages: tuple[StageAttention, ...]
    matches: tuple[Match, ...]

    @property
    def copy_similarity(self) -> float:
        """To the neighbour that it is most like."""
        return max(match.similarity for match in self.matches)

    def to_json(self) -> dict[str, Any]:
        """The document that `radt explain --json` prints."""
        neighbors = [
            {**neighbor.to_json(), "copy": match.to_json()}
            for neighbor, match in zip(self.record.neighbors, self.matches, strict=True)
        ]
        return {
            "path": str(self.path),
            "prompt": self.record.prompt,
            "seed": self.record.seed,
            "model": self.record.origin.model,
            "copy_similarity": self.copy_similarity,
            "times": list(TIMES),
            "neighbors": neighbors,
            "stages": [stage.to_json() for stage in self.stages],
        }


def lines(explanation: Explanation) -> Iterator[str]:
    """For the terminal: each neighbour's attention at every stage, likeness, caption, licence and source."""
    record = explanation.record
    yield f"{record.prompt}: seed {record.seed}, copy similarity {explanation.copy_similarity:.2f}"
    for j, (neighbor, match) in enumerate(zip(record.neighbors, explanation.matches, strict=True)):
        paid = ", ".join(f"{stage.shares[j]:.0%} at {stage.size[0]}x{stage.size[1]}" for stage in explanation.stages)
        likeness = f"similarity {match.similarity:.2f} at {match.scale:.2f} of its size"
        yield f"  {neighbor.id:>20}  attention {paid}  {likeness}  {neighbor.caption}"
        yield f"  {'':>20}  {neighbor.terms}"


def check_sheet(path: Path, out: Path) -> None:
    """Refuse to write a sheet over the picture that it explains."""
    for written in sheet_paths(out):
        if written.resolve() == path.resolve():
            raise UserError(f"the sheet would be written over {str(path)!r} itself: give --out another name")


def explain_file(path: Path, model: str | Path | None = None) -> Explanation:
    """Explain a PNG by the model that drew it. A UserError when it carries no record, or has no neighbours."""
    image, record = read_png(path)
    if not record.neighbors:
        raise UserError(f"{str(path)!r} was drawn from the text alone: it has no neighbours to explain")
    pipeline = load_drawer(path, record, model)
    picture = to_rgb8(image, (image.height, image.width))
    return Explanation(
        path=path,
        image=image,
        record=record,
        stages=tuple(attention_of(pipeline, record, to_pixels(picture)[None])),
        matches=tuple(best_match(picture, neighbor.at((image.height, image.width))) for neighbor in record.neighbors),
    )


@torch.inference_mode()
def attention_of(pipeline: "TextToImage", record: Record, picture: Pixels) -> list[StageAttention]:
    """What every stage of a request looks at in a picture, shape [1, 3, h, w] of any size."""
    settings = record.settings
    stages = pipeline.cascade.of(settings)
    conditions = pipeline.encode(record.prompt, record.neighbors, settings=settings)
    explained = []
    for number, (stage, condition) in enumerate(zip(stages, conditions, strict=True)):
        generator = stage_generator(record.seed, number)
        if number:
            below = resize(resize(picture, stages[number - 1].size), stage.size)
            low_res = augment(below, settings.augmentation_level, schedule=stage.info.schedule, generators=[generator])
            condition = replace(condition, low_res=low_res)
        explained.append(stage_attention(stage, condition, resize(picture, stage.size), generator=generator))
    return explained


def stage_attention(
    stage: Stage, condition: Condition, x0: Pixels, *, generator: torch.Generator, times: Sequence[float] = TIMES
) -> StageAttention:
    """What one stage looks at in a picture of its own size, shape [1, 3, h, w], averaged over `times`."""
    assert condition.neighbors is not None, "there are neighbours to look at"
    pictures, neighbors = [], []
    for time in times:
        t = torch.full((1,), time, device=x0.device)
        x = stage.info.schedule.add_noise(x0, draw_noise(x0, [generator]), t)
        for maps in stage.unet.attention_maps(x, t, condition.text, condition.neighbors, low_res=condition.low_res):
            pictures.append(_spread(maps.picture[0], stage.size))
            neighbors.append(_spread(maps.neighbor[0] * maps.neighbor[0, 0].numel(), stage.size))
    if not pictures:
        raise UserError(f"stage {stage.info.name!r} of this model never looks at neighbours")
    return StageAttention(
        name=stage.info.name,
        picture=torch.stack(pictures).mean(dim=0).cpu(),
        neighbor=torch.stack(neighbors).mean(dim=0).cpu(),
    )


def _spread(maps: Maps, size: Size) -> Maps:
    """Each position over the pixels around it. Levels differ by even factors, by which this keeps the mean."""
    spread: Tensor = interpolate(maps[None], size=size, mode="bilinear", align_corners=False)
    return spread[0]


def _cells(values: Float[Tensor, "h w"]) -> list[list[float]]:
    """Means over GRID x GRID cells, rounded."""
    rows: list[list[float]] = adaptive_avg_pool2d(values[None], GRID)[0].tolist()
    return [[round(value, 4) for value in row] for row in rows]
