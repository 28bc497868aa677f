"""Retrieved pairs, and pictures a user brings, as the tensors a network reads (rows R7, N1).

Next on the main path: `radt/unet/unet.py`, whose `project_neighbors` turns the batch into keys and values.
"""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, Real, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from index.embedder import IMAGE_FORMATS, MAX_PIXELS, to_8_bits
from index.errors import CorpusError, QueryError
from index.images import read_images
from radt.attribution import license_of, url_of
from radt.conditioning import NeighborBatch, TextCondition
from radt.resizing import Size
from radt.shapes import NeighborPixels

if TYPE_CHECKING:
    from index.records import Hit

CANVAS_PIXELS = 4096 * 4096  # a picture whose bars would make more, and more than twice its own, is first made smaller

RGB8 = UInt8[Tensor, "h w 3"]


@runtime_checkable  # beartype asks, in the tests
class TextEncoder(Protocol):
    """What turns prompts and captions into conditions (`radt/text_encoder.py`)."""

    def encode(self, texts: Sequence[str]) -> TextCondition:
        """One row a text."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A picture and its caption, brought by hand instead of retrieved."""

    image: Image.Image
    caption: str
    name: str = "reference"


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbor:
    """One pair that a picture was drawn from. `id` is the knowledge base's, or `reference:NAME` for one of the user's.

    `pixels` is what the model's last stage saw, at its own resolution; earlier stages see it smaller. `original`, for
    people to look at, is not saved with a picture. The scores are None for a reference, and where not asked; `part` is
    the thing of a decomposed prompt that it was found for; `url` is where the pair says that it came from, `uri` where
    its file lies; `attention` is the share that one picture paid, `similarity` how like this neighbour it came out.
    """

    id: str
    caption: str
    pixels: RGB8 = field(repr=False)
    score: float | None = None
    clip: float | None = None
    bm25: float | None = None
    part: str | None = None
    dataset: str | None = None
    license: str | None = None
    url: str | None = None
    uri: str | None = None
    attention: float | None = None
    similarity: float | None = None
    original: Image.Image | None = field(default=None, repr=False)

    @property
    def image(self) -> Image.Image:
        """The picture as the network saw it."""
        return Image.fromarray(self.pixels.numpy())

    def at(self, size: Size) -> RGB8:
        """Its pixels as a stage of another size sees them."""
        return self.pixels if self.pixels.shape[:2] == size else to_rgb8(self.image, size)

    @property
    def terms(self) -> str:
        """Its licence and its source, for people."""
        return f"licence {self.license or 'unknown'}; source {self.url or 'unknown'}"

    def to_json(self) -> dict[str, Any]:
        """Everything but the pixels."""
        kept = ("id", "caption", "score", "clip", "bm25", "part", "dataset", "license", "url", "uri")
        return {name: getattr(self, name) for name in (*kept, "attention", "similarity")}


def with_pictures_of(neighbors: Sequence[Neighbor], others: Sequence[Neighbor]) -> list[Reference]:
    """The pictures of `others` under the captions of `neighbors`, in pairs: tells pictures from words."""
    return [
        Reference(image=other.original or other.image, caption=own.caption, name=f"swapped-{place}")
        for place, (own, other) in enumerate(zip(neighbors, others, strict=False))
    ]


def neighbors_of(hits: Iterable["Hit"], references: Iterable[Reference], size: Size) -> list[Neighbor]:
    """The user's references first, then the hits by rank, each resized to `size`."""
    hits = list(hits)
    encoded = read_images([hit.image for hit in hits])
    own = [_from_reference(reference, size) for reference in references]
    return own + [_from_hit(hit, content, size) for hit, content in zip(hits, encoded, strict=True)]


def _from_reference(reference: Reference, size: Size) -> Neighbor:
    return Neighbor(
        id=f"reference:{reference.name}",
        caption=reference.caption,
        pixels=to_rgb8(reference.image, size),
        original=reference.image,
    )


def _from_hit(hit: "Hit", encoded: bytes, size: Size) -> Neighbor:
    image = decode_image(encoded, f"the image of pair {hit.id}")
    return Neighbor(
        id=str(hit.id),
        caption=hit.caption,
        pixels=to_rgb8(image, size),
        score=hit.score,
        clip=hit.clip,
        bm25=hit.bm25,
        part=hit.part,
        dataset=hit.dataset,
        license=license_of(hit.metadata),
        url=url_of(hit.metadata),
        uri=hit.image.uri,
        original=image,
    )


