"""Scoring: from the lists that searches bring to candidates with every score, best first."""

from collections.abc import Sequence

from jaxtyping import Float64, Int64
from numpy import ndarray

from index.search.candidates import Candidates
from index.search.fusion import best_first, fuse
from index.search.lexical import Lexical, coarse
from index.search.request import Query, Request
from index.search.trace import Trace
from index.search.view import RankedList


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
    lexical: Lexical,
    queries: Sequence[Query],
    ids: Sequence[Int64[ndarray, " _"]],
    known: Sequence[RankedList],
    *,
    depth: int,
) -> list[Float64[ndarray, " _"]]:
    """The word score of every candidate. A list that ended before `depth` holds every match, so the rest scores 0."""
    scattered = [listed.scatter(i) for i, listed in zip(ids, known, strict=True)]
    open_ended = [n for n, (_, have) in enumerate(scattered) if len(known[n].ids) >= depth and not have.all()]
    texts = [str(queries[n].text) for n in open_ended]
    answers = lexical.scores_many(texts, [ids[n][~scattered[n][1]] for n in open_ended])
    for n, answer in zip(open_ended, answers, strict=True):
        scores, have = scattered[n]
        scores[~have] = answer
    return [scores for scores, _ in scattered]


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
