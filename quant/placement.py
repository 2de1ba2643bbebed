"""Where a plan's quantizers stand in the graph; simulation and export write the same places in different forms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
from onnx import NodeProto

from quant.bodies import loops
from quant.flow import Chain, find_chains, scale_writer, write_chain, write_inverse
from quant.flow import Writer as FlowWriter
from quant.graph import Graph
from quant.joins import is_pooled, takes
from quant.plan import ActivationQuantizer, IntegerWeight, Operator, QuantPlan, corrected_graph


class Writer(FlowWriter, Protocol):
    """Writes quantization into a graph: as float arithmetic, or as Q/DQ nodes. Every method returns a tensor name."""

    def weight(self, graph: Graph, before: NodeProto, name: str, weight: IntegerWeight, axis: int) -> str:
        """A weight in S8 per channel."""
        ...

    def bias(self, graph: Graph, before: NodeProto, name: str, scale: np.ndarray) -> str:
        """A bias in 32 bits, on a scale for each channel."""
        ...


def place(prepared: Graph, plan: QuantPlan, writer: Writer) -> Graph:
    """The prepared graph with everything that the plan quantizes.

    Raises:
        ValueError: the plan is of another graph.
    """
    graph = corrected_graph(prepared, plan)
    written = written_chains(graph, plan)
    chains = {chain.reader: chain for chain in written if _is_active(chain, plan)}
    broken = {chain.writer: chain for chain in written if chain.factor is not None and chain.reader not in chains}
    integers = _scaled_integers(plan, written)
    for chain in written:
        scale_writer(graph, chain)
    stored = _stored(graph, plan, chains)
    clipped = {node.output[0]: node.input[0] for node in graph.nodes if node.op_type == "Relu"}
    quantized, done = plan.quantized(), {}
    for node in list(graph.nodes):
        operator = quantized.get(node.output[0]) if node.output else None
        for index, name in enumerate(node.input):
            quantizer = stored.get(name) or _read_by(operator, plan, name)
            if name in broken:
                rounded = writer.rounded(graph, node, name, *numbers_of(plan.outputs[name]))
                node.input[index] = write_inverse(graph, node, broken[name], rounded)
            elif quantizer is not None:
                if stored.get(clipped.get(name, "")) is quantizer:
                    name = clipped[name]  # what the quantizer leaves is not negative: Relu has nothing left to do
                if name not in done:
                    source = name
                    if node.output[0] in chains:
                        chain = chains[node.output[0]]
                        numbers = {key: numbers_of(output) for key, output in plan.outputs.items()}
                        source = write_chain(graph, node, chain, chain.writer, numbers, writer)
                    done[name] = writer.rounded(graph, node, source, *numbers_of(quantizer))
                node.input[index] = done[name]
            elif operator is not None and name == operator.weight:
                node.input[index] = writer.weight(graph, node, name, integers[name], plan.weights[name].axis)
        if operator is not None and plan.outputs and _has_integer_bias(graph, operator, node):
            node.input[2] = writer.bias(graph, node, node.input[2], _bias_scale(operator, plan, stored, integers))
    for loop, _ in list(loops(graph)):
        _place_inside(graph, loop, plan, writer)
    graph.prune()
    return graph


def _place_inside(graph: Graph, loop: NodeProto, plan: QuantPlan, writer: Writer) -> None:
    """Quantize what the plan names of a loop's body; numbers stand inside: runtimes want to see constants there."""
    body, quantized = graph.body(loop), plan.quantized()
    done: dict[str, str] = {}
    for node in list(body.nodes):
        operator = quantized.get(node.output[0]) if node.output else None
        if operator is None or operator.weight is None:
            continue
        source, weight = node.input[0], operator.weight
        if source not in done:
            done[source] = writer.rounded(body, node, source, *numbers_of(plan.activations[source]))
        integers, axis = plan.integers[weight], plan.weights[weight].axis
        node.input[:] = [done[source], writer.weight(body, node, weight, integers, axis)]
    if done:
        graph.set_body(loop, body)


