"""Which settings calibration chooses, on machines and searchers made up for it: no clock is looked at."""

import math
from itertools import pairwise

import numpy as np
import pytest

from index.search import calibration as module
from index.search.calibration import calibrate, enough, finalists, goal_for, ladder
from index.search.searcher import CurvePoint, ExactSearcher, Ids, Queries, Scores, shifted_queries


class MadeUp:
    """Recall grows with leaves and with the reorder depth; time too."""

    def __init__(self, *, cap: float = 1.0, reorder_cost: float = 0.1, leaves_needed: float = 20.0):
        self.cap, self.reorder_cost, self.leaves_needed = cap, reorder_cost, leaves_needed
        self.points: list[CurvePoint] = []

    def run(self, leaves_to_search: int, reorder: int) -> CurvePoint:
        found = (1 - math.exp(-3 * leaves_to_search / self.leaves_needed)) * (1 - math.exp(-reorder / 20)) * self.cap
        qps = 1e6 / (10 * leaves_to_search + self.reorder_cost * reorder)
        point = CurvePoint(leaves_to_search=leaves_to_search, reorder=reorder, recall_at_10=found, qps=qps)
        self.points.append(point)
        return point


@pytest.mark.parametrize("goal", [0.8, 0.9, 0.96, 0.99])
@pytest.mark.parametrize("reorder_cost", [0.01, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("leaves_needed", [0.5, 20.0, 300.0])
def test_the_choice_is_the_cheapest_of_the_whole_grid(goal: float, reorder_cost: float, leaves_needed: float) -> None:
    trial = MadeUp(reorder_cost=reorder_cost, leaves_needed=leaves_needed)
    reached = finalists(trial.run, 1000, goal)
    assert all(point.recall_at_10 >= goal for point in reached)
    every = [trial.run(leaves, reorder) for leaves in ladder(1000) for reorder in module._REORDERS]
    cheapest = max((point for point in every if point.recall_at_10 >= goal), key=lambda point: point.qps)
    assert max(reached, key=lambda point: point.qps) == cheapest


def test_few_exact_scores_are_taken_where_they_are_what_costs() -> None:
    cheap, dear = (finalists(MadeUp(reorder_cost=cost).run, 1000, 0.8) for cost in (0.01, 10.0))
    few, many = (max(reached, key=lambda point: point.qps) for reached in (dear, cheap))
    assert few.reorder == 35 < many.reorder
    assert few.leaves_to_search > many.leaves_to_search


def test_the_ladder_leaves_no_gap_where_leaves_are_few() -> None:
    rungs = ladder(1000)
    assert rungs[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rungs[-1] == 1000
    assert all(after <= max(before + 1, 1.2 * before) for before, after in pairwise(rungs))
    assert ladder(1) == [1]


def test_few_settings_are_tried() -> None:
    trial = MadeUp()
    finalists(trial.run, 10_000, 0.96)
    assert len(trial.points) < 40


def test_out_of_reach_is_the_best_there_is() -> None:
    trial = MadeUp(cap=0.7)
    (chosen,) = finalists(trial.run, 100, 0.96)
    assert chosen.recall_at_10 == max(point.recall_at_10 for point in trial.points)
    assert chosen.reorder == module._DEEPEST_REORDER


def test_more_effort_is_taken_when_the_other_half_finds_too_little() -> None:
    other = MadeUp(leaves_needed=30.0)  # harder than the half that chose
    chosen = CurvePoint(leaves_to_search=20, reorder=100, recall_at_10=0.95, qps=1.0)
    taken = enough(other.run, chosen, 1000, 0.9)
    assert taken.recall_at_10 >= 0.9 > other.points[-2].recall_at_10
    assert (taken.leaves_to_search, taken.reorder) == (25, 140)


def test_more_exact_scores_are_taken_when_leaves_are_not_what_is_missing() -> None:
    chosen = CurvePoint(leaves_to_search=40, reorder=50, recall_at_10=0.95, qps=1.0)
    taken = enough(MadeUp().run, chosen, 1000, 0.95)
    assert (taken.leaves_to_search, taken.reorder) == (50, 70)


def test_what_suffices_is_measured_once_and_kept() -> None:
    other = MadeUp()
    chosen = CurvePoint(leaves_to_search=30, reorder=400, recall_at_10=0.95, qps=1.0)
    assert enough(other.run, chosen, 1000, 0.95) in other.points
    assert [(point.leaves_to_search, point.reorder) for point in other.points] == [(30, 400)]


def test_no_effort_beyond_all_leaves_and_the_deepest_reorder_is_tried() -> None:
    other = MadeUp(cap=0.7)
    chosen = CurvePoint(leaves_to_search=10, reorder=module._DEEPEST_REORDER, recall_at_10=0.7, qps=1.0)
    enough(other.run, chosen, 10, 0.95)
    assert len(other.points) == 1


class Half:
    """Finds what exact search finds for queries that point one way, and nothing for others."""

    leaves = 10

    def __init__(self, exact: ExactSearcher):
        self.exact = exact
        self.efforts: list[tuple[int, int]] = []

    def with_effort(self, leaves_to_search: int, reorder: int) -> "Half":
        self.efforts.append((leaves_to_search, reorder))
        return self

    def search(self, queries: Queries, *, top_k: int, recall_at: int | None = None) -> tuple[Ids, Scores]:
        ids, scores = self.exact.search(queries, top_k=top_k)
        ids[queries[:, 0] < 0], scores[queries[:, 0] < 0] = -1, -np.inf
        return ids, scores


def test_one_half_of_the_queries_chooses_and_the_other_measures() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((400, 8)).astype(np.float32)
    exact = ExactSearcher(np.arange(400), vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    queries = shifted_queries(exact.vectors, seed=1, num=80)
    queries[::2, 0], queries[1::2, 0] = abs(queries[::2, 0]), -abs(queries[1::2, 0])
    _, truth = exact.search(queries, top_k=10)
    found = calibrate(Half(exact), queries, truth, target=0.95)
    assert found.settings["leaves_to_search"] == 1  # every query of the first half found all with one leaf
    assert found.recall_at_10 == 0.0  # and none of the second half does: what is reported is theirs
    assert "recall@10 is 0.000 and not the 0.95 asked for" in found.warning
    assert {point.recall_at_10 for point in found.curve} == {0.0}


def test_a_searcher_without_leaves_has_nothing_to_set() -> None:
    exact = ExactSearcher(np.arange(50), np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32))
    whole = Half(exact)
    whole.leaves = 0
    queries = abs(shifted_queries(exact.vectors, seed=1, num=20))
    _, truth = exact.search(queries, top_k=10)
    found = calibrate(whole, queries, truth, target=0.95)
    assert (found.settings, found.recall_at_10, found.curve, found.warning) == ({}, 1.0, (), "")


def test_the_fastest_is_found_although_the_machine_slows_down_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = ExactSearcher(np.arange(9), np.eye(9, dtype=np.float32))
    trial = module._Trial(Half(exact), exact.vectors, np.ones((9, 1), dtype=np.float32))
    speeds = iter([30.0, 20.0, 15.0, 10.0, *[3.0, 2.0] * 3])  # of the slow and the quick setting in turns

    def run(leaves_to_search: int, reorder: int) -> CurvePoint:
        qps = next(speeds) * (2 if reorder == 50 else 1)
        return CurvePoint(leaves_to_search=leaves_to_search, reorder=reorder, recall_at_10=1.0, qps=qps)

    monkeypatch.setattr(trial, "run", run)
    points = [CurvePoint(leaves_to_search=1, reorder=r, recall_at_10=1.0, qps=9.0) for r in (400, 50)]
    assert trial.fastest(points).reorder == 50


def test_a_slow_searcher_is_asked_fewer_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLOW_SECONDS", 0.0)
    exact = ExactSearcher(np.arange(300), np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32))
    _, truth = exact.search(exact.vectors, top_k=10)
    trial = module._Trial(Half(exact), exact.vectors, truth, may_cut=True)
    trial.run(1, 50)
    assert len(trial._queries) == len(trial._truth) == module._FEWEST_QUERIES


def test_few_queries_are_asked_for_more_than_many() -> None:
    assert goal_for(0.95, 256) == pytest.approx(0.96)
    assert goal_for(0.95, 64) == pytest.approx(0.97)
    assert goal_for(0.95, 1) == pytest.approx(0.975)
    assert goal_for(1.0, 1) == 1.0
