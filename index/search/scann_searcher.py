"""ScaNN (Guo et al. 2020): a tree, anisotropic quantisation, and exact scores again for the best of what they leave.

Rows are cut into shards that are built one at a time and searched together, so that neither takes more memory than it
may. Inside, ScaNN knows rows by position; our own ids lie beside it in `ids.npy`. Its docids are not used: they are a
pickle, and updating them in place goes wrong. The folder can be moved.
"""

import logging
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from index.errors import KnowledgeBaseError, MissingExtraError
from index.search.searcher import (
    NO_ID,
    STREAM_ROWS,
    ExactSearcher,
    ExactStream,
    Ids,
    Queries,
    Scores,
    SearcherManifest,
    VectorRows,
    Vectors,
    ascending_ids,
    check_queries,
    check_rows,
    merge_answers,
    padded,
    reorder_for,
)
from index.search.sizes import code_training_rows, may_be_held, processors, scann_block, scann_leaves, training_rows

if TYPE_CHECKING:
    from index.search.sizes import Structure

_REORDER = 100  # candidates scored exactly when nothing was calibrated; more when more is asked for
_PARALLEL_FROM = 32  # queries
_MOST_IN_A_TASK = 256  # queries; larger tasks are slower, 35,000 and 18,000 a second at 256 and 1000
_VECTORS = "vectors.npy"  # the exact ones, when ScaNN itself does not keep them
_STDERR = threading.Lock()  # there is one for the whole process
_CHATTER = re.compile(rb"^([IW]\d{4} |WARNING: All log messages before absl)")


_log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class _Shard:
    """Some of the rows: what ScaNN made of them, and their ids by its positions."""

    folder: Path
    ids: Int64[ndarray, " rows"]
    raw: Any = None  # ScaNN's own searcher, once it has been read from `folder`
    is_resident: bool = True  # else it is read for each search
    vectors: Any = None  # float32 [rows, d] on disk; None: ScaNN has them
    loading: Any = field(default_factory=threading.Lock)  # two that search first load it once

    def search(self, queries: Queries, wanted: int, **effort: int) -> tuple[Ids, Scores]:
        """The best `wanted` of this shard, in any order, padded as `Searcher.search` says."""
        raw = self.load()
        arguments = {"final_num_neighbors": wanted, **effort}
        if self.vectors is not None and effort:
            arguments["final_num_neighbors"] = effort["pre_reorder_num_neighbors"]
        if len(queries) >= _PARALLEL_FROM:
            arguments["batch_size"] = min(_MOST_IN_A_TASK, max(16, math.ceil(len(queries) / processors())))
            positions, scores = raw.search_batched_parallel(np.ascontiguousarray(queries), **arguments)
        else:
            positions, scores = raw.search_batched(np.ascontiguousarray(queries), **arguments)
        # Short answers come padded with position 0 and a score of NaN.
        real = np.isfinite(scores)
        if self.vectors is not None:
            scores = _exact_scores(queries, positions, real, self.vectors)
        ids = np.where(real, self.ids[np.where(real, positions, 0)], NO_ID)
        return ids, np.where(real, scores, -np.inf).astype(np.float32, copy=False)

    def load(self) -> Any:
        """ScaNN's own searcher, which is kept if it is to stay in memory."""
        if not self.is_resident:
            return _load(self.folder)
        with self.loading:
            if self.raw is None:
                self.raw = _load(self.folder)
            return self.raw


