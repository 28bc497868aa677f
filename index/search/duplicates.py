"""Duplicates: which pairs show the same picture, byte for byte or to the eye, so that no two of them are both hits.

About a third of LAION-2B shows another row's picture (Webster et al. 2023, arXiv 2303.12733): K neighbours of a prompt
would be one neighbour K times, and the neighbours of a training image would be itself. Groups are found once, after
the searcher is built, and lie beside it; rows newer than that are told apart by their sha256 alone.
"""

import json
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8
from numpy import ndarray

from index.atomic import new_folder
from index.config import from_dict, to_dict
from index.errors import ConfigError, KnowledgeBaseError
from index.search.ids import contains
from index.search.searcher import ExactSearcher, Searcher, queries_at_once

if TYPE_CHECKING:
    from index.store import PairStore

FOLDER = "duplicates"  # inside the searcher's own folder, with which it comes and goes
# Measured with the model that ships with radt, which is small and finds faces and flags alike. Of 800 emoji pictures
# saved again as JPEG (quality 75 to 95, sides 96 to 256) every one kept a cosine of 0.996 to the original, and 95 in
# 100 differed from it in at most 2 bits. Of the 28 million twos of the 7,480 emoji pictures, 228 have a cosine of
# 0.995; 104 of those differ in at most 3 bits, mostly flags that are drawn alike (Norway, Svalbard, Bouvet Island), and
# 13 are one emoji on two grounds, of the 11,220 twos of one emoji.
NEAR = 0.995  # least cosine of two near-duplicates
NEAR_BITS = 3  # bits in which their difference hashes may differ, where both have one
_NEIGHBORS = 11  # of each row that are looked at first, itself among them; twice as many while the last one is near,
_MOST_NEIGHBORS = 1408  # up to so many. Of a million made-up pairs, 16 in 100 asked for 22, 1 for 176, none for 704
_CROWDED_AT_ONCE = 1 << 15  # rows that have more: every two of them are compared, so many at once
_BATCH = 4096  # rows
COMPARED_ROWS = 200_000  # rows up to which every two are compared: a minute on one core at 100,000 x 512
_BLOCK_SCORES = 1 << 24  # products held at once
_BLOCK_LINKS = 1 << 21  # links held at once
_JOINED_AT_ONCE = 1 << 16
_FINDING_ROOTS = 32  # times cheaper than joining, for each position

NO_CONTENT = -1

OnBatch = Callable[[int, int], None]  # rows done, of how many


@dataclass(frozen=True, kw_only=True, slots=True)
class DuplicatesManifest:
    """What was looked for, how long it took, and what was found: groups of two or more, and the pairs in them."""

    rows: int
    near: float | None  # None: no near-duplicates were looked for
    near_bits: int
    exact_groups: int  # same bytes
    exact_pairs: int
    groups: int  # same bytes or nearly the same picture
    pairs: int
    largest: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """The groups of two or more, each named by its smallest id. A pair that is in none is a group by itself."""

    ids: Int64[ndarray, " members"] = field(default_factory=lambda: np.empty(0, np.int64))  # ascending
    groups: Int64[ndarray, " members"] = field(default_factory=lambda: np.empty(0, np.int64))
    manifest: DuplicatesManifest | None = None  # None: never looked for

    @classmethod
    def open(cls, directory: Path) -> "Duplicates":
        """What `build_duplicates` left in a searcher's folder; without it, no pair is known to repeat another."""
        folder = directory / FOLDER
        if not folder.exists():
            return cls()
        try:
            manifest = from_dict(DuplicatesManifest, json.loads((folder / "manifest.json").read_text()))
            ids, groups = np.load(folder / "groups.npy", allow_pickle=False)
        except (OSError, ValueError, ConfigError) as error:
            raise KnowledgeBaseError(
                f"the duplicate groups in {folder} cannot be read ({error}); delete that folder, then run "
                "`radt index build --duplicates`"
            ) from error
        return cls(ids=ids, groups=groups, manifest=manifest)

    def group_of(self, ids: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
        """The group of each pair, named by the smallest id in it."""
        if not len(self.ids):
            return ids
        positions = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[positions] == ids, self.groups[positions], ids)

    def members(self, ids: Int64[ndarray, " n"]) -> Int64[ndarray, " m"]:
        """These pairs and all that are in a group with one of them, ascending."""
        order, ordered = self._by_group
        wanted = np.unique(self.group_of(ids))
        first, last = (np.searchsorted(ordered, wanted, side=side) for side in ("left", "right"))
        together = [self.ids[order[start:stop]] for start, stop in zip(first, last, strict=True)]
        return np.unique(np.concatenate([ids, *together]))

    @cached_property
    def _by_group(self) -> tuple[Int64[ndarray, " members"], Int64[ndarray, " members"]]:
        """Positions in the order of the groups, and the groups in that order."""
        order = np.argsort(self.groups, kind="stable")
        return order, self.groups[order]

    def without(self, ids: Int64[ndarray, " n"]) -> "Duplicates":
        """The same groups less these pairs."""
        kept = ~contains(np.sort(ids), self.ids)
        return self if kept.all() else replace(self, ids=self.ids[kept], groups=self.groups[kept])

    def summary(self) -> dict[str, Any]:
        """Counts, ready for JSON; empty when no duplicates were looked for."""
        return {} if self.manifest is None else to_dict(self.manifest)


