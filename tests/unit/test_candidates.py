"""Candidates as lists: taken, interleaved by round robin, the first of each group kept."""

import numpy as np

from index.search.candidates import Candidates, first_of_each, interleave


def listed(*ids: int, final: bool = False) -> Candidates:
    score = np.linspace(1.0, 0.5, len(ids))
    return Candidates(ids=np.array(ids, dtype=np.int64), score=score, clip=score + 1, words=None, is_final=final)


def test_round_robin_takes_turns_and_nothing_twice() -> None:
    merged = interleave([listed(1, 2, 3, 4), listed(9), listed(2, 8)], ["one", "nine", "eight"])
    assert merged.ids.tolist() == [1, 9, 2, 8, 3, 4]
    assert [merged.label(n) for n in range(6)] == ["one", "nine", "eight", "eight", "one", "one"]
    assert merged.clip is not None
    np.testing.assert_array_equal(merged.clip, merged.score + 1)
    assert merged.words is None
    assert merged.score[2] == 1.0, "2 answers the part that ranks it first, with that part's score"


def test_what_several_searches_found_is_final_when_all_are() -> None:
    assert interleave([listed(1, final=True), listed(2, final=True)], ["a", "b"]).is_final
    assert not interleave([listed(1, final=True), listed(2)], ["a", "b"]).is_final
    assert listed(1, 2, final=True).take(np.array([1])).is_final


def test_empty_lists_take_no_turn() -> None:
    merged = interleave([listed(), listed(5, 6)], ["a", "b"])
    assert (merged.ids.tolist(), merged.label(0)) == ([5, 6], "b")
    assert len(interleave([listed(), listed()], ["a", "b"])) == 0


def test_the_first_of_each_group_is_kept() -> None:
    assert first_of_each(np.array([7, 3, 7, 7, 3, 1])).tolist() == [True, True, False, False, False, True]
    assert first_of_each(np.empty(0, dtype=np.int64)).tolist() == []