class ScannSearcher:
    """Approximate search by inner product, over one shard or several; ScaNN is loaded when it is first asked.

    Where it cannot be imported, the rows of `table`, if given, are compared one by one, and `note` says so.
    """

    def __init__(
        self,
        shards: Sequence[_Shard],
        *,
        dim: int,
        settings: dict[str, Any],
        snapshot: int | None,
        ids: Any = None,
        table: VectorRows | None = None,
    ):
        self._shards = tuple(shards)
        self.ids: Int64[ndarray, " rows"] = ascending_ids([s.ids for s in shards]) if ids is None else ids
        self.settings = settings
        self.snapshot = snapshot
        self._dim = dim
        self.note = ""
        self._table = table
        self._is_loaded = False
        self._loading = threading.Lock()
        self._instead: ExactSearcher | ExactStream | None = None
        self._stored: list[tuple[Any, Any]] | None = None  # see `_stored_vectors`

    @classmethod
    def open(cls, directory: Path, manifest: SearcherManifest, *, table: VectorRows | None = None) -> "ScannSearcher":
        """Open what `build_scann` wrote. KnowledgeBaseError when a part is missing or is not ours."""
        # Searchers of before there were shards have their one at the root.
        folders = [directory] if (directory / "scann").is_dir() else sorted(directory.glob("shard-*"))
        is_resident = manifest.settings.get("is_resident", True)
        shards = [_open_shard(folder, is_resident=is_resident) for folder in folders]
        rows = sum(len(shard.ids) for shard in shards)
        if rows != manifest.rows:
            raise KnowledgeBaseError(
                f"the searcher in {directory} has {rows} ids for {manifest.rows} rows; build it again with "
                "`radt index build`"
            )
        return cls(shards, dim=manifest.dim, settings=manifest.settings, snapshot=manifest.snapshot, table=table)

    @property
    def leaves(self) -> int:
        """Leaves of each shard; 0 when every row is scored."""
        return int(self.settings["leaves"])

    def with_effort(self, leaves_to_search: int, reorder: int) -> "ScannSearcher":
        """The same shards, searched with other settings."""
        settings = {**self.settings, "leaves_to_search": leaves_to_search, "reorder": reorder}
        return ScannSearcher(self._shards, dim=self._dim, settings=settings, snapshot=self.snapshot, ids=self.ids)

    def search(self, queries: Queries, *, top_k: int, recall_at: int | None = None) -> tuple[Ids, Scores]:
        """As `Searcher.search`."""
        check_queries(queries, dim=self._dim)
        nothing = padded(len(queries), top_k)
        if not len(queries) or not len(self.ids):
            return nothing
        if not self._is_loaded:
            self.load()
        if self._instead is not None:
            return self._instead.search(queries, top_k=top_k)
        answers = [nothing]
        for shard in self._shards:
            wanted = min(top_k, len(shard.ids))
            answers.append(shard.search(queries, wanted, **self._effort(wanted, len(shard.ids), recall_at)))
        return merge_answers(answers, top_k=top_k)

    def vectors(self, ids: Int64[ndarray, " n"]) -> Float32[ndarray, "n d"] | None:
        """The exact vectors of some of its rows, read from its files; None when they do not hold them."""
        rows = np.empty((len(ids), self._dim), np.float32)
        for shard, (order, stored) in zip(self._shards, self._stored_vectors(), strict=True):
            if stored is None:
                return None
            places = order[np.minimum(np.searchsorted(shard.ids, ids, sorter=order), len(order) - 1)]
            here = shard.ids[places] == ids
            rows[here] = stored[places[here]]
        return rows

    def late(self) -> Callable[[], None] | None:
        """As `LoadsLate.late`."""
        return None if self._is_loaded else self.load

    def load(self) -> None:
        """Read what stays in memory, of ScaNN or else of the table."""
        with self._loading:
            if self._is_loaded:  # by another thread meanwhile
                return
            if self._table is not None:
                self._instead = self._without_scann(self._table)
            for shard in self._shards if self._instead is None else ():
                if shard.is_resident:
                    shard.load()
            self._is_loaded = True

    def _without_scann(self, table: VectorRows) -> ExactSearcher | ExactStream | None:
        """Who compares every row where ScaNN cannot be imported, in memory unless that takes much of it; else None."""
        try:
            import_scann()
            return None
        except MissingExtraError as error:
            cause = error.__cause__
        self.note = (
            f"ScaNN cannot be imported here ({cause}), so every one of {len(self.ids):,} pairs is compared: answers "
            "are exact and take longer. `radt index build --searcher lance` makes a searcher that runs anywhere"
        )
        _log.warning(self.note)
        if not may_be_held(len(self.ids), self._dim):
            return ExactStream(table, within=self.ids)
        ids, vectors = zip(*table.vector_batches(STREAM_ROWS), strict=True)
        return ExactSearcher(np.concatenate(ids), np.concatenate(vectors)).subset(self.ids)

    def _stored_vectors(self) -> list[tuple[Any, Any]]:
        """Of every shard its positions in the order of their ids, and its vectors on disk: ours, or ScaNN's own."""
        if self._stored is None:
            self._stored = [(np.argsort(shard.ids), _on_disk(shard, self._dim)) for shard in self._shards]
        return self._stored

    def _effort(self, wanted: int, rows: int, recall_at: int | None) -> dict[str, int]:
        """What is asked for here may exceed what was set when it was built, so sizes are given each time.

        More answers than usual need more leaves; all rows need them all.
        """
        if not self.leaves:
            return {}
        share = min(1.0, 2.0 * wanted / rows)
        reorder = reorder_for(wanted, self.settings.get("reorder", _REORDER), recall_at=recall_at)
        return {
            "pre_reorder_num_neighbors": min(rows, reorder),
            "leaves_to_search": max(self.settings["leaves_to_search"], math.ceil(share * self.leaves)),
        }


