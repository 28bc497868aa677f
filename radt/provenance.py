"""What a PNG says of itself, and drawing it again from that alone (rows N1 and N3).

The PNG carries one text chunk `radt`: JSON with prompt, seed, settings, model digest, versions and neighbours, their
pixels as the network saw them included. Many or large neighbours go to a sidecar file beside the PNG instead.
"""

import base64
import binascii
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index.atomic import write_bytes
from index.config import from_dict, to_dict
from index.errors import ConfigError, ModelError, UserError
from radt.best_of import Candidate
from radt.image_to_image import InitImage
from radt.neighbors import RGB8, Neighbor, decode_image
from radt.settings import GenerateSettings

if TYPE_CHECKING:
    from PIL import Image

    from radt.pipeline import TextToImage

FORMAT = 1
CHUNK = "radt"
INLINE_LIMIT = 256 * 1024  # bytes of neighbour pixels as base64; Pillow refuses text chunks above 1 MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What drew a picture, besides the request: two equal origins on a CPU draw it the same to the last bit."""

    model: str
    model_digest: str
    radt: str
    python: str
    torch: str
    processor: str  # instruction set of the CPU kernels, or the GPU's name
    threads: int
    knowledge_base: str | None = None  # its fingerprint: the model that its vectors were made with
    snapshot: str | None = None
    compiled: bool = False  # by `--compile`, which rounds otherwise


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Everything needed to draw one picture again, given the model."""

    prompt: str
    seed: int
    settings: GenerateSettings
    origin: Origin
    neighbors: tuple[Neighbor, ...] = ()
    init: InitImage | None = None  # the picture it was drawn from
    candidates: tuple[Candidate, ...] = ()  # of `--best-of`, this picture among them
    copy_similarity: float | None = None

    @property
    def pixels(self) -> list[RGB8]:
        """The pictures that travel with it: the neighbours, then the one that it was drawn from."""
        return [*(neighbor.pixels for neighbor in self.neighbors), *([] if self.init is None else [self.init.pixels])]


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """A picture drawn again. `max_difference` is a fraction of the full range: 1/255 is one level of one channel."""

    identical: bool
    max_difference: float
    note: str | None = None  # what differs between then and now, if anything does

    @property
    def sentence(self) -> str:
        """For people."""
        because = f" ({self.note})" if self.note else ""
        if self.identical:
            return f"identical: drawn again bit for bit{because}"
        return f"not identical: pixels differ by up to {self.max_difference:.4f} of the range{because}"

    def to_json(self) -> dict[str, Any]:
        """As DESIGN fixes it, and the note."""
        return {"identical": self.identical, "max_difference": self.max_difference, "note": self.note}


def current_origin(
    *, model: str, model_digest: str, device: str, compiled: bool = False, **knowledge_base: str | None
) -> Origin:
    """What is drawing here and now."""
    import platform

    import torch

    from radt import __version__

    on_gpu = device.startswith("cuda")
    return Origin(
        model=model,
        model_digest=model_digest,
        radt=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        processor=torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        compiled=compiled,
        **knowledge_base,
    )


def save_png(path: Path, image: "Image.Image", record: Record) -> None:
    """Write the picture and its record, both files whole or not at all; a needed sidecar comes first."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    pictures = [_png_bytes(Image.fromarray(each.numpy())) for each in record.pixels]
    is_inline = sum(map(len, pictures)) * 4 / 3 <= INLINE_LIMIT
    if not is_inline:
        write_bytes(_sidecar(path), _pack(record.pixels))
    info = PngInfo()
    info.add_itxt(CHUNK, json.dumps(_to_json(record, pictures if is_inline else None)), zip=True)
    write_bytes(path, _png_bytes(image, info))


def read_png(path: Path) -> tuple["Image.Image", Record]:
    """The picture and its record. A UserError says why a file has none."""
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    image = decode_image(path.read_bytes(), str(path))
    text = image.info.get(CHUNK)
    if text is None:
        raise UserError(f"{str(path)!r} carries no record of how it was drawn: name a PNG of `radt generate`")
    try:
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise UserError(
                f"{str(path)!r} has record format {values['format']!r}, this radt reads {FORMAT}: update it"
            )
        return image.convert("RGB"), _from_json(values, path)
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise UserError(f"the record inside {str(path)!r} is damaged ({error!r}): it cannot be read") from error


