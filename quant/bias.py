"""Sequential bias correction: every quantized convolution is made right on average, front to back.

A convolution's mean output error comes from its own rounding and from what is left of the errors before it. Biases
are corrected in the order of the graph, each with everything before it already quantized and corrected (Nagel et al.,
"Data-Free Quantization through Weight Equalization and Bias Correction", 2019, section 4.2, with the expectation taken
over calibration pictures). One pass over the graph is enough: the graph is cut behind each convolution, the cut values
of all pictures are kept, and a new bias only shifts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper
from onnx.helper import make_tensor_value_info, np_dtype_to_tensor_dtype

from quant.conversion import OPSET
from quant.graph import Graph, reads
from quant.placement import written_chains
from quant.plan import QuantPlan, corrected_graph
from quant.runtime import Feed, onnx_session
from quant.simulation import simulated_model

Array = np.ndarray
IR_VERSION = 8


def sequential_biases(
    graph: Graph,
    plan: QuantPlan,
    feeds: Sequence[Feed],
    threads: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Array]:
    """What has to be added to the bias of each quantized Conv and ConvTranspose with constant weights.

    Args:
        graph: the prepared graph.
        feeds: calibration pictures; the values at one cut of all of them are kept in memory.
        advance: called after each convolution.

    Returns:
        float32[C] by operator name.
    """
    names = [op.name for op in plan.operators if op.quantized and op.op_type != "MatMul" and op.weight is not None]
    if not names:
        return {}
    exact = _channel_means(graph, names, feeds, threads)
    plain = replace(plan, bias_shifts={})
    factors = {
        chain.writer: chain.factor
        for chain in written_chains(corrected_graph(graph, plain), plain)
        if chain.factor is not None
    }
    simulated = Graph(simulated_model(graph, plain))
    shifts = {}
    values = [dict(feed) for feed in feeds]
    for name, segment in _segments(simulated, names):
        segment.run(values, threads)
        factor = factors.get(name, np.ones(1, dtype=np.float32))
        found = np.mean([_means(kept[name]) for kept in values], axis=0)
        shift = exact[name] * factor - found
        for kept in values:
            places = (1,) * (kept[name].ndim - 2)
            kept[name] = kept[name] + shift.reshape(1, -1, *places).astype(np.float32)
        shifts[name] = (shift / factor).astype(np.float32)
        advance()
    return shifts


@dataclass(frozen=True)
class _Segment:
    """Some consecutive nodes of a graph.

    Attributes:
        reads: tensors that they read and do not write.
        leaves: tensors that later nodes, or the caller, read: written here or before.
    """

    nodes: list[NodeProto]
    constants: dict[str, Array]
    reads: list[str]
    leaves: list[str]

    def run(self, values: list[dict[str, Array]], threads: int) -> None:
        """Put what later nodes read in the place of what earlier nodes left, picture by picture to spare memory."""
        written = {name for node in self.nodes for name in node.output}
        computed = [name for name in self.leaves if name in written]
        inputs = [make_tensor_value_info(n, np_dtype_to_tensor_dtype(values[0][n].dtype), None) for n in self.reads]
        outputs = [onnx.ValueInfoProto(name=name) for name in computed]
        constants = [numpy_helper.from_array(np.asarray(value, order="C"), n) for n, value in self.constants.items()]
        body = helper.make_graph(self.nodes, "segment", inputs, outputs, constants)
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)])
        model.ir_version = IR_VERSION
        session = onnx_session(model, threads, integers=False)
        for index, kept in enumerate(values):
            found = dict(zip(computed, session.run({n: kept[n] for n in self.reads}, computed), strict=True))
            values[index] = {name: found[name] if name in found else kept[name] for name in self.leaves}


def _channel_means(graph: Graph, names: list[str], feeds: Sequence[Feed], threads: int) -> dict[str, Array]:
    session = onnx_session(graph.to_model(names), threads)
    totals: dict[str, Array] = {}
    for feed in feeds:
        for name, value in zip(names, session.run(feed, names), strict=True):
            totals[name] = totals.get(name, 0) + _means(value)
    return {name: total / len(feeds) for name, total in totals.items()}


def _means(value: Array) -> Array:
    """Mean of every channel, over batch and places, float64[C]."""
    return np.asarray(np.moveaxis(value, 1, -1).reshape(-1, value.shape[1]).mean(axis=0, dtype=np.float64))


def _segments(graph: Graph, names: list[str]) -> Iterator[tuple[str, _Segment]]:
    """The graph cut behind each named tensor."""
    ends = {name: index for index, node in enumerate(graph.nodes, start=1) for name in node.output}
    start, available = 0, set(graph.inputs)
    for name in sorted(names, key=lambda name: ends[name]):
        nodes, later = graph.nodes[start : ends[name]], graph.nodes[ends[name] :]
        written = {output for node in nodes for output in node.output}
        read = dict.fromkeys(key for node in nodes for key in reads(node) if key)
        wanted = {key for node in later for key in reads(node)} | {name}
        available |= written
        yield (
            name,
            _Segment(
                nodes,
                {key: graph.constants[key] for key in read if graph.is_constant(key)},
                [key for key in read if key in available - written],
                sorted(wanted & available),
            ),
        )
        start = ends[name]