def groups_stamp(directory: Path) -> tuple[int, int] | None:
    """Another one when other groups have landed in a searcher's folder; None while there are none."""
    try:
        found = (directory / FOLDER / "manifest.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureMarks:
    """By what the pictures of a store's pairs are told apart, in order of id: 25 bytes a pair."""

    ids: Int64[ndarray, " rows"]
    contents: Int64[ndarray, " rows"]  # `content_mark` of each
    hashes: Int64[ndarray, " rows"]
    has_hash: Bool[ndarray, " rows"]

    @classmethod
    def read(cls, store: "PairStore") -> "PictureMarks":
        """Those of the pairs that are there now; a table of an older format has no difference hashes."""
        import pyarrow

        ids, contents, hashes, has_hash = ([np.empty(0, dtype)] for dtype in (np.int64, np.int64, np.int64, np.bool_))
        columns = store.known(["id", "image_sha256", "dhash"])
        for batch in store.dataset.to_batches(columns=columns, filter=store.shown_where("kind = 'pair'")):
            ids.append(batch.column("id").to_numpy())
            contents.append(_content_marks(batch.column("image_sha256").to_pylist()))
            dhash = batch.column("dhash") if "dhash" in columns else pyarrow.nulls(len(batch), pyarrow.int64())
            hashes.append(dhash.fill_null(0).to_numpy())
            has_hash.append(dhash.is_valid().to_numpy(zero_copy_only=False))
        all_ids = np.concatenate(ids)
        order = np.argsort(all_ids)
        return cls(
            ids=all_ids[order],
            contents=np.concatenate(contents)[order],
            hashes=np.concatenate(hashes)[order],
            has_hash=np.concatenate(has_hash)[order],
        )

    def alike(self, one: Int64[ndarray, " m"], other: Int64[ndarray, " m"], *, bits: int) -> Bool[ndarray, " m"]:
        """Whether the difference hashes at these positions agree, or one of the two has none."""
        differing = differing_bits(self.hashes[one], self.hashes[other])
        return ~(self.has_hash[one] & self.has_hash[other]) | (differing <= bits)


def differing_bits(one: Int64[ndarray, " n"], other: Int64[ndarray, " n"]) -> UInt8[ndarray, " n"]:
    """In how many bits two difference hashes differ."""
    return np.bitwise_count((one ^ other).view(np.uint64))  # of a signed number, those of its absolute value


class _Forest:
    """Disjoint sets (Tarjan 1975) of positions 0 to n - 1; the root of a set is its smallest member."""

    def __init__(self, size: int):
        self._parent = array("q", range(size))

    def join(self, one: Int64[ndarray, " m"], other: Int64[ndarray, " m"]) -> None:
        """Put the two of each pair in one set.

        A picture that is there a thousand times has half a million links. All but a thousand tie what is tied already,
        and go before the loop sees them.
        """
        step = max(_JOINED_AT_ONCE, len(self._parent) // 4)
        for start in range(0, len(one), step):
            a, b = one[start : start + step], other[start : start + step]
            if len(one) > max(_JOINED_AT_ONCE, len(self._parent) // _FINDING_ROOTS):
                roots = self.roots()
                is_new = roots[a] != roots[b]
                a, b = a[is_new], b[is_new]
            self._join_each(a, b)

    def _join_each(self, one: Int64[ndarray, " m"], other: Int64[ndarray, " m"]) -> None:
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            low, high = sorted((self._root(a), self._root(b)))
            self._parent[high] = low

    def roots(self) -> Int64[ndarray, " n"]:
        """The smallest member of the set of every position."""
        roots = np.frombuffer(self._parent, dtype=np.int64)
        while not np.array_equal(roots, above := roots[roots]):
            roots = above
        return roots

    def _root(self, position: int) -> int:
        parent = self._parent
        while parent[position] != position:
            parent[position] = parent[parent[position]]  # path halving
            position = parent[position]
        return position


def build_duplicates(
    store: "PairStore",
    searcher: Searcher,
    directory: Path,
    *,
    near: float | None = NEAR,
    near_bits: int = NEAR_BITS,
    on_batch: OnBatch = lambda done, total: None,
) -> Duplicates:
    """Find the groups among the store's pairs and write them into the searcher's folder, whole or not at all.

    Two pairs are alike when their images have the same bytes, or when their vectors have a cosine of at least `near`
    and their difference hashes, where both have one, differ in at most `near_bits` bits; whatever is linked by such
    pairs is one group. `near` None looks at bytes alone. Near-duplicates are looked for among the neighbours that
    `searcher`, which knows these pairs, finds of each: as many as are near, and what it misses stays apart. Rows with
    more than 1,408 are also compared two by two, in lots of 32,768 in the order of the groups found so far; memory is
    such a lot of vectors and a few numbers a row. An exact searcher compares every two up to 200,000 rows, above
    which it looks at bytes alone.
    """
    if near is not None and not 0 < near <= 1:
        raise ConfigError(f"near-duplicates have a cosine above 0 and up to 1, got {near}")
    start = time.perf_counter()
    if isinstance(searcher, ExactSearcher) and len(searcher.ids) > COMPARED_ROWS:
        near = None
    rows = PictureMarks.read(store)
    forest = _Forest(len(rows.ids))
    forest.join(*_equal_neighbors(rows.contents))
    exact = _sizes(forest.roots())
    if near is not None:
        for one, other in _near_pairs(store, searcher, rows.ids, forest, near=near, on_batch=on_batch):
            kept = rows.alike(one, other, bits=near_bits)
            forest.join(one[kept], other[kept])
    roots = forest.roots()
    sizes = _sizes(roots)
    members = sizes[roots] > 1
    manifest = DuplicatesManifest(
        rows=len(rows.ids),
        near=near,
        near_bits=near_bits,
        exact_groups=int((exact > 1).sum()),
        exact_pairs=int(exact[exact > 1].sum()),
        groups=int((sizes > 1).sum()),
        pairs=int(members.sum()),
        largest=int(sizes.max(initial=0)),
        seconds=round(time.perf_counter() - start, 3),
    )
    found = Duplicates(ids=rows.ids[members], groups=rows.ids[roots[members]], manifest=manifest)
    with new_folder(directory / FOLDER) as folder:
        np.save(folder / "groups.npy", np.stack([found.ids, found.groups]), allow_pickle=False)
        (folder / "manifest.json").write_text(json.dumps(to_dict(manifest), indent=2) + "\n")
    return found


def content_mark(sha256: str | None) -> int:
    """63 bits for the bytes of a picture, `NO_CONTENT` where they are not known: eight bytes rather than sixty-four."""
    if sha256 is None:
        return NO_CONTENT
    return int.from_bytes(blake2b(sha256.encode(), digest_size=8).digest(), "big") >> 1


def _content_marks(digests: list[str | None]) -> Int64[ndarray, " n"]:
    return np.fromiter(map(content_mark, digests), dtype=np.int64, count=len(digests))


def _equal_neighbors(values: Int64[ndarray, " n"]) -> tuple[Int64[ndarray, " m"], Int64[ndarray, " m"]]:
    """Links of two positions with the same value, enough to tie together all that have it; below 0 is none."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    (at,) = np.nonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0))
    return order[at], order[at + 1]


def _near_pairs(
    store: "PairStore",
    searcher: Searcher,
    ids: Int64[ndarray, " rows"],
    forest: _Forest,
    *,
    near: float,
    on_batch: OnBatch,
) -> Iterator[tuple[Int64[ndarray, " m"], Int64[ndarray, " m"]]]:
    """Positions of two pairs whose cosine is at least `near`, the lower first, in batches; `forest` is joined by them.

    A link is seen from either end. So where the searcher is exact, only one between two crowded rows can be missed.
    """
    if isinstance(searcher, ExactSearcher):
        yield from _all_near_pairs(searcher, ids, near=near, on_batch=on_batch)
        return
    done, crowded = 0, [np.empty(0, np.int64)]
    for some, vectors in _lots(store, queries_at_once(searcher, store.dim, top_k=_NEIGHBORS, usual=_BATCH)):
        own = np.searchsorted(ids, some)
        is_listed = np.zeros(len(own), dtype=bool)
        for rows, found, is_whole in near_neighbors(searcher.search, vectors, near=near, most=_MOST_NEIGHBORS):
            theirs = _positions(ids, found)
            linked = (theirs >= 0) & (theirs != own[rows])
            yield np.minimum(own[rows[linked]], theirs[linked]), np.maximum(own[rows[linked]], theirs[linked])
            is_listed |= is_whole
        crowded.append(own[~is_listed])
        done += len(own)
        on_batch(done, len(ids))
    yield from _crowded_pairs(store, ids, np.concatenate(crowded), forest, near=near)


def _lots(store: "PairStore", rows: int) -> Iterator[tuple[Int64[ndarray, " lot"], Float32[ndarray, "lot d"]]]:
    """Ids and vectors, so many at once or a few more: Lance's batches end where its files do."""
    held: list[tuple[Int64[ndarray, " _"], Float32[ndarray, "_ d"]]] = []
    for batch in store.vector_batches(rows):
        held.append(batch)
        if sum(len(ids) for ids, _ in held) >= rows:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(
    parts: Sequence[tuple[Int64[ndarray, " _"], Float32[ndarray, "_ d"]]],
) -> tuple[Int64[ndarray, " n"], Float32[ndarray, "n d"]]:
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([vectors for _, vectors in parts])


def _crowded_pairs(
    store: "PairStore", ids: Int64[ndarray, " rows"], crowded: Int64[ndarray, " c"], forest: _Forest, *, near: float
) -> Iterator[tuple[Int64[ndarray, " m"], Int64[ndarray, " m"]]]:
    """The near ones among the rows at these positions, neighbours of one lot and group beside each other."""
    crowded = crowded[np.argsort(forest.roots()[crowded], kind="stable")]
    for start in range(0, len(crowded), _CROWDED_AT_ONCE):
        lot = ExactSearcher(*store.vectors_of(ids[crowded[start : start + _CROWDED_AT_ONCE]]))
        yield from _all_near_pairs(lot, ids, near=near, on_batch=lambda done, total: None)


def near_neighbors(
    search: Callable[..., tuple[Any, Any]], vectors: Float32[ndarray, "n d"], *, near: float, most: int
) -> Iterator[tuple[Int64[ndarray, " m"], Int64[ndarray, " m"], Bool[ndarray, " n"]]]:
    """What `search` (see `Searcher.search`) finds of each vector with a cosine of at least `near`, in several parts.

    A part has rows of `vectors` and, beside each, the id of what is near it, and then which rows are now known to have
    no more than what was told. A row whose last neighbour is near is asked for twice as many, up to `most`.
    """
    left, top_k = np.arange(len(vectors)), min(_NEIGHBORS, most)
    while len(left):
        still: list[Int64[ndarray, " _"]] = []
        step = max(1, max(len(vectors) * _NEIGHBORS, _BLOCK_LINKS) // top_k)
        for start in range(0, len(left), step):
            rows = left[start : start + step]
            found, scores = search(vectors[rows], top_k=top_k)
            is_whole = np.zeros(len(vectors), dtype=bool)
            is_whole[rows] = scores[:, -1] < near
            row, column = np.nonzero((scores >= near) & (found >= 0))
            yield rows[row], found[row, column], is_whole
            still.append(rows[~is_whole[rows]])
        left = np.concatenate(still)
        if top_k >= most:
            return
        top_k = min(most, 2 * top_k)


def _all_near_pairs(
    searcher: ExactSearcher, ids: Int64[ndarray, " rows"], *, near: float, on_batch: OnBatch
) -> Iterator[tuple[Int64[ndarray, " m"], Int64[ndarray, " m"]]]:
    """The same from every inner product there is, without any ranking."""
    positions = _positions(ids, searcher.ids)
    total = len(positions)
    block = max(1, _BLOCK_SCORES // max(1, total))
    for start in range(0, total, block):
        rows: Float32[ndarray, "_ d"] = searcher.vectors[start : start + block]
        is_near = rows @ searcher.vectors[start:].T >= near
        step = max(1, _BLOCK_LINKS // total)
        for first in range(0, len(rows), step):
            one, other = np.nonzero(is_near[first : first + step])
            one += first
            kept = (one < other) & (positions[one + start] >= 0) & (positions[other + start] >= 0)
            yield positions[one[kept] + start], positions[other[kept] + start]
        on_batch(min(total, start + block), total)


def _positions(ids: Int64[ndarray, " rows"], wanted: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
    """Where each wanted id lies in ascending `ids`; -1 for one that is not there."""
    if not len(ids):
        return np.full(len(wanted), -1)
    positions = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return np.where(ids[positions] == wanted, positions, -1)


def _sizes(roots: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
    """How many positions each root has; 0 where a position is not a root."""
    return np.bincount(roots, minlength=len(roots))
