"""The ladder: what goes back to FP32 first, how far it goes, when it stops."""

from __future__ import annotations

import ctypes
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import operator, plan_with

from quant.ladder import FAINT, SearchScore, climb, fits, revert_to
from quant.plan import QuantPlan
from quant.recipe import Gate, Ladder, LadderMethod

GATE = Gate(max_drop=1.0, max_relative_drop=1.0)


def ladder(
    *steps: float,
    margin: float = 0.0,
    max_discordance: float = 100.0,
    min_weights: float = 0.0,
    max_error: float = 1.0,
) -> Ladder:
    return Ladder(
        search_samples=1,
        damage_samples=1,
        error_samples=1,
        coverage_steps=list(steps),
        min_coverage=0.0,
        min_weights=min_weights,
        max_error=max_error,
        max_discordance=max_discordance,
        margin=margin,
    )


def score(drop: float, relative: float | None = None, discordance: float = 0.0) -> SearchScore:
    return SearchScore(drop, drop if relative is None else relative, discordance, 100)


def ten_operators() -> QuantPlan:
    """Ten operators of equal work; operator 0 hurts most, operator 9 least."""
    return plan_with(*(operator(f"op{i}", 10, damage=1.0 / (i + 1)) for i in range(10)))


def share_of_weights(plan: QuantPlan) -> float:
    total = sum(op.parameters for op in plan.operators)
    return sum(op.parameters for op in plan.quantized().values()) / total if total else 0.0


class Scripted:
    """Errors and scores in the order of the calls; a call too many is an error."""

    def __init__(self, *scores: SearchScore, errors: Sequence[float] | None = None) -> None:
        self.scores = iter(scores)
        self.errors = itertools.repeat(0.0) if errors is None else iter(errors)

    def error(self, plan: QuantPlan) -> float:
        return next(self.errors)

    def score(self, plan: QuantPlan) -> SearchScore:
        return next(self.scores)


# --- reverting -------------------------------------------------------------------------------------


def test_the_most_damaging_operators_go_first() -> None:
    plan = revert_to(ten_operators(), 0.7, 0.0, FAINT[0])
    assert list(plan.quantized()) == [f"op{i}" for i in range(3, 10)]
    assert all("damage" in op.reason for op in plan.operators if not op.quantized)


def test_two_that_do_more_damage_together_go_before_one_that_does_most() -> None:
    halves = [operator(name, 5, damage=0.15) for name in ("one", "other")]
    plan = plan_with(operator("worst", 10, damage=0.2), *halves, operator("body", 80))
    assert list(revert_to(plan, 0.9, 0.0, FAINT[0]).quantized()) == ["worst", "body"]
    heavy = [operator(name, 1, damage=0.15, parameters=5) for name in ("one", "other")]
    plan = plan_with(operator("worst", 1, damage=0.2, parameters=10), *heavy, operator("body", 80, parameters=80))
    assert list(revert_to(plan, 0.5, 0.9, FAINT[0]).quantized()) == ["worst", "body"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 99), st.integers(1, 99)), min_size=1, max_size=7),
    st.floats(0.5, 0.95),
    st.floats(0.5, 0.95),
)
def test_no_other_choice_within_the_limits_would_take_away_more_damage(
    facts: list[tuple[int, int, int]], floor: float, weights_floor: float
) -> None:
    plan = plan_with(*(operator(f"op{i}", m, damage=d, parameters=p) for i, (m, d, p) in enumerate(facts)))
    names = list(plan.quantized())
    allowed = (
        left
        for size in range(len(names) + 1)
        for gone in itertools.combinations(names, size)
        if (left := plan.with_only(set(names) - set(gone), "")).coverage() >= floor
        and share_of_weights(left) >= weights_floor
        and len(gone) <= round(250 * (1 - floor))
    )
    best = min(map(remaining, allowed))
    assert remaining(revert_to(plan, floor, weights_floor, faint=0.0)) <= best + 1e-3 * remaining(plan)


def remaining(plan: QuantPlan) -> float:
    return sum((op.damage or 0) ** 2 for op in plan.quantized().values())


def test_few_operators_are_reverted_for_little_coverage() -> None:
    plan = plan_with(operator("body", 9000), *(operator(f"op{i}", 1, damage=0.1) for i in range(90)))
    assert len(plan.quantized()) - len(revert_to(plan, 0.99, 0.0, FAINT[0]).quantized()) == 3
    assert len(plan.quantized()) - len(revert_to(plan, 0.9, 0.0, FAINT[0]).quantized()) == 25


