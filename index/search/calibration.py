"""Calibration: the fastest settings at which an approximate searcher still finds what exact search finds.

Two settings trade recall for time: how many leaves (lists) are searched, and how many candidates are scored exactly.
Text queries lie elsewhere than images, so the rule of thumb for one data set is wrong for the next: it is measured.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from index.search.searcher import CurvePoint, Queries, Scores, Searcher, recall_of

# Above the target, over sqrt(queries): they are a sample, and the recall of one varies by about 0.1. So it is 1.6
# standard errors, 0.01 for 256 of them
_MARGIN = 0.16
# Candidates scored exactly, deepest first. Each costs about as much as the codes of thirty rows, so it is worth
# knowing how few will do: 50 instead of 100 are a quarter faster where one leaf is searched (200,000 x 512)
_REORDERS = (400, 280, 200, 140, 100, 70, 50, 35, 25)
_DEEPEST_REORDER = 1600  # when 400 do not do
_LADDER = 1.15  # from one number of leaves to the next
_STRIDE = 3  # rungs of the ladder at once, until the goal is passed
_TIMED_SECONDS = 0.05  # a faster search is timed again, and the best of three counts
_FINAL_ROUNDS = 5
_SLOW_SECONDS = 0.5  # a batch that takes longer is cut, down to:
_FEWEST_QUERIES = 100
_SLOWER = 0.7  # of the best rate so far, beyond noise: not worth going on
_STEPS_UP = ((1.1, 1.2), (1.25, 1.4), (1.6, 2), (2, 2.8), (4, 8))  # times as many leaves, and as many exact scores


Run: TypeAlias = Callable[[int, int], CurvePoint]  # leaves to search and reorder depth -> what comes of them


@runtime_checkable
class Tunable(Protocol):
    """A searcher whose effort can be set."""

    @property
    def leaves(self) -> int:
        """How many leaves (lists) there are in a shard; 0 when every row is scored."""
        ...

    def with_effort(self, leaves_to_search: int, reorder: int) -> Searcher:
        """The same searcher with other settings; they share what is in memory."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The settings chosen, what they find, and a sentence when the target was not reached."""

    settings: dict[str, Any]
    recall_at_10: float
    curve: tuple[CurvePoint, ...]
    warning: str


def calibrate(searcher: Any, queries: Queries, truth: Scores, *, target: float) -> Calibration:
    """The fastest effort that finds the share `target` of what scores as `truth` does, chosen with half the queries.

    The remaining queries measure it, and the curve around it. When they find less than the target, the next effort up
    is measured in its place, up to four times the leaves. What is reported stays fair: how hard a half is, it is at
    every effort, so a half that happens to be hard is answered with more leaves than were needed, and none is ever
    given fewer because it looks easy.
    """
    trial = _Trial(searcher, queries[::2], truth[::2], may_cut=True)
    control = _Trial(searcher, queries[1::2], truth[1::2]) if len(queries) > 1 else trial
    if not searcher.leaves:
        return Calibration(settings={}, recall_at_10=control.run(0, 0).recall_at_10, curve=(), warning="")
    goal = goal_for(target, len(queries[::2]))
    chosen = trial.fastest(finalists(trial.run, searcher.leaves, goal))
    best = enough(control.run, chosen, searcher.leaves, target)
    curve = tuple(control.run(leaves, best.reorder) for leaves in _around(best.leaves_to_search, searcher.leaves))
    measured = next(point for point in curve if point.leaves_to_search == best.leaves_to_search)
    return Calibration(
        settings={"leaves_to_search": best.leaves_to_search, "reorder": best.reorder},
        recall_at_10=measured.recall_at_10,
        curve=curve,
        warning=_warning(measured, searcher.leaves, target),
    )


def goal_for(target: float, queries: int) -> float:
    """What so many queries must find so that others may be trusted to find `target`."""
    return target + min(_MARGIN / math.sqrt(queries), (1 - target) / 2)


def enough(run: Run, chosen: CurvePoint, leaves: int, target: float) -> CurvePoint:
    """The chosen effort as `run` measures it, or the next one up that reaches the target; if none does, the best."""
    efforts = [(chosen.leaves_to_search, chosen.reorder)]
    for more_leaves, more_reorder in _STEPS_UP:
        reorder = max(chosen.reorder, min(_DEEPEST_REORDER, math.ceil(more_reorder * chosen.reorder)))
        efforts.append((min(leaves, math.ceil(more_leaves * chosen.leaves_to_search)), reorder))
    measured: list[CurvePoint] = []
    for leaves_to_search, reorder in dict.fromkeys(efforts):
        measured.append(run(leaves_to_search, reorder))
        if measured[-1].recall_at_10 >= target:
            break
    return max(measured, key=lambda point: point.recall_at_10)


