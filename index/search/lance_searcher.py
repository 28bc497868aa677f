"""Lance's inverted lists on disk: for vectors that do not fit in memory, and for machines that ScaNN has no wheel for.

Five bits a number (IVF_RQ) find candidates, full vectors score them. Lance reports dot distances, 1 - <q, v>; they
leave this file as inner products.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from index.errors import KnowledgeBaseError
from index.search.searcher import (
    STREAM_ROWS,
    Ids,
    Queries,
    Scores,
    SearcherManifest,
    VectorRows,
    ascending_ids,
    check_queries,
    check_rows,
    padded,
    reorder_for,
)
from index.search.sizes import processors

if TYPE_CHECKING:
    from index.search.sizes import Structure

_TABLE = "vectors.lance"
_LISTED_FROM = 5_000  # rows; below that Lance scans them all
_ROWS_PER_LIST = 256  # at least: Lance trains no list with fewer
_REORDER = 50  # candidates scored by their full vectors when nothing was calibrated; more when more is asked for


class LanceSearcher:
    """Approximate search by inner product over a Lance data set of its own."""

    def __init__(  # the ids are held in memory, eight bytes a row; the vectors are not
        self, dataset: Any, ids: Int64[ndarray, " rows"], *, dim: int, settings: dict[str, Any], snapshot: int | None
    ):
        self._dataset = dataset
        self.ids = ids
        self.snapshot = snapshot
        self.settings = settings
        self._dim = dim

    @classmethod
    def open(cls, directory: Path, manifest: SearcherManifest, *, url: str | None = None) -> "LanceSearcher":
        """Open what `build_lance` wrote, its table at `url` if that is elsewhere. KnowledgeBaseError if it does not."""
        import lance

        try:
            dataset = lance.dataset(f"{url or directory}/{_TABLE}")
            ids = np.load(directory / "ids.npy", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise KnowledgeBaseError(
                f"the searcher in {directory} is not complete; build it again with `radt index build`"
            ) from error
        return cls(dataset, np.sort(ids), dim=manifest.dim, settings=manifest.settings, snapshot=manifest.snapshot)

    @property
    def leaves(self) -> int:
        """How many lists there are; 0 when every row is compared."""
        return int(self.settings["lists"])

    def with_effort(self, leaves_to_search: int, reorder: int) -> "LanceSearcher":
        """The same data set, searched with other settings."""
        settings = {**self.settings, "leaves_to_search": leaves_to_search, "reorder": reorder}
        return LanceSearcher(self._dataset, self.ids, dim=self._dim, settings=settings, snapshot=self.snapshot)

    def search(self, queries: Queries, *, top_k: int, recall_at: int | None = None) -> tuple[Ids, Scores]:
        """As `Searcher.search`. Lance answers one query at a time, so a batch is spread over threads."""
        check_queries(queries, dim=self._dim)
        found, scores = padded(len(queries), top_k)
        wanted = min(top_k, len(self.ids))
        if not len(queries) or not wanted:
            return found, scores
        with ThreadPoolExecutor(min(len(queries), 2 * processors())) as threads:
            answers = threads.map(lambda query: self._nearest(query, wanted, recall_at), queries)
            for row, (ids, values) in enumerate(answers):
                order = np.lexsort((ids, -values))
                found[row, : len(ids)], scores[row, : len(ids)] = ids[order], values[order]
        return found, scores

    def _nearest(self, query: Any, wanted: int, recall_at: int | None) -> tuple[Any, Any]:
        nearest = {"column": "vector", "q": query, "k": wanted, "metric": "dot"}
        if self.leaves:
            # More answers than usual need more lists; all rows need them all.
            share = min(1.0, 2.0 * wanted / len(self.ids))
            lists = self.settings.get("leaves_to_search") or self.settings["lists_to_search"]  # the name of format 1
            nearest["nprobes"] = max(lists, math.ceil(share * self.leaves))
            reorder = reorder_for(wanted, self.settings.get("reorder", _REORDER), recall_at=recall_at)
            nearest["refine_factor"] = math.ceil(reorder / wanted)
        table = self._dataset.scanner(columns=["id", "_distance"], nearest=nearest).to_table()
        return table["id"].to_numpy(), (1.0 - table["_distance"].to_numpy()).astype(np.float32)


def build_lance(rows: VectorRows, directory: Path, structure: "Structure") -> LanceSearcher:
    """Build into `directory`; the rows are streamed and never all in memory. It is not calibrated yet."""
    import lance
    import pyarrow as pa

    schema = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float32(), rows.dim))])
    ids: list[Any] = []
    reader = pa.RecordBatchReader.from_batches(schema, _arrow_batches(rows, schema, ids))
    dataset = lance.write_dataset(reader, str(directory / _TABLE), schema=schema)
    ascending = ascending_ids(ids)
    np.save(directory / "ids.npy", ascending, allow_pickle=False)
    settings = lance_settings(structure.rows, structure.dim)
    if settings["lists"]:
        dataset = dataset.create_index("vector", settings["index"], metric="dot", num_partitions=settings["lists"])
    return LanceSearcher(dataset, ascending, dim=structure.dim, settings=settings, snapshot=None)


def lance_settings(rows: int, dim: int) -> dict[str, Any]:
    """About sqrt(n) lists, none for few rows; codes of rotated bits, of whole bytes where the width does not allow it.

    100,000 x 512 on two processors: IVF_RQ took 9 s to build and 34 MB, IVF_SQ 6 s and 51 MB, IVF_PQ (64 codes) 94 s
    and 8 MB, and recall with exact scores for the best 50 was the same within 0.01 at equal numbers of lists.
    """
    lists = 0 if rows < _LISTED_FROM else max(1, min(round(math.sqrt(rows)), rows // _ROWS_PER_LIST))
    settings: dict[str, Any] = {"lists": lists, "leaves_to_search": max(1, lists // 20) if lists else 0}
    if lists:
        settings.update(index="IVF_RQ" if dim % 8 == 0 else "IVF_SQ", reorder=_REORDER)
    return settings


def _arrow_batches(rows: VectorRows, schema: Any, ids: list[Any]) -> Iterator[Any]:
    """The rows as Arrow has them; `ids` collects theirs."""
    import pyarrow as pa

    for some, vectors in rows.vector_batches(STREAM_ROWS):
        check_rows(some, vectors)
        ids.append(some)
        column = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).ravel()), rows.dim)
        yield pa.record_batch([pa.array(some), column], schema=schema)
