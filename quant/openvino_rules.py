"""What OpenVINO computes wrongly, as rules that keep a plan away from it.

Measurements are in `docs/openvino-s8.md` and `docs/openvino-bias.md`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import NodeProto

from quant.graph import Graph, attribute
from quant.plan import QUANTIZABLE, ActivationQuantizer, QuantPlan

_SIGNED_TO_UNSIGNED = 128  # u = s + 128 has the same steps: both types hold 256 of them

_NEXT_TO_NOTHING = 2.0**-100
"""A bias that changes no sum but one of exactly 0, and that OpenVINO does not remove as it does a bias of zeros."""


def unsafe_signed_concats(graph: Graph, plan: QuantPlan) -> list[str]:
    """Quantized tensors that OpenVINO (seen on 2026.4.1) rounds to whole numbers instead of steps of their scale.

    They are in S8, a dense Conv reads them, and a Concat stands before their quantizer: directly, or with operators
    of one input in between. Some of those in between would make it right again; all are named, since the way round
    (`with_unsigned`) changes no value.

    Args:
        graph: the graph that is exported, with what equalization adds (`corrected_graph`).

    Returns:
        Names of activation quantizers, in the order of the graph.
    """
    producers = graph.producers()
    signed = {name for name, quantizer in plan.used_activations().items() if quantizer.dtype == "int8"}
    operators = plan.quantized()
    found = []
    for node in graph.nodes:
        if node.op_type != "Conv" or node.output[0] not in operators or attribute(node, "group", 1) != 1:
            continue
        if node.input[0] in signed and _behind_concat(graph, producers, node.input[0]):
            found.append(node.input[0])
    return list(dict.fromkeys(found))


def with_unsigned(plan: QuantPlan, tensors: list[str]) -> QuantPlan:
    """A copy of the plan in which the named quantizers are U8; every tensor keeps its values exactly."""
    return replace(
        plan, activations={**plan.activations, **{name: unsigned(plan.activations[name]) for name in tensors}}
    )


def unsigned(quantizer: ActivationQuantizer) -> ActivationQuantizer:
    """The U8 quantizer of the same real values as an S8 one; an U8 one stays."""
    if quantizer.dtype == "uint8":
        return quantizer
    return quantizer.model_copy(update={"dtype": "uint8", "zero_point": quantizer.zero_point + _SIGNED_TO_UNSIGNED})


def shared_without_bias(graph: Graph, plan: QuantPlan) -> list[str]:
    """Quantized convolutions for which OpenVINO (seen on 2026.4.1) counts the scale of the weights twice.

    They have no bias, or one of zeros, more than one operator reads what they write, one of them through a quantizer,
    and a size of the input is open. A second reader is enough to be named here: what stands between it and its
    quantizer may be moved, and a bias costs nothing.

    Args:
        graph: the graph that is exported, with corrected biases (`corrected_graph`).

    Returns:
        Names of operators, in the order of the graph.
    """
    operators, readers = plan.quantized(), graph.consumers()
    return [
        node.output[0]
        for node in graph.nodes
        if node.op_type == "Conv" and node.output[0] in operators and not _is_biased(graph, node)
        if len(readers[node.output[0]]) + (node.output[0] in graph.outputs) > 1
    ]


def with_biases(graph: Graph, plan: QuantPlan, names: list[str]) -> QuantPlan:
    """A copy of the plan in which the named convolutions have a bias next to nothing; no value changes."""
    weights = {node.output[0]: graph.constants[node.input[1]] for node in graph.nodes if node.output[0] in names}
    added = {name: np.full(weight.shape[0], _NEXT_TO_NOTHING, np.float32) for name, weight in weights.items()}
    return replace(plan, bias_shifts={**plan.bias_shifts, **added})


def _is_biased(graph: Graph, node: NodeProto) -> bool:
    if len(node.input) < 3 or not node.input[2]:
        return False
    return not graph.is_constant(node.input[2]) or bool(graph.constants[node.input[2]].any())


def _behind_concat(graph: Graph, producers: dict[str, NodeProto], tensor: str) -> bool:
    """Whether a Concat of several tensors is reached upwards through operators of one input."""
    while tensor in producers:
        node = producers[tensor]
        if node.op_type == "Concat":
            return len(node.input) > 1
        inputs = [name for name in node.input if name and not graph.is_constant(name)]
        if node.op_type in QUANTIZABLE or len(inputs) != 1:
            return False
        tensor = inputs[0]
    return False
