"""Searchers: query vectors in, ids and inner products out. The exact one is the oracle that every other is held to.

A searcher is a snapshot: it knows the rows it was built from and nothing of later ones. The retriever adds what is
newer and leaves out what is gone. A built searcher is a folder with `manifest.json` and files of its own kind.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from index.atomic import new_folder
from index.config import from_dict, to_dict
from index.errors import ConfigError, KnowledgeBaseError
from index.search.ids import contains

if TYPE_CHECKING:
    from index.search.sizes import Structure
    from index.store import PairStore

Ids: TypeAlias = Int64[ndarray, "q k"]  # -1 where a row has fewer than k answers
Scores: TypeAlias = Float32[ndarray, "q k"]  # -inf there
Vectors: TypeAlias = Float32[ndarray, "rows d"]
Queries: TypeAlias = Float32[ndarray, "q d"]
SearcherKind = Literal["exact", "scann", "lance"]

NO_ID = -1
EXACT_BELOW = 20_000  # rows; ScaNN's own rule of thumb (google-research/scann, docs/algorithms.md)
RECALL_AT = 10
DEFAULT_RECALL = 0.95
_BLOCK_SCORES = 1 << 24  # scores held at once by exact search: 64 MiB of float32
STREAM_ROWS = 1 << 15  # rows read at once: 64 MiB of 512 numbers
_RECALL_QUERIES = 200
_FEWEST_CAPTIONS = 30  # fewer than these say little of a recall, so shifted rows stand in
_ASKED_BYTES = 256 << 20  # of queries and their answers, for which shards that are not in memory are loaded once
_ANSWER_BYTES = 12
_DEPTH_GROWTH = 0.9  # of the candidates that need exact scores, with the answers wanted: see `reorder_for`
_EQUAL_SCORES = 1e-5  # float32 sums differ with the order of their terms
_QUERY_SHIFT = 0.5  # length of the noise added to a unit row to make a query, see `shifted_queries`


@runtime_checkable  # for the shape checks of the test run
class Searcher(Protocol):
    """Nearest rows by inner product."""

    ids: Int64[ndarray, " rows"]  # what it was built from, ascending
    snapshot: int | None  # the store's `high_water` then; None: not known

    def search(self, queries: Queries, *, top_k: int, recall_at: int | None = None) -> tuple[Ids, Scores]:
        """Ids and inner products, best first; rows with fewer than `top_k` answers are padded with -1 and -inf.

        An approximate searcher owes the first `recall_at` of them, or else all, the recall that it was calibrated for.
        """
        ...


@runtime_checkable
class VectorRows(Protocol):
    """Rows to build from or to compare, in one order however often they are read. A `PairStore` is one."""

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        ...

    def count(self, where: str | None = None) -> int:
        """How many rows there are, or how many the SQL filter lets through."""
        ...

    def vector_batches(self, rows: int, where: str | None = None) -> Iterator[tuple[Any, Any]]:
        """Ids int64 [n] and vectors float32 [n, d], at most `rows` at once; each row once."""
        ...


class ArrayRows:
    """Rows that are in memory."""

    def __init__(self, ids: Int64[ndarray, " rows"], vectors: Vectors):
        self.ids, self.vectors = ids, vectors

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self.vectors.shape[1])

    def count(self, where: str | None = None) -> int:
        """Number of rows; arrays know no filter."""
        assert where is None, where
        return len(self.ids)

    def vector_batches(self, rows: int, where: str | None = None) -> Iterator[tuple[Any, Any]]:
        """As `VectorRows.vector_batches`."""
        assert where is None, where
        for start in range(0, len(self.ids), rows):
            yield self.ids[start : start + rows], self.vectors[start : start + rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """What a searcher finds, and how fast, when it searches so many leaves (lists) and scores so many rows exactly."""

    leaves_to_search: int
    reorder: int
    recall_at_10: float
    qps: float  # queries a second in one batch, on the machine and beside the load of the build


@dataclass(frozen=True, kw_only=True, slots=True)
class SearcherManifest:
    """What was built, from which rows, and how well it finds what exact search finds.

    One half of the held-out queries chose the settings; `recall_at_10` and `curve` are measured with the other half,
    for which more effort was taken where the chosen one found too little.
    """

    kind: SearcherKind
    rows: int
    dim: int
    recall_at_10: float
    snapshot: int | None = None  # the store's `high_water` when its rows were read
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    target_recall: float = DEFAULT_RECALL
    calibrated_on: Literal["", "captions", "shifted rows"] = ""  # "": exact, nothing to calibrate
    curve: tuple[CurvePoint, ...] = ()  # at the chosen reorder depth, by leaves
    warning: str = ""  # a sentence when the target is not reached
    ram: int | None = None  # bytes it was told to stay in

    def write(self, directory: Path) -> None:
        """Write `manifest.json`."""
        (directory / "manifest.json").write_text(json.dumps(to_dict(self), indent=2) + "\n")

    @classmethod
    def read(cls, directory: Path) -> "SearcherManifest":
        """Read `manifest.json`. KnowledgeBaseError when it is not there or does not read."""
        try:
            return from_dict(cls, json.loads((directory / "manifest.json").read_text()))
        except (OSError, json.JSONDecodeError, ConfigError) as error:
            raise KnowledgeBaseError(
                f"the searcher in {directory} cannot be read ({error}); build it again with `radt index build`"
            ) from error


class ExactSearcher:
    """Every inner product, in blocks. Equal scores come in order of id, alone or in a batch alike."""

    def __init__(self, ids: Int64[ndarray, " rows"], vectors: Vectors, *, snapshot: int | None = None):
        check_rows(ids, vectors)
        self.snapshot = snapshot
        order = np.argsort(ids, kind="stable")
        in_order = bool((order[1:] > order[:-1]).all())
        self.ids: Int64[ndarray, " rows"] = ids if in_order else ids[order]
        self.vectors: Vectors = np.ascontiguousarray(vectors if in_order else vectors[order])
        self._longest = float(np.sqrt(np.einsum("nd,nd->n", vectors, vectors).max(initial=0.0)))

    def search(
        self,
        queries: Queries,
        *,
        top_k: int,
        recall_at: int | None = None,
        above: Float32[ndarray, " q"] | None = None,
    ) -> tuple[Ids, Scores]:
        """As `Searcher.search`. Rows that score less than `above` may be left out, which saves sorting them."""
        check_queries(queries, dim=self.vectors.shape[1])
        found, scores = padded(len(queries), top_k)
        if not len(self.ids):
            return found, scores
        floors = np.full(len(queries), -np.inf, np.float32) if above is None else above
        block = max(1, _BLOCK_SCORES // len(self.ids))
        for start in range(0, len(queries), block):
            products = queries[start : start + block] @ self.vectors.T
            for row, rough in enumerate(products, start=start):
                ids, exact = self._best(queries[row], rough, top_k, floor=float(floors[row]))
                found[row, : len(ids)], scores[row, : len(ids)] = ids, exact
        return found, scores

    def scores(self, query: Float32[ndarray, " d"], ids: Int64[ndarray, " k"]) -> Float32[ndarray, " k"]:
        """Inner products with the named rows; -inf for an id that is not here."""
        scores = np.full(len(ids), -np.inf, dtype=np.float32)
        if len(self.ids):
            positions = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
            here = self.ids[positions] == ids
            scores[here] = inner_products(query, self.vectors[positions[here]])
        return scores

    def subset(self, ids: Int64[ndarray, " k"]) -> "ExactSearcher":
        """A searcher over those of its rows that are named."""
        kept = np.searchsorted(self.ids, ids[contains(self.ids, ids)])
        return ExactSearcher(self.ids[kept], self.vectors[kept], snapshot=self.snapshot)

    def _best(
        self, query: Float32[ndarray, " d"], rough: Float32[ndarray, " rows"], top_k: int, *, floor: float
    ) -> tuple[Int64[ndarray, " k"], Float32[ndarray, " k"]]:
        # A matrix product rounds differently with the shape of its batch. Taking a little more than the best top_k
        # and scoring those again one row at a time makes the answer independent of the other queries.
        margin = 1e-5 * self._longest * float(np.linalg.norm(query))
        (positions,) = np.nonzero(rough >= floor - margin)
        if top_k < len(positions):
            scores = rough[positions]
            threshold = np.partition(scores, len(scores) - top_k)[len(scores) - top_k] - margin
            positions = positions[scores >= threshold]
        everything = len(positions) == len(self.vectors)  # as when all are ranked: taking them would copy them
        exact = inner_products(query, self.vectors if everything else self.vectors[positions])
        best = np.lexsort((positions, -exact))[:top_k]
        return self.ids[positions[best]], exact[best]


class ExactStream:
    """Exact search over rows that need not fit in memory: block by block, the answers of `ExactSearcher` to the bit.

    `where` is an SQL filter; of what it leaves, only rows with one of the ascending ids `within` count, if given.
    """

    def __init__(
        self,
        rows: VectorRows,
        where: str | None = None,
        *,
        within: Int64[ndarray, " n"] | None = None,
        rows_at_once: int = STREAM_ROWS,
    ):
        self._rows, self._where, self._within, self._rows_at_once = rows, where, within, rows_at_once

    def search(self, queries: Queries, *, top_k: int, recall_at: int | None = None) -> tuple[Ids, Scores]:
        """As `Searcher.search`; every call reads all rows, so ask for many queries at once."""
        check_queries(queries, dim=self._rows.dim)
        held = [padded(len(queries), top_k)]
        for ids, vectors in self._rows.vector_batches(self._rows_at_once, self._where):
            if self._within is not None:
                kept = contains(self._within, ids)
                ids, vectors = ids[kept], vectors[kept]
            wanted = max(1, min(top_k, len(ids)))
            held.append(ExactSearcher(ids, vectors).search(queries, top_k=wanted, above=held[0][1][:, -1]))
            if sum(found.shape[1] for found, _ in held) >= 2 * top_k:  # a long list is not sorted for every block
                held = [merge_answers(held, top_k=top_k)]
        return merge_answers(held, top_k=top_k)


class StreamSearcher:
    """Compares every row of a store and holds none: for a state that no searcher was built for."""

    def __init__(self, store: "PairStore"):
        self._rows = store
        self.ids: Int64[ndarray, " rows"] = np.sort(store.matching_ids())
        self.snapshot: int | None = store.high_water

    def search(self, queries: Queries, *, top_k: int, recall_at: int | None = None) -> tuple[Ids, Scores]:
        """As `ExactStream.search`."""
        return ExactStream(self._rows).search(queries, top_k=top_k)


def merge_answers(answers: Sequence[tuple[Any, Any]], *, top_k: int) -> tuple[Ids, Scores]:
    """The best of several answers, ids and scores [q, any number], over disjoint rows; equal scores by id."""
    ids = np.concatenate([found for found, _ in answers], axis=1)
    scores = np.concatenate([values for _, values in answers], axis=1)
    order = np.lexsort((ids, -scores), axis=1)[:, :top_k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)


def inner_products(query: Float32[ndarray, " d"], vectors: Vectors) -> Float32[ndarray, " rows"]:
    """Inner products summed in float64: the same for a row whatever rows stand beside it."""
    return np.einsum("nd,d->n", vectors, query, dtype=np.float64).astype(np.float32)


def build_searcher(
    kind: Literal["auto", "exact", "scann", "lance"],
    rows: VectorRows,
    directory: Path,
    *,
    seed: int = 0,
    queries: Queries | None = None,
    snapshot: int | None = None,
    target_recall: float = DEFAULT_RECALL,
    ram: int | None = None,
) -> SearcherManifest:
    """Build a searcher into `directory`, whole or not at all, and measure it beside exact search.

    The rows are streamed: `ram` bytes, by default most of what this machine has, bound what building and serving hold
    (see `sizes.choose_structure`, which also says what `auto` is). Of the held-out `queries` one half chooses the
    fastest settings that find `target_recall` of the true ten, the other half measures them (see `calibrate`). They
    should be text vectors, because those lie elsewhere than image vectors do; with fewer than 30, shifted rows stand
    in. A target that cannot be reached is said in `warning`. `snapshot` is the store's `high_water` when the rows were
    read: the retriever compares every row that is newer.
    """
    from index.search.sizes import choose_structure

    if kind not in ("auto", *get_args(SearcherKind)):
        raise ConfigError(f"searcher is one of auto, {', '.join(get_args(SearcherKind))}, got {kind!r}")
    if not 0 < target_recall <= 1:
        raise ConfigError(f"recall is a share of 1, got {target_recall}")
    structure = choose_structure(rows.count(), rows.dim, ram=ram, kind=kind)
    manifest = SearcherManifest(
        kind=structure.kind,
        rows=structure.rows,
        dim=rows.dim,
        recall_at_10=1.0,
        snapshot=snapshot,
        seed=seed,
        target_recall=target_recall,
        ram=ram,
    )
    with new_folder(directory) as temporary:
        if structure.kind == "exact" or not structure.rows:
            check_all_rows(rows)
        else:
            manifest = _build_approximate(manifest, structure, rows, temporary, queries=queries)
        manifest.write(temporary)
    return manifest


def is_as_planned(manifest: SearcherManifest, structure: "Structure", *, target_recall: float) -> bool:
    """Whether a searcher that was built before is of this structure and was set up for this recall."""
    vectors, is_resident = manifest.settings.get("vectors", "memory"), manifest.settings.get("is_resident", True)
    if manifest.kind != structure.kind or structure.kind == "exact":
        return manifest.kind == structure.kind
    is_alike = structure.kind == "lance" or (vectors, is_resident) == (structure.vectors, structure.is_resident)
    return is_alike and manifest.target_recall == target_recall


def open_searcher(directory: Path, store: "PairStore", *, url: str | None = None) -> Searcher:
    """Open what `build_searcher` wrote. Without a built searcher, or with an exact one, every row is compared.

    So it is where ScaNN cannot be imported: the searcher then says so in its `note` once it is asked.

    `url` is where the original lies of which `directory` is a copy without its tables.
    """
    manifest = SearcherManifest.read(directory) if directory.exists() else None
    if manifest is None or manifest.kind == "exact" or not manifest.rows:
        return exact_searcher(store)
    if manifest.kind == "scann":
        from index.search.scann_searcher import ScannSearcher

        return ScannSearcher.open(directory, manifest, table=store)
    from index.search.lance_searcher import LanceSearcher

    return LanceSearcher.open(directory, manifest, url=url)


def exact_searcher(store: "PairStore", where: str | None = None) -> ExactSearcher:
    """Exact search over the rows of the store as they are now, or over those that a filter leaves."""
    return ExactSearcher(*store.ids_and_vectors(where), snapshot=store.high_water)


def is_resident(searcher: Searcher) -> bool:
    """Whether it is in memory; else every search loads all its shards anew, one after another."""
    return bool(getattr(searcher, "settings", {}).get("is_resident", True))


def queries_at_once(searcher: Searcher, dim: int, *, top_k: int, usual: int) -> int:
    """How many queries to ask together: as usual or, of a searcher that is not resident, 256 MB with their answers."""
    return usual if is_resident(searcher) else max(usual, _ASKED_BYTES // (4 * dim + _ANSWER_BYTES * top_k))


def recall(searcher: Searcher, exact: ExactSearcher, queries: Queries, *, top_k: int = RECALL_AT) -> float:
    """Mean share of the true `top_k` that `searcher` finds."""
    top_k = min(top_k, len(exact.ids))
    if not len(queries) or not top_k:
        return 1.0
    _, found = searcher.search(queries, top_k=top_k)
    _, truth = exact.search(queries, top_k=top_k)
    return recall_of(found, truth)


def reorder_for(wanted: int, reorder: int, *, recall_at: int | None = None) -> int:
    """How many candidates to score exactly for `wanted` answers, when `reorder` do for the ten of the calibration.

    The first `recall_at` of the answers, or else all, are to be found as surely as those ten.

    Recall of as many as are asked for, overlapping clusters of 512 numbers: 50 for 10, 100 for 20, 200 for 50 and 400
    for 100 find 0.95; twice as many as are wanted would find 0.88 of 50 and 0.89 of 100.
    """
    sure = wanted if recall_at is None else min(wanted, recall_at)
    return max(reorder, 2 * wanted, math.ceil(reorder * (sure / RECALL_AT) ** _DEPTH_GROWTH))


def recall_of(found: Scores, truth: Scores) -> float:
    """Mean share of answers that score as high as the last true one does.

    By scores and not by ids: of a picture that is there a hundred times, any ten copies are the true ten.
    """
    return float((found >= truth[:, -1:] - _EQUAL_SCORES).mean())


def shifted_queries(vectors: Vectors, *, seed: int, num: int = _RECALL_QUERIES) -> Queries:
    """Unit queries that lie near rows and not on them: text vectors do, and measuring with the rows flatters."""
    generator = np.random.default_rng(seed)
    num = min(num, len(vectors))
    rows = vectors[generator.choice(len(vectors), size=num, replace=False)]
    noise = generator.standard_normal(rows.shape, dtype=np.float32)
    noise *= _QUERY_SHIFT / np.maximum(np.linalg.norm(noise, axis=1, keepdims=True), 1e-12)
    queries = rows + noise
    return queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)


def padded(num_queries: int, top_k: int) -> tuple[Ids, Scores]:
    """An answer in which nothing has been found yet."""
    if top_k < 1:
        raise ConfigError(f"top_k must be at least 1, got {top_k}")
    return (
        np.full((num_queries, top_k), NO_ID, dtype=np.int64),
        np.full((num_queries, top_k), -np.inf, dtype=np.float32),
    )


def check_rows(ids: Int64[ndarray, " rows"], vectors: Vectors) -> None:
    """One float32 vector for each id, no id twice, and no NaN or infinity: ScaNN ends the process on those."""
    assert ids.dtype == np.int64, ids.dtype
    assert vectors.dtype == np.float32, vectors.dtype
    assert vectors.ndim == 2, vectors.shape
    assert len(ids) == len(vectors), (len(ids), len(vectors))
    ascending_ids([ids])
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise KnowledgeBaseError(
            f"the vector of id {ids[~finite][0]} is not finite ({(~finite).sum()} such rows); remove them with "
            "`radt index remove --id`"
        )


def check_queries(queries: Queries, *, dim: int) -> None:
    """Finite float32 rows of the right width."""
    assert queries.dtype == np.float32, queries.dtype
    assert queries.ndim == 2, queries.shape
    if queries.shape[1] != dim:
        raise KnowledgeBaseError(
            f"the query vector has {queries.shape[1]} numbers and the knowledge base {dim}; use the model it was "
            "built with"
        )
    if not np.isfinite(queries).all():
        raise KnowledgeBaseError("the query vector is not finite; check the model that made it")


def check_all_rows(rows: VectorRows) -> Int64[ndarray, " rows"]:
    """`check_rows` for rows that are streamed: their ids, ascending."""
    ids = [np.empty(0, np.int64)]
    for some, vectors in rows.vector_batches(STREAM_ROWS):
        check_rows(some, vectors)
        ids.append(some)
    return ascending_ids(ids)


def ascending_ids(parts: Sequence[Any]) -> Int64[ndarray, " rows"]:
    """All ids, sorted. KnowledgeBaseError when one appears twice."""
    ids = np.sort(np.concatenate(parts))
    twice = int((ids[1:] == ids[:-1]).sum())
    if twice:
        raise KnowledgeBaseError(f"{twice} ids appear twice; check with `radt index verify`")
    return ids


def _build_approximate(
    manifest: SearcherManifest,
    structure: "Structure",
    rows: VectorRows,
    directory: Path,
    *,
    queries: Queries | None,
) -> SearcherManifest:
    from index.search.calibration import calibrate

    searcher = _builder(structure.kind)(rows, directory, structure)
    is_text = queries is not None and len(queries) >= _FEWEST_CAPTIONS
    if queries is None or not is_text:
        queries = shifted_queries(_sample(rows, _RECALL_QUERIES, seed=manifest.seed), seed=manifest.seed)
    _, truth = ExactStream(rows).search(queries, top_k=min(RECALL_AT, structure.rows))
    found = calibrate(searcher, queries, truth, target=manifest.target_recall)
    return replace(
        manifest,
        recall_at_10=found.recall_at_10,
        settings={**searcher.settings, **found.settings},
        calibrated_on="captions" if is_text else "shifted rows",
        curve=found.curve,
        warning=found.warning,
    )


def _builder(kind: SearcherKind) -> Callable[[VectorRows, Path, "Structure"], Any]:
    if kind == "scann":
        from index.search.scann_searcher import build_scann

        return build_scann
    from index.search.lance_searcher import build_lance

    return build_lance


def _sample(rows: VectorRows, num: int, *, seed: int) -> Vectors:
    """Some of the rows, chosen evenly; streamed."""
    total = rows.count()
    chosen = np.sort(np.random.default_rng(seed).choice(total, size=min(num, total), replace=False))
    picked, start = [np.empty((0, rows.dim), np.float32)], 0
    for ids, vectors in rows.vector_batches(STREAM_ROWS):
        here = chosen[(chosen >= start) & (chosen < start + len(ids))] - start
        picked.append(vectors[here])
        start += len(ids)
    return np.concatenate(picked)
