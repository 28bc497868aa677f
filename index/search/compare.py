"""Compare two knowledge bases, or two ways to search one: what each finds for the same queries, side by side."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from index.errors import QueryError

if TYPE_CHECKING:
    from index.knowledge_base import KnowledgeBase
    from index.records import Hit
    from index.search.joined import JoinedKnowledgeBase
    from index.search.retriever import SearchResult

PERSISTENCE = 0.9  # of rank-biased overlap: the first ten ranks weigh 0.86 (Webber et al. 2010, section 5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One side of a comparison: a knowledge base, and how it is asked (the keywords of `Retriever.search`)."""

    kb: "KnowledgeBase | JoinedKnowledgeBase"
    asked: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What two sides found for one query. `shared` holds the hits of one picture, those of A and of B together.

    `overlap` is the share of the k hits that both have, `rbo` the rank-biased overlap of the two lists; 1 is the same.
    `shift` is the median of what the shared hits gain in score from A to B; None when they share none, and when the two
    sides do not score alike.
    """

    query: str
    overlap: float
    rbo: float
    shared: list[tuple["Hit", "Hit"]]
    only_a: list["Hit"]
    only_b: list["Hit"]
    hits_a: list["Hit"]
    hits_b: list["Hit"]
    shift: float | None
    ms_a: float
    ms_b: float

    @property
    def is_identical(self) -> bool:
        """Whether both sides found the same in the same order."""
        return not self.only_a and not self.only_b and all(one.rank == other.rank for one, other in self.shared)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "query": self.query,
            "overlap": self.overlap,
            "rbo": self.rbo,
            "score_shift": self.shift,
            "shared": [_shared_json(a, b) for a, b in self.shared],
            "only_a": [_hit_json(hit) for hit in self.only_a],
            "only_b": [_hit_json(hit) for hit in self.only_b],
            "ms_a": round(self.ms_a, 3),
            "ms_b": round(self.ms_b, 3),
        }


def compare(
    a: Side,
    b: Side,
    queries: Sequence[str],
    *,
    k: int = 10,
    on_query: Callable[[str], None] = lambda query: None,
) -> list[Difference]:
    """Ask both sides every query, in turn, and say how far they agree; the least alike come first.

    Hits of two knowledge bases are the same when their ids are, else when their images have the same sha256, else,
    where that is not known, when their captions are equal. QueryError for an empty list of queries.
    """
    if not queries:
        raise QueryError("there is no query to compare by; put one on each line of the file")
    for side in (a, b):  # so that neither is charged for reading its files
        side.kb.query(queries[0], k=k, **side.asked)
    differences = []
    for query in queries:
        found_a = a.kb.query(query, k=k, **a.asked)
        found_b = b.kb.query(query, k=k, **b.asked)
        differences.append(_difference(query, (a, found_a), (b, found_b)))
        on_query(query)
    return sorted(differences, key=lambda one: (one.rbo, one.overlap))


def summarize(differences: Sequence[Difference]) -> dict[str, Any]:
    """Medians and means over the queries, ready for JSON."""
    shifts = [one.shift for one in differences if one.shift is not None]
    return {
        "queries": len(differences),
        "identical": sum(one.is_identical for one in differences),
        "disjoint": sum(not one.shared for one in differences),
        "overlap_median": statistics.median(one.overlap for one in differences),
        "overlap_mean": statistics.fmean(one.overlap for one in differences),
        "rbo_median": statistics.median(one.rbo for one in differences),
        "rbo_mean": statistics.fmean(one.rbo for one in differences),
        "score_shift_median": statistics.median(shifts) if shifts else None,
        "ms_median_a": round(statistics.median(one.ms_a for one in differences), 3),
        "ms_median_b": round(statistics.median(one.ms_b for one in differences), 3),
    }


def rank_biased_overlap(one: Sequence[Any], other: Sequence[Any], *, persistence: float = PERSISTENCE) -> float:
    """How far two rankings of distinct items agree, 0 to 1, the top counting most.

    The extrapolated form of Webber, Moffat and Zobel 2010, equation 32, for two lists of any lengths: what is known of
    the agreement at the end of the lists is taken to go on for ever. Two empty lists agree, one empty list does not.
    """
    if not 0 < persistence < 1:
        raise QueryError(f"the persistence of rank-biased overlap lies between 0 and 1, got {persistence}")
    short, long = sorted((list(one), list(other)), key=len)
    if not short:
        return 0.0 if long else 1.0
    p, s, l = persistence, len(short), len(long)
    overlap = [len(set(short[:depth]) & set(long[:depth])) for depth in range(1, l + 1)]  # X_d
    total = math.fsum(overlap[d - 1] / d * p**d for d in range(1, l + 1))
    total += math.fsum(overlap[s - 1] * (d - s) / (s * d) * p**d for d in range(s + 1, l + 1))
    at_end = (overlap[-1] - overlap[s - 1]) / l + overlap[s - 1] / s
    return min(1.0, (1 - p) / p * total + at_end * p**l)  # sums of powers may end a bit above


def _difference(query: str, a: tuple[Side, "SearchResult"], b: tuple[Side, "SearchResult"]) -> Difference:
    (side_a, found_a), (side_b, found_b) = a, b
    names = _same_names(found_a.hits, found_b.hits, _digests(side_a, found_a), _digests(side_b, found_b))
    names_a, names_b = [hit.id for hit in found_a.hits], [names[hit.id] for hit in found_b.hits]
    by_name = dict(zip(names_a, found_a.hits, strict=True))
    shared = [(by_name[n], hit) for n, hit in zip(names_b, found_b.hits, strict=True) if n in by_name]
    scored_alike = all(side_a.asked.get(name) == side_b.asked.get(name) for name in ("by", "fusion"))
    longest = max(len(names_a), len(names_b))
    return Difference(
        query=query,
        overlap=len(shared) / longest if longest else 1.0,
        rbo=rank_biased_overlap(names_a, names_b),
        shared=sorted(shared, key=lambda pair: pair[0].rank),
        only_a=[hit for hit in found_a.hits if hit.id not in names_b],
        only_b=[hit for n, hit in zip(names_b, found_b.hits, strict=True) if n not in by_name],
        hits_a=found_a.hits,
        hits_b=found_b.hits,
        shift=statistics.median(b.score - a.score for a, b in shared) if shared and scored_alike else None,
        ms_a=sum(found_a.timings_ms.values()),
        ms_b=sum(found_b.timings_ms.values()),
    )


def _digests(side: Side, found: "SearchResult") -> dict[int, str | None]:
    return {pair.id: pair.sha256 for pair in side.kb.store.get([hit.id for hit in found.hits])}


def _same_names(
    hits_a: Sequence["Hit"], hits_b: Sequence["Hit"], digests_a: Mapping[int, Any], digests_b: Mapping[int, Any]
) -> dict[int, int]:
    """For every hit of B the id of the hit of A that is the same, or else a number that is no id; each A but once."""
    left = {hit.id: hit for hit in hits_a}
    names: dict[int, int] = {}

    def take(is_same: Callable[["Hit", "Hit"], bool]) -> None:
        for hit in hits_b:
            if hit.id not in names:
                same = next((one for one in left.values() if is_same(one, hit)), None)
                if same is not None:
                    names[hit.id] = left.pop(same.id).id

    def both_known(one: "Hit", other: "Hit") -> bool:
        return digests_a.get(one.id) is not None and digests_b.get(other.id) is not None

    take(lambda one, other: one.id == other.id)
    take(lambda one, other: both_known(one, other) and digests_a[one.id] == digests_b[other.id])
    take(lambda one, other: not both_known(one, other) and one.caption == other.caption)
    return {hit.id: names.get(hit.id, -1 - place) for place, hit in enumerate(hits_b)}


def _hit_json(hit: "Hit") -> dict[str, Any]:
    return {"id": str(hit.id), "rank": hit.rank, "score": hit.score, "caption": hit.caption}


def _shared_json(a: "Hit", b: "Hit") -> dict[str, Any]:
    return {
        "id_a": str(a.id),
        "id_b": str(b.id),
        "caption": a.caption,
        "rank_a": a.rank,
        "rank_b": b.rank,
        "score_a": a.score,
        "score_b": b.score,
        "clip_a": a.clip,
        "clip_b": b.clip,
        "bm25_a": a.bm25,
        "bm25_b": b.bm25,
    }
