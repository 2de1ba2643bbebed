"""Sequential bias correction: every convolution is right on average once everything before it is quantized."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_flow import flowing_plan, mobile_block
from test_plan import plan_of
from tiny_models import TinyNet, run, simulate, simulated_model, small_detector, small_recognizer

from quant.bias import Parts, sequential_biases
from quant.graph import Graph
from quant.placement import active_chains, place
from quant.plan import QuantPlan, corrected_graph
from quant.runtime import Feed
from quant.simulation import FloatWriter


def coarse(plan: QuantPlan) -> QuantPlan:
    """Quantizers with few steps, so that errors are large."""
    for quantizer in [*plan.activations.values(), *plan.outputs.values()]:
        quantizer.scale *= 1.5
    return plan


def mean_errors(net: TinyNet, plan: QuantPlan, feeds: list[Feed]) -> dict[str, float]:
    """Largest mean error of a channel, for each quantized convolution in the whole quantized model."""
    graph = net.graph()
    chains = {chain.writer: chain.factor for chain in active_chains(corrected_graph(graph, plan), plan).values()}
    errors = {}
    for op in plan.quantized().values():
        if op.op_type == "MatMul":
            continue
        exact = np.mean([run(graph.to_model([op.name]), f, op.name)[0].mean((0, 2, 3)) for f in feeds], axis=0)
        model = simulated_model(graph, plan)
        model.graph.output.append(type(model.graph.output[0])(name=op.name))
        found = np.mean([simulate(model, f, op.name)[0].mean((0, 2, 3)) for f in feeds], axis=0)
        factor = chains.get(op.name)
        errors[op.name] = float(np.abs(found / (1 if factor is None else factor) - exact).max())
    return errors


@pytest.mark.parametrize("kind", ["detector", "chain"])
def test_no_convolution_is_wrong_on_average(kind: str) -> None:
    net = small_detector() if kind == "detector" else mobile_block()
    plan = coarse(plan_of(net) if kind == "detector" else flowing_plan(net))
    feeds = [net.feed(seed) for seed in range(4)]
    before = mean_errors(net, plan, feeds)
    plan.bias_shifts = sequential_biases(net.graph(), plan, feeds, 1)
    after = mean_errors(net, plan, feeds)
    assert set(plan.bias_shifts) == set(before)
    writer = FloatWriter()
    place(net.graph(), plan, writer)
    assert bool(writer.bias_steps) == (kind == "chain")
    chains = {chain.writer: chain.factor for chain in active_chains(corrected_graph(net.graph(), plan), plan).values()}
    for name, error in after.items():
        step = writer.bias_steps.get(name, np.zeros(1)) / (1 if chains.get(name) is None else chains[name])
        assert before[name] > 2e-4
        assert error < 1e-5 + step.max() / 2, name


def test_integer_biases_move_by_whole_steps_so_that_the_plan_rounds_as_it_was_corrected() -> None:
    net = mobile_block()
    plan = coarse(flowing_plan(net))
    plan.bias_shifts = sequential_biases(net.graph(), plan, [net.feed(seed) for seed in range(4)], 1)
    writer = FloatWriter()
    place(net.graph(), plan, writer)
    chains = {chain.writer: chain.factor for chain in active_chains(corrected_graph(net.graph(), plan), plan).values()}
    assert writer.bias_steps
    for name, step in writer.bias_steps.items():
        factor = chains.get(name)
        steps = plan.bias_shifts[name] * (1 if factor is None else factor) / step
        np.testing.assert_allclose(steps, np.rint(steps), atol=0.01)
        assert np.rint(steps).any()


def test_sessions_of_parts_are_kept_only_where_they_come_back() -> None:
    net = small_recognizer()
    plan, feeds = coarse(plan_of(net)), [net.feed()]
    parts = Parts(net.graph(), plan, feeds, feeds, 1)
    kept = len(parts._sessions)
    for op in plan.operators:
        parts.outputs({op.name})
    assert len(parts._sessions) == kept


def test_attention_is_carried_along() -> None:
    net = small_recognizer()
    plan, feeds = coarse(plan_of(net)), [net.feed(seed) for seed in range(4)]
    plan.bias_shifts = sequential_biases(net.graph(), plan, feeds, 1)
    assert list(plan.bias_shifts) == [plan.operators[0].name]
    assert max(mean_errors(net, plan, feeds).values()) < 1e-4


def test_what_is_in_fp32_is_left_alone_and_progress_moves() -> None:
    net = small_detector()
    plan = plan_of(net)
    first = plan.operators[0].name
    calls: list[None] = []
    shifts = sequential_biases(net.graph(), plan.with_only({first}, ""), [net.feed()], 1, lambda: calls.append(None))
    assert set(shifts) == {first} and len(calls) == 1
    assert sequential_biases(net.graph(), plan.with_only(set(), ""), [net.feed()], 1) == {}


def test_a_convolution_over_one_axis() -> None:
    net = TinyNet((2, 4, 9))
    output = net.op("Conv", "x", net.const(net.weights(3, 4, 3)), pads=[1, 1])
    net.op("Relu", output)
    shifts = sequential_biases(net.graph(), coarse(plan_of(net)), [net.feed()], 1)
    assert shifts[output].shape == (3,)


# --- parts of a plan -------------------------------------------------------------------------------


def one_by_one(net: TinyNet, plan: QuantPlan, names: set[str], calibration: list[Feed], feed: Feed) -> np.ndarray:
    """Outputs of a part with the bias of every convolution corrected by running the whole model for each of them."""
    graph = net.graph()
    simulated = Graph(simulated_model(graph, replace(plan.with_only(names, ""), bias_shifts={})))
    convolutions = [node for node in simulated.nodes if node.op_type in ("Conv", "ConvTranspose")]
    for node in convolutions:
        output = node.output[0]
        exact = np.mean([run(graph.to_model([output]), f, output)[0].mean((0, 2, 3)) for f in calibration], axis=0)
        found = [simulate(simulated.to_model([output]), f, output)[0].mean((0, 2, 3)) for f in calibration]
        bias = simulated.constants[node.input[2]] if len(node.input) > 2 else 0
        shifted = simulated.add_constant(f"{output}_b", (bias + exact - np.mean(found, axis=0)).astype(np.float32))
        node.input[:] = [node.input[0], node.input[1], shifted]
    return simulate(simulated.to_model(), feed)[0]


def test_parts_run_with_the_biases_behind_them_corrected() -> None:
    net = small_detector()
    plan = coarse(plan_of(net))
    calibration, feed = [net.feed(seed) for seed in range(3)], net.feed(9)
    parts = Parts(net.graph(), plan, calibration, [feed], 1)
    exact = run(net.graph().to_model(), feed)[0]
    names = [{op.name} for op in plan.operators] + [{op.name for op in plan.operators}]
    found = [parts.outputs(part)[0][0] for part in names]
    for part, output in zip(names, found, strict=True):
        np.testing.assert_allclose(output, one_by_one(net, plan, part, calibration, feed), atol=2e-6)
        assert np.abs(output - exact).max() > 1e-4
    for part, output in reversed(list(zip(names, found, strict=True))):
        np.testing.assert_array_equal(parts.outputs(part)[0][0], output)
    np.testing.assert_allclose(parts.outputs(set())[0][0], exact, atol=1e-5)


def test_parts_in_integer_flow_write_natural_values_again() -> None:
    net = mobile_block()
    plan = flowing_plan(net)
    feeds = [net.feed(seed) for seed in range(3)]
    everything = {op.name for op in plan.operators}
    output = Parts(net.graph(), coarse(plan), feeds, feeds[:1], 1).outputs(everything)[0][0]
    corrected = replace(plan, bias_shifts=sequential_biases(net.graph(), plan, feeds, 1))
    expected = simulate(simulated_model(net.graph(), corrected), feeds[0])[0]
    np.testing.assert_allclose(output, expected, atol=1e-4)


def test_without_calibration_the_biases_of_the_plan_stay() -> None:
    net = small_detector()
    plan, feed = coarse(plan_of(net)), net.feed()
    plan.bias_shifts = sequential_biases(net.graph(), plan, [net.feed(1)], 1)
    names = set(plan.quantized())
    output = Parts(net.graph(), plan, [], [feed], 1).outputs(names)[0][0]
    np.testing.assert_allclose(output, simulate(simulated_model(net.graph(), plan), feed)[0], atol=1e-5)
