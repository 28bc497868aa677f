"""Vectors that a source brings: whether they look like the model's own, as far as pictures or captions can tell.

Vectors of another model may have the same width. Nothing then fails, and every search by CLIP finds noise.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from index.embedder import Embedder, decode_image
from index.errors import CorpusError, ImageError, KnowledgeBaseError, ModelError
from index.images import try_read_images
from index.records import ShardRecord, StoredPair
from index.store import PairStore

if TYPE_CHECKING:
    import PIL.Image

ASKED = 64  # pairs that are looked at,
FEWEST = 16  # and fewer of them, or fewer different captions, say nothing
PICTURES = 16  # of them, that are embedded again where they can be read
LEAST_COSINE = 0.8  # median, between a vector and its picture embedded again: of one model it is 0.99, of two near 0
LEAST_ERRORS = 4.0  # standard errors by which a caption must be nearer to its own vector than to the others


def doubt(store: PairStore, embedder: Embedder, records: Sequence[ShardRecord]) -> str:
    """A sentence when the vectors that these shards brought do not look like the model's; empty when they do.

    Pictures that can be read decide. Without them, captions must be nearer to their own vectors than to those of other
    pairs, by `LEAST_ERRORS` standard errors: with a trained model it is 20, with another's vectors or random weights
    about 0. That is a doubt and no proof, so nothing is refused.
    """
    rows = _some(store, [record for record in records if not record.foreign_dim])
    if len(rows) < FEWEST:
        return ""
    try:
        cosine = _cosine_of_pictures(rows, embedder)
        errors = None if cosine is not None else _errors_of_captions(rows, embedder)
    except (ModelError, KnowledgeBaseError):  # it is not here, or no longer the same; who needs it is told
        return ""
    if cosine is not None and cosine < LEAST_COSINE:
        reason = f"pictures embedded again have a cosine of {cosine:.2f} to them, where 1 was expected"
    elif errors is not None and errors < LEAST_ERRORS:
        reason = "captions are no nearer to the vectors of their own pairs than to those of others"
    else:
        return ""
    return (
        f"the vectors that the source brings do not look like those of the model {embedder.name}: {reason}; if another "
        "model made them, build a new knowledge base with that one (--model NAME)"
    )


def _some(store: PairStore, records: Sequence[ShardRecord]) -> list[StoredPair]:
    """Pairs of the largest of these shards, drawn evenly."""
    if not records:
        return []
    largest = max(records, key=lambda record: record.pairs)
    dataset, shard = (name.replace("'", "''") for name in (largest.dataset, largest.shard))
    ids = np.sort(store.matching_ids(f"dataset = '{dataset}' AND shard = '{shard}'"))
    chosen = np.random.default_rng(0).choice(ids, size=min(ASKED, len(ids)), replace=False)
    return store.get(np.sort(chosen), vectors=True)


def _cosine_of_pictures(rows: Sequence[StoredPair], embedder: Embedder) -> float | None:
    """The median between the vector of a row and its picture embedded now; None when too few can be read."""
    contents = try_read_images([row.image for row in rows[:PICTURES]])
    pictures = [_decoded(content) for content in contents]
    whole = [i for i, picture in enumerate(pictures) if picture is not None]
    if len(whole) < PICTURES // 2:
        return None
    again = embedder.images([picture for picture in pictures if picture is not None])
    return float(np.median(np.einsum("nd,nd->n", again, np.stack([np.asarray(rows[i].vector) for i in whole]))))


def _decoded(content: bytes | ImageError) -> "PIL.Image.Image | None":
    try:
        return decode_image(content) if isinstance(content, bytes) else None
    except CorpusError:
        return None


def _errors_of_captions(rows: Sequence[StoredPair], embedder: Embedder) -> float | None:
    """How many standard errors captions are nearer to their own vectors than to the others; None when few differ."""
    different = list({row.caption: row for row in rows}.values())
    if len(different) < FEWEST:
        return None
    vectors = np.stack([np.asarray(row.vector) for row in different])
    return _standard_errors(embedder.texts([row.caption for row in different]), vectors)


def _standard_errors(texts: Float32[np.ndarray, "n d"], vectors: Float32[np.ndarray, "n d"]) -> float:
    cosines = texts.astype(np.float64) @ vectors.astype(np.float64).T
    others = (cosines.sum(axis=1) - np.diag(cosines)) / (len(cosines) - 1)
    gains = np.diag(cosines) - others
    return float(gains.mean() / max(gains.std(ddof=1) / np.sqrt(len(gains)), 1e-12))
