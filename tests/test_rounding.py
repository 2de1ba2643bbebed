"""Second-moment rounding: the definition on small cases, every layout, and a smaller output error than nearest."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from test_plan import plan_of
from tiny_models import TinyNet, run

from quant.graph import Graph
from quant.plan import FULL_WEIGHTS, REDUCED_WEIGHTS, QuantPlan, dequantize_weight, quantize_weight
from quant.rounding import Moments, collect_moments, round_by_moments, round_rows
from quant.runtime import Feed


def correlated(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Feed]:
    """Pictures whose channels and neighbours move together."""
    rng = np.random.default_rng(seed)
    smooth = [rng.standard_normal((shape[0], 1, *shape[2:])).cumsum(axis=-1) for _ in range(count)]
    return [{"x": (base + 0.1 * rng.standard_normal(shape)).astype(np.float32)} for base in smooth]


def layers() -> dict[str, TinyNet]:
    nets = {}
    for name, build in {
        "dense": lambda net: net.conv("x", 8, 6),
        "pointwise": lambda net: net.conv("x", 8, 6, kernel=1, pad=0),
        "depthwise": lambda net: net.conv("x", 8, 8, kernel=5, pad=2, group=8),
        "grouped": lambda net: net.conv("x", 8, 4, group=2),
        "transposed": lambda net: net.conv_transpose("x", 8, 3),
        "product": lambda net: net.matmul("x", 12, 7),
    }.items():
        nets[name] = TinyNet((2, 8, 9, 12), seed=4)
        build(nets[name])
    return nets


def rounded(graph: Graph, plan: QuantPlan, feeds: list[Feed]) -> QuantPlan:
    result = plan.with_only(set(plan.quantized()), "")
    result.integers = round_by_moments(
        graph, plan, collect_moments(graph, plan.operators, feeds, 1, seed=0), biases_follow=True
    )
    return result


def output_of(net: TinyNet, plan: QuantPlan | None, feed: Feed) -> np.ndarray:
    """The layer with FP32 inputs and the plan's weights, mean over positions taken out where a bias takes it up."""
    graph = net.graph()
    weight = graph.nodes[0].input[1]
    if plan is not None:
        graph.constants[weight] = dequantize_weight(plan.integers[weight], plan.weights[weight].axis)
    return run(graph.to_model(), feed)[0]


@pytest.mark.parametrize("name", list(layers()))
def test_unseen_outputs_are_nearer_than_with_nearest_rounding(name: str) -> None:
    net = layers()[name]
    plan = plan_of(net)
    better = rounded(net.graph(), plan, correlated(net.shape, 24))

    def error(candidate: QuantPlan) -> float:
        total = 0.0
        for feed in correlated(net.shape, 6, seed=99):
            moved = output_of(net, candidate, feed) - output_of(net, None, feed)
            axes = (0, 2, 3) if name != "product" else (0, 1, 2)
            centred = moved if name == "product" else moved - moved.mean(axis=axes, keepdims=True)
            total += float(np.square(centred).sum())
        return total

    assert error(better) < 0.7 * error(plan)
    weight = net.graph().nodes[0].input[1]
    np.testing.assert_array_equal(better.integers[weight].scale, plan.integers[weight].scale)
    assert better.integers[weight].values.shape == plan.integers[weight].values.shape
    assert np.abs(better.integers[weight].values.astype(int)).max() <= 127


def test_independent_inputs_are_rounded_to_nearest() -> None:
    rows = 20 * np.random.default_rng(0).standard_normal((2, 5, 6))
    values = round_rows(rows, np.stack([np.diag(np.arange(1.0, 7.0))] * 2), 0.0)
    np.testing.assert_array_equal(values, np.rint(rows))


def test_two_inputs_that_move_together_find_the_best_pair() -> None:
    hessian = np.array([[[1.0, 0.95], [0.95, 1.0]]])
    row = np.array([10.4, 7.4])
    found = round_rows(row.reshape(1, 1, 2), hessian, 0.0)[0, 0]

    def cost(pair: np.ndarray) -> float:
        return float((row - pair) @ hessian[0] @ (row - pair))

    best = min((np.floor(row) + step for step in product((0, 1), repeat=2)), key=lambda pair: cost(np.array(pair)))
    np.testing.assert_array_equal(found, best)
    assert cost(found) < cost(np.rint(row))


def test_moments_by_the_definition() -> None:
    patches = np.random.default_rng(1).standard_normal((3, 40, 4)).astype(np.float32) + 2
    moments = Moments.of(patches[:, :25])
    moments.update(patches[:, 25:])
    for group in range(3):
        np.testing.assert_allclose(moments.covariance()[group], np.cov(patches[group].T, bias=True), rtol=1e-4)
        np.testing.assert_allclose(moments.second_moment()[group], patches[group].T @ patches[group] / 40, rtol=1e-4)


def test_small_movements_far_from_zero_are_not_lost() -> None:
    moved = np.random.default_rng(2).standard_normal((1, 60, 3))
    patches = (1000 + 0.1 * moved).astype(np.float32)
    moments = Moments.of(patches[:, :30])
    moments.update(patches[:, 30:])
    np.testing.assert_allclose(moments.covariance()[0], np.cov(patches[0].T.astype(np.float64), bias=True), rtol=1e-3)


def test_layouts_that_are_not_supported_keep_their_rounding() -> None:
    net = TinyNet((1, 4, 6, 6))
    up = net.op("ConvTranspose", "x", net.const(net.weights(4, 4, 3, 3)), strides=[2, 2])
    net.op("Conv", up, net.const(net.weights(2, 4, 3, 3)), auto_pad="SAME_UPPER")
    plan = plan_of(net)
    assert collect_moments(net.graph(), plan.operators, [net.feed()], 1, seed=0) == {}
    again = round_by_moments(net.graph(), plan, {}, biases_follow=True)
    assert all(again[name] is plan.integers[name] for name in again)


def test_the_same_seed_gives_the_same_weights() -> None:
    net = layers()["dense"]
    plan = plan_of(net)
    feeds = correlated((1, 8, 30, 30), 4)
    first, second = (rounded(net.graph(), plan, feeds).integers for _ in range(2))
    assert all(np.array_equal(first[name].values, second[name].values) for name in first)


@pytest.mark.parametrize("largest", [FULL_WEIGHTS, REDUCED_WEIGHTS])
def test_weights_keep_the_range_that_they_were_given(largest: int) -> None:
    net = layers()["dense"]
    graph, plan = net.graph(), plan_of(net)
    for name, quantizer in plan.weights.items():
        plan.integers[name] = quantize_weight(graph.constants[name], quantizer.axis, largest)
    after = rounded(graph, plan, correlated((2, 8, 9, 12), 4))
    for name, weight in after.integers.items():
        assert int(np.abs(weight.values).max()) == largest
        step = weight.scale.reshape(-1, *[1] * (weight.values.ndim - 1))
        assert np.abs(dequantize_weight(weight, 0) - graph.constants[name]).max() < 3 * step.max()
