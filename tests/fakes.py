"""Stand-ins that are cheap and deterministic: an embedder that hashes, and small corpora drawn in memory."""

import io
import json
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from index.ingest.shards import Sample, Shard
from index.records import ImageLocation, Pair

# As in pyproject.toml. Where there is a wheel, a ScaNN that does not import is a failure and no reason to skip.
needs_scann = pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info >= (3, 14), reason="ScaNN has wheels for Linux and Python below 3.14"
)

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "brown", "pink", "gray", "black")
SHAPES = ("circle", "square", "triangle")


class HashEmbedder:
    """Unit vectors from the words of a text, or from the pixels of an image: equal input, equal vector.

    Texts that share words are near each other; a text and an image have nothing to do with one another.
    """

    def __init__(self, *, dim: int = 32, salt: str = ""):
        self.name = f"hash-{dim}{salt}"
        self.dim = dim
        self.fingerprint = blake2b(self.name.encode(), digest_size=16).hexdigest()

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return self._unit([sum((self._word(w) for w in text.split()), np.zeros(self.dim)) for text in texts])

    def images(self, images: Sequence[PIL.Image.Image]) -> np.ndarray:
        return self.embed([self.prepare(image) for image in images])

    def prepare(self, image: PIL.Image.Image) -> np.ndarray:
        return np.asarray(image.convert("RGB").resize((8, 8)), np.float32).transpose(2, 0, 1) / 255

    def embed(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        return self._unit([self._word(pixels.tobytes().hex()) for pixels in prepared])

    def image_side(self) -> int | None:
        return None

    def batch_rows(self) -> int:
        return 64

    def _word(self, word: str) -> np.ndarray:
        seed = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "big")
        return np.random.default_rng(seed).normal(size=self.dim)

    def _unit(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        vectors = np.array(rows, np.float32).reshape(len(rows), self.dim)
        with np.errstate(invalid="ignore"):
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def caption_of(number: int) -> str:
    """The caption of the picture `draw(number)`."""
    color, shape = COLORS[number % len(COLORS)], SHAPES[number // len(COLORS) % len(SHAPES)]
    return f"a {color} {shape} number {number}"


def draw(number: int, *, size: int = 32) -> PIL.Image.Image:
    """A small picture; every number has its own."""
    color, shape = COLORS[number % len(COLORS)], SHAPES[number // len(COLORS) % len(SHAPES)]
    image = PIL.Image.new("RGB", (size, size), "white")
    pen = PIL.ImageDraw.Draw(image)
    box = (4, 4, size - 5, size - 5)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    else:
        pen.polygon([(size // 2, 4), (4, size - 5), (size - 5, size - 5)], fill=color)
    pen.point([(i, 0) for i in range(size) if number >> i & 1], fill="black")
    return image


def encode(image: PIL.Image.Image, kind: str = "PNG") -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def sample(number: int, *, key: str | None = None) -> dict[str, bytes]:
    """One img2dataset sample: file name in the tar -> content."""
    key = key or f"{number:09d}"
    metadata = {"caption": caption_of(number), "url": f"https://example.org/{number}.png", "key": key}
    return {
        f"{key}.png": encode(draw(number)),
        f"{key}.txt": caption_of(number).encode(),
        f"{key}.json": json.dumps({**metadata, "status": "success", "width": 32, "height": 32}).encode(),
    }


def write_tar(path: Path, members: Sequence[tuple[str, bytes]] | Mapping[str, bytes]) -> None:
    """A tar of these files, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_img2dataset(folder: Path, *, shards: int = 2, per_shard: int = 6) -> int:
    """What `img2dataset --output_format webdataset` leaves: tars and stats. The number of pairs."""
    for shard in range(shards):
        members: dict[str, bytes] = {}
        for i in range(per_shard):
            members |= sample(shard * per_shard + i)
        write_tar(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": per_shard, "successes": per_shard}))
    return shards * per_shard


PLACE = ImageLocation(uri="/data/0.tar", offset=512, size=10)


class InMemory:
    """The contents of a shard: what an iterator yields, once."""

    def __init__(self, samples: Iterable[Sample]):
        self._samples = samples

    def samples(self, shard: Shard) -> Iterator[Sample]:
        yield from self._samples


def shard_of(name: str, samples: Iterable[Sample]) -> Shard:
    """A shard that lies nowhere."""
    return Shard(
        dataset="d", source="/data", name=name, layout="webdataset tars", fs=None, files={}, contents=InMemory(samples)
    )


def pairs_of(shard: str, count: int) -> list[Pair]:
    """The first pictures with their captions, as a reader yields them."""
    return [
        Pair(
            dataset="d",
            shard=shard,
            key=f"{number:05d}",
            caption=caption_of(number),
            image=PLACE,
            encoded=encode(draw(number)),
        )
        for number in range(count)
    ]


@cache
def photo(width: int, height: int, *, seed: int = 0) -> PIL.Image.Image:
    """Smooth shapes with some grain, so that resampling has something to do."""
    random = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), PIL.Image.Resampling.BICUBIC), np.float32)
    grain = random.normal(scale=6, size=smooth.shape)
    return PIL.Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
