"""Explain a query: the stage that lost a pair, what approximation cost, which words counted, what lies around each hit.

The retriever answers; this module asks it again in other ways and compares. `contact_sheet.py` draws what it finds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from index.records import Hit, StoredPair
from index.search.decompose import Corpus, CountedWords
from index.search.fusion import RANK_CONSTANT, FusionRule
from index.search.retriever import Retriever, SearchResult, Standing

if TYPE_CHECKING:
    from index.knowledge_base import KnowledgeBase
    from index.search.joined import JoinedKnowledgeBase

NEIGHBORS = 4  # nearest pairs that are told of each hit
_REPEATS = 8
MANY_NEWER = 20_000  # rows that cost every query some milliseconds
_OF_STANDING = ("image", "vector", "by", "fusion", "where", "dataset")  # what decides where a pair stands


@dataclass(frozen=True, kw_only=True, slots=True)
class WhyNot:
    """Why a pair is not among the hits of a query. `stage` is the one that lost it, or `hit` when it is one.

    The stages: `store`, `filter`, `excluded`, `candidates` (in neither list), `approximate` (the searcher missed it),
    `threshold`, `duplicates`, `diversity`, `decompose`, `k`.
    """

    id: int
    stage: str
    sentence: str
    standing: Standing | None = None  # among all pairs, every one compared
    numbers: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        standing = {} if self.standing is None else asdict(self.standing)
        return {"id": str(self.id), "stage": self.stage, "sentence": self.sentence, **standing, **self.numbers}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactDifference:
    """One query answered by the searcher and by comparing every pair; times in ms, once what fits is loaded."""

    exact: SearchResult
    approximate: SearchResult

    @property
    def missed(self) -> list[Hit]:
        """Hits that only the exact search found."""
        return _without(self.exact.hits, self.approximate.hits)

    @property
    def extra(self) -> list[Hit]:
        """Hits that only the approximate search found, in place of those."""
        return _without(self.approximate.hits, self.exact.hits)

    @property
    def recall(self) -> float:
        """The share of the exact hits that the approximate search found too; 1 when there are none."""
        total = len(self.exact.hits)
        return 1 - len(self.missed) / total if total else 1.0

    @property
    def is_moot(self) -> bool:
        """Whether the searcher looked at every pair as well, or no vectors were compared: there is nothing to miss."""
        looked_at_all = self.approximate.examined >= self.approximate.matching
        return (looked_at_all or "vector" not in self.approximate.lists) and not self.missed

    @property
    def vector_recall(self) -> float | None:
        """The share of as many nearest vectors as there are hits that the searcher found; None without vectors.

        Below it, `recall` has another cause: fused over all pairs, ranks are others than among the best of each list.
        """
        k, shares = len(self.exact.hits), []
        for exact, found in zip(
            *(each.lists.get("vector", []) for each in (self.exact, self.approximate)), strict=True
        ):
            shares.append(np.isin(exact[:k], found[:k]).mean() if k else 1.0)
        return float(np.mean(shares)) if shares else None

    @property
    def summary(self) -> str:
        """What it cost, in a sentence."""
        times, first = self.timings_ms, "the searcher"
        if self.is_moot:
            first = "the search, which compares every pair here too,"
            if "vector" not in self.approximate.lists:
                first = "the search, which compares words alone and all of them,"
        took = f"{first} took {times['approximate']:.1f} ms, ranking every pair {times['exact']:.1f} ms"
        if not self.missed or self.vector_recall is None or "words" not in self.approximate.lists:
            return took
        depth = max(map(len, self.approximate.lists["vector"]), default=0)
        return (
            f"of the nearest vectors it found {self.vector_recall:.2f}; the rest of the difference is that ranks among "
            f"all pairs are fused, not those among the best {depth:,} of each list; {took}"
        )

    @property
    def lines(self) -> list[tuple[str, Hit]]:
        """What became of each hit that only one of the two has."""
        lines = []
        for hit in self.missed:
            place = self.approximate.rank("duplicates", hit.id) or self.approximate.rank("union", hit.id)
            lines.append((f"number {hit.rank} was {'not found' if place is None else f'number {place:,}'}", hit))
        return lines + [(f"in place of those, as number {hit.rank}", hit) for hit in self.extra]

    @property
    def timings_ms(self) -> dict[str, float]:
        """What either search took, the embedding of the query left out: both need the same."""
        return {
            name: sum(ms for clock, ms in getattr(self, name).timings_ms.items() if clock not in ("load", "embed"))
            for name in ("exact", "approximate")
        }

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "recall": self.recall,
            "vector_recall": self.vector_recall,
            "missed": [_brief(hit) for hit in self.missed],
            "extra": [_brief(hit) for hit in self.extra],
            "timings_ms": {name: round(ms, 3) for name, ms in self.timings_ms.items()},
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What lies around the hits: `neighbors` their nearest pairs with cosines, `repeats` those of the same picture.

    `pairs` has all that is stored of every pair that is named.
    """

    pairs: dict[int, StoredPair] = field(default_factory=dict)
    neighbors: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    repeats: dict[int, list[int]] = field(default_factory=dict)


