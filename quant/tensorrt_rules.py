"""Explicit quantization as TensorRT wants it, checked on the model alone: no engine is built here.

Rules: NVIDIA, "TensorRT Developer Guide", chapter "Working with Quantized Types" (explicit quantization).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, NodeProto

from quant.graph import Graph, attribute
from quant.plan import weight_axis

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_WEIGHTED = ("Conv", "ConvTranspose", "MatMul")


def explicit_quantization_problems(model: ModelProto) -> list[str]:
    """What keeps a Q/DQ model from TensorRT; an empty list where nothing does.

    Every quantizer is symmetric INT8 with constant positive scales and zero points 0; activations have one scale,
    weights one for each output channel or one; a convolution with INT8 weights reads a dequantized activation.
    """
    graph = Graph(model)
    producers, readers = graph.producers(), graph.consumers()
    problems = []
    for node in graph.nodes:
        if node.op_type in _QUANTIZERS:
            problems += [f"{node.output[0]}: {said}" for said in _quantizer_problems(graph, node)]
        if node.op_type == "QuantizeLinear":
            kinds = {reader.op_type for reader in readers[node.output[0]]}
            if kinds != {"DequantizeLinear"}:
                problems.append(
                    f"{node.output[0]}: is read by {', '.join(sorted(kinds)) or 'nothing'}, not by DQ alone"
                )
        if node.op_type in _WEIGHTED:
            problems += [f"{node.output[0]}: {said}" for said in _operator_problems(graph, producers, node)]
    return problems


def _quantizer_problems(graph: Graph, node: NodeProto) -> Iterator[str]:
    scale, zero = (graph.constants.get(name) for name in (*node.input[1:], *[""] * 2)[:2])
    if scale is None:
        yield "the scale is no constant"
        return
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        yield "the scale is not positive"
    if zero is None or zero.dtype != np.int8 or zero.any():
        yield "is not symmetric INT8 with zero point 0"
    if scale.size > 1 and not graph.is_constant(node.input[0]):
        yield "an activation has one scale for each channel"


def _operator_problems(graph: Graph, producers: dict[str, NodeProto], node: NodeProto) -> Iterator[str]:
    sources = [producers.get(name) for name in node.input]
    dequantized = [source is not None and source.op_type == "DequantizeLinear" for source in sources]
    if dequantized[0] != dequantized[1]:
        yield "only one of its two operands is dequantized"
    if any(dequantized[2:]):
        yield "its bias is dequantized; it has to be in floats"
    weight = sources[1]
    if weight is not None and dequantized[1] and graph.is_constant(weight.input[0]):
        scale, axis = graph.constants[weight.input[1]], attribute(weight, "axis", 1)
        if scale.size > 1 and axis != weight_axis(node.op_type):
            yield f"its weight is scaled along axis {axis}, not along its output channels"
