"""Copies: for a picture from anywhere, the pairs of a knowledge base that show the same, to the byte or to the eye.

A training picture whose neighbour is itself in another size teaches a model to copy. Duplicate groups tell only what
lies in the knowledge base apart; a picture from elsewhere, or of a knowledge base without groups, is compared with
what was found for it.
"""

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float32, Int64
from numpy import ndarray

from index.embedder import Embedder, decode_scaled
from index.errors import CorpusError
from index.images import difference_hash
from index.records import Hit, Pair
from index.search.duplicates import (
    NEAR,
    NEAR_BITS,
    NO_CONTENT,
    PictureMarks,
    content_mark,
    differing_bits,
    near_neighbors,
)
from index.search.ids import distinct
from index.search.view import View

if TYPE_CHECKING:
    import PIL.Image

    from index.store import PairStore

_MOST_NEAR = 11 << 7  # neighbours of one picture that are looked for at once; what is beyond is found among the hits
_THREADS = 4  # that decode
_DECODED = 64  # pictures in memory at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """What is known of the pictures of some pairs, in their order. A vector that is not known yet is NaN."""

    pairs: Sequence[Pair]
    same: Sequence[Int64[ndarray, " _"]]  # positions, in the knowledge base, of the pairs with the same bytes
    hashes: Int64[ndarray, " n"]
    has_hash: Bool[ndarray, " n"]
    vectors: Float32[ndarray, "n d"]

    def readable(self) -> "Pictures":
        """Those whose vector is known."""
        rows = np.nonzero(np.isfinite(self.vectors).all(axis=1))[0]
        return Pictures(
            pairs=[self.pairs[row] for row in rows.tolist()],
            same=[self.same[row] for row in rows.tolist()],
            hashes=self.hashes[rows],
            has_hash=self.has_hash[rows],
            vectors=self.vectors[rows],
        )