def exact_difference(
    ask: Callable[..., SearchResult], text: str | None, *, is_warm: bool = False, **asked: Any
) -> ExactDifference:
    """Answer a query in both ways. `ask` is `KnowledgeBase.query`; `asked` are its arguments but for `exact`.

    Unless it `is_warm` from another query, each way is gone once before: that loads vectors, words and model, which
    no later query pays for.
    """
    for is_exact in () if is_warm else (False, True):
        ask(text, exact=is_exact, **asked)
    approximate = ask(text, exact=False, **asked)
    return ExactDifference(exact=ask(text, exact=True, **asked), approximate=approximate)


def term_scores(retriever: Retriever, text: str | None, hits: Sequence[Hit]) -> list[dict[str, float]]:
    """What every word of the query adds to the bm25 of each hit; of a part of it, where the query was decomposed."""
    if not any(hit.bm25 for hit in hits):
        return [{} for _ in hits]
    texts = [text if hit.part is None else hit.part for hit in hits]
    return [
        retriever.contributions(words, [hit.id])[0] if words else {} for words, hit in zip(texts, hits, strict=True)
    ]


def word_counts(retriever: Retriever, text: str | None, result: SearchResult) -> dict[str, int]:
    """How many captions have each word of a text that was searched for by its words; 0 for a word that nobody has.

    Words that carry grammar are not searched for, so they are not among them.
    """
    if text is None or "words" not in result.lists:
        return {}
    lexical = retriever.view.lexical("bm25")
    assert isinstance(lexical, CountedWords), type(lexical)
    corpus = Corpus(lexical)
    counts = corpus.statistics(text).frequencies
    return {term: counts.get(term, 0) for term in corpus.terms(text)}


def how_fused(hit: Hit, result: SearchResult, rule: FusionRule) -> str:
    """The sum or product by which `rule` made the score of a hit; empty where one component is the score.

    By `rrf` also where no rank of the lists gives the score, as for a hit of several parts of a prompt.
    """
    if hit.clip is None or hit.bm25 is None:
        return ""
    clip = max(hit.clip, 0.0)
    if rule == "sum":
        return f"{clip:.4f} by clip + {hit.score - clip:.4f} by bm25 (1 for the best candidate)"
    if rule == "product":
        return f"{clip:.4f} by clip x {hit.score / clip:.4f} by bm25 (1 for the best candidate)" if clip else ""
    ranks = {"clip": result.rank("vector", hit.id)} | ({"bm25": result.rank("words", hit.id)} if hit.bm25 else {})
    known = {name: 1 / (RANK_CONSTANT + rank) for name, rank in ranks.items() if rank is not None}
    rest = hit.score - sum(known.values())
    if len(known) == len(ranks) - 1 and rest > 0:  # below the end of one list: the rank that makes the score whole
        ranks |= {name: round(1 / rest) - RANK_CONSTANT for name in ranks if name not in known}
    places = {name: rank for name, rank in ranks.items() if rank is not None and rank > 0}
    if not math.isclose(sum(1 / (RANK_CONSTANT + rank) for rank in places.values()), hit.score, rel_tol=1e-9):
        return ""
    return " + ".join(f"1/({RANK_CONSTANT} + {rank:,}) by {name}" for name, rank in places.items())


