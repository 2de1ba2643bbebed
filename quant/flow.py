"""Integer flow: what a convolution writes stays in 8 bits until the next convolution reads it.

Runtimes whose integer kernels span whole operators (onnxruntime's QLinearConv, QLinearMul, QLinearAdd) gain nothing
from quantized inputs alone; they want the outputs quantized too. Hard-swish between two convolutions then is two
integer multiplications: `x * clip(x / 6 + 1/2, 0, 1)`, where the second factor is what an 8-bit quantizer of the range
[-3, 3) leaves of x, read on the scale 0..1.

A reader whose channels are equalized needs `m * x` for a factor m of each channel. The convolution before writes that
at no cost, since its weights have a scale for each channel; x comes back by an integer multiplication with 1 / m.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from onnx import NodeProto, helper

from quant.graph import Graph

GATE_SCALE, GATE_ZERO = 6 / 256, 128
"""Quantizer of x that saturates at -3 and (nearly) 3."""

GATE_READ_SCALE = 1 / 255.5
"""Scale on which its integers are the gate of hard-swish: between 1/256, exact at -3, and 1/255, exact above 3."""

HARD_SWISH_END = -3.0
"""Where hard-swish ends: below it is 0."""

LARGEST_STEP = 255
"""Equalization factors of chains are n / LARGEST_STEP."""


@dataclass(frozen=True)
class Chain:
    """Convolution -> hard-swish -> perhaps a shift -> perhaps equalization -> convolution.

    Attributes:
        writer, reader: outputs of the two convolutions.
        activation: output of the hard-swish.
        result: what the reader reads.
        shift: number that is added behind the hard-swish.
        factor: float32[C] that equalization multiplies with, or None.
    """

    writer: str
    activation: str
    result: str
    reader: str
    shift: float
    factor: np.ndarray | None

    @property
    def product(self) -> str:
        """Name of the tensor between the two multiplications and the shift."""
        return f"{self.activation}_product"


class Writer(Protocol):
    """Writes quantization into a graph: as float arithmetic, or as Q/DQ nodes. Every method returns a tensor name."""

    def rounded(self, graph: Graph, before: NodeProto, tensor: str, scale: float, zero_point: int, dtype: str) -> str:
        """A tensor rounded and clipped to 8 bits."""
        ...

    def constant(self, graph: Graph, before: NodeProto, stem: str, values: np.ndarray) -> str:
        """A constant, rounded to 8 bits."""
        ...

    def gate(self, graph: Graph, before: NodeProto, tensor: str) -> str:
        """`clip(x / 6 + 1/2, 0, 1)` in 8 bits."""
        ...


def relu_alone(readers: Sequence[NodeProto]) -> str | None:
    """What Relu gives on of a tensor, where nothing else reads it: in 8 bits from 0 on both are one."""
    return readers[0].output[0] if [node.op_type for node in readers] == ["Relu"] else None


def find_chains(graph: Graph) -> list[Chain]:
    """All chains of a graph, equalized or not."""
    readers, producers = graph.consumers(), graph.producers()
    chains = []
    for node in graph.nodes:
        if node.op_type != "HardSwish" or not _may_write(graph, producers.get(node.input[0]), readers):
            continue
        chain = _followed(graph, node, readers)
        if chain is not None:
            chains.append(chain)
    return chains


def scale_writer(graph: Graph, chain: Chain) -> None:
    """Let the convolution before write `factor * x`."""
    node = graph.producers()[chain.writer]
    if chain.factor is None:
        return
    graph.constants[node.input[1]] = graph.constants[node.input[1]] * chain.factor.reshape(-1, 1, 1, 1)
    if len(node.input) > 2:
        node.input[2] = graph.add_constant(f"{chain.writer}_bias", graph.constants[node.input[2]] * chain.factor)


def write_chain(
    graph: Graph,
    before: NodeProto,
    chain: Chain,
    source: str,
    quantizers: dict[str, tuple[float, int, str]],
    writer: Writer,
) -> str:
    """Write the integer form of a chain, up to what the reader reads, before its quantizer.

    Args:
        source: tensor with `factor * x`.
        quantizers: scale, zero point and dtype of `chain.writer` and, with a shift, of `chain.product`.
    """
    stored = writer.rounded(graph, before, source, *quantizers[chain.writer])
    inverse = np.ones(1) if chain.factor is None else 1 / chain.factor.reshape(1, -1, 1, 1)
    back = writer.constant(graph, before, f"{chain.activation}_inverse", inverse.astype(np.float32))
    natural = _insert(graph, before, "Mul", [stored, back], f"{chain.activation}_natural")
    gate = writer.gate(graph, before, natural)
    product = _insert(graph, before, "Mul", [stored, gate], chain.product)
    if not chain.shift:
        return product
    product = writer.rounded(graph, before, product, *quantizers[chain.product])
    factor = np.ones(1) if chain.factor is None else chain.factor.reshape(1, -1, 1, 1)
    shift = writer.constant(graph, before, f"{chain.activation}_shift", (chain.shift * factor).astype(np.float32))
    return _insert(graph, before, "Add", [product, shift], f"{chain.activation}_moved")


def write_inverse(graph: Graph, before: NodeProto, chain: Chain, source: str) -> str:
    """Give back x where `factor * x` was stored and what reads it is in FP32."""
    assert chain.factor is not None
    back = graph.add_constant(f"{chain.activation}_inverse", (1 / chain.factor).reshape(1, -1, 1, 1).astype(np.float32))
    return _insert(graph, before, "Mul", [source, back], f"{chain.activation}_natural")


def observed(graph: Graph, chains: Collection[Chain], writers: Collection[str]) -> tuple[Graph, dict[str, str]]:
    """A graph with the tensors that have to be calibrated for stored outputs.

    Args:
        writers: convolutions whose outputs are stored.

    Returns:
        The graph, and the tensor to observe for each writer and each product.
    """
    result = graph.copy()
    by_writer = {chain.writer: chain for chain in chains}
    readers, found = result.consumers(), {}
    for name in writers:
        first, tensor = readers[name][0], relu_alone(readers[name]) or name
        if all(reader.op_type == "HardSwish" for reader in readers[name]):
            least = result.add_constant(f"{name}_least", np.asarray(HARD_SWISH_END, dtype=np.float32))
            tensor = _insert(result, first, "Max", [tensor, least], f"{name}_clipped")  # hard-swish is 0 below -3
        chain = by_writer.get(name)
        if chain is not None and chain.factor is not None:
            scaled = result.add_constant(f"{name}_factor", chain.factor.reshape(1, -1, 1, 1))
            tensor = _insert(result, first, "Mul", [tensor, scaled], f"{name}_scaled")
        found[name] = tensor
    for chain in chains:
        if chain.shift and chain.writer in found:
            reader = result.producers()[chain.reader]
            factor = np.ones(1, dtype=np.float32) if chain.factor is None else chain.factor.reshape(1, -1, 1, 1)
            constant = result.add_constant(f"{chain.product}_factor", factor)
            found[chain.product] = _insert(result, reader, "Mul", [chain.activation, constant], chain.product)
    return result, found


def _insert(graph: Graph, before: NodeProto, kind: str, inputs: list[str], stem: str) -> str:
    name = graph.fresh_name(stem)
    graph.insert_before(before, helper.make_node(kind, inputs, [name], name=name))
    return name


def _may_write(graph: Graph, node: NodeProto | None, readers: dict[str, list[NodeProto]]) -> bool:
    if node is None or node.op_type != "Conv" or not all(graph.is_constant(name) for name in node.input[1:]):
        return False
    return len(readers[node.output[0]]) == 1 and len(readers[node.input[1]]) == 1


def _followed(graph: Graph, activation: NodeProto, readers: dict[str, list[NodeProto]]) -> Chain | None:
    """The chain that starts at a hard-swish, if it leads to one convolution and nowhere else."""
    tensor, shift, factor = activation.output[0], 0.0, None
    while len(readers[tensor]) == 1 and tensor not in graph.outputs:
        node = readers[tensor][0]
        value = next((graph.constants[name] for name in node.input if graph.is_constant(name)), None)
        if node.op_type == "Conv" and node.input[0] == tensor:
            return Chain(activation.input[0], activation.output[0], tensor, node.output[0], shift, factor)
        if value is None or factor is not None:
            return None
        if node.op_type == "Add" and value.size == 1:
            shift += float(value.reshape(-1)[0])
        elif node.op_type == "Mul" and value.ndim == 4 and value.shape[1] == value.size:
            factor = value.reshape(-1)
        else:
            return None
        tensor = node.output[0]
    return None
