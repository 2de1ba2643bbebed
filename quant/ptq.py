"""Post-training quantization: ranges from calibration, rounded weights, corrected biases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from onnx import NodeProto, helper

from quant.calibration import Statistics
from quant.flow import Chain, find_chains, observed, write_chain
from quant.graph import Graph
from quant.joins import is_pooled, takes
from quant.observer import RangeMethod
from quant.placement import active_chains, numbers_of
from quant.plan import (
    FULL_WEIGHTS,
    ActivationQuantizer,
    IntegerWeight,
    Operator,
    QuantPlan,
    WeightQuantizer,
    dequantize_weight,
    quantize_weight,
    weight_axis,
)
from quant.runtime import Feed, onnx_session
from quant.simulation import FloatWriter, make_quantizer


def activation_tensors(operators: Iterable[Operator]) -> list[str]:
    """Tensors that have to be calibrated, in graph order."""
    return list(dict.fromkeys(name for op in operators if op.quantized for name in op.activations))


def make_plan(
    graph: Graph,
    operators: list[Operator],
    statistics: Statistics,
    method: RangeMethod,
    *,
    model: str,
    dtype: str,
    prepared_sha256: str,
    largest: int = FULL_WEIGHTS,
) -> QuantPlan:
    """A plan in which every quantizable operator is in INT8.

    Args:
        method: chooses each tensor's range.
        dtype: `uint8` (asymmetric) or `int8` (symmetric) activations.
        largest: integer of a weight.
    """
    activations = read_activations(operators, statistics, method, dtype)
    weights, integers = {}, {}
    for op in operators:
        if op.quantized and op.weight is not None:
            axis = weight_axis(op.op_type)
            weights[op.weight] = WeightQuantizer(tensor=op.weight, axis=axis)
            integers[op.weight] = quantize_weight(graph.constants[op.weight], axis, largest)
    return QuantPlan(model, "", "ptq", prepared_sha256, operators, activations, weights, integers, {}, [])


_BIAS_STEPS = 2**28
"""Most steps of a bias; S32 holds eight times as many, for what is corrected, equalized and learned later on."""


def scales_for_biases(graph: Graph, plan: QuantPlan) -> dict[str, IntegerWeight]:
    """The plan's integer weights, on larger scales where a bias would not fit into 32 bits.

    Kernels store a bias in steps of its channel's weights times those of the input. The weights of dead channels are
    next to 0, and what such a channel gives on is its bias alone.

    Args:
        graph: the graph that the plan was made on.
    """
    nodes = {node.output[0]: node for node in graph.nodes if node.output}
    integers = dict(plan.integers)
    for operator in plan.quantized().values():
        node = nodes.get(operator.name)
        if node is None or node.op_type != "Conv" or operator.weight is None:
            continue
        if len(node.input) < 3 or not graph.is_constant(node.input[2]):
            continue
        source, weight = operator.activations[0], integers[operator.weight]
        steps = [part[source].scale for part in (plan.activations, plan.outputs) if source in part]
        least = np.abs(graph.constants[node.input[2]]) / (min(steps) * _BIAS_STEPS)
        if (weight.scale < least).any():
            scale = np.maximum(weight.scale, least).astype(np.float32)
            shares = (weight.scale / scale).reshape(-1, *(1,) * (weight.values.ndim - 1))
            integers[operator.weight] = IntegerWeight(np.rint(weight.values * shares).astype(np.int8), scale)
    return integers


def read_activations(
    operators: Iterable[Operator], statistics: Statistics, method: RangeMethod, dtype: str
) -> dict[str, ActivationQuantizer]:
    """Quantizers of what quantized operators read, by tensor name."""
    found = {}
    for name in activation_tensors(operators):
        low, high = method.choose(statistics[name], symmetric=dtype == "int8")
        found[name] = make_quantizer(name, low, high, dtype)
    return found


def observed_outputs(graph: Graph, operators: Iterable[Operator]) -> tuple[Graph, dict[str, str]]:
    """Which outputs are stored in 8 bits, and a graph with the tensors to calibrate for them.

    Of convolutions all but those of pooled maps (one value a channel), which gain nothing, those that convolutions read
    as they are (these have quantizers already), and scores, which a Sigmoid ends; beside these what joins of maps write
    (see `quant.joins`).

    Returns:
        The graph, and the tensor to observe for each output (and each product in a chain, see `quant.flow`).
    """
    listed = list(operators)
    readers = graph.consumers()
    read = {name for op in listed if op.quantized for name in op.activations}
    writers = [
        op.name
        for op in listed
        if op.quantized and op.op_type == "Conv" and op.weight is not None and not is_pooled(graph, op.name)
        if op.name not in read and op.name not in graph.outputs
        if any(reader.op_type != "Sigmoid" for reader in readers[op.name])
    ]
    owners = takes(graph, writers, {op.name: op for op in listed if op.quantized}).values()
    joined = [name for name in dict.fromkeys(owners) if name not in read and name not in writers]
    watched, tensors = observed(graph, find_chains(graph), writers)
    return watched, tensors | {name: name for name in joined}


def stored_outputs(
    tensors: Mapping[str, str], statistics: Statistics, method: RangeMethod, dtype: str
) -> dict[str, ActivationQuantizer]:
    """Quantizers of stored outputs.

    Args:
        tensors: what was observed, from `observed_outputs`.
    """
    found = {}
    for name, tensor in tensors.items():
        low, high = method.choose(statistics[tensor], symmetric=dtype == "int8")
        found[name] = make_quantizer(stored_name(name, tensor), low, high, dtype)
    return found


def stored_name(output: str, observed: str) -> str:
    """What the quantizer of a stored output calls its tensor: the scaled one of an equalized chain has its own name."""
    return f"{output}_scaled" if observed.startswith(f"{output}_scaled") else output


def correct_biases(graph: Graph, plan: QuantPlan, feeds: Iterable[Feed], threads: int) -> dict[str, np.ndarray]:
    """Mean output error of every quantized convolution, per channel, given its FP32 input.

    Added to the bias it makes the quantized convolution right on average (fast bias correction:
    Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019,
    section 4.2, with the expectation taken over calibration pictures).

    Returns:
        float32[C] by operator name, for Conv and ConvTranspose.
    """
    paired = graph.copy()
    chains = active_chains(graph, plan)
    twins = [_add_twin(paired, node, plan, chains) for node in list(paired.nodes) if _correctable(node, plan)]
    tensors = [name for pair in twins for name in pair]
    session = onnx_session(paired.to_light_model(tensors), threads, integers=False)
    sums = {exact: np.zeros(1) for exact, _ in twins}
    count = 0
    for feed in feeds:
        count += 1
        arrays = dict(zip(tensors, session.run(feed, tensors), strict=True))
        for exact, rounded in twins:
            error = np.moveaxis(arrays[exact] - arrays[rounded], 1, -1)
            sums[exact] = sums[exact] + error.reshape(-1, error.shape[-1]).mean(axis=0, dtype=np.float64)
    return {name: (total / max(count, 1)).astype(np.float32) for name, total in sums.items()}


def _correctable(node: NodeProto, plan: QuantPlan) -> bool:
    operator = plan.quantized().get(node.output[0])
    return operator is not None and operator.op_type != "MatMul" and operator.weight is not None


def _add_twin(graph: Graph, node: NodeProto, plan: QuantPlan, chains: Mapping[str, Chain]) -> tuple[str, str]:
    """Put a quantized copy of a convolution beside it; returns both output names."""
    operator = plan.quantized()[node.output[0]]
    assert operator.weight is not None
    twin = NodeProto()
    twin.CopyFrom(node)
    twin.output[0] = twin.name = graph.fresh_name(f"{node.output[0]}_twin")
    source = operator.activations[0]
    quantizer = plan.outputs.get(source) or plan.activations[source]
    if chain := chains.get(operator.name):
        source, quantizer = chain_twin(graph, node, plan, chain), plan.activations[source]
    twin.input[0] = FloatWriter().rounded(graph, node, source, *numbers_of(quantizer))
    values = dequantize_weight(plan.integers[operator.weight], plan.weights[operator.weight].axis)
    twin.input[1] = graph.add_constant(f"{operator.weight}_twin", values)
    graph.insert_before(node, twin)
    return node.output[0], twin.output[0]


def chain_twin(graph: Graph, before: NodeProto, plan: QuantPlan, chain: Chain) -> str:
    """What integers make of a chain whose convolution wrote exact values."""
    source = chain.writer
    if chain.factor is not None:
        factor = graph.add_constant(f"{source}_factor", chain.factor.reshape(1, -1, 1, 1))
        name = graph.fresh_name(f"{source}_scaled")
        graph.insert_before(before, helper.make_node("Mul", [source, factor], [name], name=name))
        source = name
    numbers = {name: numbers_of(quantizer) for name, quantizer in plan.outputs.items()}
    return write_chain(graph, before, chain, source, numbers, FloatWriter())


def with_damages(operators: list[Operator], damages: Mapping[str, float]) -> list[Operator]:
    """Operators with their measured damage noted."""
    return [op.model_copy(update={"damage": damages.get(op.name)}) for op in operators]