class _Trial:
    """A searcher with queries whose answers are known; with `may_cut`, fewer of them when they take long."""

    def __init__(self, searcher: Tunable, queries: Queries, truth: Scores, *, may_cut: bool = False):
        self._searcher, self._queries, self._truth, self._may_cut = searcher, queries, truth, may_cut

    def run(self, leaves_to_search: int, reorder: int) -> CurvePoint:
        searcher = self._searcher.with_effort(leaves_to_search, reorder)
        fastest = math.inf
        for _ in range(3):
            started = time.perf_counter()
            _, found = searcher.search(self._queries, top_k=self._truth.shape[1])
            fastest = min(fastest, time.perf_counter() - started)
            if fastest > _TIMED_SECONDS:
                break
        point = CurvePoint(
            leaves_to_search=leaves_to_search,
            reorder=reorder,
            recall_at_10=round(recall_of(found, self._truth), 4),
            qps=round(len(self._queries) / fastest, 1),
        )
        if self._may_cut and fastest > _SLOW_SECONDS:
            kept = max(_FEWEST_QUERIES, round(len(self._queries) * _SLOW_SECONDS / fastest))
            self._queries, self._truth = self._queries[:kept], self._truth[:kept]
        return point

    def fastest(self, points: Sequence[CurvePoint]) -> CurvePoint:
        """The one with the best of several times, taken in turns: a machine that other work slows, slows all alike."""
        if len(points) == 1:
            return points[0]
        rounds = [[self.run(p.leaves_to_search, p.reorder) for p in points] for _ in range(_FINAL_ROUNDS)]
        best = [max(times, key=lambda point: point.qps) for times in zip(*rounds, strict=True)]
        return max(best, key=lambda point: point.qps)


def finalists(run: Run, leaves: int, goal: float) -> list[CurvePoint]:
    """For each reorder depth the fewest leaves that reach the goal, unless that is much slower than another depth.

    The cheapest of the whole grid is among them as long as more leaves, and more exact scores, find more and take
    longer: the fewest leaves that do at one depth are too few, or just enough, at a shallower one. When nothing
    reaches the goal: the best there is.
    """
    rungs = ladder(leaves)
    deepest = _fewest_leaves(run, rungs, _REORDERS[0], goal)
    if deepest.recall_at_10 < goal:
        deeper = _fewest_leaves(run, rungs, _DEEPEST_REORDER, goal)
        return [deeper if deeper.recall_at_10 > deepest.recall_at_10 else deepest]
    found, best, fewest = [deepest], deepest.qps, rungs.index(deepest.leaves_to_search)
    for reorder in _REORDERS[1:]:
        for rung in range(fewest, len(rungs)):
            point = run(rungs[rung], reorder)
            if point.recall_at_10 >= goal or point.qps < _SLOWER * best:
                break
        if point.recall_at_10 >= goal:
            found.append(point)
            best, fewest = max(best, point.qps), rung
    return found


def ladder(leaves: int) -> list[int]:
    """The numbers of leaves that are tried, up to all of them."""
    rungs = [1]
    while rungs[-1] < leaves:
        rungs.append(min(leaves, max(rungs[-1] + 1, round(_LADDER * rungs[-1]))))
    return rungs


def _fewest_leaves(run: Run, rungs: Sequence[int], reorder: int, goal: float) -> CurvePoint:
    """The first point from below that reaches the goal, or the best of all when none does."""
    tried: dict[int, CurvePoint] = {}
    low, high = -1, 0
    while True:
        tried[high] = run(rungs[high], reorder)
        if tried[high].recall_at_10 >= goal:
            break
        if high == len(rungs) - 1:
            return max(tried.values(), key=lambda point: (point.recall_at_10, -point.leaves_to_search))
        low, high = high, min(high + _STRIDE, len(rungs) - 1)
    while high - low > 1:
        middle = (low + high) // 2
        tried[middle] = run(rungs[middle], reorder)
        low, high = (low, middle) if tried[middle].recall_at_10 >= goal else (middle, high)
    return tried[high]


def _around(chosen: int, leaves: int) -> list[int]:
    """Numbers of leaves on both sides of the chosen one, for the curve."""
    return sorted({min(leaves, max(1, round(chosen * factor))) for factor in (0.25, 0.5, 1, 2, 4)})


def _warning(measured: CurvePoint, leaves: int, target: float) -> str:
    if measured.recall_at_10 >= target:
        return ""
    share = f"{measured.leaves_to_search} of {leaves} leaves and {measured.reorder} exact scores a query"
    return (
        f"recall@10 is {measured.recall_at_10:.3f} and not the {target} asked for, with {share}; "
        "a lower --recall is faster, --searcher exact finds all"
    )
