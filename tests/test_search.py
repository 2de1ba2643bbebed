"""The search: which neighbours are tried, which point is chosen, what the front is, and that time ends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from test_ladder import GATE, ladder, score
from test_plan import operator, plan_with

from quant.execution import Kernel
from quant.ladder import Limits, Rung, SearchScore
from quant.plan import QuantPlan
from quant.search import (
    FINALISTS,
    Point,
    chosen,
    confirmed,
    draw_front,
    explore,
    front,
    neighbours,
    taken,
    timed_again,
)
from quant.speed import gains


def plan_of_four() -> QuantPlan:
    """`slow` gains nothing, `quick` and `other` do; `left` is in FP32, by the ladder."""
    plan = plan_with(*(operator(name, 10, damage=0.1) for name in ("slow", "quick", "other", "left")))
    return plan.with_only({"slow", "quick", "other"}, "too much damage")


GAINS = {"slow": -1.0, "quick": 3.0, "other": 1.0, "left": 2.0}


class World:
    """Latencies and scores by the names of the quantized operators."""

    def __init__(self, latency: Callable[[set[str]], float], fails: Mapping[frozenset[str], SearchScore]) -> None:
        self.latency, self.fails = latency, fails
        self.measured: list[set[str]] = []

    def error(self, plan: QuantPlan) -> float:
        return 0.0

    def score(self, plan: QuantPlan) -> SearchScore:
        return self.fails.get(frozenset(plan.quantized()), score(0.1, discordance=1.0))

    def measure(self, plan: QuantPlan) -> float:
        self.measured.append(set(plan.quantized()))
        return self.latency(self.measured[-1])

    def search(self, turns: int = 99, least: int = 0) -> list[Point]:
        left = iter(range(turns))
        start = plan_of_four()
        first = Point(start, Rung("ladder", start.coverage(), 1, 0.0, self.score(start), True), self.measure(start))
        return explore(
            first,
            GAINS,
            (ladder(), GATE),
            self,
            self.measure,
            lambda plan: plan,
            lambda plan: len(plan.quantized()) >= least,
            lambda: next(left, None) is not None,
        )


def milliseconds(names: set[str]) -> float:
    return (10 - sum(GAINS[name] for name in names)) / 10


def test_the_fastest_plan_that_passes_is_found() -> None:
    world = World(milliseconds, {})
    points = world.search()
    assert set(chosen(points).plan.quantized()) == {"quick", "other", "left"}
    assert len(points) == len(world.measured) == len({frozenset(names) for names in world.measured})


def test_a_faster_plan_that_fails_is_left() -> None:
    both = frozenset({"quick", "other", "left"})
    points = World(milliseconds, {both: score(5.0)}).search()
    assert set(chosen(points).plan.quantized()) == {"quick", "other"}
    assert any(set(p.plan.quantized()) == both and not p.rung.passed for p in points)


def test_plans_below_the_floor_are_not_even_measured() -> None:
    world = World(milliseconds, {})
    world.search(least=4)
    assert all(len(names) >= 3 for names in world.measured) and {"quick", "other"} not in world.measured


def test_the_search_ends_with_its_time() -> None:
    assert len(World(milliseconds, {}).search(turns=0)) == 1
    assert len(World(milliseconds, {}).search(turns=1)) == 2


def test_neighbours_by_what_the_profile_promises() -> None:
    plan = plan_of_four()
    found = dict(neighbours(plan, GAINS))
    assert list(found) == ["slower in INT8 left out", "with left"]
    assert set(found["slower in INT8 left out"].quantized()) == {"quick", "other"}
    assert set(found["with left"].quantized()) == {"slow", "quick", "other", "left"}
    stored = replace(plan, outputs={"quick": next(iter(plan.activations.values()), None)})  # type: ignore[dict-item]
    assert not dict(neighbours(stored, GAINS))["inputs alone"].outputs
    assert dict(neighbours(plan, {})) == {}, "nothing is promised where nothing was measured"


def point(latency: float, drop: float, passed: bool = True, discordance: float = 0.0) -> Point:
    return Point(plan_of_four(), Rung("x", 1.0, 0, 0.0, score(drop, discordance=discordance), passed), latency)


def test_of_equally_fast_points_the_better_is_chosen() -> None:
    near = [point(0.500, 0.9), point(0.505, 0.1), point(0.6, 0.0)]
    assert chosen(near) is near[1]
    failing = [point(0.3, 3.0, passed=False), point(0.9, 2.0, passed=False)]
    assert chosen([*failing, near[2]]) is near[2]
    assert chosen(failing) is failing[1], "none passes: the best"


def test_a_lucky_figure_is_not_what_decides() -> None:
    """Ten plans that take 0.7 each, timed with noise, and one that takes 0.6: the least of ten is below that."""
    noise = [0.04, -0.02, 0.05, -0.13, 0.01, -0.03, 0.02, 0.0, -0.01, 0.03]
    points = [point(0.7 + off, 0.05 * index) for index, off in enumerate(noise)]
    points[5] = point(0.6, 0.01)
    assert chosen(points) is points[3], "by the first figures"
    true = {id(p.plan): 0.7 for p in points} | {id(points[5].plan): 0.6}
    asked: list[int] = []

    def measure(plans: Sequence[QuantPlan]) -> list[float]:
        asked.extend(map(id, plans))
        return [true[id(plan)] for plan in plans]

    again = timed_again(points, measure)
    finalists = [p for p in again if p.finalist]
    assert chosen(finalists).plan is points[5].plan
    assert asked == [id(p.plan) for p in finalists] and asked[0] == id(points[0].plan), "the ladder's is among them"
    assert [p.latency for p in again if not p.finalist] == [
        p.latency for p, q in zip(points, again, strict=True) if not q.finalist
    ]


def test_few_points_are_timed_again() -> None:
    points = [point(0.9 - 0.05 * index, 0.1 * index) for index in range(10)]
    again = timed_again([*points, point(0.1, 9.0, passed=False)], lambda plans: [0.5] * len(plans))
    assert [index for index, p in enumerate(again) if p.finalist] == [0, *range(10 - FINALISTS, 10)]
    failing = [point(0.3, 3.0, passed=False), point(0.9, 2.0, passed=False)]
    again = timed_again(failing, lambda plans: [0.5] * len(plans))
    assert [p.finalist for p in again] == [False, True], "none passes: the best"


LIMITS = Limits.of(ladder(max_discordance=3.0), GATE)


def test_what_fails_on_the_target_is_not_taken() -> None:
    """The fastest passes in simulation alone; the next best passes on the target, too, and no other is scored there."""
    points = [replace(point(latency, 0.1), finalist=True) for latency in (0.9, 0.5, 0.7, 0.8)]
    points.append(point(0.1, 0.0))
    results = {id(points[1].plan): score(0.2, discordance=9.0), id(points[2].plan): score(0.3)}
    found = confirmed(points, LIMITS, lambda plan: results[id(plan)])
    assert [p.measured for p in found] == [None, *results.values(), None, None]
    assert taken(found, LIMITS) is found[2] and found[2].document()["measured"]["drop"] == 0.3


def test_where_none_passes_on_the_target_the_best_there_is_taken() -> None:
    points = [replace(point(latency, 0.1), finalist=True) for latency in (0.9, 0.5, 0.7)]
    drops = {id(p.plan): drop for p, drop in zip(points, (3.0, 4.0, 2.0), strict=True)}
    found = confirmed(points, LIMITS, lambda plan: score(drops[id(plan)]))
    assert taken(found, LIMITS) is found[2]


def test_the_front_holds_what_no_other_beats() -> None:
    points = [point(0.5, 0.8), point(0.6, 0.9), point(0.7, 0.2), point(0.4, 2.0, passed=False)]
    assert front(points) == [points[3], points[0], points[2]]


def test_the_plot_is_the_same_every_time(tmp_path: Path) -> None:
    points = [point(0.5, 0.8, discordance=2.0), point(0.7, 0.2, discordance=1.0)]
    for name in ("a.svg", "b.svg"):
        draw_front(points, points[1], "model on target", tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "model on target" in (tmp_path / "a.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("decoration", ["", "/WithoutBiases", "_nchwc", "/MatmulTransposeFusion/"])
def test_gains_are_matched_by_the_operators_name(decoration: str) -> None:
    fp32 = [Kernel(f"conv{decoration}", "Conv", "f32", 3.0), Kernel("gone", "Conv", "f32", 1.0)]
    int8 = [Kernel("conv", "QLinearConv", "u8", 1.0), Kernel("reorder", "Reorder", "u8", 9.0)]
    assert gains(["conv", "gone"], fp32, int8) == {"conv": 2.0}
