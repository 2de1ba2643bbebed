"""Post-training quantization: ranges from calibration, rounded weights, corrected biases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from onnx import NodeProto

from quant.calibration import Statistics
from quant.graph import Graph
from quant.observer import RangeMethod
from quant.plan import (
    Operator,
    QuantPlan,
    WeightQuantizer,
    dequantize_weight,
    quantize_weight,
    weight_axis,
)
from quant.runtime import Feed, onnx_session
from quant.simulation import insert_rounding, make_quantizer


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
) -> QuantPlan:
    """A plan in which every quantizable operator is in INT8.

    Args:
        method: chooses each tensor's range.
        dtype: `uint8` (asymmetric) or `int8` (symmetric) activations.
    """
    symmetric = dtype == "int8"
    activations = {}
    for name in activation_tensors(operators):
        low, high = method.choose(statistics[name], symmetric=symmetric)
        activations[name] = make_quantizer(name, low, high, dtype)
    weights, integers = {}, {}
    for op in operators:
        if op.quantized and op.weight is not None:
            axis = weight_axis(op.op_type)
            weights[op.weight] = WeightQuantizer(tensor=op.weight, axis=axis)
            integers[op.weight] = quantize_weight(graph.constants[op.weight], axis)
    return QuantPlan(model, "", "ptq", prepared_sha256, operators, activations, weights, integers, {}, [])


def correct_biases(graph: Graph, plan: QuantPlan, feeds: Iterable[Feed], threads: int) -> dict[str, np.ndarray]:
    """Mean output error of every quantized convolution, per channel, given its FP32 input.

    Added to the bias it makes the quantized convolution right on average (fast bias correction:
    Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019,
    section 4.2, with the expectation taken over calibration pictures).

    Returns:
        float32[C] by operator name, for Conv and ConvTranspose.
    """
    paired = graph.copy()
    twins = [_add_twin(paired, node, plan) for node in list(paired.nodes) if _correctable(node, plan)]
    tensors = [name for pair in twins for name in pair]
    session = onnx_session(paired.to_model(tensors), threads)
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


def _add_twin(graph: Graph, node: NodeProto, plan: QuantPlan) -> tuple[str, str]:
    """Put a quantized copy of a convolution beside it; returns both output names."""
    operator = plan.quantized()[node.output[0]]
    assert operator.weight is not None
    twin = NodeProto()
    twin.CopyFrom(node)
    twin.output[0] = twin.name = graph.fresh_name(f"{node.output[0]}_twin")
    twin.input[0] = insert_rounding(graph, node, plan.activations[operator.activations[0]])
    values = dequantize_weight(plan.integers[operator.weight], plan.weights[operator.weight].axis)
    twin.input[1] = graph.add_constant(f"{operator.weight}_twin", values)
    graph.insert_before(node, twin)
    return node.output[0], twin.output[0]


def with_damages(operators: list[Operator], damages: Mapping[str, float]) -> list[Operator]:
    """Operators with their measured damage noted."""
    return [op.model_copy(update={"damage": damages.get(op.name)}) for op in operators]
