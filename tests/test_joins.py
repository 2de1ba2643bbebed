"""Integer flow through sums, gates, concatenations, resizing and Relu: what takes whose quantizer, and what runs on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_flow import distance, flowing_plan, optimized_kinds
from tiny_models import TinyNet, run, simulate, simulated_model

from quant import export, placement
from quant.export import quantized_model
from quant.joins import takes
from quant.plan import QuantPlan, load_plan


def gated(net: TinyNet, data: str, channels: int) -> str:
    """A map times a gate for each channel, made of its means."""
    mean = net.op("GlobalAveragePool", data)
    gate = net.op("HardSigmoid", net.conv(mean, channels, channels, kernel=1, pad=0))
    return net.op("Mul", data, gate)


def doubled(net: TinyNet, data: str, mode: str = "nearest") -> str:
    scales = net.const(np.array([1, 1, 2, 2], dtype=np.float32))
    return net.op("Resize", data, "", scales, mode=mode, coordinate_transformation_mode="asymmetric",
                  nearest_mode="floor")  # fmt: skip


def pyramid() -> TinyNet:
    """The neck of a detector: gated maps of two sizes, the small one added to the large, both joined for the head."""
    net = TinyNet((1, 6, 16, 24), seed=3)
    small = gated(net, net.op("Conv", "x", net.const(net.weights(8, 6, 2, 2)), strides=[2, 2], name="deep"), 8)
    large = gated(net, net.op("Conv", "x", net.const(net.weights(8, 6, 1, 1)), name="flat"), 8)
    total = net.op("Add", large, doubled(net, small), name="total")
    both = [doubled(net, net.conv(small, 8, 4)), net.conv(total, 8, 4)]
    net.op("Conv", net.op("Concat", *both, axis=1, name="both"), net.const(net.weights(3, 8, 3, 3)), name="head")
    return net


def owners(net: TinyNet, plan: QuantPlan) -> dict[str, str]:
    written = [name for name in plan.outputs if name in plan.quantized()]
    return takes(net.graph(), written, plan.quantized())


def test_in_a_neck_all_maps_flow_in_8_bits(tmp_path: Path) -> None:
    net = pyramid()
    plan, feed = flowing_plan(net, "none"), net.feed(50)
    exact = run(net.graph().to_model(), feed)[0]
    simulated = simulate(simulated_model(net.graph(), plan), feed)[0]
    model = quantized_model(net.graph(), plan, {})
    assert 0 < distance(simulated, exact) < 0.05
    assert distance(run(model, feed)[0], simulated) < 0.01
    kinds = optimized_kinds(model, tmp_path)
    assert kinds["QLinearAdd"] == 1 and kinds["QLinearMul"] == 2 and kinds["QLinearConcat"] == 1
    assert not {"Add", "Mul", "Concat"} & kinds.keys() and kinds["Conv"] == 1  # the head's output is the model's


def test_a_sum_is_rounded_for_all_by_the_quantizer_of_its_reader_and_a_gate_by_its_own() -> None:
    net = pyramid()
    plan = flowing_plan(net, "none")
    found = owners(net, plan)
    nodes = {node.output[0]: node for node in net.graph().nodes}
    large, resized = nodes["total"].input
    assert found["total"] == "total" and "total" in plan.activations and "total" not in plan.outputs
    assert found[large] == large and large in plan.outputs
    assert found[resized] == found[nodes[resized].input[0]] == nodes[resized].input[0]
    gate = nodes[large].input[1]
    assert found[gate] == gate and plan.outputs[gate].zero_point == 0
    assert {found[name] for name in nodes["both"].input} == {"both"}


def residual() -> TinyNet:
    """Two convolutions in a row, then three blocks of two, each added to what it was made of."""
    net = TinyNet((1, 4, 12, 16), seed=7)
    data = net.conv(net.conv("x", 4, 6), 6, 6)
    for _ in range(3):
        data = net.op("Add", data, net.conv(net.conv(data, 6, 6), 6, 6))
    net.conv(net.op("HardSwish", data), 6, 2)
    return net


REVERTED = [(pyramid, name) for name in flowing_plan(pyramid(), "none").quantized()]
REVERTED += [(residual, name) for name in flowing_plan(residual(), "none").quantized()]


@pytest.mark.parametrize(("made", "reverted"), REVERTED, ids=lambda value: getattr(value, "__name__", value))
def test_an_operator_in_fp32_takes_no_other_along(tmp_path: Path, made: Callable[[], TinyNet], reverted: str) -> None:
    net = made()
    plan, feed = flowing_plan(net, "none"), net.feed(50)
    plan.with_only(set(plan.quantized()) - {reverted}, "it hurts").save(tmp_path)
    fewer = load_plan(tmp_path)
    exact, simulated = run(net.graph().to_model(), feed)[0], simulate(simulated_model(net.graph(), fewer), feed)[0]
    assert distance(simulated, exact) < 0.05
    assert distance(run(quantized_model(net.graph(), fewer, {}), feed)[0], simulated) < 0.01
    before, after = (optimized_kinds(quantized_model(net.graph(), p, {}), tmp_path) for p in (plan, fewer))
    assert after["QLinearConv"] >= before["QLinearConv"] - 1 and after["QLinearAdd"] == before["QLinearAdd"]
    assert after["QLinearMul"] >= before["QLinearMul"] - 1, "a map in floats has its gate in floats"


def test_onnxruntime_rounds_no_weights_of_an_operator_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does where nothing stands between the operator and the quantizers around it."""
    net = TinyNet((1, 4, 12, 16), seed=7)
    uneven = net.weights(6, 6, 1, 1) * np.geomspace(1, 300, 6, dtype=np.float32).reshape(-1, 1, 1, 1)
    between = net.op("Conv", net.conv(net.conv("x", 4, 6), 6, 6), net.const(uneven), name="between")
    even = net.weights(2, 6, 1, 1) / np.geomspace(1, 300, 6, dtype=np.float32).reshape(1, -1, 1, 1)
    net.op("Conv", net.op("Relu", between), net.const(even))
    plan, feed = flowing_plan(net, "none"), net.feed(50)
    fewer = plan.with_only(set(plan.quantized()) - {"between"}, "it hurts")
    exported = quantized_model(net.graph(), fewer, {})
    assert optimized_kinds(exported, tmp_path)["QLinearConv"] == 2
    assert distance(run(exported, feed)[0], simulate(simulated_model(net.graph(), fewer), feed)[0]) < 0.005
    monkeypatch.setattr(export, "_weights_are_taken", lambda graph, tensor: False)
    bare = quantized_model(net.graph(), fewer, {})
    assert distance(run(bare, feed)[0], run(exported, feed)[0]) > 0.005, "onnxruntime left them: the rule may go"


