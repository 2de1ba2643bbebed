"""The plan's reference output: quantization written as plain float arithmetic.

Independent of any runtime's Q/DQ or integer kernels; exports are compared with it.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, helper

from quant.graph import Graph
from quant.observer import affine_parameters
from quant.plan import ActivationQuantizer, QuantPlan, corrected_graph, dequantize_weight


def simulated_model(prepared: Graph, plan: QuantPlan) -> ModelProto:
    """The prepared graph in which quantized tensors are rounded and clipped in float32."""
    graph = corrected_graph(prepared, plan)
    quantized = plan.quantized()
    rounded: dict[str, str] = {}
    for node in list(graph.nodes):
        operator = quantized.get(node.output[0]) if node.output else None
        if operator is None:
            continue
        for index, name in enumerate(node.input):
            if name in operator.activations:
                if name not in rounded:
                    rounded[name] = insert_rounding(graph, node, plan.activations[name])
                node.input[index] = rounded[name]
            elif name == operator.weight:
                values = dequantize_weight(plan.integers[name], plan.weights[name].axis)
                node.input[index] = graph.add_constant(f"{name}_simulated", values)
    return graph.to_model()


def insert_rounding(graph: Graph, before: NodeProto, quantizer: ActivationQuantizer) -> str:
    """Insert nodes that round and clip a tensor as its quantizer does; returns the rounded tensor."""
    smallest, largest = integer_limits(quantizer)
    scale = graph.add_constant(f"{quantizer.tensor}_scale", np.asarray(quantizer.scale, dtype=np.float32))
    low = graph.add_constant(f"{quantizer.tensor}_low", np.asarray(smallest - quantizer.zero_point, dtype=np.float32))
    high = graph.add_constant(f"{quantizer.tensor}_high", np.asarray(largest - quantizer.zero_point, dtype=np.float32))
    names = [graph.fresh_name(f"{quantizer.tensor}_sim") for _ in range(4)]
    steps = [
        helper.make_node("Div", [quantizer.tensor, scale], [names[0]]),
        helper.make_node("Round", [names[0]], [names[1]]),
        helper.make_node("Clip", [names[1], low, high], [names[2]]),
        helper.make_node("Mul", [names[2], scale], [names[3]]),
    ]
    for step in steps:
        step.name = step.output[0]
        graph.insert_before(before, step)
    return names[3]


def integer_limits(quantizer: ActivationQuantizer) -> tuple[int, int]:
    """Smallest and largest integer of a quantizer; S8 is symmetric in meaning but clips at -128."""
    return (0, 255) if quantizer.dtype == "uint8" else (-128, 127)


def make_quantizer(tensor: str, low: float, high: float, dtype: str) -> ActivationQuantizer:
    """The quantizer of a tensor for a chosen range in real units."""
    scale, zero_point, _, _ = affine_parameters(low, high, symmetric=dtype == "int8")
    return ActivationQuantizer(tensor=tensor, dtype=dtype, scale=scale, zero_point=zero_point)  # type: ignore[arg-type]
