"""Post-training quantization: plans from statistics, and biases that are right on average."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_plan import plan_of
from tiny_models import TinyNet, run, simulate, simulated_model, small_detector, small_recognizer

from quant.calibration import collect_statistics
from quant.graph import Graph
from quant.observer import MeanSquaredError, MinMax, RangeMethod
from quant.plan import QuantPlan, quantizable_operators
from quant.ptq import activation_tensors, correct_biases, make_plan, with_damages


def test_tensors_to_calibrate_are_named_once_in_graph_order() -> None:
    graph = small_recognizer().graph()
    operators = quantizable_operators(graph, {})
    names = activation_tensors(operators)
    assert names[0] == "x"
    assert len(names) == len(set(names))
    assert set(names) == {name for op in operators for name in op.activations}
    operators[0].quantized = False
    assert "x" not in activation_tensors(operators)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("method", [MinMax(), MeanSquaredError()])
def test_a_plan_says_everything_about_every_operator(dtype: str, method: RangeMethod) -> None:
    net = small_recognizer()
    graph = net.graph()
    operators = quantizable_operators(graph, {})
    statistics = collect_statistics(graph, activation_tensors(operators), [net.feed()], 1)
    plan = make_plan(graph, operators, statistics, method, model="m", dtype=dtype, prepared_sha256="1" * 64)
    assert (plan.model, plan.method, plan.prepared_sha256, plan.bias_shifts) == ("m", "ptq", "1" * 64, {})
    for op in operators:
        for name in op.activations:
            quantizer = plan.activations[name]
            assert quantizer.dtype == dtype
            low, high = method.choose(statistics[name], symmetric=dtype == "int8")
            steps = (127 if abs(high) >= abs(low) else -127) if dtype == "int8" else 255
            reach = max(abs(low), high) if dtype == "int8" else max(high, 0) - min(low, 0)
            assert quantizer.scale == pytest.approx(reach / abs(steps), rel=1e-5)
            assert quantizer.zero_point == (0 if dtype == "int8" else round(-min(low, 0) / quantizer.scale))
        if op.weight:
            assert plan.weights[op.weight].axis == (1 if op.op_type == "MatMul" else 0)
            assert plan.integers[op.weight].scale.size == graph.constants[op.weight].shape[plan.weights[op.weight].axis]
    assert set(plan.weights) == {op.weight for op in operators if op.weight}


def test_a_transposed_convolution_is_quantized_along_its_output_channels() -> None:
    net = TinyNet((1, 4, 3, 3))
    net.conv_transpose("x", 4, 6)
    plan = plan_of(net)
    assert plan.weights["c0"].axis == 1
    assert plan.integers["c0"].scale.shape == (6,)


# --- bias correction -------------------------------------------------------------------------------


def coarse(plan: QuantPlan) -> QuantPlan:
    """Ranges so badly chosen that the mean error is large."""
    for name, quantizer in plan.activations.items():
        plan.activations[name] = quantizer.model_copy(update={"scale": quantizer.scale * 0.4})
    return plan


def alone(graph: Graph, plan: QuantPlan, name: str, feeds: list[Any]) -> np.ndarray[Any, Any]:
    """Mean output error per channel of one operator when only it is quantized, by its definition."""
    simulated = simulated_model(graph, plan.with_only({name}, ""))
    simulated.graph.output[0].CopyFrom(graph.to_model([name]).graph.output[-1])
    errors = [
        (run(graph.to_model([name]), feed, name)[0] - simulate(simulated, feed, name)[0]).mean(axis=(0, 2, 3))
        for feed in feeds
    ]
    return np.mean(errors, axis=0)


def test_the_shift_is_the_mean_error_of_each_operator_given_exact_inputs() -> None:
    net = small_detector()
    graph = net.graph()
    plan = coarse(plan_of(net))
    feeds = [net.feed(seed) for seed in range(4)]
    shifts = correct_biases(graph, plan, iter(feeds), 1)
    assert set(shifts) == {op.name for op in plan.operators}
    for name, shift in shifts.items():
        expected = alone(graph, plan, name, feeds)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(shift, expected, atol=1e-5)


def test_with_the_shift_the_mean_error_is_gone() -> None:
    net = small_detector()
    graph = net.graph()
    plan = coarse(plan_of(net))
    feeds = [net.feed(seed) for seed in range(4)]
    before = {op.name: np.abs(alone(graph, plan, op.name, feeds)).max() for op in plan.operators}
    plan.bias_shifts = correct_biases(graph, plan, feeds, 1)
    for op in plan.operators:
        assert np.abs(alone(graph, plan, op.name, feeds)).max() < 0.01 * before[op.name]


def test_pictures_of_different_sizes_count_alike() -> None:
    net = small_detector()
    graph, plan = net.graph(), coarse(plan_of(net))
    small, large = {"x": np.full((1, 3, 4, 4), 0.5, np.float32)}, {"x": np.full((1, 3, 32, 32), -1.5, np.float32)}
    single = [correct_biases(graph, plan, [feed], 1) for feed in (small, large)]
    both = correct_biases(graph, plan, [small, large], 1)
    for name, shift in both.items():
        np.testing.assert_allclose(shift, (single[0][name] + single[1][name]) / 2, atol=1e-5)


def test_only_quantized_convolutions_are_corrected_and_the_graph_is_left_alone() -> None:
    net = small_recognizer()
    graph = net.graph()
    before = graph.to_model().SerializeToString(deterministic=True)
    plan = plan_of(net)
    convolution = plan.operators[0].name
    assert set(correct_biases(graph, plan, [net.feed()], 1)) == {convolution}
    assert not correct_biases(graph, plan.with_only(set(), ""), [net.feed()], 1)
    assert graph.to_model().SerializeToString(deterministic=True) == before


def test_a_convolution_over_one_axis_is_corrected_too() -> None:
    net = TinyNet((2, 4, 9))
    output = net.op("Conv", "x", net.const(net.weights(3, 4, 3)), pads=[1, 1])
    shift = correct_biases(net.graph(), coarse(plan_of(net)), [net.feed()], 1)[output]
    assert shift.shape == (3,)


def test_damages_are_noted_by_name() -> None:
    operators = plan_of(small_detector()).operators
    noted = with_damages(operators, {operators[1].name: 0.5})
    assert [op.damage for op in noted] == [None, 0.5, None, None]
    assert operators[1].damage is None


def test_a_tensor_that_was_always_zero_gets_a_usable_quantizer() -> None:
    net = TinyNet((1, 2, 4, 4))
    net.conv(net.op("Relu", net.op("Neg", net.op("Abs", "x"))), 2, 2)
    plan = plan_of(net)
    (quantizer,) = plan.activations.values()
    assert quantizer.scale > 0
    exact, found = (
        run(net.graph().to_model(), net.feed())[0],
        simulate(simulated_model(net.graph(), plan), net.feed())[0],
    )
    np.testing.assert_array_equal(exact, found)