def moved(net: TinyNet) -> None:
    """A small map made large beside a large one, for one convolution."""
    small = net.op("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2])
    both = net.op("Concat", doubled(net, small), net.op("HardSwish", "x"), axis=1)
    net.conv(net.op("HardSwish", net.conv(both, 8, 5)), 5, 2)


def test_rounding_in_front_of_what_moves_values_is_rounding_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    net = TinyNet((1, 4, 8, 8), seed=5)
    moved(net)
    plan = flowing_plan(net, "none")
    models = [simulated_model(net.graph(), plan)]
    monkeypatch.setattr(placement, "takes", lambda graph, stored, *_, **__: {name: name for name in stored})
    models.append(simulated_model(net.graph(), plan))
    assert len(models[0].graph.node) > len(models[1].graph.node)
    for seed in range(3):
        first, second = (simulate(model, net.feed(seed))[0] for model in models)
        np.testing.assert_array_equal(first, second)


def test_relu_is_left_to_the_quantizer_of_the_convolution_before(tmp_path: Path) -> None:
    net = TinyNet((1, 4, 8, 8), seed=5)
    first = net.conv("x", 4, 6)
    active = net.op("Relu", first)
    net.conv(net.op("Relu", net.conv(active, 6, 6)), 6, 2)
    plan, feed = flowing_plan(net, "none"), net.feed(9)
    assert owners(net, plan)[active] == first and plan.outputs[first].zero_point == 0
    model = simulated_model(net.graph(), plan)
    assert "Relu" not in {node.op_type for node in model.graph.node}
    exact, simulated = run(net.graph().to_model(), feed)[0], simulate(model, feed)[0]
    assert 0 < distance(simulated, exact) < 0.03
    assert distance(run(quantized_model(net.graph(), plan, {}), feed)[0], simulated) < 0.01
    kinds = optimized_kinds(quantized_model(net.graph(), plan, {}), tmp_path)
    assert kinds["QLinearConv"] == 2 and "Relu" not in kinds


def test_relu_stays_where_something_else_reads_the_convolution() -> None:
    net = TinyNet((1, 4, 8, 8), seed=5)
    first = net.conv("x", 4, 6)
    net.conv(net.op("Add", net.conv(net.op("Relu", first), 6, 6), first), 6, 2)
    plan, feed = flowing_plan(net, "none"), net.feed(9)
    model = simulated_model(net.graph(), plan)
    assert "Relu" in {node.op_type for node in model.graph.node} and plan.outputs[first].zero_point > 0
    assert distance(simulate(model, feed)[0], run(net.graph().to_model(), feed)[0]) < 0.05


def test_a_map_that_is_joined_and_read_is_rounded_once_for_both(tmp_path: Path) -> None:
    """As in networks that pass on what each of their blocks gives."""
    net = TinyNet((1, 4, 8, 8), seed=5)
    first = net.op("Relu", net.conv("x", 4, 6))
    second = net.op("Relu", net.conv(first, 6, 6))
    net.op("HardSwish", net.conv(net.op("Concat", first, second, axis=1, name="both"), 12, 3))
    plan = flowing_plan(net, "none")
    found = owners(net, plan)
    assert found["both"] == "both" and found[first] != "both" != found[second]
    kinds = optimized_kinds(quantized_model(net.graph(), plan, {}), tmp_path)
    assert kinds["QLinearConcat"] == 1 and kinds["QLinearConv"] == 3 and not {"Relu", "Concat"} & kinds.keys()


def softened(net: TinyNet, data: str) -> str:
    return doubled(net, data, mode="linear")


CASES: dict[str, Callable[[TinyNet], str]] = {
    "a resizing that computes": lambda net: net.conv(softened(net, net.op("HardSwish", "x")), 4, 2),
    "a map that a float operator reads, too": lambda net: net.op(
        "Concat", net.conv(doubled(net, net.op("HardSwish", "x")), 4, 2), net.op("Tanh", "t1"), axis=1
    ),
    "a sum with a map in floats": lambda net: net.conv(net.op("Add", net.conv("x", 4, 4), net.op("Tanh", "x")), 4, 2),
    "a factor for each channel": lambda net: net.conv(
        net.op("Mul", net.op("Tanh", "x"), net.const(net.weights(1, 4, 1, 1))), 4, 2
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_stays_as_it_is(case: str) -> None:
    net = TinyNet((1, 4, 8, 8), seed=5)
    CASES[case](net)
    plan = flowing_plan(net, "none")
    assert owners(net, plan).keys() == plan.outputs.keys() & plan.quantized().keys() == plan.outputs.keys()


def test_without_stored_outputs_nothing_takes_a_quantizer() -> None:
    net = pyramid()
    plan = flowing_plan(net, "none")
    plan.outputs = {}
    kinds = [node.op_type for node in simulated_model(net.graph(), plan).graph.node]
    assert kinds.count("QuantizeLinear") == len({name for op in plan.quantized().values() for name in op.activations})
