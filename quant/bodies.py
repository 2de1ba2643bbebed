"""What stands inside of loops: their operators, what their tensors hold step by step, and operators in INT8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import onnx
from onnx import GraphProto, NodeProto, helper

from quant.graph import Graph, bodies, own_names


def loops(graph: Graph) -> Iterator[tuple[NodeProto, GraphProto]]:
    """The loops of a graph with their bodies; not those inside of branches and of other loops."""
    for node in graph.nodes:
        if node.op_type == "Loop":
            (body,) = bodies([node])
            yield node, body


def inner_nodes(graph: Graph) -> dict[str, NodeProto]:
    """Operators of the loops' bodies by the first tensor that they write."""
    return {node.output[0]: node for _, body in loops(graph) for node in body.node if node.output}


def find_node(graph: Graph, tensor: str) -> NodeProto:
    """The operator that writes a tensor, in the graph or in the body of one of its loops."""
    return graph.producers().get(tensor) or inner_nodes(graph)[tensor]


def stepwise(
    graph: Graph, tensors: Sequence[str], kind: Literal["Identity", "Shape"] = "Identity"
) -> tuple[Graph, list[str]]:
    """A copy of a graph that also hands out tensors from inside of its loops, all steps stacked along a new first axis.

    Args:
        tensors: of the graph or of bodies; those of the graph stay as they are.
        kind: Identity for the values, which need one shape in all steps; Shape for their sizes.

    Returns:
        The copy, and the name under which each of the tensors is found in it.
    """
    result, places = graph.copy(), dict(zip(tensors, tensors, strict=True))
    for loop, body in loops(result):
        for name in sorted(own_names(body) & set(tensors)):
            places[name], inner = result.fresh_name(f"{name}_steps"), result.fresh_name(f"{name}_step")
            body.node.append(helper.make_node(kind, [name], [inner], name=inner))
            body.output.append(onnx.ValueInfoProto(name=inner))
            loop.output.append(places[name])
    return result, [places[name] for name in tensors]
