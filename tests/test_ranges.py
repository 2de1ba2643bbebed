"""Ranges by their readers' errors, against convolutions and products written in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from test_flow import mobile_block
from test_simulation import integers_of
from tiny_models import TinyNet, run, small_detector, small_recognizer

from quant.calibration import Statistics, collect_statistics, count_work
from quant.equalization import equalize, make_equalizers
from quant.flow import GATE_READ_SCALE, GATE_SCALE, GATE_ZERO
from quant.graph import Graph
from quant.observer import Entropy, MeanSquaredError, MinMax, MovingAverage, Percentile, RangeMethod, candidate_methods
from quant.placement import active_chains
from quant.plan import ActivationQuantizer, QuantPlan, dequantize_weight, quantizable_operators
from quant.ptq import activation_tensors, make_plan, observed_outputs, read_activations, stored_outputs
from quant.ranges import PerTensor, range_errors
from quant.runtime import Feed
from quant.simulation import make_quantizer, rounded_constant

Array = np.ndarray[Any, Any]
METHODS = (Percentile(99.0), Percentile(90.0), MinMax(), MeanSquaredError(), Entropy(), MovingAverage())


def calibrated(
    graph: Graph, feeds: Sequence[Feed], dtype: str = "uint8", flowing: bool = False
) -> tuple[QuantPlan, Statistics, dict[str, str]]:
    """A plan by the first method, what calibration saw, and what it watched for stored outputs."""
    operators = quantizable_operators(graph, count_work(graph, feeds[0], 1).macs)
    watched, outputs = observed_outputs(graph, operators) if flowing else (graph, {})
    statistics = collect_statistics(watched, [*activation_tensors(operators), *outputs.values()], feeds, 1)
    plan = make_plan(graph, operators, statistics, METHODS[0], model="t", dtype=dtype, prepared_sha256="")
    plan.outputs = stored_outputs(outputs, statistics, METHODS[0], dtype)
    return plan, statistics, outputs


def rounded(values: Array, quantizer: ActivationQuantizer) -> Array:
    return (integers_of(values, quantizer) - quantizer.zero_point) * float(np.float32(quantizer.scale))


def convolved(data: Array, weight: Array, pad: int, group: int = 1) -> Array:
    """Convolution by its definition, without bias."""
    padded = np.pad(data.astype(np.float64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    kernel, share = weight.shape[2], data.shape[1] // group
    height, width = (size - kernel + 1 for size in padded.shape[2:])
    out = np.zeros((len(data), len(weight), height, width))
    for channel, filters in enumerate(weight.astype(np.float64)):
        first = channel // (len(weight) // group) * share
        for row in range(kernel):
            for column in range(kernel):
                part = padded[:, first : first + share, row : row + height, column : column + width]
                out[:, channel] += np.einsum("nihw,i->nhw", part, filters[:, row, column])
    return out


def squared(errors: Sequence[Array]) -> float:
    return float(sum(np.square(error).sum() for error in errors))


def values_of(graph: Graph, feeds: Sequence[Feed], name: str) -> list[Array]:
    return [run(graph.to_model([name]), feed, name)[0] if name not in feed else feed[name] for feed in feeds]


def forked() -> tuple[Graph, list[Feed]]:
    """One tensor with outliers, read by a dense and a depthwise convolution and by something in FP32."""
    net = TinyNet((1, 4, 7, 9), seed=11, free=(2, 3))
    shared = net.op("Mul", "x", net.op("Abs", "x"))
    first, second = net.conv(shared, 4, 5), net.conv(shared, 4, 4, group=4)
    graph = net.graph(first, second, net.op("Neg", shared))
    feeds = [net.feed(seed) for seed in range(4)]
    feeds[2]["x"][0, 1, 2, 3] = 9.0
    return graph, feeds


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_the_error_is_that_of_all_readers_by_definition(dtype: str) -> None:
    graph, feeds = forked()
    plan, statistics, outputs = calibrated(graph, feeds, dtype)
    offers = [read_activations(plan.operators, statistics, method, dtype) for method in METHODS]
    (name,) = plan.activations
    expected = []
    for offer in offers:
        total = 0.0
        for op, group in zip(plan.operators, (1, 4), strict=True):
            assert op.weight is not None
            exact, stored = graph.constants[op.weight], dequantize_weight(plan.integers[op.weight], 0)
            errors = [
                convolved(values, exact, 1, group) - convolved(rounded(values, offer[name]), stored, 1, group)
                for values in values_of(graph, feeds, name)
            ]
            total += squared(errors)
        expected.append(total)
    found = range_errors(graph, plan, offers, feeds, 1)
    assert list(found) == [name]
    np.testing.assert_allclose(found[name], expected, rtol=1e-4)
    best = PerTensor(METHODS).refine(graph, plan, statistics, outputs, feeds, 1)
    assert best.activations[name] == offers[int(np.argmin(expected))][name]
    assert min(expected) < 0.9 * expected[0], "the first candidate is not the best"


def test_both_sides_of_a_product_are_judged_with_the_other_exact() -> None:
    net = TinyNet((1, 6, 6), seed=2)
    left = net.op("Mul", "x", net.op("Abs", "x"))
    net.op("MatMul", left, net.op("Relu", "x"))
    graph, feeds = net.graph(), [net.feed(seed) for seed in range(3)]
    plan, statistics, _ = calibrated(graph, feeds)
    offers = [read_activations(plan.operators, statistics, method, "uint8") for method in METHODS]
    found = range_errors(graph, plan, offers, feeds, 1)
    names = plan.operators[0].activations
    sides = list(zip(*(values_of(graph, feeds, name) for name in names), strict=True))
    for place, name in enumerate(names):
        expected = []
        for offer in offers:
            copies = [tuple(rounded(v, offer[name]) if i == place else v for i, v in enumerate(s)) for s in sides]
            expected.append(
                sum(float(np.square(a @ b - c @ d).sum()) for (a, b), (c, d) in zip(sides, copies, strict=True))
            )
        np.testing.assert_allclose(found[name], expected, rtol=1e-4)


def test_stored_outputs_are_judged_at_the_end_of_their_chain() -> None:
    net = mobile_block()
    feeds = [net.feed(seed) for seed in range(4)]
    equalizers = make_equalizers(net.graph(), "depthwise", feeds, 1)
    graph = equalize(net.graph(), equalizers, equalizers)
    plan, statistics, outputs = calibrated(graph, feeds, flowing=True)
    offers = [
        read_activations(plan.operators, statistics, m, "uint8") | stored_outputs(outputs, statistics, m, "uint8")
        for m in METHODS
    ]
    found = range_errors(graph, plan, offers, feeds, 1)
    chain = active_chains(graph, plan)["deep"]
    assert chain.shift and chain.factor is not None
    assert {chain.writer, chain.product, chain.result} <= set(found)
    operator = plan.quantized()["deep"]
    assert operator.weight is not None
    exact, stored = graph.constants[operator.weight], dequantize_weight(plan.integers[operator.weight], 0)
    factor = chain.factor.reshape(1, -1, 1, 1)
    pictures = list(zip(values_of(graph, feeds, "first"), values_of(graph, feeds, chain.result), strict=True))

    def in_8_bits(values: Array) -> Array:
        integers, scale, zero = rounded_constant(values.astype(np.float32))
        return (integers.astype(float) - zero) * np.float32(scale)

    for name in (chain.writer, chain.product):
        for offer, error in zip(offers, found[name], strict=True):
            numbers = plan.outputs | {name: offer[name]}
            errors = []
            for written, read in pictures:
                kept = rounded(written * factor, numbers[chain.writer])
                steps = np.rint((kept * in_8_bits(1 / factor)).astype(np.float32) / np.float32(GATE_SCALE)) + GATE_ZERO
                product = rounded(kept * np.clip(steps, 0, 255) * GATE_READ_SCALE, numbers[chain.product])
                final = rounded(product + in_8_bits(chain.shift * factor), plan.activations[chain.result])
                errors.append(convolved(read, exact, 1, 8) - convolved(final, stored, 1, 8))
            assert error == pytest.approx(squared(errors), rel=0.02)  # single values round the other way


def test_a_stored_output_outside_of_chains_is_judged_by_what_reads_it() -> None:
    net = TinyNet((1, 3, 6, 6), seed=4)
    written = net.conv("x", 3, 4)
    doubled, halved = net.op("Mul", written, net.const([2.0])), net.op("Mul", written, net.const([0.5]))
    graph = net.graph(net.op("Add", doubled, halved))
    feeds = [net.feed(seed) for seed in range(3)]
    plan, statistics, outputs = calibrated(graph, feeds, flowing=True)
    assert list(plan.outputs) == [written]
    offers = [
        read_activations(plan.operators, statistics, m, "uint8") | stored_outputs(outputs, statistics, m, "uint8")
        for m in METHODS
    ]
    expected = [
        sum(4.25 * float(np.square(v - rounded(v, offer[written])).sum()) for v in values_of(graph, feeds, written))
        for offer in offers
    ]
    found = range_errors(graph, plan, offers, feeds, 1)
    np.testing.assert_allclose(found[written], expected, rtol=1e-4)
    best = PerTensor(METHODS).refine(graph, plan, statistics, outputs, feeds, 1)
    assert best.outputs[written] == offers[int(np.argmin(expected))][written]


def test_equal_candidates_leave_the_first() -> None:
    graph, feeds = forked()
    plan, statistics, outputs = calibrated(graph, feeds)
    twice: tuple[RangeMethod, ...] = (METHODS[0], METHODS[0])
    assert range_errors(graph, plan, [plan.activations] * 2, feeds, 1) == {}
    same = PerTensor(twice).refine(graph, plan, statistics, outputs, feeds, 1)
    assert same.activations == plan.activations
    (name,) = plan.activations
    other = make_quantizer(name, -0.1, 0.1, "uint8")
    offers = [plan.activations, {name: other}, plan.activations]
    errors = range_errors(graph, plan, offers, feeds, 1)[name]
    assert errors[0] == errors[2] < errors[1]


@pytest.mark.parametrize("net", [small_detector(), small_recognizer()], ids=["detector", "recognizer"])
def test_no_candidate_is_better_than_the_mixture_and_nothing_else_changes(net: TinyNet) -> None:
    graph, feeds = net.graph(), [net.feed(seed) for seed in range(3)]
    before = graph.to_model().SerializeToString(deterministic=True)
    plan, statistics, outputs = calibrated(graph, feeds)
    methods = tuple(candidate_methods(99.999))
    best = PerTensor(methods).refine(graph, plan, statistics, outputs, feeds, 1)
    single = [read_activations(plan.operators, statistics, method, "uint8") for method in methods]
    errors = range_errors(graph, plan, [best.activations, *single], feeds, 1)
    assert all(found[0] == found.min() for found in errors.values()) and errors
    assert graph.to_model().SerializeToString(deterministic=True) == before
    assert best.operators == plan.operators and best.integers is plan.integers
    assert best.notes[-1].startswith("ranges chosen per tensor: ")
