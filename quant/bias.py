"""Sequential bias correction: every quantized convolution is made right on average, front to back.

A convolution's mean output error comes from its own rounding and from what is left of the errors before it. Biases
are corrected in the order of the graph, each with everything before it already quantized and corrected (Nagel et al.,
"Data-Free Quantization through Weight Equalization and Bias Correction", 2019, section 4.2, with the expectation taken
over calibration pictures). One pass over the graph is enough: the graph is cut behind each convolution, the cut values
of all pictures are kept, and a new bias only shifts them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper
from onnx.helper import make_tensor_value_info, np_dtype_to_tensor_dtype

from quant.conversion import OPSET
from quant.graph import Graph, reads
from quant.placement import place, written_chains
from quant.plan import QuantPlan, corrected_graph
from quant.runtime import Feed, Session, onnx_session
from quant.simulation import FloatWriter

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
    names = corrected_operators(plan)
    if not names:
        return {}
    exact = _channel_means(graph, names, feeds, threads)
    simulated = _Simulated.of(graph, plan, exact)
    shifts = {}
    values = [dict(feed) for feed in feeds]
    for segment in _segments(simulated.graph, names):
        if segment.end is not None:
            segment.run(values, segment.session(values[0], threads))
            shifts[segment.end] = simulated.put_right(values, segment.end, exact[segment.end], len(feeds))
            advance()
    return shifts


class Parts:
    """Runs parts of a plan, everything else in FP32, with the biases behind them corrected.

    So it is in the whole plan: what a part does to the mean of a channel farther on is no damage, since biases make up
    for it there. What comes before a part is computed once for the parts behind it, so that they are best asked for
    from front to back.

    Args:
        calibration: pictures from which biases are corrected, in the place of the plan's own; with none, those stay.
        feeds: pictures whose outputs are asked for.
    """

    def __init__(
        self, graph: Graph, plan: QuantPlan, calibration: Sequence[Feed], feeds: Sequence[Feed], threads: int
    ) -> None:
        self._graph, self._threads = graph, threads
        self._plan = plan
        self._names = corrected_operators(plan) if calibration else []
        self._exact = _channel_means(graph, self._names, calibration, threads)
        self._calibration, self._feeds = calibration, feeds
        self._fp32 = list(_segments(self._simulated(set()).graph, self._names))
        self._sessions: dict[bytes, Session | None] = dict.fromkeys(segment.digest for segment in self._fp32)
        self._done, self._values = 0, self._inputs()

    def outputs(self, names: Collection[str]) -> list[list[Array]]:
        """The model's outputs for each picture of `feeds`, with the operators of these names in INT8."""
        simulated = self._simulated(set(names))
        segments = list(_segments(simulated.graph, self._names))
        same = takewhile(lambda pair: pair[0].digest == pair[1].digest, zip(segments, self._fp32, strict=True))
        begin = min(sum(1 for _ in same), len(segments) - 1)
        values = self._before(begin)
        for segment in segments[begin:]:
            if segment.nodes:
                segment.run(values, self._session(segment, values[0]))
            if segment.end is not None:
                simulated.put_right(values, segment.end, self._exact[segment.end], len(self._calibration))
        return [[kept[name] for name in self._graph.outputs] for kept in values[len(self._calibration) :]]

    def _simulated(self, names: set[str]) -> _Simulated:
        return _Simulated.of(self._graph, self._plan.with_only(names, ""), self._exact)

    def _before(self, begin: int) -> list[dict[str, Array]]:
        """The values in FP32 that the segments from `begin` on read."""
        if begin < self._done:
            self._done, self._values = 0, self._inputs()
        for segment in self._fp32[self._done : begin]:
            segment.run(self._values, self._session(segment, self._values[0]))
        self._done = begin
        return [dict(kept) for kept in self._values]

    def _inputs(self) -> list[dict[str, Array]]:
        return [dict(feed) for feed in (*self._calibration, *self._feeds)]

    def _session(self, segment: _Segment, kept: Mapping[str, Array]) -> Session:
        """Those in FP32 are the same for all parts, so they are kept."""
        session = self._sessions.get(segment.digest) or segment.session(kept, self._threads)
        if segment.digest in self._sessions:
            self._sessions[segment.digest] = session
        return session