class Copies:
    """What shows the same picture in a store, as a view of it was made: 33 bytes for each pair there."""

    def __init__(self, store: "PairStore", view: View, embedder: Embedder):
        marks = PictureMarks.read(store)
        self._view, self._embedder = view, embedder
        self._ids, self._marks, self._hashes, self._has_hash = marks.ids, marks.contents, marks.hashes, marks.has_hash
        self._by_mark = np.argsort(self._marks, kind="stable")

    def pictures(self, pairs: Sequence[Pair]) -> Pictures:
        """What is known of the pictures of these pairs without the network."""
        same = [self._same_bytes(pair) for pair in pairs]
        hashes = np.zeros(len(pairs), np.int64)
        has_hash = np.zeros(len(pairs), dtype=bool)
        for row, at in enumerate(same):
            if len(at):
                hashes[row], has_hash[row] = self._hashes[at[0]], self._has_hash[at[0]]
        todo = [row for row, at in enumerate(same) if not len(at)]
        with ThreadPoolExecutor(_THREADS) as threads:
            for row, made in zip(todo, threads.map(self._hash, [pairs[row] for row in todo]), strict=True):
                if made is not None:
                    hashes[row], has_hash[row] = made, True
        vectors = np.full((len(pairs), self._embedder.dim), np.nan, np.float32)
        return Pictures(pairs=pairs, same=same, hashes=hashes, has_hash=has_hash, vectors=vectors)

    def embed(self, pictures: Pictures, rows: Int64[ndarray, " m"]) -> None:
        """Find out the vectors of these rows: stored, brought along, or made here; NaN where there is no picture."""
        rows = rows[np.isnan(pictures.vectors[rows, 0])]
        stored = np.array([row for row in rows.tolist() if len(pictures.same[row])], np.int64)
        if len(stored):
            ids = np.array([self._ids[pictures.same[row][0]] for row in stored.tolist()], np.int64)
            pictures.vectors[stored] = self._view.vectors(ids)
        todo: list[int] = []
        for row in rows[~np.isin(rows, stored)].tolist():
            vector = pictures.pairs[row].vector
            if vector is not None and len(vector) == self._embedder.dim:
                pictures.vectors[row] = vector
            else:
                todo.append(row)
        for start in range(0, len(todo), _DECODED):
            decoded = {row: self._decoded(pictures.pairs[row]) for row in todo[start : start + _DECODED]}
            images = {row: image for row, image in decoded.items() if image is not None}
            if images:
                pictures.vectors[list(images)] = self._embedder.images(list(images.values()))

    def of(self, pictures: Pictures) -> list[Int64[ndarray, " _"]]:
        """Of each the pair itself, the pairs of its bytes, and all that are in a duplicate group with one of those."""
        members = self._view.duplicates.members
        return [
            members(np.append(self._ids[at], pair.id)) for pair, at in zip(pictures.pairs, pictures.same, strict=True)
        ]

    def among(
        self, pictures: Pictures, asked: Int64[ndarray, " a"], hits: Sequence[Sequence[Hit]]
    ) -> dict[int, Int64[ndarray, " _"]]:
        """What shows the same to the eye, by row, for those of the rows `asked` with such a one among their `hits`.

        That is what has a cosine of at least `NEAR` and a difference hash, where both have one, that differs in at
        most `NEAR_BITS` bits, and what is in a duplicate group with such a one. Only pictures whose hash is that of a
        hit are embedded, where no vector is known of them.
        """
        rows = np.repeat(asked, [len(each) for each in hits])
        ids = np.array([hit.id for each in hits for hit in each], dtype=np.int64)
        is_alike = self._alike(pictures, rows, ids)
        rows, ids = rows[is_alike], ids[is_alike]
        if not len(ids):
            return {}
        self.embed(pictures, distinct(rows))
        cosines = np.einsum("nd,nd->n", pictures.vectors[rows], self._view.vectors(ids))
        is_near = cosines >= NEAR  # never of NaN
        rows, ids = rows[is_near], ids[is_near]
        if not len(ids):
            return {}
        more_rows, more_ids = self._look_alikes(pictures, distinct(rows))
        rows, ids = np.concatenate([rows, more_rows]), np.concatenate([ids, more_ids])
        return {int(row): self._view.duplicates.members(distinct(ids[rows == row])) for row in distinct(rows)}

    def _look_alikes(
        self, pictures: Pictures, asked: Int64[ndarray, " a"]
    ) -> tuple[Int64[ndarray, " m"], Int64[ndarray, " m"]]:
        """Rows, and ids of what the searcher finds to look like them: else every repeat would take another search."""

        def search(queries: Float32[ndarray, "q d"], *, top_k: int) -> tuple[Any, Any]:
            found = self._view.search(queries, top_k=top_k, subset=None, exact=False)
            return found.ids, found.scores

        rows, ids = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for some, found, _ in near_neighbors(search, pictures.vectors[asked], near=NEAR, most=_MOST_NEAR):
            is_alike = self._alike(pictures, asked[some], found)
            rows.append(asked[some][is_alike])
            ids.append(found[is_alike])
        return np.concatenate(rows), np.concatenate(ids)

    def _alike(self, pictures: Pictures, rows: Int64[ndarray, " m"], ids: Int64[ndarray, " m"]) -> Bool[ndarray, " m"]:
        """Whether the hash of a picture is that of a pair here, or one of the two has none."""
        at = np.searchsorted(self._ids, ids)
        both = pictures.has_hash[rows] & self._has_hash[at]
        return ~both | (differing_bits(pictures.hashes[rows], self._hashes[at]) <= NEAR_BITS)

    def _hash(self, pair: Pair) -> int | None:
        image = self._decoded(pair)
        return None if image is None else difference_hash(image)

    def _decoded(self, pair: Pair) -> "PIL.Image.Image | None":
        """The picture as a build sees it, so that the same one has the same hash; None where there is none."""
        if pair.encoded is not None:
            with contextlib.suppress(CorpusError):
                return decode_scaled(pair.encoded, side=self._embedder.image_side())[0]
        return None

    def _same_bytes(self, pair: Pair) -> Int64[ndarray, " n"]:
        """Positions of the pairs with the bytes of this one or, where it brings none, with what is stored of it."""
        if pair.encoded is not None:
            return self._marked(content_mark(sha256(pair.encoded).hexdigest()))
        at = int(np.searchsorted(self._ids, pair.id))
        if at == len(self._ids) or self._ids[at] != pair.id:
            return np.empty(0, np.int64)
        mark = int(self._marks[at])
        return np.array([at]) if mark == NO_CONTENT else self._marked(mark)

    def _marked(self, mark: int) -> Int64[ndarray, " n"]:
        first, last = (
            int(np.searchsorted(self._marks, mark, side=side, sorter=self._by_mark)) for side in ("left", "right")
        )
        return self._by_mark[first:last]