def read_reference(text: str) -> Reference:
    """`IMG=CAPTION` from the command line. The caption may hold further equals signs; the path may not."""
    path, separator, caption = text.partition("=")
    if not separator or not caption.strip():
        raise QueryError(f"a reference is IMAGE=CAPTION, got {text!r}; say in words what the picture shows")
    if not Path(path).is_file():
        raise QueryError(f"there is no image file at {path!r} (from --reference {text!r})")
    return Reference(image=decode_image(Path(path).read_bytes(), path), caption=caption.strip(), name=Path(path).name)


def decode_image(encoded: bytes, name: str) -> Image.Image:
    """Decode an image and turn it upright, transparency kept. A broken or a far too large one is a CorpusError."""
    try:
        with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise CorpusError(f"{name} is {image.width}x{image.height}: more than {MAX_PIXELS} pixels are refused")
            image.load()
            return to_8_bits(ImageOps.exif_transpose(image))
    except CorpusError:
        raise
    except Exception as error:  # a decoder on a hostile file may raise anything, and it is always the file's fault
        raise CorpusError(f"{name} cannot be read as an image: replace it or leave it out") from error


def to_rgb8(image: Image.Image, size: Size) -> RGB8:
    """Fit an image into a height and width: transparency over white, white bars where its shape is another, Lanczos."""
    height, width = size
    rgba = image.convert("RGBA")
    canvas_width, canvas_height = _canvas_size(rgba, size)
    shrink = math.sqrt(max(CANVAS_PIXELS, 2 * rgba.width * rgba.height) / (canvas_width * canvas_height))
    if shrink < 1:
        smaller = max(1, round(rgba.width * shrink)), max(1, round(rgba.height * shrink))
        rgba = rgba.resize(smaller, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", _canvas_size(rgba, size), "white")
    canvas.alpha_composite(rgba, ((canvas.width - rgba.width) // 2, (canvas.height - rgba.height) // 2))
    small = canvas.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return rearrange(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8), "(h w c) -> h w c", h=height, c=3)


def _canvas_size(image: Image.Image, size: Size) -> tuple[int, int]:
    """Width and height of the smallest canvas of the proportions of `size` that holds an image."""
    height, width = size
    scale = max(image.height / height, image.width / width)
    return max(image.width, round(width * scale)), max(image.height, round(height * scale))


def to_pixels(rgb: Real[Tensor, "*b h w 3"]) -> Float[Tensor, "*b 3 h w"]:
    """Colour from 0 to 255, in bytes or between them where layers were laid over one another, to [-1, 1]."""
    return rearrange(rgb.float() / 127.5 - 1, "... h w c -> ... c h w")


def from_pixels(pixels: Float[Tensor, "*b 3 h w"]) -> UInt8[Tensor, "*b h w 3"]:
    """[-1, 1] to 8-bit colour, rounded to nearest; the inverse of `to_pixels`."""
    levels = (pixels.clamp(-1, 1) + 1) * 127.5
    return rearrange(levels.round().to(torch.uint8), "... c h w -> ... h w c").cpu()


def make_batches(
    rows: Sequence[Sequence[Neighbor]], encoder: TextEncoder, sizes: Sequence[Size]
) -> list[NeighborBatch] | None:
    """One row of neighbours an example, at each of the sizes; the captions are encoded once.

    Shorter rows are padded and masked; None when nobody has a neighbour.
    """
    k = max((len(row) for row in rows), default=0)
    if k == 0:
        return None
    mask = torch.tensor([[place < len(row) for place in range(k)] for row in rows])
    captions = [row[place].caption if place < len(row) else "" for row in rows for place in range(k)]
    text = _unflatten(encoder.encode(captions), k).drop(~mask)
    return [NeighborBatch(pixels=_stack(rows, k, size), text=text, mask=mask) for size in sizes]


def _stack(rows: Sequence[Sequence[Neighbor]], k: int, size: Size) -> NeighborPixels:
    blank = torch.full((*size, 3), 255, dtype=torch.uint8)
    pixels = [[*[neighbor.at(size) for neighbor in row], *[blank] * (k - len(row))] for row in rows]
    return to_pixels(torch.stack([torch.stack(row) for row in pixels]))


def _unflatten(text: TextCondition, k: int) -> TextCondition:
    return TextCondition(
        tokens=rearrange(text.tokens, "(b k) n d -> b k n d", k=k),
        mask=rearrange(text.mask, "(b k) n -> b k n", k=k),
        pooled=rearrange(text.pooled, "(b k) p -> b k p", k=k),
    )
