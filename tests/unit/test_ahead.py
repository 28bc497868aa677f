"""Searching ahead: the answers of searching a few at a time, with far fewer searches."""

import numpy as np

from index.search.ahead import Ahead
from index.search.searcher import ExactSearcher

IDS = np.arange(300, dtype=np.int64)
VECTORS = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
QUERIES = np.random.default_rng(1).standard_normal((100, 8)).astype(np.float32)
SEARCHER = ExactSearcher(IDS, VECTORS)


def ahead_of(queries: np.ndarray, *, at_once: int) -> tuple[Ahead, list[int]]:
    asked: list[int] = []

    def search(lot: np.ndarray, *, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append(len(lot))
        return SEARCHER.search(lot, top_k=top_k)

    return Ahead(search, queries, top_k=20, at_once=at_once, among=IDS), asked


def test_a_few_at_a_time_are_answered_from_a_few_searches() -> None:
    ahead, asked = ahead_of(QUERIES, at_once=45)
    for start in range(0, 100, 15):
        some = QUERIES[start : start + 15]
        for top_k in (5, 20):
            answer = ahead.answer(some, top_k=top_k, among=IDS)
            assert answer is not None
            for found, expected in zip(answer, SEARCHER.search(some, top_k=top_k), strict=True):
                np.testing.assert_array_equal(found, expected)
    assert asked == [45, 45, 10]


def test_equal_queries_are_one_and_their_order_does_not_matter() -> None:
    ahead, asked = ahead_of(np.concatenate([QUERIES[:30], QUERIES[:30]]), at_once=60)
    some = QUERIES[[7, 3, 7, 29]]
    answer = ahead.answer(some, top_k=20, among=IDS)
    assert answer is not None
    np.testing.assert_array_equal(answer[0], SEARCHER.search(some, top_k=20)[0])
    assert len(asked) == 1


def test_what_was_not_announced_is_not_answered() -> None:
    ahead, asked = ahead_of(QUERIES[:50], at_once=20)
    assert ahead.answer(QUERIES[40:60], top_k=5, among=IDS) is None, "not expected"
    assert ahead.answer(QUERIES[:5], top_k=21, among=IDS) is None, "not so deep"
    assert ahead.answer(QUERIES[:5], top_k=5, among=IDS[:100]) is None, "not among these rows"
    assert ahead.answer(QUERIES[[0, 49]], top_k=5, among=IDS) is None, "not of one lot"
    assert asked == []
