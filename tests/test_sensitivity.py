"""Damage per operator: what it measures, and that it points at the culprit."""

from __future__ import annotations

import numpy as np
import pytest
from test_plan import plan_of
from tiny_models import TinyNet, run, small_detector, small_recognizer

from quant.runtime import onnx_session
from quant.sensitivity import measure_damages, output_error
from quant.simulation import simulated_model


def test_damage_is_the_relative_error_of_the_output_with_one_operator_in_int8() -> None:
    net = small_recognizer()
    graph, plan = net.graph(), plan_of(net)
    feeds = [net.feed(seed) for seed in range(2)]
    damages = measure_damages(graph, plan, feeds, 1)
    assert list(damages) == [op.name for op in plan.operators]
    for name, damage in damages.items():
        errors = []
        for feed in feeds:
            exact = run(graph.to_model(), feed)[0].astype(np.float64)
            found = run(simulated_model(graph, plan.with_only({name}, "")), feed)[0]
            errors.append(np.abs(found - exact).sum() / np.abs(exact).sum())
        assert damage == pytest.approx(float(np.mean(errors)), rel=1e-4)


def test_the_operator_with_the_bad_range_is_the_most_damaging_and_each_counts_one_step() -> None:
    net = small_detector()
    plan = plan_of(net)
    culprit = plan.operators[2]
    tensor = culprit.activations[0]
    plan.activations[tensor] = plan.activations[tensor].model_copy(update={"scale": 100.0})
    steps: list[int] = []
    damages = measure_damages(net.graph(), plan, [net.feed()], 1, lambda: steps.append(1))
    assert max(damages, key=lambda name: damages[name]) == culprit.name
    assert len(steps) == len(plan.operators)


def test_operators_in_fp32_are_not_measured() -> None:
    net = small_detector()
    plan = plan_of(net)
    first = plan.operators[0].name
    assert list(measure_damages(net.graph(), plan.with_only({first}, ""), [net.feed()], 1)) == [first]


def test_error_is_taken_over_all_outputs_and_averaged_over_pictures() -> None:
    net = TinyNet((1, 2))
    double, negative = net.op("Mul", "x", net.const([2.0])), net.op("Neg", "x")
    session = onnx_session(net.model(double, negative), 1)
    feeds = [{"x": np.array([[1, 1]], np.float32)}, {"x": np.array([[0, 0]], np.float32)}]
    exact = [[np.array([[2, 1]], np.float32), np.array([[-1, -2]], np.float32)]] + [[np.zeros((1, 2), np.float32)] * 2]
    assert output_error(session, feeds, exact) == pytest.approx((2 / 6 + 0) / 2)


def test_outputs_of_zero_do_not_divide_by_zero() -> None:
    net = TinyNet((1, 2))
    net.op("Relu", "x")
    zeros = [{"x": np.zeros((1, 2), np.float32)}]
    assert output_error(onnx_session(net.model(), 1), zeros, [[np.zeros((1, 2), np.float32)]]) == 0
