"""Fusion by hand: the three rules on small numbers, and what is refused."""

import numpy as np
import pytest

from index.errors import ConfigError, QueryError
from index.search.fusion import best_first, fuse, fuse_ranks, normalize_bm25, normalize_clip, rank

IDS = np.array([7, 3, 5])
CLIP = np.array([0.5, -0.2, 0.1])
BM25 = np.array([0.0, 4.0, 2.0])


def test_clip_below_zero_counts_as_zero() -> None:
    assert normalize_clip(CLIP).tolist() == [0.5, 0.0, 0.1]


def test_bm25_is_relative_to_the_best_candidate_and_all_zero_stays_zero() -> None:
    assert normalize_bm25(BM25).tolist() == [0.0, 1.0, 0.5]
    assert normalize_bm25(np.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert normalize_bm25(np.zeros(0)).tolist() == []


def test_sum_by_hand() -> None:
    assert fuse(IDS, CLIP, BM25, rule="sum").tolist() == [0.5, 1.0, 0.6]


def test_product_by_hand() -> None:
    assert fuse(IDS, CLIP, BM25, rule="product").tolist() == [0.0, 0.0, 0.05]


def test_rrf_by_hand() -> None:
    # id 7: first by clip, no word. id 3: third by clip, first by words. id 5: second in both.
    expected = [1 / 61, 1 / 63 + 1 / 61, 2 / 62]
    np.testing.assert_allclose(fuse(IDS, CLIP, BM25), expected, rtol=0, atol=1e-15)


def test_a_weight_scales_its_list() -> None:
    expected = [2 / 61, 2 / 63 + 0.5 / 61, 2.5 / 62]
    np.testing.assert_allclose(fuse(IDS, CLIP, BM25, weights=(2.0, 0.5)), expected, rtol=0, atol=1e-15)


def test_ties_are_ranked_by_id() -> None:
    everyone = np.ones(3, dtype=bool)
    assert rank(IDS, np.array([1.0, 1.0, 1.0]), listed=everyone).tolist() == [3.0, 1.0, 2.0]
    assert best_first(IDS, np.array([1.0, 1.0, 2.0])).tolist() == [2, 1, 0]


def test_what_is_not_listed_has_no_rank() -> None:
    ranks = rank(IDS, BM25, listed=BM25 > 0)
    assert ranks.tolist() == [np.inf, 1.0, 2.0]
    assert fuse_ranks([ranks], weights=[1.0]).tolist() == [0.0, 1 / 61, 1 / 62]


def test_no_candidates_give_no_scores() -> None:
    none = np.array([], dtype=np.int64)
    for rule in ("rrf", "sum", "product"):
        assert fuse(none, np.zeros(0), np.zeros(0), rule=rule).shape == (0,)  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (0.0, 0.0), (np.nan, 1.0), (np.inf, 1.0)])
def test_impossible_weights_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="weight"):
        fuse(IDS, CLIP, BM25, weights=weights)


@pytest.mark.usefixtures("untyped_caller")
def test_an_unknown_rule_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="rrf, sum, product, got 'max'"):
        fuse(IDS, CLIP, BM25, rule="max")  # type: ignore[arg-type]


def test_a_score_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(QueryError, match="finite"):
        fuse(IDS, np.array([0.1, np.nan, 0.2]), BM25)


def test_as_many_weights_as_lists() -> None:
    with pytest.raises(QueryError, match="2 ranked lists need as many weights, got 1"):
        fuse_ranks([np.ones(2), np.ones(2)], weights=[1.0])
    with pytest.raises(ConfigError, match="rank constant"):
        fuse_ranks([np.ones(2)], weights=[1.0], rank_constant=0.0)