def _has_integer_bias(graph: Graph, operator: Operator, node: NodeProto) -> bool:
    constant = len(node.input) > 2 and graph.is_constant(node.input[2])
    return constant and node.op_type == "Conv" and operator.weight is not None


def written_chains(graph: Graph, plan: QuantPlan) -> list[Chain]:
    """Chains whose convolution before is quantized and stores its output, with the factor that it writes.

    Args:
        graph: the prepared graph with what the plan equalizes (`corrected_graph`).
    """
    names = plan.quantized()
    found = []
    for chain in find_chains(graph) if plan.outputs else []:
        if chain.writer in names and chain.writer in plan.outputs:
            scaled = plan.outputs[chain.writer].tensor != chain.writer
            factor = chain.factor if chain.factor is not None or not scaled else _factor(plan, chain)
            found.append(replace(chain, factor=factor if scaled else None))
    return found


def active_chains(graph: Graph, plan: QuantPlan) -> dict[str, Chain]:
    """Chains by reader that flow in integers from end to end; where the reader is in FP32, they break off behind Q."""
    return {chain.reader: chain for chain in written_chains(graph, plan) if _is_active(chain, plan)}


def _factor(plan: QuantPlan, chain: Chain) -> np.ndarray:
    """What the convolution before writes although the reader, which is in FP32, is not equalized."""
    return np.asarray(1 / plan.equalizers[chain.reader].factor)


def _is_active(chain: Chain, plan: QuantPlan) -> bool:
    return chain.reader in plan.quantized() and (not chain.shift or chain.product in plan.outputs)


def _stored(graph: Graph, plan: QuantPlan, chains: Mapping[str, Chain]) -> dict[str, ActivationQuantizer]:
    """Tensors that all readers read in 8 bits, beside those of active chains: of convolutions, and between them.

    What a convolution reads as another one wrote it has a quantizer, which the writer keeps where the reader is in
    FP32. What was calibrated for the scaled output of an equalized chain says nothing about the plain one.
    """
    if not plan.outputs:
        return {}
    convs = {op.name for op in plan.quantized().values() if op.op_type == "Conv" and op.weight is not None}
    read = {name for name in plan.activations if name in convs and not is_pooled(graph, name)}
    plain = {name for name, quantizer in plan.outputs.items() if quantizer.tensor == name}
    written = (read | plain & plan.quantized().keys()) - {chain.writer for chain in chains.values()}
    known = plan.activations | plan.outputs
    owners = takes(graph, written, plan.quantized(), offered=plain)
    return {tensor: known[owner] for tensor, owner in owners.items() if owner in known}


def _read_by(operator: Operator | None, plan: QuantPlan, name: str) -> ActivationQuantizer | None:
    return plan.activations[name] if operator is not None and name in operator.activations else None


def _scaled_integers(plan: QuantPlan, chains: Iterable[Chain]) -> dict[str, IntegerWeight]:
    """Integer weights whose scales make the writers of equalized chains write `factor * x`."""
    integers = dict(plan.integers)
    for chain in chains:
        weight = plan.quantized()[chain.writer].weight
        if chain.factor is not None and weight is not None:
            scale = (integers[weight].scale * chain.factor).astype(np.float32)
            integers[weight] = IntegerWeight(integers[weight].values, scale)
    return integers


def _bias_scale(
    operator: Operator,
    plan: QuantPlan,
    stored: Mapping[str, ActivationQuantizer],
    integers: Mapping[str, IntegerWeight],
) -> np.ndarray:
    assert operator.weight is not None
    name = operator.activations[0]
    return integers[operator.weight].scale * np.float32((stored.get(name) or plan.activations[name]).scale)


def numbers_of(quantizer: ActivationQuantizer) -> tuple[float, int, str]:
    """Scale, zero point and dtype."""
    return quantizer.scale, quantizer.zero_point, quantizer.dtype