@dataclass(frozen=True)
class _Simulated:
    """The simulation of a plan.

    Attributes:
        factors: of convolutions that do not write their natural values.
        steps: of biases that are stored as integers, in what the convolution writes.
    """

    graph: Graph
    factors: dict[str, Array]
    steps: dict[str, Array]

    @classmethod
    def of(cls, graph: Graph, plan: QuantPlan, exact: Mapping[str, Array]) -> _Simulated:
        """With uncorrected biases for all convolutions whose exact means are given."""
        shifts = {name: np.zeros(len(means), dtype=np.float32) for name, means in exact.items()}
        plain = replace(plan, bias_shifts=plan.bias_shifts | shifts)
        chains = written_chains(corrected_graph(graph, plain), plain)
        factors = {chain.writer: chain.factor for chain in chains if chain.factor is not None}
        writer = FloatWriter()
        return cls(Graph(place(graph, plain, writer).to_model()), factors, writer.bias_steps)

    def put_right(self, values: Sequence[dict[str, Array]], name: str, exact: Array, count: int) -> Array:
        """Shift what a convolution writes so that its channels' means over the first pictures are the exact ones.

        Args:
            count: how many pictures count.

        Returns:
            The shift of natural values, float32[C]; a whole number of the steps of an integer bias.
        """
        factor = self.factors.get(name, np.ones(1, dtype=np.float32))
        shift = exact * factor - np.mean([_means(kept[name]) for kept in values[:count]], axis=0)
        if name in self.steps:
            step = self.steps[name].astype(np.float64)
            shift = np.rint(shift / step) * step
        for kept in values:
            places = (1,) * (kept[name].ndim - 2)
            kept[name] = kept[name] + shift.reshape(1, -1, *places).astype(np.float32)
        return (shift / factor).astype(np.float32)


def corrected_operators(plan: QuantPlan) -> list[str]:
    """The convolutions whose biases are corrected, in the plan's order."""
    return [op.name for op in plan.operators if op.quantized and op.op_type != "MatMul" and op.weight is not None]


@dataclass(frozen=True)
class _Segment:
    """Some consecutive nodes of a graph.

    Attributes:
        end: the convolution behind which it is cut, None for the rest of the graph.
        reads: tensors that they read and do not write.
        leaves: tensors that later nodes, or the caller, read: written here or before.
    """

    end: str | None
    nodes: list[NodeProto]
    constants: dict[str, Array]
    reads: list[str]
    leaves: list[str]

    @cached_property
    def digest(self) -> bytes:
        """Of what it computes."""
        parts = [node.SerializeToString(deterministic=True) for node in self.nodes]
        parts += [
            f"{name} {value.dtype} {value.shape}".encode() + value.tobytes() for name, value in self.constants.items()
        ]
        return hashlib.sha256(b"\0".join([*parts, *(name.encode() for name in self.leaves)])).digest()

    def session(self, kept: Mapping[str, Array], threads: int) -> Session:
        """Ready to run on values of the types of those given."""
        inputs = [make_tensor_value_info(n, np_dtype_to_tensor_dtype(kept[n].dtype), None) for n in self.reads]
        outputs = [onnx.ValueInfoProto(name=name) for name in self._computed]
        constants = [numpy_helper.from_array(np.asarray(value, order="C"), n) for n, value in self.constants.items()]
        body = helper.make_graph(self.nodes, "segment", inputs, outputs, constants)
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)])
        model.ir_version = IR_VERSION
        return onnx_session(model, threads, integers=False)

    def run(self, values: list[dict[str, Array]], session: Session) -> None:
        """Put what later nodes read in the place of what earlier nodes left, picture by picture to spare memory."""
        computed = self._computed
        for index, kept in enumerate(values):
            found = dict(zip(computed, session.run({n: kept[n] for n in self.reads}, computed), strict=True))
            values[index] = {name: found[name] if name in found else kept[name] for name in self.leaves}

    @property
    def _computed(self) -> list[str]:
        written = {name for node in self.nodes for name in node.output}
        return [name for name in self.leaves if name in written]


def _channel_means(graph: Graph, names: list[str], feeds: Sequence[Feed], threads: int) -> dict[str, Array]:
    session = onnx_session(graph.to_model(names), threads)
    totals: dict[str, Array] = {}
    for feed in feeds:
        for name, value in zip(names, session.run(feed, names), strict=True):
            totals[name] = totals.get(name, 0) + _means(value)
    return {name: total / len(feeds) for name, total in totals.items()}


def _means(value: Array) -> Array:
    """Mean of every channel, over batch and places, float64[C]."""
    return np.asarray(value.mean(axis=(0, *range(2, value.ndim)), dtype=np.float64))


def _segments(graph: Graph, names: Collection[str]) -> Iterator[_Segment]:
    """The graph cut behind each named tensor, and what is left behind the last one."""
    ends = {name: index for index, node in enumerate(graph.nodes, start=1) for name in node.output}
    start, available = 0, set(graph.inputs)
    for name in (*sorted(names, key=lambda name: ends[name]), None):
        end = len(graph.nodes) if name is None else ends[name]
        nodes, later = graph.nodes[start:end], graph.nodes[end:]
        written = {output for node in nodes for output in node.output}
        read = dict.fromkeys(key for node in nodes for key in reads(node) if key)
        wanted = {key for node in later for key in reads(node)} | {*graph.outputs, *([name] if name else [])}
        available |= written
        yield _Segment(
            name,
            nodes,
            {key: graph.constants[key] for key in read if graph.is_constant(key)},
            [key for key in read if key in available - written],
            sorted(wanted & available),
        )
        start = end
