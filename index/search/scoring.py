"""Scoring: from the lists that searches bring to candidates with every score, best first."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from index.search.candidates import Candidates
from index.search.fusion import best_first, fuse
from index.search.ids import contains
from index.search.lexical import Lexical, Ranking, Subset, coarse
from index.search.request import Query, Request
from index.search.trace import Trace
from index.search.view import RankedList

# Lance reads the filtered columns of all rows for every query: 2 ms of one core for 100,000 numbers. Above so many rows
# a filter that leaves this share of them is not given to the word index, but applied to a list as much longer.
_PUSH_DOWN_ROWS = 300_000
_WORDS_SHARE = 0.05


def words_within(
    lexical: Lexical, texts: Sequence[str], subset: Subset | None, *, top_k: int, rows: int
) -> list[Ranking]:
    """The best `top_k` by words among the rows of a filter.

    A filter goes down into the word index, unless it leaves many rows of very many: then it is applied to a list as
    much longer, which is doubled until it is enough.
    """
    if subset is None or rows <= _PUSH_DOWN_ROWS or len(subset.ids) < _WORDS_SHARE * rows:
        return lexical.search_many(texts, top_k=top_k, within=subset)
    answers: list[Ranking] = [(np.empty(0, dtype=np.int64), np.empty(0))] * len(texts)
    pending = list(range(len(texts)))
    asked = min(rows, 2 * top_k * rows // len(subset.ids))
    while pending:
        rankings = lexical.search_many([texts[p] for p in pending], top_k=asked)
        enough = []
        for position, (ids, scores) in zip(pending, rankings, strict=True):
            kept = contains(subset.ids, ids)
            answers[position] = ids[kept][:top_k], scores[kept][:top_k]
            enough.append(kept.sum() >= top_k or len(ids) < asked or asked == rows)
        pending = [position for position, is_enough in zip(pending, enough, strict=True) if not is_enough]
        asked = min(rows, 2 * asked)
    return answers


def without_excluded(
    listed: Sequence[RankedList], queries: Sequence[Query], trace: Trace, stage: str, *, depth: int
) -> list[RankedList]:
    """The best `depth` of each list that its query does not exclude; `stage` is whose lists they are."""
    trace.kept[stage] = sum(len(each.ids) for each in listed)
    kept = [each.without(query.exclude, limit=depth) for each, query in zip(listed, queries, strict=True)]
    trace.excluded = max(trace.excluded, max(len(query.exclude) for query in queries))
    trace.lists[stage] = [each.ids for each in kept]
    return kept


def is_final(by_vector: RankedList, by_words: RankedList, request: Request, *, depth: int) -> bool:
    """Whether a deeper search would bring no more hits: the lists have ended, or fallen below a bound."""
    has_ended = not (request.uses_clip and len(by_vector.ids) >= depth)
    has_ended &= not (request.uses_words and len(by_words.ids) >= depth)
    return has_ended or request.bounds.end(by_vector.scores, by_words.scores)


def complete_words(
    lexical: Lexical, query: Query, ids: Int64[ndarray, " n"], known: RankedList, *, exhausted: bool
) -> Float64[ndarray, " n"]:
    """The word score of every candidate. A list that ended early holds every match, so the rest scores 0."""
    assert query.text is not None
    scores, have = known.scatter(ids)
    if not exhausted and not have.all():
        scores[~have] = lexical.scores(query.text, ids[~have])
    return scores


def fused(
    ids: Int64[ndarray, " n"],
    clip: Float64[ndarray, " n"] | None,
    words: Float64[ndarray, " n"] | None,
    request: Request,
) -> Candidates:
    """Fuse, and put the best first."""
    alone = clip if words is None else words
    assert alone is not None
    score = alone
    if clip is not None and words is not None:
        # Ranks tell apart what ties but for rounding; sums and products do not.
        score = fuse(ids, clip, coarse(words) if request.fusion == "rrf" else words, rule=request.fusion)
    candidates = Candidates(ids=ids, score=score, clip=clip, words=words if request.by != "tfidf" else None)
    return candidates.take(best_first(ids, score))