def test_of_more_and_fewer_operators_those_are_reverted_that_leave_the_smaller_error() -> None:
    for errors, kept in (([0.5, 0.2, 0.3, 0.4], 5), ([0.5, 0.3, 0.2, 0.4], 9), ([0.5, 0.4, 0.3, 0.2], 0)):
        judge = Scripted(score(9.0), score(0.0), errors=errors)
        plan, rungs = climb(ten_operators(), ladder(), GATE, 0.0, judge)
        assert len(plan.quantized()) == kept
        assert [rung.error for rung in rungs] == [0.5, 0.2]


def test_one_operator_far_worse_than_the_rest_does_not_end_the_ladder() -> None:
    operators = [operator("bad", 1, damage=1.0), *(operator(f"op{i}", 2, damage=0.1) for i in range(50))]
    judge = Scripted(score(9.0), score(9.0), score(9.0), score(0.0))
    plan, rungs = climb(plan_with(*operators), ladder(0.9), GATE, 0.7, judge)
    assert [rung.reverted for rung in rungs] == [0, 1, 5, 15]
    assert plan.coverage() >= 0.7


def test_what_does_no_damage_stays_small() -> None:
    plan = plan_with(
        operator("bad", 1, damage=0.3), operator("good", 1, damage=0.001), operator("body", 98, damage=0.1)
    )
    assert list(revert_to(plan, 0.9, 0.0, FAINT[0]).quantized()) == ["good", "body"]


def test_one_too_large_for_the_floor_is_stepped_over() -> None:
    plan = plan_with(
        operator("large", 60, damage=9), operator("middle", 30, damage=1), operator("small", 10, damage=0.5)
    )
    assert list(revert_to(plan, 0.65, 0.0, FAINT[0]).quantized()) == ["large", "small"]
    assert list(revert_to(plan, 0.9, 0.0, FAINT[0]).quantized()) == ["large", "middle"]


def test_weights_that_bound_the_file_size_stay_in_int8() -> None:
    plan = plan_with(operator("heavy", 1, damage=9, parameters=60), operator("light", 1, damage=0.5, parameters=40))
    assert list(revert_to(plan, 0.0, 0.5, FAINT[0]).quantized()) == ["heavy"]
    assert list(revert_to(plan, 0.0, 0.7, FAINT[0]).quantized()) == ["heavy", "light"]
    _, rungs = climb(plan, ladder(min_weights=0.5), GATE, 0.0, Scripted(score(2.0), score(2.0)))
    assert [rung.reverted for rung in rungs] == [0, 1]


def test_no_larger_share_of_the_weights_goes_back_than_of_the_work() -> None:
    heavy = operator("heavy", 1, damage=9, parameters=15)
    plan = plan_with(heavy, operator("light", 1, damage=0.5, parameters=5), operator("body", 98, parameters=80))
    damaged = []
    for scores in ([2.0, 0.0], [2.0, 2.0, 0.0]):
        chosen, _ = climb(plan, ladder(0.9), GATE, 0.8, Scripted(*map(score, scores)))
        damaged.append({"heavy", "light"} - chosen.quantized().keys())
    assert damaged[0] == {"light"} and "heavy" in damaged[1]


def test_full_coverage_reverts_nothing() -> None:
    assert len(revert_to(ten_operators(), 1.0, 0.0, FAINT[0]).quantized()) == 10


def test_operators_that_are_in_fp32_already_stay_there_and_count() -> None:
    plan = plan_with(operator("a", 50, damage=1), operator("b", 20, quantized=False), operator("c", 30, damage=2))
    less = revert_to(plan, 0.5, 0.0, FAINT[0])
    assert list(less.quantized()) == ["a"]
    assert less.coverage() == 0.5
    assert list(revert_to(plan, 0.81, 0.0, FAINT[0]).quantized()) == ["a", "c"], (
        "below the floor already: nothing more goes"
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 10), st.booleans(), st.integers(0, 99)), max_size=12),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_no_floor_is_ever_crossed(
    facts: list[tuple[int, float, bool, int]], floor: float, weights_floor: float
) -> None:
    plan = plan_with(*(operator(f"op{i}", m, q, d, p) for i, (m, d, q, p) in enumerate(facts)))
    less = revert_to(plan, floor, weights_floor, FAINT[0])
    assert less.coverage() >= min(floor, plan.coverage()) - 1e-12
    assert share_of_weights(less) >= min(weights_floor, share_of_weights(plan)) - 1e-12
    assert set(less.quantized()) <= set(plan.quantized())


