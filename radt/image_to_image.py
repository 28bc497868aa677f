"""From a picture to a picture: SDEdit (Meng et al. 2022, "SDEdit: Guided image synthesis and editing", section 3).

The picture is noised to a time of the schedule, its `strength`, and denoised from there: towards 0 it comes back as it
was, at 1 nothing of it is left. In a cascade every stage starts so that is not larger than the picture; a larger stage
has no detail of it to keep, and draws over the stage below as ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from index.errors import QueryError
from radt.diffusion.schedule import NoiseSchedule
from radt.neighbors import RGB8, decode_image, to_pixels, to_rgb8
from radt.resizing import Size, resize
from radt.shapes import Pixels

Start = Float[Tensor, "#b c h w"]  # one picture for all rows, or one a row


@dataclass(frozen=True, kw_only=True, slots=True)
class InitImage:
    """The picture to start from, at the size of the largest stage that is not larger than what was given."""

    name: str
    pixels: RGB8 = field(repr=False)

    @property
    def image(self) -> Image.Image:
        """The picture as the networks start from it."""
        return Image.fromarray(self.pixels.numpy())

    def at(self, size: Size) -> Pixels | None:
        """One picture [1 3 h w] for a stage of this size, or None where the stage is larger and starts from noise."""
        if size[0] > self.pixels.shape[0] or size[1] > self.pixels.shape[1]:
            return None
        return resize(to_pixels(self.pixels)[None], size)


def read_init_image(path: str | Path, sizes: Sequence[Size]) -> InitImage:
    """Read a file for stages of these sizes, smallest first. A QueryError or CorpusError says what is wrong with it."""
    if not Path(path).is_file():
        raise QueryError(f"there is no image file at {str(path)!r} (from --init-image)")
    return make_init_image(decode_image(Path(path).read_bytes(), str(path)), sizes, name=Path(path).name)


def make_init_image(image: Image.Image, sizes: Sequence[Size], *, name: str = "image") -> InitImage:
    """A picture cropped about its middle to the stages' shape; one smaller than all of them is enlarged to the first.

    What is transparent lies over white, as in the pictures that networks are trained on.
    """
    fitting = [(height, width) for height, width in sizes if height <= image.height and width <= image.width]
    height, width = fitting[-1] if fitting else sizes[0]
    cropped = ImageOps.fit(image.convert("RGBA"), (width, height), Image.Resampling.LANCZOS)
    return InitImage(name=name, pixels=to_rgb8(cropped, (height, width)))


def starting_point(
    init: Start | None, noise: Pixels, *, strength: float, schedule: NoiseSchedule
) -> tuple[Pixels, float]:
    """x_t and the time t that a sampler begins at: the noise at t = 1, or the picture noised to t = `strength`."""
    if init is None:
        return noise, 1.0
    times = torch.full((len(noise),), strength, device=noise.device)
    return schedule.add_noise(init.to(noise.device).expand_as(noise), noise, times), strength
