"""Operators as products of matrices: what positions read, times the rows, is what they write."""

from __future__ import annotations

import numpy as np
import pytest
from test_rounding import layers
from tiny_models import TinyNet, run

from quant.graph import attribute
from quant.patches import is_supported, patches, rows_of, unrow, written


def nets() -> dict[str, TinyNet]:
    strided = TinyNet((1, 4, 7, 6), seed=8)
    weight = strided.const(strided.weights(6, 2, 3, 2))
    strided.op("Conv", "x", weight, pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2], group=2)
    return {**layers(), "strided": strided}


@pytest.mark.parametrize("most", [7, 10_000])
@pytest.mark.parametrize("name", list(nets()))
def test_what_positions_read_times_the_rows_is_what_they_write(name: str, most: int) -> None:
    net = nets()[name]
    graph, feed = net.graph(), net.feed()
    node = graph.nodes[0]
    output = run(graph.to_model(), feed)[0]
    read = patches(graph, node, feed["x"], np.random.default_rng(3), most)
    wrote = written(graph, node, output, np.random.default_rng(3), most)
    made = np.matmul(read, rows_of(node, graph.constants[node.input[1]]).transpose(0, 2, 1))
    if len(node.input) > 2:
        bias = graph.constants[node.input[2]]
        pixels = wrote.shape[0] * wrote.shape[2] // len(bias)
        made = made + np.repeat(bias, pixels).reshape(len(wrote), 1, -1)
    assert wrote.shape[1] == min(most, wrote.shape[1])
    np.testing.assert_allclose(made, wrote, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(layers()))
def test_rows_are_a_weight_in_another_order(name: str) -> None:
    net = layers()[name]
    graph = net.graph()
    node = graph.nodes[0]
    shape = graph.constants[node.input[1]].shape
    weight = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    np.testing.assert_array_equal(unrow(node, rows_of(node, weight).astype(np.float64), shape), weight)
    assert is_supported(graph, node) and attribute(node, "group", 1) in (1, 2, 8)