# --- climbing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [73, 279, 385])
def test_the_solver_prints_nothing(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    """On each of these plans HiGHS prints a line of its own, from C, whose buffer is written later."""
    random = np.random.default_rng(seed)
    count = int(random.integers(5, 120))
    macs, parameters = ((10.0 ** random.uniform(0, 10, count)).astype(int) for _ in range(2))
    facts = zip(macs.tolist(), (10.0 ** random.uniform(-4, 0, count)).tolist(), parameters.tolist(), strict=True)
    operators = [operator(f"op{i}", m, damage=d, parameters=p) for i, (m, d, p) in enumerate(facts)]
    work, weights = 1 - random.uniform(0.02, 0.1), 1 - random.uniform(0.02, 0.3)
    native = ctypes.CDLL(None)
    native.puts(b"before")
    revert_to(plan_with(*operators), work, weights, 0.0)
    native.fflush(None)
    assert capfd.readouterr() == ("before\n", "")


def test_plain_ptq_is_taken_when_it_passes() -> None:
    plan, rungs = climb(ten_operators(), ladder(0.9, 0.8), GATE, 0.5, Scripted(score(0.9)))
    assert (plan.method, plan.coverage()) == ("ptq", 1.0)
    assert [(r.name, r.reverted, r.passed) for r in rungs] == [("ptq", 0, True)]


def test_it_stops_at_the_first_rung_that_passes() -> None:
    scores = score(3.0), score(2.0), score(0.5)
    plan, rungs = climb(ten_operators(), ladder(0.9, 0.8, 0.7), GATE, 0.5, Scripted(*scores))
    assert [(r.name, r.coverage, r.passed) for r in rungs] == [
        ("ptq", 1.0, False),
        ("revert 1", 0.9, False),
        ("revert 2", 0.8, True),
    ]
    assert (plan.method, list(plan.quantized())) == ("ptq+revert", [f"op{i}" for i in range(2, 10)])
    assert json.dumps([rung.document() for rung in rungs])


def test_the_last_rung_is_the_floor_and_lower_steps_are_left_out() -> None:
    scores = score(3.0), score(2.5), score(2.2)
    plan, rungs = climb(ten_operators(), ladder(0.9, 0.6, 0.3), GATE, 0.7, Scripted(*scores))
    assert [rung.coverage for rung in rungs] == [1.0, 0.9, 0.7]
    assert plan.coverage() == 0.7


def test_the_best_is_taken_when_none_passes() -> None:
    scores = score(3.0), score(1.5), score(2.0)
    plan, rungs = climb(ten_operators(), ladder(0.9), GATE, 0.8, Scripted(*scores))
    assert (plan.coverage(), plan.method) == (0.9, "ptq+revert")
    assert not any(rung.passed for rung in rungs)

    plan, _ = climb(ten_operators(), ladder(0.9), GATE, 0.8, Scripted(score(2.0), score(2.0), score(2.0)))
    assert (plan.coverage(), plan.method) == (1.0, "ptq"), "of equals the one with the most in INT8"

    scores = score(2.0, discordance=6.0), score(2.5, discordance=1.0), score(2.5, discordance=2.0)
    plan, _ = climb(ten_operators(), ladder(0.9), GATE, 0.8, Scripted(*scores))
    assert plan.coverage() == 0.9, "discordance counts too"


@pytest.mark.parametrize(
    ("first", "limits"),
    [
        (score(1.01), ladder(0.9)),
        (score(0.5, relative=1.01), ladder(0.9)),
        (score(0.8), ladder(0.9, margin=0.3)),
        (score(0.0, discordance=3.1), ladder(0.9, max_discordance=3.0)),
    ],
)
def test_every_limit_binds(first: SearchScore, limits: Ladder) -> None:
    _, rungs = climb(ten_operators(), limits, GATE, 0.8, Scripted(first, score(0.0)))
    assert [rung.passed for rung in rungs] == [False, True]


def test_the_error_rules_out_a_rung_before_its_metric_is_measured() -> None:
    plan, rungs = climb(
        ten_operators(), ladder(0.9, max_error=0.01), GATE, 0.8, Scripted(score(0.0), errors=[0.02, 0.011, 0.01])
    )
    assert [(rung.error, rung.score is None, rung.passed) for rung in rungs] == [
        (0.02, True, False),
        (0.011, True, False),
        (0.01, False, True),
    ]
    assert plan.coverage() == 0.8


def test_without_any_score_the_smallest_error_is_taken() -> None:
    judge = Scripted(errors=[0.04, 0.02, 0.03])
    plan, rungs = climb(ten_operators(), ladder(0.9, max_error=0.01), GATE, 0.8, judge)
    assert plan.coverage() == 0.9
    assert all(rung.score is None for rung in rungs)


def test_a_rung_with_a_score_beats_those_that_the_error_ruled_out() -> None:
    judge = Scripted(score(9.0), errors=[0.02, 0.005, 0.011, 0.012])
    plan, rungs = climb(ten_operators(), ladder(max_error=0.01), GATE, 0.8, judge)
    assert plan.coverage() == 0.8 and [rung.error for rung in rungs] == [0.02, 0.005, 0.011]


def test_where_the_nearest_choice_fails_by_its_score_the_others_of_its_coverage_are_scored_in_turn() -> None:
    operators = [operator("bad", 1, damage=1.0), *(operator(f"op{i}", 2, damage=0.1) for i in range(50))]
    judge = Scripted(score(9.0), score(2.0), score(0.0), errors=[0.02, 0.006, 0.005])
    _, rungs = climb(plan_with(*operators), ladder(0.9), GATE, 0.7, judge)
    assert [(rung.error, rung.passed) for rung in rungs] == [(0.02, False), (0.005, False), (0.006, True)]
    assert rungs[1].reverted > rungs[2].reverted == 1


def fit(plan: QuantPlan) -> QuantPlan:
    """Stands for the fit of weights: what it was given is in its notes."""
    return replace(plan, notes=[*plan.notes, f"fitted {len(plan.quantized())}"])


def test_weights_are_fitted_where_a_step_fails_before_more_goes_back() -> None:
    scores = score(3.0), score(2.0), score(1.5), score(0.5)
    plan, rungs = climb(ten_operators(), ladder(0.9, 0.8), GATE, 0.5, Scripted(*scores), fit=fit)
    assert [(r.name, r.coverage, r.reverted, r.passed) for r in rungs] == [
        ("ptq", 1.0, 0, False),
        ("ptq, fit", 1.0, 0, False),
        ("revert 1", 0.9, 1, False),
        ("revert 1, fit", 0.9, 1, True),
    ]
    assert (plan.method, plan.notes) == ("ptq+revert+fit", ["fitted 9"]), "fitted anew from the plan without fit"


def test_what_passes_is_not_fitted() -> None:
    plan, rungs = climb(ten_operators(), ladder(0.9), GATE, 0.5, Scripted(score(0.5)), fit=fit)
    assert ([r.name for r in rungs], plan.method, plan.notes) == (["ptq"], "ptq", [])


def test_of_equals_the_plan_that_was_not_fitted_is_taken() -> None:
    scores = [score(2.0)] * 4
    plan, rungs = climb(ten_operators(), ladder(), GATE, 0.9, Scripted(*scores), fit=fit)
    assert [r.name for r in rungs] == ["ptq", "ptq, fit", "revert 1", "revert 1, fit"]
    assert (plan.method, plan.notes) == ("ptq", [])


def test_the_nearest_choice_is_fitted() -> None:
    operators = [operator("bad", 1, damage=1.0), *(operator(f"op{i}", 2, damage=0.1) for i in range(50))]
    judge = Scripted(
        score(9.0), score(9.0), score(2.0), score(2.0), score(0.0), errors=[0.02, 0.01, 0.006, 0.005, 0.001]
    )
    _, rungs = climb(plan_with(*operators), ladder(0.9), GATE, 0.7, judge, fit=fit)
    nearest = min((rung for rung in rungs[2:-1]), key=lambda rung: rung.error)
    assert rungs[-1].passed and rungs[-1].name == f"revert {nearest.reverted}, fit"


@pytest.mark.parametrize(
    ("method", "samples", "expected"), [("ptq", 16, True), ("auto", 16, True), ("qat", 16, False), ("ptq", 0, False)]
)
def test_when_weights_are_fitted(method: LadderMethod, samples: int, expected: bool) -> None:
    assert fits(ladder().model_copy(update={"method": method, "fit_samples": samples})) is expected


def test_a_gain_passes() -> None:
    _, rungs = climb(ten_operators(), ladder(0.9, margin=0.3), GATE, 0.8, Scripted(score(-2.0)))
    assert rungs[0].passed


def test_a_rung_that_changes_nothing_is_not_evaluated_again() -> None:
    plan = plan_with(operator("a", 90, damage=1), operator("b", 10, damage=1))
    _, rungs = climb(plan, ladder(0.99, 0.95, 0.92), GATE, 0.9, Scripted(score(2.0), score(2.0)))
    assert [rung.name for rung in rungs] == ["ptq", "revert 1"]


def test_the_given_plan_is_left_alone() -> None:
    plan = ten_operators()
    climb(plan, ladder(0.9), GATE, 0.8, Scripted(score(2.0), score(0.0)))
    assert (len(plan.quantized()), plan.method) == (10, "ptq")
