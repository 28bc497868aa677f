"""The decoding stage: from a sample as a reader yields it to what the network takes and the store keeps."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np

from index.embedder import Embedder, Prepared, decode_scaled, image_size
from index.errors import ConfigError, CorpusError
from index.images import difference_hash, thumbnail_of
from index.ingest.shards import Sample
from index.records import BadSample, Pair

CHUNK_SAMPLES = 16  # decoded by one thread at a time: handing over a single small image costs more than to decode it
CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepImages:
    """What is kept of the images beside their vectors: copies of the files, JPEGs of at most `thumbnail` pixels."""

    copy: bool = False
    thumbnail: int | None = None

    def __post_init__(self) -> None:
        if self.thumbnail is not None and self.thumbnail < 1:
            raise ConfigError(f"a thumbnail has at least 1 pixel, got {self.thumbnail}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """A good sample: `prepared` for the network, or with the `vector` that it brought, and what was measured of it."""

    pair: Pair  # without its bytes
    prepared: Prepared | None
    vector: np.ndarray | None
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    dhash: int | None = None
    copy: bytes | None = None
    thumbnail: bytes | None = None
    foreign_dim: int = 0  # numbers of the vector it brought, where that was of another width than the model's


def chunks(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Samples in groups worth a thread's while, in order; a group may exceed `CHUNK_BYTES` by one image."""
    chunk: list[Sample] = []
    held = 0
    for sample in samples:
        chunk.append(sample)
        held += len(sample.encoded or b"") if isinstance(sample, Pair) else 0
        if len(chunk) >= CHUNK_SAMPLES or held >= CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def decode_chunk(samples: Sequence[Sample], embedder: Embedder, keep: KeepImages) -> list[Decoded | BadSample]:
    """Each of them decoded, or why it cannot be."""
    return [sample if isinstance(sample, BadSample) else _decode(sample, embedder, keep) for sample in samples]


def _decode(pair: Pair, embedder: Embedder, keep: KeepImages) -> Decoded | BadSample:
    if pair.vector is not None and pair.vector.shape != (embedder.dim,):
        if pair.encoded is None:
            return bad(pair, f"its vector has {pair.vector.size} numbers, the model's have {embedder.dim}")
        again = _decode(replace(pair, vector=None), embedder, keep)  # another model's: the image is embedded again
        return again if isinstance(again, BadSample) else replace(again, foreign_dim=pair.vector.size)
    try:
        if pair.encoded is None:
            return _without_image(pair)
        if pair.vector is not None and keep.thumbnail is None:
            return _with_vector(pair, pair.encoded, keep)
        return _with_image(pair, pair.encoded, embedder, keep)
    except CorpusError as error:
        return bad(pair, str(error))


def _without_image(pair: Pair) -> Decoded | BadSample:
    if pair.vector is None:
        return bad(pair, "there is neither an image nor a vector")
    return Decoded(pair=pair, prepared=None, vector=pair.vector)


def _with_vector(pair: Pair, encoded: bytes, keep: KeepImages) -> Decoded:
    """Nothing has to be embedded, so the image is not decoded; its header tells the size."""
    width, height = image_size(encoded)
    return Decoded(
        pair=replace(pair, encoded=None),
        prepared=None,
        vector=pair.vector,
        sha256=sha256(encoded).hexdigest(),
        width=width,
        height=height,
        copy=encoded if keep.copy else None,
    )


def _with_image(pair: Pair, encoded: bytes, embedder: Embedder, keep: KeepImages) -> Decoded:
    image, (width, height) = decode_scaled(encoded, side=_side(embedder, keep))
    return Decoded(
        pair=replace(pair, encoded=None),
        prepared=None if pair.vector is not None else embedder.prepare(image),
        vector=pair.vector,
        sha256=sha256(encoded).hexdigest(),
        width=width,
        height=height,
        dhash=difference_hash(image),
        copy=encoded if keep.copy else None,
        thumbnail=None if keep.thumbnail is None else thumbnail_of(image, keep.thumbnail),
    )


def _side(embedder: Embedder, keep: KeepImages) -> int | None:
    """How many pixels are needed of an image, for the network and for the thumbnail."""
    side = embedder.image_side()
    return None if side is None else max(side, keep.thumbnail or 0)


def foreign_vectors(width: int | str, *, model: str, dim: int) -> str:
    """What is to be said of a source whose vectors are not of the model's width."""
    return (
        f"the vectors that the source brings have {width} numbers, and those of the model {model} have {dim}: they are "
        "not used, and the images are embedded again; to keep them, build a new knowledge base with the model that "
        "made them (--model NAME)"
    )


def bad(pair: Pair, reason: str) -> BadSample:
    """The pair as a bad sample."""
    return BadSample(shard=pair.shard, key=pair.key, offset=pair.image.offset, reason=reason)
