"""The shared vocabulary: Pair goes in, Hit comes out, and the id that ties a pair to its vector for ever."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLocation:
    """Where the encoded image lies: a byte range of a tar shard, a whole file (`offset` None), or a cell of a table.

    Cells are `PATH.parquet#COLUMN/ROW`, `PATH.lance#COLUMN/ROW` and, for a copy that the knowledge base keeps,
    `pairs.lance#image/id=ID`. `uri` is empty when no image is known, only its vector. `origin` is the source of the
    pair, or what else vouches for the host of a `uri` that is neither here nor in a bucket.
    """

    uri: str
    offset: int | None = None
    size: int | None = None
    origin: str = field(default="", repr=False, compare=False)

    def read(self) -> bytes:
        """Read the encoded bytes, from a bucket as from a folder. ImageError when they are not there (any more)."""
        from index.images import read_images

        return read_images([self])[0]

    def to_json(self) -> dict[str, Any]:
        """As DESIGN fixes it: `uri`, `offset`, `size`."""
        return {"uri": self.uri, "offset": self.offset, "size": self.size}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One image with one caption, as a reader yields it. `encoded` is the image file's bytes.

    A pair that brings its `vector`, of unit norm and the knowledge base's own model, is not embedded again; it may
    come without image bytes.
    """

    dataset: str
    shard: str
    key: str
    caption: str
    image: ImageLocation
    encoded: bytes | None = field(repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    vector: "np.ndarray | None" = field(default=None, repr=False)

    @property
    def id(self) -> int:
        """The stable id of this pair (see `pair_id`)."""
        return pair_id(self.dataset, self.shard, self.key)


def shard_title(shard: str) -> str:
    """A shard as people are told of it: the images at the top of a source are the shard ".", which says nothing."""
    return "(top folder)" if shard == "." else shard


@dataclass(frozen=True, kw_only=True, slots=True)
class BadSample:
    """A sample that cannot be used, and why. `offset` is its byte position in a tar shard, None elsewhere."""

    shard: str
    key: str
    offset: int | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """A ledger entry: shard `shard` of `dataset` is in the store, whole, as it was when `digest` was taken.

    `stamp` (names, sizes and times of its files) says cheaply that nothing changed; `digest` (their content) decides.
    """

    dataset: str
    source: str
    shard: str
    digest: str
    stamp: str
    pairs: int
    bad: int
    bytes: int
    layout: str = ""  # of its source, as the reader names it; empty in a ledger of format 1
    foreign_dim: int = 0  # of vectors it brings that are not of the model's width: their images were embedded again


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredPair:
    """One row of the store: a pair, what was measured of its image, and, on request, its unit vector, float32 [d].

    `dhash` is the 64-bit difference hash of the image (9 by 8 grey pixels) as a signed number. `image_bytes` is the
    copy to keep in the knowledge base, written and not read back here: `image` then says where it lies.
    """

    id: int
    dataset: str
    source: str
    shard: str
    digest: str
    key: str
    caption: str
    image: ImageLocation
    sha256: str | None
    width: int | None
    height: int | None
    dhash: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    vector: "np.ndarray | None" = field(default=None, repr=False)
    image_bytes: bytes | None = field(default=None, repr=False)
    thumbnail: bytes | None = field(default=None, repr=False)  # JPEG


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownPair:
    """Of one row of the store what a hit shows: half as much to read as a `StoredPair`."""

    id: int
    dataset: str
    caption: str
    image: ImageLocation
    sha256: str | None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One retrieved pair. `clip` and `bm25` are the raw component scores; None means not asked for."""

    id: int
    rank: int
    score: float
    clip: float | None
    bm25: float | None
    caption: str
    dataset: str
    image: ImageLocation
    metadata: Mapping[str, Any] = field(default_factory=dict)
    kb: str | None = None  # where it was found, when several knowledge bases were searched
    part: str | None = None  # what it answers, when the prompt was decomposed

    def open_image(self) -> "PIL.Image.Image":
        """Decode the image as RGB."""
        import PIL.Image

        return PIL.Image.open(io.BytesIO(self.image.read())).convert("RGB")

    def to_json(self) -> dict[str, Any]:
        """A JSON object; the id is a decimal string because JSON numbers lose bits above 2**53."""
        return {
            "id": str(self.id),
            "rank": self.rank,
            "score": self.score,
            "clip": self.clip,
            "bm25": self.bm25,
            "caption": self.caption,
            "dataset": self.dataset,
            "image": self.image.to_json(),
            "metadata": dict(self.metadata),
            **({"kb": self.kb} if self.kb is not None else {}),
            **({"part": self.part} if self.part is not None else {}),
        }


def pair_id(dataset: str, shard: str, key: str) -> int:
    """63 bits of blake2b over (dataset, shard path relative to its source, key): fits Arrow int64, never negative."""
    text = json.dumps([dataset, shard, key], ensure_ascii=False)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def table_schema(dim: int) -> "pa.Schema":
    """Arrow schema of the one table of a knowledge base.

    `kind` says what a row is: a `pair`; a `shard`, the ledger entry that landed in the same commit as its pairs; a
    `bad` sample; or a `removed` pair, of which only the id stays, so that a later build does not bring it back.
    """
    import pyarrow as pa

    return pa.schema([
        pa.field("kind", pa.string(), nullable=False),
        pa.field("id", pa.int64()),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("shard_digest", pa.string()),
        pa.field("key", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("image_uri", pa.string()),
        pa.field("image_offset", pa.int64()),
        pa.field("image_size", pa.int64()),
        pa.field("image_sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("metadata", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("vector", pa.list_(pa.float32(), dim)),
        pa.field("dhash", pa.int64()),  # from here on: since format 2, see `PairStore.add_missing_columns`
        pa.field("image", pa.large_binary()),
        pa.field("thumbnail", pa.binary()),
    ])
