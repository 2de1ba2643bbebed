"""The simulated model against a quantizer written in integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from test_plan import plan_of
from tiny_models import TinyNet, run, simulate, simulated_model, small_detector, small_recognizer

from quant.graph import Graph
from quant.placement import numbers_of
from quant.plan import ActivationQuantizer, QuantPlan
from quant.simulation import FloatWriter, integer_limits, make_quantizer

Array = np.ndarray[Any, Any]


def integers_of(values: Array, quantizer: ActivationQuantizer) -> Array:
    """QuantizeLinear by its definition: divide in float32, round half to even, shift, saturate."""
    low, high = (0, 255) if quantizer.dtype == "uint8" else (-128, 127)
    divided = np.rint(values.astype(np.float32) / np.float32(quantizer.scale))
    return np.clip(divided + quantizer.zero_point, low, high).astype(np.int64)


def rounding_of(quantizer: ActivationQuantizer) -> Graph:
    """A graph that only rounds its input."""
    net = TinyNet((1, 8))
    net.op("Identity", "x")
    graph = net.graph()
    last = graph.nodes[-1]
    last.input[0] = FloatWriter().rounded(graph, last, "x", *numbers_of(quantizer))
    return graph


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=8, max_size=8),
    st.floats(-500, 0, width=32),
    st.floats(0.015625, 500, width=32),
    st.sampled_from(["uint8", "int8"]),
)
def test_rounding_is_quantize_then_dequantize(values: list[float], low: float, high: float, dtype: str) -> None:
    quantizer = make_quantizer("x", low, high, dtype)
    data = np.array([values], dtype=np.float32)
    found = run(rounding_of(quantizer).to_model(), {"x": data})[0]
    integers = integers_of(data, quantizer)
    np.testing.assert_array_equal(
        found, (integers - quantizer.zero_point).astype(np.float32) * np.float32(quantizer.scale)
    )
    smallest, largest = integer_limits(quantizer.dtype)
    assert smallest <= integers.min() <= integers.max() <= largest
    inside = (data >= low) & (data <= high)
    assert np.all(np.abs(found - data)[inside] <= 1.01 * quantizer.scale)


def test_zero_and_ties_are_exact() -> None:
    quantizer = make_quantizer("x", -1.0, 254.0, "uint8")
    assert (quantizer.scale, quantizer.zero_point) == (1.0, 1)
    data = np.array([[0.0, -0.5, 0.5, 1.5, 2.5, -9.0, 300.0, 254.5]], dtype=np.float32)
    found = run(rounding_of(quantizer).to_model(), {"x": data})[0]
    np.testing.assert_array_equal(found, [[0, 0, 0, 2, 2, -1, 254, 254]])


def reference_convolution(data: Array, weight: Array, bias: Array) -> Array:
    """Valid convolution in integers."""
    out = np.zeros((data.shape[0], weight.shape[0], data.shape[2] - 2, data.shape[3] - 2))
    for row in range(out.shape[2]):
        for column in range(out.shape[3]):
            patch = data[:, :, row : row + 3, column : column + 3]
            out[:, :, row, column] = np.einsum("nihw,oihw->no", patch, weight)
    return out + bias.reshape(1, -1, 1, 1)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_a_convolution_agrees_with_integer_arithmetic(dtype: str) -> None:
    net = TinyNet((2, 3, 6, 6))
    output = net.conv("x", 3, 4, pad=0)
    plan = plan_of(net, dtype)
    plan.bias_shifts = {output: np.array([0.5, -0.5, 0.25, 0.0], np.float32)}
    feed = net.feed(9, scale=2.0)
    quantizer, stored = plan.activations["x"], plan.integers["c0"]
    products = reference_convolution(
        integers_of(feed["x"], quantizer) - quantizer.zero_point, stored.values.astype(np.int64), np.zeros(4)
    )
    bias = net.constants["c1"] + plan.bias_shifts[output]
    expected = products * (quantizer.scale * stored.scale.astype(np.float64)).reshape(1, -1, 1, 1)
    found = simulate(simulated_model(net.graph(), plan), feed)[0]
    np.testing.assert_allclose(found, expected + bias.reshape(1, -1, 1, 1), atol=1e-5)
    assert integers_of(feed["x"], quantizer).max() == integer_limits(quantizer.dtype)[1], "some values are clipped"


def test_a_plan_without_operators_is_the_prepared_graph() -> None:
    net = small_recognizer()
    plan = plan_of(net).with_only(set(), "test")
    np.testing.assert_array_equal(
        simulate(simulated_model(net.graph(), plan), net.feed())[0], run(net.graph().to_model(), net.feed())[0]
    )


def test_only_readers_that_are_quantized_see_the_rounded_tensor() -> None:
    net = TinyNet((1, 2, 4, 4))
    shared = net.op("Relu", "x")
    first, second = net.conv(shared, 2, 2), net.conv(shared, 2, 2)
    other = net.op("Neg", shared)
    graph = net.graph(first, second, other)
    plan = plan_for(net, graph).with_only({first}, "test")
    feed = net.feed()
    exact, simulated = run(graph.to_model(), feed), simulate(simulated_model(graph, plan), feed)
    assert np.abs(exact[0] - simulated[0]).max() > 1e-4
    np.testing.assert_array_equal(exact[1], simulated[1])
    np.testing.assert_array_equal(exact[2], simulated[2])


def test_a_tensor_that_two_operators_read_is_rounded_once() -> None:
    net = TinyNet((1, 2, 4, 4))
    net.op("Add", net.conv("x", 2, 2), net.conv("x", 2, 2))
    model = simulated_model(net.graph(), plan_of(net))
    assert [node.op_type for node in model.graph.node].count("QuantizeLinear") == 1


def test_a_weight_shared_with_an_fp32_operator_keeps_its_values_there() -> None:
    net = TinyNet((1, 2, 4, 4))
    weight = net.const(net.weights(2, 2, 1, 1))
    first = net.op("Conv", "x", weight)
    second = net.op("Conv", "x", weight)
    graph = net.graph(first, second)
    plan = plan_for(net, graph).with_only({first}, "test")
    exact, simulated = run(graph.to_model(), net.feed()), simulate(simulated_model(graph, plan), net.feed())
    assert np.abs(exact[0] - simulated[0]).max() > 1e-5
    np.testing.assert_array_equal(exact[1], simulated[1])


def plan_for(net: TinyNet, graph: Graph) -> QuantPlan:
    """Like `plan_of`, for a graph with other outputs than the net's last tensor."""
    twin = TinyNet(net.shape)
    twin.nodes, twin.constants = list(net.nodes), dict(net.constants)
    names = list(graph.outputs)
    twin.nodes.append(helper.make_node("Concat", names, ["all"], axis=1))
    return plan_of(twin)


def test_the_detector_and_the_recognizer_move_a_little_and_not_much() -> None:
    for net in (small_detector(), small_recognizer()):
        exact = run(net.graph().to_model(), net.feed())[0]
        simulated = simulate(simulated_model(net.graph(), plan_of(net)), net.feed())[0]
        assert 0 < np.abs(simulated - exact).max() < 0.1
