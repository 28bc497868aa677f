"""Searchers: query vectors in, ids and inner products out. The exact one is the oracle that every other is held to.

A searcher is a snapshot: it knows the rows it was built from and nothing of later ones. The retriever adds what is
newer and leaves out what is gone. A built searcher is a folder with `manifest.json` and files of its own kind.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from index.atomic import new_folder
from index.config import from_dict, to_dict
from index.errors import ConfigError, KnowledgeBaseError, MissingExtraError

if TYPE_CHECKING:
    from index.store import PairStore

Ids: TypeAlias = Int64[ndarray, "q k"]  # -1 where a row has fewer than k answers
Scores: TypeAlias = Float32[ndarray, "q k"]  # -inf there
Vectors: TypeAlias = Float32[ndarray, "rows d"]
Queries: TypeAlias = Float32[ndarray, "q d"]
SearcherKind = Literal["exact", "scann", "lance"]

NO_ID = -1
EXACT_BELOW = 20_000  # rows; ScaNN's own rule of thumb (google-research/scann, docs/algorithms.md)
_BLOCK_SCORES = 1 << 24  # scores held at once by exact search: 64 MiB of float32
_RECALL_QUERIES = 200
_TARGET_RECALL = 0.97  # a little above the promised 0.95: queries of tomorrow are not those calibrated with
_QUERY_SHIFT = 0.5  # length of the noise added to a unit row to make a query, see `shifted_queries`


@runtime_checkable  # for the shape checks of the test run
class Searcher(Protocol):
    """Nearest rows by inner product."""

    ids: Int64[ndarray, " rows"]  # what it was built from, ascending
    snapshot: int | None  # the store's `high_water` then; None: not known

    def search(self, queries: Queries, *, top_k: int) -> tuple[Ids, Scores]:
        """Ids and inner products, best first; rows with fewer than `top_k` answers are padded with -1 and -inf."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SearcherManifest:
    """What was built, from which rows, and how well it finds what exact search finds."""

    kind: SearcherKind
    rows: int
    dim: int
    recall_at_10: float
    snapshot: int | None = None  # the store's `high_water` when its rows were read
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

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

    def search(self, queries: Queries, *, top_k: int) -> tuple[Ids, Scores]:
        """As `Searcher.search`."""
        check_queries(queries, dim=self.vectors.shape[1])
        found, scores = padded(len(queries), top_k)
        if not len(self.ids):
            return found, scores
        block = max(1, _BLOCK_SCORES // len(self.ids))
        for start in range(0, len(queries), block):
            products = queries[start : start + block] @ self.vectors.T
            for row, rough in enumerate(products, start=start):
                ids, exact = self._best(queries[row], rough, top_k)
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
        kept = np.isin(self.ids, ids, assume_unique=True)
        return ExactSearcher(self.ids[kept], self.vectors[kept], snapshot=self.snapshot)

    def _best(
        self, query: Float32[ndarray, " d"], rough: Float32[ndarray, " rows"], top_k: int
    ) -> tuple[Int64[ndarray, " k"], Float32[ndarray, " k"]]:
        # A matrix product rounds differently with the shape of its batch. Taking a little more than the best top_k
        # and scoring those again one row at a time makes the answer independent of the other queries.
        positions = np.arange(len(rough))
        if top_k < len(rough):
            margin = 1e-5 * self._longest * float(np.linalg.norm(query))
            threshold = np.partition(rough, len(rough) - top_k)[len(rough) - top_k] - margin
            (positions,) = np.nonzero(rough >= threshold)
        exact = inner_products(query, self.vectors[positions])
        best = np.lexsort((positions, -exact))[:top_k]
        return self.ids[positions[best]], exact[best]


def inner_products(query: Float32[ndarray, " d"], vectors: Vectors) -> Float32[ndarray, " rows"]:
    """Inner products summed in float64: the same for a row whatever rows stand beside it."""
    return np.einsum("nd,d->n", vectors, query, dtype=np.float64).astype(np.float32)


def build_searcher(
    kind: Literal["auto", "exact", "scann", "lance"],
    ids: Int64[ndarray, " rows"],
    vectors: Vectors,
    directory: Path,
    *,
    seed: int = 0,
    queries: Queries | None = None,
    snapshot: int | None = None,
) -> SearcherManifest:
    """Build a searcher into `directory`, whole or not at all, and measure it beside exact search.

    `queries` are the held-out queries to measure with: text vectors if there are any, because they lie elsewhere than
    image vectors do; without them, shifted rows stand in. `snapshot` is the store's `high_water` when the rows were
    read: the retriever compares every row that is newer. `auto` is exact below 20,000 rows, then ScaNN where it can
    be imported, else Lance.
    """
    if kind not in ("auto", *get_args(SearcherKind)):
        raise ConfigError(f"searcher is one of auto, {', '.join(get_args(SearcherKind))}, got {kind!r}")
    check_rows(ids, vectors)
    chosen = choose_kind(len(ids)) if kind == "auto" else kind
    if queries is None:
        queries = shifted_queries(vectors, seed=seed)
    with new_folder(directory) as temporary:
        manifest = SearcherManifest(
            kind=chosen, rows=len(ids), dim=vectors.shape[1], recall_at_10=1.0, snapshot=snapshot, seed=seed
        )
        if chosen != "exact" and len(ids):
            exact = ExactSearcher(ids, vectors)
            # One half of the queries sets the searcher up, the other measures it.
            searcher, settings = _build_approximate(chosen, exact, temporary, queries=queries[::2])
            manifest = replace(manifest, recall_at_10=recall(searcher, exact, queries[1::2]), settings=settings)
        manifest.write(temporary)
    return manifest


def open_searcher(directory: Path, store: "PairStore") -> Searcher:
    """Open what `build_searcher` wrote. Without a built searcher, or with an exact one, every row is compared."""
    manifest = SearcherManifest.read(directory) if directory.exists() else None
    if manifest is None or manifest.kind == "exact" or not manifest.rows:
        return exact_searcher(store)
    if manifest.kind == "scann":
        from index.search.scann_searcher import ScannSearcher

        return ScannSearcher.open(directory, manifest)
    from index.search.lance_searcher import LanceSearcher

    return LanceSearcher.open(directory, manifest)


def exact_searcher(store: "PairStore", where: str | None = None) -> ExactSearcher:
    """Exact search over the rows of the store as they are now, or over those that a filter leaves."""
    return ExactSearcher(*store.ids_and_vectors(where), snapshot=store.high_water)


def choose_kind(rows: int) -> SearcherKind:
    """What `auto` means for this many rows on this machine."""
    if rows < EXACT_BELOW:
        return "exact"
    from index.search.scann_searcher import import_scann

    try:
        import_scann()
    except MissingExtraError:
        return "lance"
    return "scann"


def recall(searcher: Searcher, exact: ExactSearcher, queries: Queries, *, top_k: int = 10) -> float:
    """Mean share of the true `top_k` that `searcher` finds."""
    top_k = min(top_k, len(exact.ids))
    if not len(queries) or not top_k:
        return 1.0
    found, _ = searcher.search(queries, top_k=top_k)
    truth, _ = exact.search(queries, top_k=top_k)
    return float(np.mean([np.isin(t, f).mean() for t, f in zip(truth, found, strict=True)]))


def fewest_lists(
    make: Callable[[int], Searcher], exact: ExactSearcher, queries: Queries, *, first: int, last: int
) -> int:
    """The fewest lists (leaves, partitions) to read that reach the target recall, tried from `first` up by halves."""
    lists = max(1, first)
    while lists < last and recall(make(lists), exact, queries) < _TARGET_RECALL:
        lists = max(lists + 1, round(1.5 * lists))
    return min(lists, last)


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
    if len(np.unique(ids)) != len(ids):
        raise KnowledgeBaseError(f"{len(ids) - len(np.unique(ids))} ids appear twice; check with `radt index verify`")
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


def _build_approximate(
    kind: SearcherKind, exact: ExactSearcher, directory: Path, *, queries: Queries
) -> tuple[Searcher, dict[str, Any]]:
    if kind == "scann":
        from index.search.scann_searcher import build_scann

        return build_scann(exact.ids, exact.vectors, directory, queries=queries, exact=exact)
    from index.search.lance_searcher import build_lance

    return build_lance(exact.ids, exact.vectors, directory, queries=queries, exact=exact)
