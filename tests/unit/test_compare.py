"""Rank-biased overlap against its closed forms; what counts as the same hit; the page of a comparison."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.errors import QueryError
from index.knowledge_base import KnowledgeBase
from index.search.compare import Side, compare, rank_biased_overlap, summarize
from index.search.compare_sheet import write_compare_sheet
from tests.fakes import HashEmbedder, caption_of, draw
from tests.unit.test_explain import EVIL, Collector

rankings = st.lists(st.integers(0, 12), unique=True, max_size=9)


def endless(one: Sequence[int], other: Sequence[int], *, p: float, depth: int = 4000) -> float:
    """The definition, equation 4: (1 - p) sum over d of p^(d-1) A_d, for lists as long as is asked."""
    return (1 - p) * sum(p ** (d - 1) * len(set(one[:d]) & set(other[:d])) / d for d in range(1, depth + 1))


@given(one=rankings, other=rankings, p=st.floats(0.05, 0.95))
@settings(deadline=None, max_examples=60)
def test_it_is_a_symmetric_share(one: list[int], other: list[int], p: float) -> None:
    value = rank_biased_overlap(one, other, persistence=p)
    assert 0 <= value <= 1
    assert value == rank_biased_overlap(other, one, persistence=p)
    assert rank_biased_overlap(one, one, persistence=p) == pytest.approx(1)
    assert rank_biased_overlap(one, [n + 100 for n in other], persistence=p) == (0 if one or other else 1)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_closed_forms(p: float) -> None:
    assert rank_biased_overlap("ab", "ba", persistence=p) == pytest.approx(p)  # all agree but for the first depth
    assert rank_biased_overlap("abc", "cab", persistence=p) == pytest.approx(p / 2 * (1 + p))
    # Half of the ends agree: half at every depth after the first, extrapolated for ever.
    assert rank_biased_overlap("ax", "ay", persistence=p) == pytest.approx(1 - p + p / 2)


@pytest.mark.parametrize("p", [0.5, 0.8])
@pytest.mark.parametrize(("one", "other"), [("abcd", "badc"), ("abcdef", "fbcdea"), ("abcde", "edcba")])
def test_lists_that_come_together_equal_the_endless_ones(p: float, one: str, other: str) -> None:
    """Both hold the same items at their end, so going on for ever in agreement is what equation 32 extrapolates."""
    tail = list(range(4000))
    wanted = endless([*map(ord, one), *[-n - 1 for n in tail]], [*map(ord, other), *[-n - 1 for n in tail]], p=p)
    assert rank_biased_overlap(one, other, persistence=p) == pytest.approx(wanted, abs=1e-9)


def test_a_short_list_that_agrees_as_far_as_it_goes() -> None:
    """Equation 32 with uneven ends: the agreement of the short list's last depth is taken to hold further down."""
    assert rank_biased_overlap("ab", "abcd") == pytest.approx(1)
    assert rank_biased_overlap([], "a") == 0
    assert rank_biased_overlap([], []) == 1
    with pytest.raises(QueryError, match="between 0 and 1"):
        rank_biased_overlap("a", "a", persistence=1)


def make(folder: Path, numbers: Sequence[int], *, dataset: str = "shapes", salt: str = "") -> KnowledgeBase:
    kb = KnowledgeBase.create(folder, HashEmbedder(salt=salt))
    for number in numbers:
        kb.add([draw(number)], caption_of(number), dataset=dataset)
    kb.build_search("exact")
    return kb


BM25 = {"by": "bm25"}


def test_a_knowledge_base_agrees_with_itself(tmp_path: Path) -> None:
    kb = make(tmp_path / "kb", range(12))
    differences = compare(Side(kb=kb, asked={}), Side(kb=kb, asked={}), ["a red circle", "green"], k=4)
    assert all(one.is_identical and one.shift == 0 for one in differences)
    summary = summarize(differences)
    assert (summary["identical"], summary["overlap_median"], summary["rbo_median"]) == (2, 1, pytest.approx(1))


def test_the_same_picture_is_the_same_hit_under_another_id(tmp_path: Path) -> None:
    a = make(tmp_path / "a", range(12))
    b = make(tmp_path / "b", range(2, 14), dataset="forms")  # other ids; no 0 and 1, but 12 and 13
    (one,) = compare(Side(kb=a, asked=BM25), Side(kb=b, asked=BM25), ["circle square"], k=20)
    assert {hit.caption for hit in one.only_a} == {caption_of(0), caption_of(1)}
    assert {hit.caption for hit in one.only_b} == {caption_of(12), caption_of(13)}
    assert all(x.caption == y.caption and x.id != y.id for x, y in one.shared)
    assert one.overlap == pytest.approx(10 / 12)
    document = one.to_json()
    shifts = [pair["score_b"] - pair["score_a"] for pair in document["shared"]]
    assert document["score_shift"] == pytest.approx(float(np.median(shifts)))


def test_without_a_sha256_the_caption_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from index.search import compare as module

    a, b = make(tmp_path / "a", range(4)), make(tmp_path / "b", range(4), dataset="forms")
    monkeypatch.setattr(module, "_digests", lambda side, found: dict.fromkeys([hit.id for hit in found.hits]))
    (one,) = compare(Side(kb=a, asked=BM25), Side(kb=b, asked=BM25), ["a circle"], k=4)
    assert one.overlap == 1
    assert not one.only_a


def test_two_ways_to_ask_and_the_worst_first(tmp_path: Path) -> None:
    kb = make(tmp_path / "kb", range(20))
    a, b = Side(kb=kb, asked={"by": "clip"}), Side(kb=kb, asked=BM25)
    differences = compare(a, b, ["a red circle", "zebra", "number 7"], k=5)
    assert [one.rbo for one in differences] == sorted(one.rbo for one in differences)
    zebra = next(one for one in differences if one.query == "zebra")
    assert (len(zebra.only_a), zebra.hits_b, zebra.shift) == (5, [], None)
    assert all(one.shift is None for one in differences)  # a cosine and a BM25 score have no difference
    with pytest.raises(QueryError, match="there is no query"):
        compare(a, b, [])


def test_the_page_stands_alone_and_escapes(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", range(6)), make(tmp_path / "b", range(3, 9))
    b.add([draw(50)], EVIL)
    sides = Side(kb=a, asked=BM25), Side(kb=b, asked=BM25)
    differences = compare(*sides, ["circle", f"{EVIL} circle"], k=5)
    path = tmp_path / "out" / "page.html"
    write_compare_sheet(path, *sides, differences, names=(EVIL, "b"), summary=summarize(differences))
    page = path.read_text()
    parsed = Collector(page)
    assert "script" not in parsed.tags
    assert all(source.startswith("data:image/") for source in parsed.sources)
    assert parsed.tags.count("section") == 2
    assert parsed.tags.count("img") == sum(len(one.hits_a) + len(one.hits_b) for one in differences)
    assert "url(" not in page