def build_scann(rows: VectorRows, directory: Path, structure: "Structure") -> ScannSearcher:
    """Build into `directory`, shard after shard; the rows are streamed through a file. It is not calibrated yet."""
    import_scann()
    per_shard = math.ceil(structure.rows / structure.shards)
    settings = {
        **scann_settings(per_shard, structure.dim),
        "shards": structure.shards,
        "vectors": structure.vectors,
        "is_resident": structure.is_resident,
    }
    folders = []
    for folder in _write_shards(rows, directory, structure.rows, per_shard):
        _build_shard(folder, settings)
        folders.append(folder)
    shards = [_open_shard(folder, is_resident=structure.is_resident) for folder in folders]
    return ScannSearcher(shards, dim=structure.dim, settings=settings, snapshot=None)


def scann_settings(rows: int, dim: int) -> dict[str, Any]:
    """Sizes by rule: about sqrt(n) leaves; coarser blocks and a lower threshold as vectors get longer.

    The well-known threshold of 0.2 is for 100 numbers; at 768 it caps recall near 0.8. The rule
    T = 0.2 (128 / d)^0.75 is TheCleaners/scann-core's (docs/tuning.md).
    """
    leaves = scann_leaves(rows)
    if not leaves:
        return {"leaves": 0, "leaves_to_search": 0}
    return {
        "leaves": leaves,
        "leaves_to_search": max(1, leaves // 20),
        "reorder": _REORDER,
        "dims_per_block": scann_block(dim),
        "threshold": round(0.2 * min(1.0, 128 / dim) ** 0.75, 4),
        "training_rows": training_rows(rows),
    }


def import_scann() -> Any:
    """ScaNN's module, or a MissingExtraError that says where it can be had."""
    try:
        from scann import scann_ops_pybind
    except ImportError as error:
        raise MissingExtraError(
            f"ScaNN cannot be imported ({error}); it has packages for Linux and Python below 3.14 only "
            "(`pip install scann`), elsewhere use --searcher lance or exact"
        ) from error
    return scann_ops_pybind


def _write_shards(rows: VectorRows, directory: Path, total: int, per_shard: int) -> Iterator[Path]:
    """Cut the rows into folders with `ids.npy` and `vectors.npy`, one after another, so that each can be built alone.

    Plain writes, not a memory map: a full disk is then an error and not the end of the process.
    """
    batches = _cut(rows, per_shard)
    for number, start in enumerate(range(0, total, per_shard)):
        folder = directory / f"shard-{number:05d}"
        folder.mkdir()
        here = min(per_shard, total - start)
        ids: list[Any] = []
        with open(folder / _VECTORS, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (here, rows.dim)}
            np.lib.format.write_array_header_1_0(file, header)
            while sum(map(len, ids)) < here:
                some, vectors = next(batches)
                check_rows(some, vectors)
                ids.append(some)
                file.write(np.ascontiguousarray(vectors).data)
        np.save(folder / "ids.npy", np.concatenate(ids), allow_pickle=False)
        yield folder


def _cut(rows: VectorRows, per_shard: int) -> Iterator[tuple[Any, Any]]:
    """The batches, cut again where a shard ends."""
    room = per_shard
    for ids, vectors in rows.vector_batches(STREAM_ROWS):
        start = 0
        while start < len(ids):
            stop = min(len(ids), start + room)
            yield ids[start:stop], vectors[start:stop]
            room = room - (stop - start) or per_shard
            start = stop


def _build_shard(folder: Path, settings: dict[str, Any]) -> None:
    """Train and encode what lies in `vectors.npy`; the file goes when ScaNN keeps the vectors itself."""
    vectors = np.load(folder / _VECTORS, mmap_mode="r", allow_pickle=False)
    is_kept = settings["vectors"] == "disk" and settings["leaves"]
    builder = import_scann().builder(vectors, 10, "dot_product")
    if settings["leaves"]:
        sample = min(len(vectors), settings["training_rows"])
        builder = builder.tree(
            settings["leaves"],
            settings["leaves_to_search"],
            training_sample_size=sample,
            # Of the training rows: at ScaNN's 50, leaves that are smaller in the sample are lost, and rows with them.
            min_partition_size=min(50, max(1, sample // settings["leaves"] // 10)),
            # Leaves are chosen by inner product with their centres, which favours long centres over near ones. At one
            # length, 16 leaves find what 64 did (200,000 x 512, 450 leaves: recall@10 0.963 and 0.971).
            spherical=True,
        )
        builder = builder.score_ah(
            settings["dims_per_block"],
            anisotropic_quantization_threshold=settings["threshold"],
            training_sample_size=min(sample, code_training_rows(len(vectors))),
        )
        if not is_kept:
            builder = builder.reorder(_REORDER)
    else:
        builder = builder.score_brute_force()
    (folder / "scann").mkdir()
    with _quiet():
        raw = builder.set_n_training_threads(processors()).build()
        raw.serialize(str(folder / "scann"), relative_path=True)
    if not is_kept:
        (folder / _VECTORS).unlink()


def _check_files(folder: Path) -> None:
    if not (folder / "scann" / "scann_assets.pbtxt").is_file() or not (folder / "ids.npy").is_file():
        raise KnowledgeBaseError(f"the searcher in {folder} is not complete; build it again with `radt index build`")
    if any(folder.rglob("*.pkl")):
        raise KnowledgeBaseError(f"{folder} holds a pickle, which radt never wrote and does not load; remove it")


def _open_shard(folder: Path, *, is_resident: bool) -> _Shard:
    _check_files(folder)
    vectors = folder / _VECTORS
    return _Shard(
        folder=folder,
        ids=np.load(folder / "ids.npy", allow_pickle=False),
        is_resident=is_resident,
        vectors=np.load(vectors, mmap_mode="r", allow_pickle=False) if vectors.is_file() else None,
    )


def _on_disk(shard: _Shard, dim: int) -> Any:
    """Float32 [rows, d], mapped; None where ScaNN keeps another precision, or none."""
    path = shard.folder / "scann" / "dataset.npy"
    if shard.vectors is not None or not path.is_file():
        return shard.vectors
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    return stored if (stored.shape, stored.dtype) == ((len(shard.ids), dim), np.float32) else None


def _load(folder: Path) -> Any:
    _check_files(folder)  # again: it may have been opened long ago
    with _quiet():
        return import_scann().load_searcher(str(folder / "scann"))


def _exact_scores(queries: Queries, positions: Any, real: Any, vectors: Vectors) -> Any:
    """Inner products with rows that lie on disk, read in their order there."""
    scores = np.full(positions.shape, -np.inf, np.float32)
    for row, query in enumerate(queries):
        (here,) = np.nonzero(real[row])
        here = here[np.argsort(positions[row, here])]
        scores[row, here] = vectors[positions[row, here]] @ query
    return scores


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what ScaNN's C++ chats to stderr (lines of absl's I and W levels) from the user; all else is passed on."""
    sys.stderr.flush()
    with _STDERR, tempfile.TemporaryFile() as heard:
        saved = os.dup(2)
        os.dup2(heard.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            heard.seek(0)
            for line in heard:
                if not _CHATTER.match(line):
                    os.write(2, line)
