"""Paddings that are named (`SAME`, `VALID`) as numbers: what comes behind counts borders and reads numbers alone."""

from __future__ import annotations

from onnx import NodeProto, helper

from quant.graph import Graph, attribute

_WINDOWED = ("AveragePool", "Conv", "MaxPool")


def write_paddings(graph: Graph) -> int:
    """Give windows with a named padding the numbers that it stands for.

    `SAME` with a stride above 1 stays: its numbers depend on the size of the picture. So does `SAME` with dilations,
    which Paddle does not heed and onnxruntime refuses.

    Returns:
        Number of operators changed.
    """
    count = 0
    for node in graph.nodes:
        pads = _pads(graph, node) if node.op_type in _WINDOWED else None
        if pads is None:
            continue
        # A named padding rounds sizes by itself, whatever `ceil_mode` says; these numbers leave nothing to round up.
        kept = [one for one in node.attribute if one.name not in ("auto_pad", "ceil_mode", "pads")]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("pads", pads)])
        count += 1
    return count


def _pads(graph: Graph, node: NodeProto) -> list[int] | None:
    """All begins, then all ends; None where no padding is named, or its numbers are not known."""
    name = attribute(node, "auto_pad", "NOTSET")
    sizes = _kernel(graph, node)
    if name == "NOTSET" or sizes is None:
        return None
    if name == "VALID":
        return [0] * (2 * len(sizes))
    if any(step != 1 for step in [*attribute(node, "strides", []), *attribute(node, "dilations", [])]):
        return None
    less, more = [(size - 1) // 2 for size in sizes], [size // 2 for size in sizes]
    return [*less, *more] if name == "SAME_UPPER" else [*more, *less]


def _kernel(graph: Graph, node: NodeProto) -> list[int] | None:
    sizes = attribute(node, "kernel_shape")
    if sizes is not None:
        return list(sizes)
    weight = graph.constants.get(node.input[1])
    return list(weight.shape[2:]) if weight is not None else None
