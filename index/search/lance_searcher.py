"""Lance's inverted lists on disk: for vectors that do not fit in memory, and for machines that ScaNN has no wheel for.

One byte a number (IVF_SQ) to find candidates, full vectors to score them. Lance reports dot distances, 1 - <q, v>;
they leave this file as inner products.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from index.errors import KnowledgeBaseError
from index.search.searcher import (
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

_TABLE = "vectors.lance"
_LISTED_FROM = 5_000  # rows; below that Lance scans them all
_ROWS_PER_LIST = 256  # at least: Lance trains no list with fewer
_REFINE = 5  # candidates scored by their full vectors, per answer


class LanceSearcher:
    """Approximate search by inner product over a Lance data set of its own."""

    def __init__(  # the ids are held in memory, eight bytes a row; the vectors are not
        self, dataset: Any, ids: Int64[ndarray, " rows"], *, dim: int, settings: dict[str, Any], snapshot: int | None
    ):
        self._dataset = dataset
        self.ids = ids
        self.snapshot = snapshot
        self._dim = dim
        self._lists: int = settings["lists"]  # 0: every row is compared
        self._lists_to_search: int = settings["lists_to_search"]

    @classmethod
    def open(cls, directory: Path, manifest: SearcherManifest) -> "LanceSearcher":
        """Open what `build_lance` wrote. KnowledgeBaseError when it does not open."""
        import lance

        try:
            dataset = lance.dataset(str(directory / _TABLE))
            ids = np.load(directory / "ids.npy", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise KnowledgeBaseError(
                f"the searcher in {directory} is not complete; build it again with `radt index build`"
            ) from error
        return cls(dataset, ids, dim=manifest.dim, settings=manifest.settings, snapshot=manifest.snapshot)

    def search(self, queries: Queries, *, top_k: int) -> tuple[Ids, Scores]:
        """As `Searcher.search`."""
        check_queries(queries, dim=self._dim)
        found, scores = padded(len(queries), top_k)
        wanted = min(top_k, len(self.ids))
        for row, query in enumerate(queries):
            ids, values = self._nearest(query, wanted)
            order = np.lexsort((ids, -values))
            found[row, : len(ids)], scores[row, : len(ids)] = ids[order], values[order]
        return found, scores

    def _nearest(self, query: Any, wanted: int) -> tuple[Any, Any]:
        nearest = {"column": "vector", "q": query, "k": wanted, "metric": "dot"}
        if self._lists:
            # More answers than usual need more lists; all rows need them all.
            share = min(1.0, 2.0 * wanted / len(self.ids))
            nearest["nprobes"] = max(self._lists_to_search, math.ceil(share * self._lists))
            nearest["refine_factor"] = _REFINE
        table = self._dataset.scanner(columns=["id", "_distance"], nearest=nearest).to_table()
        return table["id"].to_numpy(), (1.0 - table["_distance"].to_numpy()).astype(np.float32)


def build_lance(
    ids: Int64[ndarray, " rows"], vectors: Vectors, directory: Path, *, queries: Queries, exact: ExactSearcher
) -> tuple[LanceSearcher, dict[str, Any]]:
    """Build into `directory` and choose how many lists to read, so that `queries` find 97 % of the true ten."""
    import lance
    import pyarrow as pa

    check_rows(ids, vectors)
    rows, dim = vectors.shape
    table = pa.table({"id": ids, "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)})
    dataset = lance.write_dataset(table, str(directory / _TABLE))
    np.save(directory / "ids.npy", ids, allow_pickle=False)
    lists = 0 if rows < _LISTED_FROM else max(1, min(round(math.sqrt(rows)), rows // _ROWS_PER_LIST))
    settings: dict[str, Any] = {"lists": lists, "lists_to_search": max(1, lists // 20) if lists else 0}
    if lists:
        dataset = dataset.create_index("vector", "IVF_SQ", metric="dot", num_partitions=lists)

        def reading(lists_to_search: int) -> LanceSearcher:
            trial = {**settings, "lists_to_search": lists_to_search}
            return LanceSearcher(dataset, ids, dim=dim, settings=trial, snapshot=None)

        settings["lists_to_search"] = fewest_lists(reading, exact, queries, first=lists // 20, last=lists)
    return LanceSearcher(dataset, ids, dim=dim, settings=settings, snapshot=None), settings
