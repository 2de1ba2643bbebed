"""Integer flow: chains are found where they are, compute the same, and onnxruntime runs them on integers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_plan import LARGEST, plan_of
from tiny_models import TinyNet, run, simulate, simulated_model

from quant.calibration import collect_statistics
from quant.equalization import equalize, make_equalizers
from quant.export import quantized_model
from quant.flow import find_chains
from quant.graph import Graph
from quant.observer import MinMax
from quant.placement import written_chains
from quant.plan import QuantPlan, corrected_graph, load_plan, quantizable_operators
from quant.ptq import activation_tensors, make_plan, observed_outputs, scales_for_biases, stored_outputs


def mobile_block(shift: float = 0.25) -> TinyNet:
    """Pointwise, hard-swish, shift, depthwise, hard-swish, pointwise: channels of very different size."""
    net = TinyNet((1, 4, 12, 16), seed=7, free=(2, 3))
    sizes = np.geomspace(0.2, 6, 8).reshape(8, 1, 1, 1)
    first = net.op("Conv", "x", net.const(net.weights(8, 4, 1, 1) * sizes), net.const(net.weights(8)), name="first")
    wide = net.op("HardSwish", first)
    if shift:
        wide = net.op("Add", wide, net.const(np.array([shift])))
    deep = net.op("Conv", wide, net.const(net.weights(8, 1, 3, 3)), net.const(net.weights(8)), pads=[1] * 4, group=8,
                  name="deep")  # fmt: skip
    net.op(
        "Conv", net.op("HardSwish", deep), net.const(net.weights(5, 8, 1, 1)), net.const(net.weights(5)), name="last"
    )
    return net


def block_with_dead_channels() -> TinyNet:
    """As trained networks have them: weights next to 0, so that a bias is all that comes out."""
    net = mobile_block()
    for name, size in (("first", 1e-17), ("deep", 0.0)):
        weight, bias = next(node for node in net.nodes if node.output[0] == name).input[1:]
        net.constants[weight][5] *= size
        net.constants[bias][5] = 1.5
    return net


def flowing_plan(net: TinyNet, scope: str = "depthwise") -> QuantPlan:
    graph, feeds = net.graph(), [net.feed(seed) for seed in range(4)]
    equalizers = make_equalizers(graph, scope, feeds, 1)  # type: ignore[arg-type]
    equalized = equalize(graph, equalizers, equalizers)
    operators = quantizable_operators(equalized, {op.name: 1000 for op in plan_of(net).operators})
    watched, outputs = observed_outputs(equalized, operators)
    statistics = collect_statistics(watched, [*activation_tensors(operators), *outputs.values()], feeds, 1)
    plan = make_plan(
        equalized, operators, statistics, MinMax(), model="t", dtype="uint8", prepared_sha256="", largest=LARGEST
    )
    plan.equalizers = equalizers
    plan.outputs = stored_outputs(outputs, statistics, MinMax(), "uint8")
    plan.integers = scales_for_biases(equalized, plan)
    return plan


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).sum() / np.abs(expected).sum())


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_chains_between_convolutions_are_found(shift: float) -> None:
    graph = mobile_block(shift).graph()
    found = {(chain.writer, chain.reader): chain for chain in find_chains(graph)}
    assert set(found) == {("first", "deep"), ("deep", "last")}
    assert found["first", "deep"].shift == shift and found["deep", "last"].shift == 0
    assert found["first", "deep"].factor is None
    equalizers = make_equalizers(graph, "depthwise", [mobile_block(shift).feed()], 1)
    (equalized,) = [c for c in find_chains(equalize(graph, equalizers, equalizers)) if c.reader == "deep"]
    assert equalized.factor is not None
    np.testing.assert_allclose(equalized.factor, 1 / equalizers["deep"].factor)


@pytest.mark.parametrize("case", ["two readers", "an output", "a channel shift", "no convolution before"])
def test_what_leads_elsewhere_is_no_chain(case: str) -> None:
    net = TinyNet((1, 4, 8, 8), seed=1)
    source = "x" if case == "no convolution before" else net.conv("x", 4, 4)
    active = net.op("HardSwish", source)
    if case == "a channel shift":
        active = net.op("Add", active, net.const(np.arange(4.0).reshape(1, 4, 1, 1)))
    last = net.conv(active, 4, 3)
    outputs = [last]
    if case == "two readers":
        outputs.append(net.op("Relu", active))
    if case == "an output":
        outputs.append(active)
    assert find_chains(net.graph(*outputs)) == []


def optimized_kinds(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Kernels that onnxruntime chooses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("shift", [0.0, 0.25])
@pytest.mark.parametrize("scope", ["none", "depthwise"])
def test_simulation_and_export_agree_and_stay_near_fp32(shift: float, scope: str) -> None:
    net = mobile_block(shift)
    plan, feed = flowing_plan(net, scope), net.feed(50)
    exact = run(net.graph().to_model(), feed)[0]
    simulated = simulate(simulated_model(net.graph(), plan), feed)[0]
    exported = run(quantized_model(net.graph(), plan, {}), feed)[0]
    assert 0 < distance(simulated, exact) < 0.05
    assert distance(exported, simulated) < 0.01


def test_onnxruntime_computes_the_whole_block_on_integers(tmp_path: Path) -> None:
    net = mobile_block()
    kinds = optimized_kinds(quantized_model(net.graph(), flowing_plan(net), {}), tmp_path)
    assert (kinds["QLinearConv"], kinds["QLinearMul"], kinds["QLinearAdd"]) >= (2, 4, 1)
    assert not kinds["HardSwish"] and not kinds["HardSigmoid"]


@pytest.mark.parametrize("reverted", ["first", "deep", "last"])
def test_an_operator_in_fp32_leaves_its_neighbours_on_integers(tmp_path: Path, reverted: str) -> None:
    net = mobile_block()
    plan = flowing_plan(net)
    plan.with_only(set(plan.quantized()) - {reverted}, "it hurts").save(tmp_path)
    fewer = load_plan(tmp_path)
    feed = net.feed(50)
    exact = run(net.graph().to_model(), feed)[0]
    simulated = simulate(simulated_model(net.graph(), fewer), feed)[0]
    assert distance(simulated, exact) < 0.05
    exported = run(quantized_model(net.graph(), fewer, {}), feed)[0]
    assert distance(exported, simulated) < 0.01
    before, after = (optimized_kinds(quantized_model(net.graph(), p, {}), tmp_path) for p in (plan, fewer))
    assert after["QLinearConv"] >= before["QLinearConv"] - 1, "only the reverted one is lost"


def test_the_plan_with_stored_outputs_comes_back(tmp_path: Path) -> None:
    net = mobile_block()
    plan = flowing_plan(net)
    assert plan.outputs["first"].tensor == "first_scaled" and plan.outputs["deep"].tensor == "deep"
    plan.save(tmp_path)
    back = load_plan(tmp_path)
    assert back.outputs == plan.outputs
    first, second = (simulated_model(net.graph(), p).SerializeToString(deterministic=True) for p in (plan, back))
    assert first == second


def test_graphs_keep_scalars() -> None:
    net = TinyNet((1, 2))
    net.op("Mul", "x", net.const(np.float32(3)))
    (constant,) = Graph(net.graph().to_model()).constants.values()
    assert constant.shape == ()


def test_what_dead_channels_give_on_is_not_lost() -> None:
    """Their biases are stored in steps of their weights, which are next to 0."""
    net = block_with_dead_channels()
    plan, feed = flowing_plan(net), net.feed(9)
    chains = written_chains(corrected_graph(net.graph(), plan), plan)
    factors = {chain.writer: chain.factor[5] for chain in chains if chain.factor is not None}
    for model in (simulated_model(net.graph(), plan), quantized_model(net.graph(), plan, {})):
        for name in ("first", "deep"):
            exact = run(net.graph().ending_at([name]).to_model(), feed)[0]
            found = run(Graph(model).ending_at([name]).to_model(), feed)[0]
            np.testing.assert_allclose(found[:, 5] / factors.get(name, 1.0), exact[:, 5], atol=1e-3)
