"""Reconstruction: parts cover the network, each ends nearer to FP32, and the result is a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_flow import flowing_plan, mobile_block
from test_plan import plan_of
from tiny_models import TinyNet, run, simulate, simulated_model, small_detector, small_recognizer

from quant.errors import NotTrainable
from quant.plan import QUANTIZABLE, QuantPlan
from quant.recipe import Reconstruction, load_recipe
from quant.reconstruction import parts, reconstruct
from quant.student import Student, trace
from quant.training import RATES, Schedule, relative_square

FEW = {"samples": 6, "iterations": 40, "batch": 2, "warm_up": 3, "learning_rate": 0.15}


def settings(**changes: Any) -> Reconstruction:
    return Reconstruction.model_validate({**FEW, **changes})


def coarse(plan: QuantPlan, shift: float = 2e-3) -> QuantPlan:
    """Few integers, and biases that are wrong."""
    for name, weight in plan.integers.items():
        values = (5 * np.rint(weight.values / 5)).astype(np.int8)
        plan.integers[name] = replace(weight, values=values)
    for op in plan.quantized().values():
        if op.op_type != "MatMul" and op.weight:
            plan.bias_shifts[op.name] = np.full(len(plan.integers[op.weight].scale), shift, dtype=np.float32)
    return plan


def error(net: TinyNet, plan: QuantPlan) -> float:
    """On pictures that were not trained on."""
    feeds = [net.feed(seed) for seed in range(50, 58)]
    pairs = [(simulate(simulated_model(net.graph(), plan), feed)[0], run(net.model(), feed)[0]) for feed in feeds]
    return float(np.mean([np.square(found - exact).sum() / np.square(exact).sum() for found, exact in pairs]))


CASES = {
    "detector": (small_detector, plan_of),
    "recognizer": (small_recognizer, plan_of),
    "chain": (mobile_block, flowing_plan),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operators", [1, 3])
def test_parts_cover_the_network(case: str, operators: int) -> None:
    make, planned = CASES[case]
    net, plan = make(), planned(make())
    traced = trace(net.graph(), plan)
    names = {name for node in net.graph().nodes for name in node.output}
    found = list(parts(traced, plan, names, operators))
    covered = [node.output[0] for part in found for node in part.nodes]
    assert covered == [node.output[0] for node in traced.nodes][: len(covered)]
    assert {op.name for op in plan.operators if op.weight} <= set(covered), "what is left holds no weights"
    assert all(sum(node.op_type in QUANTIZABLE for node in part.nodes) >= operators for part in found[:-1])
    assert all(part.aim in names for part in found)


@pytest.mark.parametrize("case", CASES)
def test_every_part_ends_nearer_to_fp32_and_so_does_the_whole(case: str) -> None:
    make, planned = CASES[case]
    net = make()
    plan = coarse(planned(net))
    refined, results = reconstruct(net.graph(), plan, [net.feed(s) for s in range(16)], settings(), seed=0, threads=1)
    assert all(result.after <= result.before for result in results)
    assert any(result.after < 0.7 * result.before for result in results)
    assert error(net, refined) < 0.7 * error(net, plan)


def test_it_is_the_same_for_the_same_seed_and_leaves_its_plan_alone() -> None:
    net = small_detector()
    plan, feeds = coarse(plan_of(net)), [net.feed(seed) for seed in range(6)]
    shifts = {name: shift.copy() for name, shift in plan.bias_shifts.items()}
    one, other, another = (
        reconstruct(net.graph(), plan, feeds, settings(), seed=seed, threads=1)[0] for seed in (1, 1, 2)
    )
    for name, weight in one.integers.items():
        np.testing.assert_array_equal(weight.values, other.integers[name].values)
    for name, shift in one.bias_shifts.items():
        np.testing.assert_array_equal(shift, other.bias_shifts[name])
    assert any((shift != another.bias_shifts[name]).any() for name, shift in one.bias_shifts.items())
    assert all((shift == plan.bias_shifts[name]).all() for name, shift in shifts.items())


def test_nothing_is_trained_when_time_is_up() -> None:
    net = small_detector()
    plan = coarse(plan_of(net))
    refined, results = reconstruct(net.graph(), plan, [net.feed(), net.feed(2)], settings(), seed=0, threads=1,
                                   expired=lambda: True)  # fmt: skip
    assert results == []
    assert refined is plan


def test_only_what_is_asked_for_changes() -> None:
    net = small_detector()
    plan = coarse(plan_of(net))
    refined, _ = reconstruct(
        net.graph(),
        plan,
        [net.feed(s) for s in range(4)],
        settings(learned=["biases"], learning_rate=2),
        seed=0,
        threads=1,
    )
    assert refined.activations == plan.activations
    for name, weight in plan.integers.items():
        np.testing.assert_array_equal(refined.integers[name].values, weight.values)
    assert any((shift != plan.bias_shifts[name]).any() for name, shift in refined.bias_shifts.items())


def test_pictures_that_were_held_back_decide() -> None:
    """What is learned from is like FP32 already; the picture that decides holds values that were never seen."""
    net = small_detector()
    plan = coarse(plan_of(net))
    learned_from = [net.feed(seed, scale=0.01) for seed in range(1, 4)]
    feeds = [net.feed(50, scale=4.0), *learned_from]
    _, results = reconstruct(net.graph(), plan, feeds, settings(), seed=0, threads=1)
    traced = trace(net.graph(), plan)
    first = next(parts(traced, plan, {name for node in net.graph().nodes for name in node.output}, 1))
    (exact,) = run(net.model(first.aim), feeds[0])
    found = Student(plan, traced, first.nodes, []).run(feeds[0], [first.aim])[first.aim]
    assert results[0].before == pytest.approx(float(relative_square(found, exact)), rel=1e-4)
    with pytest.raises(NotTrainable, match="two calibration pictures"):
        reconstruct(net.graph(), plan, feeds[:1], settings(), seed=0, threads=1)


def test_by_default_weights_can_reach_the_next_integer() -> None:
    recipe = load_recipe("PP-OCRv4_mobile_rec")
    for part, least in ((recipe.reconstruction, 0.5), (recipe.qat, 0.1)):
        schedule = Schedule(part.learning_rate, part.warm_up, part.iterations)
        travel = sum(schedule.at(step) for step in range(part.iterations))
        assert least < RATES["weights"] * travel < 1.5
        assert RATES["biases"] * travel < 0.1 and RATES["scales"] * travel < 0.02


def test_a_later_part_may_read_an_input() -> None:
    net = TinyNet((1, 3, 4, 4))
    deep = net.op("Relu", net.conv("x", 3, 3))
    net.conv(net.op("Add", net.conv(deep, 3, 3), "x"), 3, 2)
    plan = coarse(plan_of(net))
    _, results = reconstruct(net.graph(), plan, [net.feed(s) for s in range(4)], settings(), seed=0, threads=1)
    assert len(results) == 3


def test_parts_with_nothing_to_train_stay() -> None:
    net = small_recognizer()
    plan = coarse(plan_of(net))
    feeds = [net.feed(seed) for seed in range(16)]
    _, results = reconstruct(
        net.graph(), plan, feeds, settings(learned=["biases"], learning_rate=0.3), seed=0, threads=1
    )
    assert any(result.after < result.before for result in results)
    assert results[-1].after == results[-1].before, "a MatMul has no bias"


def test_what_cannot_be_trained_ends_it_and_parts_before_are_kept() -> None:
    net = TinyNet((1, 3, 8, 8))
    deep = net.conv(net.op("Relu", net.conv("x", 3, 4)), 4, 4)
    net.conv(net.op("Sin", net.conv(deep, 4, 4)), 4, 2)
    plan, feeds = coarse(plan_of(net)), [net.feed(seed) for seed in range(4)]
    refined, results = reconstruct(net.graph(), plan, feeds, settings(operators=2), seed=0, threads=1)
    assert len(results) == 1 and results[0].after < results[0].before
    changed = [(refined.integers[name].values != weight.values).any() for name, weight in plan.integers.items()]
    assert any(changed[:2]) and not any(changed[2:])
    with pytest.raises(NotTrainable, match="Sin"):
        reconstruct(net.graph(), plan, feeds, settings(operators=4), seed=0, threads=1)


def test_what_follows_the_last_weights_need_not_be_trainable() -> None:
    net = TinyNet((1, 3, 8, 8))
    net.op("Sin", net.conv("x", 3, 4))
    plan = coarse(plan_of(net))
    _, results = reconstruct(net.graph(), plan, [net.feed(s) for s in range(4)], settings(), seed=0, threads=1)
    assert results[0].after < results[0].before


def test_weights_of_two_parts_are_trained_once() -> None:
    """The part that reads them later takes what the first one learned."""
    net = TinyNet((1, 3, 8, 8))
    stem = net.conv("x", 3, 3)
    weight, bias = net.nodes[0].input[1:]
    net.op("Conv", net.op("Relu", stem), weight, bias, pads=[1] * 4, kernel_shape=[3, 3])
    plan, feeds = coarse(plan_of(net)), [net.feed(seed) for seed in range(4)]
    chosen = settings(learned=["weights", "scales"])
    refined, results = reconstruct(net.graph(), plan, feeds, chosen, seed=0, threads=1)
    (first, second), traced = results, trace(net.graph(), plan)
    names = {name for node in net.graph().nodes for name in node.output}
    alone = next(parts(traced, plan, names, 1))
    assert first.after < first.before and second.after == second.before
    student = Student(refined, trace(net.graph(), refined), alone.nodes, [])
    (exact,) = run(net.model(alone.aim), feeds[0])
    found = student.run(feeds[0], [alone.aim])[alone.aim]
    assert float(relative_square(found, exact)) == pytest.approx(first.after, rel=1e-3)
