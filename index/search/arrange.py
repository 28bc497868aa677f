"""Arranging: scored candidates into the order in which they become hits."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from index.search.candidates import Candidates, first_of_each, interleave
from index.search.decompose import Corpus, cover_terms
from index.search.diversity import spread
from index.search.request import Asked, Request
from index.search.view import View

_COVER_POOL = 500  # candidates, best first, that are ordered by the words they cover


def arrange(asked: Asked, lists: Sequence[Candidates], request: Request, view: View) -> Candidates:
    """One list of the lists of a query's parts: no two pairs of one group, spread out, each part in turn."""
    lists = [_distinct(candidates, view) for candidates in lists]
    if request.diversity:
        lists = [_spread(candidates, request, view) for candidates in lists]
    if asked.corpus is None:
        return lists[0]
    if request.decompose == "terms":
        return _by_terms(lists[0], asked.labels[0], asked.corpus)
    return _distinct(interleave(lists, asked.labels), view)


def _distinct(candidates: Candidates, view: View) -> Candidates:
    groups = view.duplicates.group_of(candidates.ids)
    return candidates.take(first_of_each(groups))


def _spread(candidates: Candidates, request: Request, view: View) -> Candidates:
    """By maximal marginal relevance; beyond the usual number of candidates they keep their order."""
    vectors = view.vectors(candidates.ids[: request.depth])
    order = spread(candidates.score[: request.depth], vectors, diversity=request.diversity)
    return candidates.take(np.concatenate([order, np.arange(len(order), len(candidates))]))


def _by_terms(candidates: Candidates, text: str, corpus: Corpus) -> Candidates:
    """By greedy coverage of the text's rare words, each labelled with those that its caption has."""
    statistics = corpus.statistics(text)
    known = [term for term in corpus.terms(text) if statistics.frequencies.get(term, 0)]
    pool = candidates.take(np.arange(min(len(candidates), _COVER_POOL)))
    if not known or not len(pool):
        return candidates
    has = corpus.having(known, pool.ids)
    order = cover_terms(has, np.array([statistics.idf(term) for term in known]))
    labels = [" ".join(np.array(known)[column]) for column in has[:, order].T]
    part = np.array([position if label else -1 for position, label in enumerate(labels)])
    return replace(pool.take(order), labels=tuple(labels), part=part)