def surroundings(
    base: "KnowledgeBase | JoinedKnowledgeBase", hits: Sequence[Hit], *, more: Sequence[int] = ()
) -> Surroundings:
    """Look around every hit; `more` names other pairs of which everything should be told."""
    retriever, ids = base.retriever, [hit.id for hit in hits]
    rows = base.store.get(ids, vectors=True)
    neighbors: dict[int, list[tuple[int, float]]] = {}
    if rows:
        found = retriever.search_many(
            [row.caption for row in rows],
            vectors=np.stack([row.vector for row in rows if row.vector is not None]),
            k=NEIGHBORS,
            by="clip",
            exclude_group_of=[[row.id] for row in rows],
        )
        neighbors = {row.id: [(hit.id, hit.score) for hit in near] for row, near in zip(rows, found, strict=True)}
    repeats = {i: _repeats(retriever, i) for i in ids}
    named = {*ids, *more, *(i for near in neighbors.values() for i, _ in near)}.union(*repeats.values())
    pairs = {pair.id: pair for pair in base.store.get(sorted(named), thumbnails=True)}
    return Surroundings(pairs=pairs, neighbors=neighbors, repeats=repeats)


def searcher_facts(base: "KnowledgeBase | JoinedKnowledgeBase") -> list[dict[str, Any]]:
    """What searches each knowledge base: its kind, the rows it knows, its measured recall, the rows newer than it."""
    facts = []
    for part in getattr(base, "parts", [base]):
        manifest = part.searcher_manifest()
        known = {} if manifest is None else {"rows": manifest.rows, "recall_at_10": manifest.recall_at_10}
        kind = "exact" if manifest is None or part.store.snapshot is not None else manifest.kind
        facts.append({"kind": kind, **known, "newer": part.unsearched(), "pairs": part.store.count()})
    return facts


def describe_searcher(fact: Mapping[str, Any]) -> str:
    """One of `searcher_facts` in a line, and what to do when many rows lie outside it."""
    recall = f", recall@10 {fact['recall_at_10']:.3f}" if "recall_at_10" in fact else ""
    newer = f"; {fact['newer']:,} newer ones compared one by one" if fact["newer"] else ""
    fold = ": `radt index compact` folds them in" if fact["newer"] > MANY_NEWER else ""
    return f"{fact['pairs']:,} pairs by {fact['kind']}{recall}{newer}{fold}"


# Why a pair is not a hit


def why_not(
    retriever: Retriever,
    pair_id: int,
    text: str | None = None,
    *,
    result: SearchResult | None = None,
    **asked: Any,
) -> WhyNot:
    """Follow a pair through the stages of a query to the one that lost it.

    `asked` are the arguments of `Retriever.search`; `result` its answer, if it is there already.
    """
    stored = retriever.store.get([pair_id])
    if not stored:
        stores = getattr(retriever.store, "parts", [retriever.store])
        fate = "was taken down" if any(pair_id in store.removed_ids() for store in stores) else "was never added"
        sentence = f"{pair_id} is not in the knowledge base: it {fate}."
        if fate == "was never added" and (bad := sum(store.count_bad() for store in stores)):
            sentence += f" What could not be used, {bad:,} so far, is listed by `radt index stats --quarantine`."
        return WhyNot(id=pair_id, stage="store", sentence=sentence)
    if pair_id in _excluded(retriever, asked):
        return WhyNot(id=pair_id, stage="excluded", sentence=f"{pair_id} is excluded by the query itself.")
    result = result or retriever.search(text, **asked)
    standing = retriever.standing(pair_id, text, **{name: asked[name] for name in _OF_STANDING if name in asked})
    if standing is None:
        sentence = f"{pair_id} does not pass the filter of the query (it is of dataset {stored[0].dataset!r})."
        return WhyNot(id=pair_id, stage="filter", sentence=sentence, numbers={"matching": result.matching})
    for hit in result.hits:
        if hit.id == pair_id:
            sentence = f"{pair_id} is a hit, number {hit.rank} of {len(result.hits)}. {_describe(standing)}"
            return WhyNot(id=pair_id, stage="hit", sentence=sentence, standing=standing)
    stage, reason, numbers = _lost(retriever, stored[0], result=result, standing=standing, asked=asked)
    sentence = f"{pair_id} is not a hit: {reason}. {_describe(standing)}"
    return WhyNot(id=pair_id, stage=stage, sentence=sentence, standing=standing, numbers=numbers)


