"""Maximal marginal relevance: its slow twin, and what must hold whatever the vectors are."""

from itertools import pairwise

import numpy as np
import pytest

from index.errors import QueryError
from index.search.diversity import spread


def some(seed: int, n: int = 30, d: int = 6) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((n, d)).astype(np.float32)
    scores = np.sort(generator.random(n))[::-1].copy()
    return scores, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def naive(scores: np.ndarray, vectors: np.ndarray, diversity: float) -> list[int]:
    """Carbonell and Goldstein's definition, every maximum taken anew."""
    relevance = (scores - scores.min()) / (scores.max() - scores.min())
    placed: list[int] = []
    while len(placed) < len(scores):

        def value(i: int) -> float:
            repeats = max((float(vectors[i] @ vectors[j]) for j in placed), default=0.0)
            return (1 - diversity) * relevance[i] - diversity * repeats

        placed.append(max((i for i in range(len(scores)) if i not in placed), key=value))
    return placed


@pytest.mark.parametrize("diversity", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_naive_greedy_agrees(diversity: float) -> None:
    for seed in range(4):
        scores, vectors = some(seed)
        assert spread(scores, vectors, diversity=diversity).tolist() == naive(scores, vectors, diversity)


def test_off_is_the_order_of_the_scores() -> None:
    scores, vectors = some(7)
    assert spread(scores, vectors, diversity=0.0).tolist() == list(range(len(scores)))
    ties = np.array([1.0, 1.0, 0.5, 0.5])
    assert spread(ties, vectors[:4], diversity=0.0).tolist() == [0, 1, 2, 3]


def test_the_second_place_moves_away_from_the_first_as_diversity_grows() -> None:
    for seed in range(20):
        scores, vectors = some(seed)
        seconds = [int(spread(scores, vectors, diversity=d)[1]) for d in np.linspace(0, 0.99, 34)]
        likeness = [float(vectors[0] @ vectors[second]) for second in seconds]
        assert all(later <= earlier + 1e-6 for earlier, later in pairwise(likeness))
        worth = [scores[second] for second in seconds]
        assert all(later <= earlier for earlier, later in pairwise(worth))


def test_the_scale_of_the_scores_does_not_matter() -> None:
    scores, vectors = some(3)
    order = spread(scores, vectors, diversity=0.4)
    assert (spread(100 * scores - 7, vectors, diversity=0.4) == order).all()


def test_a_copy_of_the_best_falls_behind() -> None:
    vectors = np.eye(3, dtype=np.float32)[[0, 0, 1, 2]]
    order = spread(np.array([1.0, 0.9, 0.8, 0.0]), vectors, diversity=0.3)
    assert order.tolist() == [0, 2, 1, 3]


def test_few_and_none() -> None:
    scores, vectors = some(1)
    assert spread(scores[:0], vectors[:0], diversity=0.5).tolist() == []
    assert spread(scores[:1], vectors[:1], diversity=0.5).tolist() == [0]


@pytest.mark.parametrize("diversity", [-0.1, 1.5, float("nan")])
def test_out_of_range_is_one_sentence(diversity: float) -> None:
    scores, vectors = some(1)
    with pytest.raises(QueryError, match="diversity lies between 0"):
        spread(scores, vectors, diversity=diversity)
