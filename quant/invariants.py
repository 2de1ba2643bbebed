"""Work that a loop repeats in every step although its result never changes is done once, in front of the loop.

Exporters write whole steps: the decoder of SLANet projects the encoder's features anew for every token, PaddleX's
graphs transpose weights of a GRU in every step. Moved out, a product is an operator like any other, and can be in INT8;
what stays in a step is the step's own. The same numbers are multiplied in the same order, so outputs stay equal;
`quant.prepare` proves it on real pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import GraphProto, NodeProto, helper

from quant.bodies import loops
from quant.graph import Graph, all_nodes, constant_value, reads, rename_reads

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LAYOUTS = ("Transpose",)  # of weights: behind it they are constants again
_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")


def hoist_invariants(graph: Graph) -> int:
    """Move products that no step changes, and what is made of them alone, in front of their loops.

    Returns:
        Number of operators moved.
    """
    return sum(_hoist(graph, loop, body) for loop, body in list(loops(graph)))


def _hoist(graph: Graph, loop: NodeProto, body: GraphProto) -> int:
    moved = _worth_moving(_invariant(body))
    taken = {*graph.producers(), *graph.constants, *graph.inputs}
    for node in moved:
        copy = NodeProto()
        copy.CopyFrom(node)
        if node.op_type == "Constant":  # the body may need its own: runtimes want some operands to be constants there
            name = graph.add_constant(node.output[0], constant_value(node))
            rename_reads([other for other in moved if other is not node], node.output[0], name)
            continue
        for place, name in enumerate(node.output):
            if name in taken:  # by a body of another loop, which ended up here before
                copy.output[place] = graph.fresh_name(name)
                rename_reads(body.node, name, copy.output[place])
        graph.insert_before(loop, copy)
        _hand_on(graph, body, dict(zip(node.output, copy.output, strict=True)))
    kept = [node for node in body.node if not any(node is other for other in moved) or node.op_type == "Constant"]
    _keep(body, kept)
    return sum(node.op_type != "Constant" for node in moved)


def _invariant(body: GraphProto) -> list[NodeProto]:
    """Operators of a body that depend on nothing that changes from step to step."""
    changing = {info.name for info in body.input} | {tensor.name for tensor in body.initializer}
    found = []
    for node in body.node:
        if any(inner.op_type in _RANDOM for inner in all_nodes([node])) or changing.intersection(reads(node)):
            changing.update(node.output)
        else:
            found.append(node)
    return found


def _worth_moving(invariant: Sequence[NodeProto]) -> list[NodeProto]:
    """Products among operators, what depends on them, and what they need."""
    names: set[str] = set()
    for node in invariant:
        if node.op_type in (*_PRODUCTS, *_LAYOUTS) or names.intersection(reads(node)):
            names.update(node.output)
    needed = set(names)
    for node in reversed(invariant):
        if needed.intersection(node.output):
            needed.update(reads(node))
    return [node for node in invariant if needed.intersection(node.output)]


def _hand_on(graph: Graph, body: GraphProto, moved: Mapping[str, str]) -> None:
    """Let a body that gives back what was moved out of it compute something again: ONNX wants that of its outputs."""
    for info in body.output:
        if info.name in moved:
            name = graph.fresh_name(f"{info.name}_given")
            body.node.append(helper.make_node("Identity", [moved[info.name]], [name], name=name))
            info.name = name


def _keep(body: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Leave in a body those of its operators that its outputs depend on."""
    needed = {info.name for info in body.output}
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(reads(node))
            kept.append(node)
    copies = [NodeProto() for _ in kept]
    for copy, node in zip(copies, reversed(kept), strict=True):
        copy.CopyFrom(node)
    del body.node[:]
    body.node.extend(copies)
