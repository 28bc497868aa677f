"""Requests: what is asked of the retriever, checked, in the form in which it is passed on."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from index.errors import QueryError, check_filter
from index.search.candidates import Candidates
from index.search.decompose import Corpus, Decompose
from index.search.diversity import check_diversity
from index.search.fusion import FusionRule
from index.search.lexical import Subset
from index.search.searcher import Queries

By = Literal["hybrid", "clip", "bm25", "tfidf"]

_DEPTH = 10  # candidates of each list per hit asked for
_MIN_DEPTH = 100
_MAX_K = 10**12  # its candidates are counted in 64 bits


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """Least scores of a hit: fused, and of each component."""

    score: float | None = None
    clip: float | None = None
    bm25: float | None = None

    def __bool__(self) -> bool:
        return not (self.score is None and self.clip is None and self.bm25 is None)

    def names(self) -> str:
        """Those that are set, as a user calls them."""
        return " and ".join(f"min_{name}" for name in ("score", "clip", "bm25") if getattr(self, name) is not None)

    def end(self, clips: Float64[ndarray, " n"], words: Float64[ndarray, " m"]) -> bool:
        """Whether what lies below the lowest scores of these two lists is below a bound.

        A fused score is not known of what was not found; it is taken to fall as both lists do.
        """
        below_clip = self.clip is not None and len(clips) > 0 and clips[-1] < self.clip
        below_bm25 = self.bm25 is not None and len(words) > 0 and words[-1] < self.bm25
        return self.score is not None or bool(below_clip) or bool(below_bm25)

    def keep(self, candidates: Candidates) -> Candidates:
        """The candidates that reach every bound."""
        kept = np.ones(len(candidates), dtype=bool)
        for values, least in (
            (candidates.score, self.score),
            (candidates.clip, self.clip),
            (candidates.words, self.bm25),
        ):
            if values is not None and least is not None:
                kept &= values >= least
        return candidates.take(kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked of every query of a batch."""

    k: int
    by: By
    fusion: FusionRule = "rrf"
    bounds: Bounds = field(default_factory=Bounds)
    exact: bool = False
    subset: Subset | None = None
    diversity: float = 0.0
    decompose: Decompose = "off"

    @property
    def depth(self) -> int:
        """Candidates of each list."""
        return max(_DEPTH * self.k, _MIN_DEPTH)

    def recall_at(self, depth: int) -> int:
        """Of so many candidates by vector, how many at the top must not be missed.

        The k that will be hits, and more where a longer list is asked for because those were too few. Of the rest it is
        enough to have most: what words find as well is scored exactly anyway. For diversity any of them may be a hit.
        """
        return depth if self.diversity else math.ceil(self.k * depth / self.depth)

    @property
    def uses_clip(self) -> bool:
        """Whether vectors are compared."""
        return self.by in ("hybrid", "clip")

    @property
    def uses_words(self) -> bool:
        """Whether words are compared."""
        return self.by != "clip"


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What is searched for at once: a whole query, or a part of one.

    `vector` is None when no vector is needed, `text` when no words are.
    """

    text: str | None
    vector: Float32[ndarray, " d"] | None
    exclude: Int64[ndarray, " x"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A query of the user's, as what is searched for. `labels` names the parts where it is decomposed by `corpus`."""

    queries: list[Query]
    labels: list[str] = field(default_factory=list)
    corpus: Corpus | None = None


def checked_by(by: By, text: str | None, *, has_vector: bool) -> By:
    """The kind of search that the given parts of a query allow, or a QueryError."""
    if by not in get_args(By):
        raise QueryError(f"by is one of {', '.join(get_args(By))}, got {by!r}")
    if text is not None and not text.strip():
        raise QueryError("the query text is empty; give at least one word")
    if text is None:
        if not has_vector:
            raise QueryError("there is nothing to search for; give a text, an image or a vector")
        if by in ("bm25", "tfidf"):
            raise QueryError(f"searching by {by} needs a text; give one, or search by clip")
        return "clip"
    return by


def check_request(request: Request) -> None:
    """Known words, numbers in range, and no bound on a score that is not computed."""
    if request.k < 1:
        raise QueryError(f"k must be at least 1, got {request.k}")
    if request.k > _MAX_K:
        raise QueryError(f"k must be at most {_MAX_K}, got {request.k}")
    for name, options in (("fusion", FusionRule), ("decompose", Decompose)):
        if getattr(request, name) not in get_args(options):
            raise QueryError(f"{name} is one of {', '.join(get_args(options))}, got {getattr(request, name)!r}")
    check_diversity(request.diversity)
    for name in ("score", "clip", "bm25"):
        least = getattr(request.bounds, name)
        if least is not None and not math.isfinite(least):
            raise QueryError(f"min_{name} must be a finite number, got {least}")
    if request.bounds.clip is not None and not request.uses_clip:
        raise QueryError(f"min_clip has no effect on a search by {request.by}; use min_score, or search by hybrid")
    if request.bounds.bm25 is not None and request.by not in ("hybrid", "bm25"):
        raise QueryError(f"min_bm25 has no effect on a search by {request.by}; use min_score, or search by hybrid")


def condition(where: str | None, dataset: str | Sequence[str] | None) -> str | None:
    """One SQL filter of a filter and the names of data sets."""
    if where is not None:
        check_filter(where)
    if not dataset:
        return where
    names = [dataset] if isinstance(dataset, str) else dataset
    quoted = ["'" + name.replace("'", "''") + "'" for name in names]
    of_dataset = f"dataset IN ({', '.join(quoted)})"
    return of_dataset if where is None else f"({where}) AND {of_dataset}"


def unit_rows(vectors: Queries) -> Queries:
    """Rows at length one. QueryError for one that has none."""
    norms = np.sqrt(np.einsum("qd,qd->q", vectors, vectors))[:, None]  # np.linalg.norm takes 15 times as long
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        raise QueryError("a query vector must be finite and not zero")
    return (vectors / norms).astype(np.float32, copy=False)


def id_array(ids: Collection[int]) -> Int64[ndarray, " x"]:
    """Ids as an array, but for those that are too large for any row to have."""
    return np.array([i for i in map(int, ids) if -(2**63) <= i < 2**63], dtype=np.int64)
