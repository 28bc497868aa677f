"""ScaNN (Guo et al. 2020): a tree, anisotropic quantisation, and exact scores again for the best of what they leave.

Inside, ScaNN knows rows by position; our own ids lie beside it in `ids.npy`. Its docids are not used: they are a
pickle, and updating them in place goes wrong. The folder can be moved.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from index.errors import KnowledgeBaseError, MissingExtraError
from index.search.searcher import (
    EXACT_BELOW,
    ExactSearcher,
    Ids,
    Queries,
    Scores,
    SearcherManifest,
    Vectors,
    check_queries,
    check_rows,
    fewest_lists,
    padded,
)

_TRAINING_ROWS = 100_000
_REORDER = 100  # candidates scored exactly; more when more is asked for
_REORDER_FACTOR = 3
_PARALLEL_FROM = 32  # queries


class ScannSearcher:
    """Approximate search by inner product."""

    def __init__(
        self, searcher: Any, ids: Int64[ndarray, " rows"], *, dim: int, settings: dict[str, Any], snapshot: int | None
    ):
        self._searcher = searcher
        self.ids = ids
        self.snapshot = snapshot
        self._dim = dim
        self._leaves: int = settings["leaves"]  # 0: every row is scored
        self._leaves_to_search: int = settings["leaves_to_search"]

    @classmethod
    def open(cls, directory: Path, manifest: SearcherManifest) -> "ScannSearcher":
        """Open what `build_scann` wrote. KnowledgeBaseError when a part is missing or is not ours."""
        scann = import_scann()
        if any(directory.rglob("*.pkl")):
            raise KnowledgeBaseError(f"{directory} holds a pickle, which radt never wrote and does not load; remove it")
        assets = directory / "scann" / "scann_assets.pbtxt"
        if not assets.is_file() or not (directory / "ids.npy").is_file():
            raise KnowledgeBaseError(
                f"the searcher in {directory} is not complete; build it again with `radt index build`"
            )
        ids = np.load(directory / "ids.npy", allow_pickle=False)
        if len(ids) != manifest.rows:
            raise KnowledgeBaseError(
                f"the searcher in {directory} has {len(ids)} ids for {manifest.rows} rows; build it again with "
                "`radt index build`"
            )
        searcher = scann.load_searcher(str(assets.parent))
        return cls(searcher, ids, dim=manifest.dim, settings=manifest.settings, snapshot=manifest.snapshot)

    def search(self, queries: Queries, *, top_k: int) -> tuple[Ids, Scores]:
        """As `Searcher.search`."""
        check_queries(queries, dim=self._dim)
        found, scores = padded(len(queries), top_k)
        wanted = min(top_k, len(self.ids))
        if not len(queries):
            return found, scores
        # All three sizes are given each time: what is asked for here may exceed what was set when it was built.
        arguments: dict[str, int] = {"final_num_neighbors": wanted}
        if self._leaves:
            arguments["pre_reorder_num_neighbors"] = min(len(self.ids), max(_REORDER, _REORDER_FACTOR * wanted))
            arguments["leaves_to_search"] = self._leaves_for(wanted)
        is_many = len(queries) >= _PARALLEL_FROM
        batched = self._searcher.search_batched_parallel if is_many else self._searcher.search_batched
        positions, products = batched(np.ascontiguousarray(queries), **arguments)
        # Short answers come padded with position 0 and a score of NaN.
        real = np.isfinite(products)
        ids = np.where(real, self.ids[np.where(real, positions, 0)], -1)
        values = np.where(real, products, -np.inf).astype(np.float32)
        order = np.lexsort((ids, -values), axis=1)
        found[:, : ids.shape[1]] = np.take_along_axis(ids, order, axis=1)
        scores[:, : ids.shape[1]] = np.take_along_axis(values, order, axis=1)
        return found, scores

    def _leaves_for(self, wanted: int) -> int:
        """More answers than usual need more leaves; all rows need them all."""
        share = min(1.0, 2.0 * wanted / len(self.ids))
        return max(self._leaves_to_search, math.ceil(share * self._leaves))


def build_scann(
    ids: Int64[ndarray, " rows"], vectors: Vectors, directory: Path, *, queries: Queries, exact: ExactSearcher
) -> tuple[ScannSearcher, dict[str, Any]]:
    """Build into `directory` and choose how many leaves to search, so that `queries` find 97 % of the true ten."""
    check_rows(ids, vectors)
    scann = import_scann()
    rows, dim = vectors.shape
    settings = scann_settings(rows, dim)
    builder = scann.builder(np.ascontiguousarray(vectors), 10, "dot_product")
    if settings["leaves"]:
        sample = min(rows, _TRAINING_ROWS)
        builder = builder.tree(settings["leaves"], settings["leaves_to_search"], training_sample_size=sample)
        builder = builder.score_ah(
            settings["dims_per_block"],
            anisotropic_quantization_threshold=settings["threshold"],
            training_sample_size=sample,
        ).reorder(_REORDER)
    else:
        builder = builder.score_brute_force()
    raw = builder.set_n_training_threads(os.cpu_count() or 1).build()
    if settings["leaves"]:

        def visiting(leaves_to_search: int) -> ScannSearcher:
            trial = {**settings, "leaves_to_search": leaves_to_search}
            return ScannSearcher(raw, ids, dim=dim, settings=trial, snapshot=None)

        first, last = settings["leaves_to_search"], settings["leaves"]
        settings["leaves_to_search"] = fewest_lists(visiting, exact, queries, first=first, last=last)
    (directory / "scann").mkdir()
    raw.serialize(str(directory / "scann"), relative_path=True)
    np.save(directory / "ids.npy", ids, allow_pickle=False)
    return ScannSearcher(raw, ids, dim=dim, settings=settings, snapshot=None), settings


def scann_settings(rows: int, dim: int) -> dict[str, Any]:
    """Sizes by rule: about sqrt(n) leaves; coarser blocks and a lower threshold as vectors get longer.

    The well-known threshold of 0.2 is for 100 numbers; at 768 it caps recall near 0.8. The rule
    T = 0.2 (128 / d)^0.75 is TheCleaners/scann-core's (docs/tuning.md).
    """
    if rows < EXACT_BELOW:
        return {"leaves": 0, "leaves_to_search": 0}
    leaves = round(math.sqrt(rows))
    return {
        "leaves": leaves,
        "leaves_to_search": max(1, leaves // 20),
        "dims_per_block": 2 if dim <= 256 else 3 if dim <= 512 else 4,
        "threshold": round(0.2 * min(1.0, 128 / dim) ** 0.75, 4),
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
