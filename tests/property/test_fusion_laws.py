"""Laws of fusion that hold for any candidates."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray

from index.search.fusion import FusionRule, best_first, fuse

RULES: list[FusionRule] = ["rrf", "sum", "product"]
Candidates = tuple[ndarray, ndarray, ndarray]

# Scores on a coarse grid, so that ties are common: they are what goes wrong.
clips = st.integers(-20, 20).map(lambda n: n / 20)
bm25s = st.integers(0, 30).map(lambda n: n / 2)


@st.composite
def candidates(draw: st.DrawFn, *, min_size: int = 1) -> Candidates:
    ids = draw(st.lists(st.integers(0, 2**62), min_size=min_size, max_size=30, unique=True))
    clip = draw(st.lists(clips, min_size=len(ids), max_size=len(ids)))
    bm25 = draw(st.lists(bm25s, min_size=len(ids), max_size=len(ids)))
    return np.array(ids, dtype=np.int64), np.array(clip), np.array(bm25)


def order(rows: Candidates, scores: ndarray) -> list[int]:
    return rows[0][best_first(rows[0], scores)].tolist()


@settings(deadline=None)
@given(rows=candidates(), rule=st.sampled_from(RULES), data=st.data())
def test_the_order_of_the_candidates_does_not_matter(rows: Candidates, rule: FusionRule, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(range(len(rows[0]))))
    straight = dict(zip(rows[0].tolist(), fuse(*rows, rule=rule).tolist(), strict=True))
    again: Candidates = (rows[0][shuffled], rows[1][shuffled], rows[2][shuffled])
    assert dict(zip(again[0].tolist(), fuse(*again, rule=rule).tolist(), strict=True)) == straight


@settings(deadline=None)
@given(rows=candidates())
def test_rrf_sees_order_and_not_size(rows: Candidates) -> None:
    ids, clip, bm25 = rows
    # A monotone map of bm25 must keep 0 at 0: it says that no word matched.
    assert fuse(ids, np.exp(3 * clip) - 2, bm25**3).tolist() == fuse(ids, clip, bm25).tolist()


@settings(deadline=None)
@given(rows=candidates(), rule=st.sampled_from(RULES))
def test_a_list_of_weight_zero_cannot_reorder_the_other(rows: Candidates, rule: FusionRule) -> None:
    ids, clip, bm25 = rows
    for nothing in (np.zeros_like(bm25), bm25[::-1].copy()):
        assert order(rows, fuse(ids, clip, bm25, rule=rule, weights=(1.0, 0.0))) == order(
            rows, fuse(ids, clip, nothing, rule=rule, weights=(1.0, 0.0))
        )
    for other in (np.zeros_like(clip), clip[::-1].copy()):
        assert order(rows, fuse(ids, clip, bm25, rule=rule, weights=(0.0, 1.0))) == order(
            rows, fuse(ids, other, bm25, rule=rule, weights=(0.0, 1.0))
        )


@settings(deadline=None)
@given(rows=candidates())
def test_a_product_is_zero_exactly_when_one_side_is(rows: Candidates) -> None:
    ids, clip, bm25 = rows
    assert ((fuse(ids, clip, bm25, rule="product") == 0) == ((clip <= 0) | (bm25 == 0))).all()


@settings(deadline=None)
@given(rows=candidates())
def test_scores_stay_in_their_ranges(rows: Candidates) -> None:
    for rule, top in (("sum", 2.0), ("product", 1.0), ("rrf", 2 / 61)):
        scores = fuse(*rows, rule=rule)  # type: ignore[arg-type]
        assert (scores >= 0).all()
        assert (scores <= top + 1e-12).all()
    assert (fuse(*rows) > 0).all(), "every candidate has a rank by clip"


@settings(deadline=None)
@given(rows=candidates(), rule=st.sampled_from(RULES))
def test_better_in_both_is_never_worse(rows: Candidates, rule: FusionRule) -> None:
    ids, clip, bm25 = rows
    scores = fuse(ids, clip, bm25, rule=rule)
    better = (clip[:, None] > clip) & (bm25[:, None] > bm25)
    assert (scores[:, None] >= scores)[better].all()
