"""Reconstruction: parts cover the network, each ends nearer to FP32, and the result is a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_flow import flowing_plan, mobile_block
from test_plan import plan_of
from tiny_models import TinyNet, run, simulate, small_detector, small_recognizer

from quant.plan import QUANTIZABLE, QuantPlan
from quant.recipe import Reconstruction
from quant.reconstruction import parts, reconstruct
from quant.simulation import simulated_model
from quant.student import trace

FEW = {"samples": 6, "iterations": 40, "batch": 2, "warm_up": 3, "learning_rate": 5e-2}


def settings(**changes: Any) -> Reconstruction:
    return Reconstruction.model_validate({**FEW, **changes})


def coarse(plan: QuantPlan) -> QuantPlan:
    """Few integers, and biases that are wrong."""
    for name, weight in plan.integers.items():
        values = (3 * np.rint(weight.values / 3)).astype(np.int8)
        plan.integers[name] = replace(weight, values=values)
    for op in plan.quantized().values():
        if op.op_type != "MatMul" and op.weight:
            plan.bias_shifts[op.name] = np.full(len(plan.integers[op.weight].scale), 0.05, dtype=np.float32)
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
    refined, results = reconstruct(net.graph(), plan, [net.feed(s) for s in range(6)], settings(), seed=0, threads=1)
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
    refined, results = reconstruct(net.graph(), plan, [net.feed()], settings(), seed=0, threads=1, expired=lambda: True)
    assert results == []
    assert refined is plan


def test_only_what_is_asked_for_changes() -> None:
    net = small_detector()
    plan = coarse(plan_of(net))
    refined, _ = reconstruct(
        net.graph(), plan, [net.feed(s) for s in range(4)], settings(learned=["biases"]), seed=0, threads=1
    )
    assert refined.activations == plan.activations
    for name, weight in plan.integers.items():
        np.testing.assert_array_equal(refined.integers[name].values, weight.values)
    assert any((shift != plan.bias_shifts[name]).any() for name, shift in refined.bias_shifts.items())