def replay(path: Path, model: str | Path | None = None) -> Replay:
    """Draw the picture of a PNG again from its own record and compare, on a CPU with as many threads as then."""
    import torch

    image, record = read_png(path)
    pipeline = load_drawer(path, record, model)
    with _threads(record.origin.threads):
        again = pipeline.draw(
            record.prompt, record.neighbors, settings=record.settings, seeds=[record.seed], init=record.init
        )[0]
        now_origin = pipeline.origin()
    before = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    if before.shape != again.shape:
        drawn = f"{again.shape[1]}x{again.shape[0]}"
        raise UserError(f"{str(path)!r} is {image.width}x{image.height} and was drawn {drawn}: it was resized since")
    difference = int((before.int() - again.int()).abs().max())
    return Replay(identical=difference == 0, max_difference=difference / 255, note=_changes(record, now_origin))


def load_drawer(path: Path, record: Record, model: str | Path | None = None) -> "TextToImage":
    """The model that drew a picture, on a CPU. A ModelError when `model` (None: the demonstration model) is another."""
    from radt.pipeline import TextToImage

    pipeline = TextToImage.load(model, device="cpu")
    if pipeline.digest != record.origin.model_digest:
        was, now = f"{record.origin.model} ({record.origin.model_digest})", f"{pipeline.name} ({pipeline.digest})"
        raise ModelError(f"{str(path)!r} was drawn by model {was}, and this is {now}: name the other with --model")
    return pipeline


def _changes(record: Record, now: Origin) -> str | None:
    """In words, what is not as it was when the picture was made and may move its last bits."""
    names = ("radt", "torch", "processor")
    parts = [
        f"{name} was {getattr(record.origin, name)} and is {getattr(now, name)}"
        for name in names
        if getattr(record.origin, name) != getattr(now, name)
    ]
    if record.origin.compiled and not now.compiled:
        parts.append("its networks were compiled")
    if record.settings.batch_size > 1:
        parts.append(f"it was made in batches of {record.settings.batch_size}")
    return "; ".join(parts) or None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Sums are split by thread, so that the last bits depend on how many there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _to_json(record: Record, pictures: Sequence[bytes] | None) -> dict[str, Any]:
    neighbors = [neighbor.to_json() for neighbor in record.neighbors]
    init = None if record.init is None else {"name": record.init.name}
    if pictures is not None:
        for values, picture in zip([*neighbors, *([init] if init else [])], pictures, strict=True):
            values["png"] = base64.b64encode(picture).decode("ascii")
    return {
        "format": FORMAT,
        "prompt": record.prompt,
        "seed": record.seed,
        "settings": to_dict(record.settings),
        "origin": to_dict(record.origin),
        "neighbors": neighbors,
        "neighbors_inline": pictures is not None,
        "init": init,
        "candidates": [to_dict(each) for each in record.candidates],
        "copy_similarity": record.copy_similarity,
    }


def _from_json(values: Mapping[str, Any], path: Path) -> Record:
    from radt.neighbors import to_rgb8

    init = values.get("init")
    carried = [*values["neighbors"], *([init] if init else [])]
    if values["neighbors_inline"]:
        images = [decode_image(_unbase64(each["png"]), f"a neighbour inside {path}") for each in carried]
        pixels = [to_rgb8(image, (image.height, image.width)) for image in images]
    else:
        pixels = _unpack(_sidecar(path), len(carried))
    neighbors = [
        Neighbor(pixels=picture, **{name: value for name, value in each.items() if name != "png"})
        for each, picture in zip(values["neighbors"], pixels, strict=False)  # the last may be the one drawn from
    ]
    return Record(
        prompt=str(values["prompt"]),
        seed=int(values["seed"]),
        settings=from_dict(GenerateSettings, values["settings"]),
        origin=from_dict(Origin, values["origin"]),
        neighbors=tuple(neighbors),
        init=InitImage(name=str(init["name"]), pixels=pixels[-1]) if init else None,
        candidates=tuple(from_dict(Candidate, each) for each in values.get("candidates", ())),
        copy_similarity=values["copy_similarity"],
    )


def _unbase64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("a neighbour's pixels are not base64") from error


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.neighbors.safetensors")


def _pack(pictures: Sequence[RGB8]) -> bytes:
    from safetensors.torch import save

    return save({str(place): picture.contiguous() for place, picture in enumerate(pictures)})


def _unpack(path: Path, count: int) -> list[RGB8]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        return [tensors[str(place)] for place in range(count)]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"the neighbours of this picture lie in {str(path)!r}, which is missing or damaged") from error


def _png_bytes(image: "Image.Image", info: Any = None) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
