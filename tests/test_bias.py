"""Sequential bias correction: every convolution is right on average once everything before it is quantized."""

from __future__ import annotations

import numpy as np
import pytest
from test_flow import flowing_plan, mobile_block
from test_plan import plan_of
from tiny_models import TinyNet, run, simulate, small_detector, small_recognizer

from quant.bias import sequential_biases
from quant.placement import active_chains
from quant.plan import QuantPlan, corrected_graph
from quant.runtime import Feed
from quant.simulation import simulated_model


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
    for name, error in after.items():
        assert before[name] > 1e-3
        assert error < 1e-4, name


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
