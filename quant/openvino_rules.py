"""What OpenVINO computes wrongly, as rules that keep a plan away from it; measurements are in `docs/openvino-s8.md`."""

from __future__ import annotations

from dataclasses import replace

from onnx import NodeProto

from quant.graph import Graph, attribute
from quant.plan import QUANTIZABLE, ActivationQuantizer, QuantPlan

_SIGNED_TO_UNSIGNED = 128  # u = s + 128 has the same steps: both types hold 256 of them


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
