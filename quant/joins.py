"""Integer flow between convolutions through operators without weights: what moves values, and what joins maps.

Kernels for whole operators (onnxruntime's QLinearAdd, QLinearMul, QLinearConcat, Resize in 8 bits) take over only where
all that an operator reads and writes is in 8 bits. Three things bring that about:

* Nearest resizing and concatenation move values. Rounding in front of them is rounding behind them, and there the maps
  are smaller: what leads to a quantized convolution through them alone takes the quantizer of that convolution.
* Relu behind a convolution leaves what its quantizer leaves, if that begins at 0; so it takes it and is not computed.
* A sum of maps, their concatenation, and a map times a gate for each channel are joins: where everything that they read
  is in 8 bits, so is what they write, by a quantizer of its own or that of the convolution which reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from onnx import NodeProto

from quant.flow import relu_alone
from quant.graph import Graph, attribute
from quant.plan import Operator


@dataclass(frozen=True)
class Join:
    """An operator that makes a map of others.

    Attributes:
        maps: tensors [N, C, H, W] that it reads.
        gate: tensor [N, C, 1, 1] that a map is multiplied with.
    """

    maps: tuple[str, ...]
    gate: str | None = None


def takes(
    graph: Graph, stored: Collection[str], quantized: Mapping[str, Operator], offered: Collection[str] = ()
) -> dict[str, str]:
    """The tensors that flow in 8 bits, each with the tensor whose quantizer it takes.

    Args:
        stored: outputs of convolutions that are kept in 8 bits.
        quantized: operators in INT8 by name.
        offered: tensors with a quantizer that nothing may need: where other maps of a join are in 8 bits, it is used.

    Returns:
        Owners of quantizers by tensor. An owner is one of `stored`, is read by a quantized operator, or is what a join
        writes, or its gate, which is calibrated for this alone.
    """
    owners = {name: name for name in stored} | _moved_back(graph, stored, quantized)
    read = {tensor for operator in quantized.values() for tensor in operator.activations}
    readers, offers = graph.consumers(), {name: name for name in (*offered, *read)}
    for node in graph.nodes:
        source, tensor = (node.input[0], node.output[0]) if node.input and node.output else ("", "")
        if source in owners and relu_alone(readers[source]) == tensor:
            owners[tensor] = owners[source]
        elif node.op_type == "Resize" and _moved(node):
            for known in (owners, offers):
                if source in known:
                    known.setdefault(tensor, known[source])
        elif (join := _join(graph, node)) is not None and _in_integers(join, {*owners, *read}, offers):
            if node.op_type == "Concat" and tensor not in owners and tensor not in read:
                continue
            for name in (*join.maps, *([join.gate] if join.gate else [])):
                owner = owners.setdefault(name, offers.get(name, name))
                owners.setdefault(owner, owner)
            owners.setdefault(tensor, tensor)
    return owners


def _in_integers(join: Join, rounded: Collection[str], offered: Collection[str]) -> bool:
    """Whether all maps of a join are in 8 bits, or can be where one of them is."""
    missing = [name for name in join.maps if name not in rounded]
    return len(missing) < len(join.maps) and all(name in offered for name in missing)


def _moved_back(graph: Graph, stored: Collection[str], quantized: Mapping[str, Operator]) -> dict[str, str]:
    """What leads to quantized operators alone, through operators that move values, and what these read."""
    readers, producers = graph.consumers(), graph.producers()
    found: dict[str, str] = {}
    for node in (node for node in reversed(graph.nodes) if _moved(node)):
        tensor = node.output[0]
        if tensor not in found and not _rounded_by_all(tensor, readers[tensor], quantized):
            continue
        for source in _moved(node):
            writer = producers.get(source)
            if writer is None or len(readers[source]) > 1 or source in graph.outputs:
                continue
            if writer.op_type != "Relu" or writer.input[0] not in stored:
                found[source] = found.get(tensor, tensor)
    return found


def _moved(node: NodeProto) -> list[str]:
    """The tensors whose values an operator gives on as they are, computing none."""
    if node.op_type == "Resize" and attribute(node, "mode", "nearest") == "nearest":
        return [node.input[0]]
    return list(node.input) if node.op_type == "Concat" else []


def _rounded_by_all(tensor: str, readers: Sequence[NodeProto], quantized: Mapping[str, Operator]) -> bool:
    """Whether quantized operators read a tensor, and nothing else does."""
    names = [node.output[0] if node.output else "" for node in readers]
    return bool(names) and all(name in quantized and tensor in quantized[name].activations for name in names)


def _join(graph: Graph, node: NodeProto) -> Join | None:
    if node.op_type not in ("Add", "Mul", "Concat") or any(graph.is_constant(name) for name in node.input):
        return None
    maps = tuple(name for name in node.input if _is_map(graph, name))
    if node.op_type == "Mul":
        gates = [name for name in node.input if is_pooled(graph, name)]
        return Join(maps, gates[0]) if len(maps) == 1 and len(gates) == 1 else None
    return Join(maps) if len(maps) == len(node.input) else None


def _is_map(graph: Graph, tensor: str) -> bool:
    shape = graph.shape(tensor)
    return shape is not None and len(shape) == 4 and shape[2:] != (1, 1)


def is_pooled(graph: Graph, tensor: str) -> bool:
    """Whether a tensor holds one value a channel."""
    shape = graph.shape(tensor)
    return shape is not None and len(shape) == 4 and shape[2:] == (1, 1)