def _lost(
    retriever: Retriever, pair: StoredPair, *, result: SearchResult, standing: Standing, asked: dict[str, Any]
) -> tuple[str, str, dict[str, Any]]:
    """The stage that lost a pair which passes the filter, why, and the numbers that show it."""
    if result.rank("union", pair.id) is None:
        return _no_candidate(result, standing)
    if "thresholds" in result.lists and result.rank("thresholds", pair.id) is None:
        failed = _failed_bounds(standing, asked)
        return "threshold", " and ".join(failed) or "it is below a least score", {}
    place, k = result.rank("duplicates", pair.id), asked.get("k", 5)
    shown = _shown_instead(retriever, pair, result)
    if shown is not None:
        numbers = {"shown": str(shown.id), "shown_rank": shown.rank}
        return "duplicates", f"the same image is shown already, as {shown.id}, hit number {shown.rank}", numbers
    if place is None:
        return "duplicates", "another pair of the same image comes before it", {}
    numbers = {"place": place, "k": k}
    before = result.rank("thresholds" if "thresholds" in result.lists else "union", pair.id) or place
    if asked.get("diversity") and before <= k < place:
        return "diversity", f"of {before:,} by score it became {place:,}, for it is too like those above", numbers
    if result.parts and before <= k < place:
        return "decompose", f"number {before:,} for its part of the prompt, it is number {place:,} in turn", numbers
    return "k", f"{place - 1:,} pairs come before it and {k:,} were asked for", numbers


def _no_candidate(result: SearchResult, standing: Standing) -> tuple[str, str, dict[str, Any]]:
    depths = {
        name: max(map(len, result.lists[name]), default=0) for name in ("vector", "words") if name in result.lists
    }
    if standing.clip_rank is not None and standing.clip_rank <= depths.get("vector", 0):
        reason = "the approximate search did not come upon it; ask with --exact"
        return "approximate", reason, {"depths": depths}
    if "vector" not in depths and not standing.bm25:
        return "candidates", "its caption shares no word with the query", {"depths": depths}
    where = " nor ".join(f"among the {depth:,} best by {name}" for name, depth in depths.items())
    return "candidates", f"it is {'neither' if len(depths) > 1 else 'not'} {where}", {"depths": depths}


def _failed_bounds(standing: Standing, asked: dict[str, Any]) -> list[str]:
    values = {"score": standing.score, "clip": standing.clip, "bm25": standing.bm25}
    return [
        f"its {name} is below the least {name} of {asked[f'min_{name}']:g}"
        for name, value in values.items()
        if asked.get(f"min_{name}") is not None and value is not None and value < asked[f"min_{name}"]
    ]


def _shown_instead(retriever: Retriever, pair: StoredPair, result: SearchResult) -> Hit | None:
    """The hit that shows the same picture."""
    alike = set(retriever.view.repeats_of(np.array([pair.id])).tolist())
    digests = {row.id: row.sha256 for row in retriever.store.get([hit.id for hit in result.hits])}
    same = (hit for hit in result.hits if hit.id in alike or (pair.sha256 and digests.get(hit.id) == pair.sha256))
    return next(same, None)


def _excluded(retriever: Retriever, asked: dict[str, Any]) -> set[int]:
    groups = np.fromiter(asked.get("exclude_group_of", ()), dtype=np.int64)
    return {*asked.get("exclude", ()), *(retriever.view.repeats_of(groups).tolist() if len(groups) else ())}


def _describe(standing: Standing) -> str:
    parts = [f"when every pair is compared it is number {standing.rank:,} of {standing.of:,}"]
    if standing.clip is not None:
        parts.append(f"clip {standing.clip:.4f} is number {standing.clip_rank:,}")
    if standing.bm25_rank is not None:
        parts.append(f"bm25 {standing.bm25:.4f} is number {standing.bm25_rank:,}")
    elif standing.bm25 is not None:
        parts.append("no word of the query is in its caption")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _repeats(retriever: Retriever, pair_id: int) -> list[int]:
    alike = retriever.view.repeats_of(np.array([pair_id]))
    return [i for i in alike.tolist() if i != pair_id][:_REPEATS]


def _without(hits: Sequence[Hit], others: Sequence[Hit]) -> list[Hit]:
    known = {hit.id for hit in others}
    return [hit for hit in hits if hit.id not in known]


def _brief(hit: Hit) -> dict[str, Any]:
    return {"id": str(hit.id), "rank": hit.rank, "score": hit.score, "caption": hit.caption}
