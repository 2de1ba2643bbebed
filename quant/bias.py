"""Sequential bias correction: every quantized convolution is made right on average, front to back.

A convolution's mean output error comes from its own rounding and from what is left of the errors before it. Biases
are corrected in the order of the graph, each with everything before it already quantized and corrected (Nagel et al.,
"Data-Free Quantization through Weight Equalization and Bias Correction", 2019, section 4.2, with the expectation taken
over calibration pictures). One pass over the graph is enough: the graph is cut behind each convolution, the cut values
of all pictures are kept, and a new bias only shifts them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
from onnx import helper

from quant.graph import Graph
from quant.placement import place, written_chains
from quant.plan import QuantPlan, corrected_graph
from quant.runtime import Feed, Session, onnx_session
from quant.segments import Segment, segments_of
from quant.simulation import FloatWriter

Array = np.ndarray


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
    exact = channel_means(graph, names, feeds, threads)
    simulated = Simulated.of(graph, plan, exact)
    shifts = {}
    values = [dict(feed) for feed in feeds]
    for segment in segments_of(simulated.graph, names):
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
        self._exact = channel_means(graph, self._names, calibration, threads)
        self._calibration, self._feeds = calibration, feeds
        self._fp32 = list(segments_of(self._simulated(set()).graph, self._names))
        self._sessions: dict[bytes, Session | None] = dict.fromkeys(segment.digest for segment in self._fp32)
        self._done, self._values = 0, self._inputs()

    def outputs(self, names: Collection[str]) -> list[list[Array]]:
        """The model's outputs for each picture of `feeds`, with the operators of these names in INT8."""
        simulated = self._simulated(set(names))
        segments = list(segments_of(simulated.graph, self._names))
        same = takewhile(lambda pair: pair[0].digest == pair[1].digest, zip(segments, self._fp32, strict=True))
        begin = min(sum(1 for _ in same), len(segments) - 1)
        values = self._before(begin)
        for segment in segments[begin:]:
            if segment.nodes:
                segment.run(values, self._session(segment, values[0]))
            if segment.end is not None:
                simulated.put_right(values, segment.end, self._exact[segment.end], len(self._calibration))
        return [[kept[name] for name in self._graph.outputs] for kept in values[len(self._calibration) :]]

    def _simulated(self, names: set[str]) -> Simulated:
        return Simulated.of(self._graph, self._plan.with_only(names, ""), self._exact)

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

    def _session(self, segment: Segment, kept: Mapping[str, Array]) -> Session:
        """Those in FP32 are the same for all parts, so they are kept."""
        session = self._sessions.get(segment.digest) or segment.session(kept, self._threads)
        if segment.digest in self._sessions:
            self._sessions[segment.digest] = session
        return session


@dataclass(frozen=True)
class Simulated:
    """The simulation of a plan.

    Attributes:
        factors: of convolutions that do not write their natural values.
        steps: of biases that are stored as integers, in what the convolution writes.
    """

    graph: Graph
    factors: dict[str, Array]
    steps: dict[str, Array]

    @classmethod
    def of(cls, graph: Graph, plan: QuantPlan, exact: Mapping[str, Array]) -> Simulated:
        """With uncorrected biases for all convolutions whose exact means are given."""
        shifts = {name: np.zeros(len(means), dtype=np.float32) for name, means in exact.items()}
        plain = replace(plan, bias_shifts=plan.bias_shifts | shifts)
        chains = written_chains(corrected_graph(graph, plain), plain)
        factors = {chain.writer: chain.factor for chain in chains if chain.factor is not None}
        writer = FloatWriter()
        return cls(place(graph, plain, writer).copy(), factors, writer.bias_steps)

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


def channel_means(graph: Graph, names: list[str], feeds: Sequence[Feed], threads: int) -> dict[str, Array]:
    """Mean of every channel of what these convolutions write over pictures, their batches and places, float64[C]."""
    bench, writers = graph.copy(), graph.producers()
    means = {name: bench.fresh_name(f"{name}_mean") for name in graph.last_first(names)}
    for name, mean in means.items():
        axes = [0, *range(2, graph.constants[writers[name].input[1]].ndim)]
        bench.nodes.append(helper.make_node("ReduceMean", [name], [mean], name=mean, axes=axes, keepdims=0))
    asked = [means[name] for name in names]
    session = onnx_session(bench.to_light_model(asked), threads)
    totals: dict[str, Array] = {}
    for feed in feeds:
        for name, value in zip(names, session.run(feed, asked), strict=True):
            totals[name] = totals.get(name, 0) + value.astype(np.float64)
    return {name: total / len(feeds) for name, total in totals.items()}


def _means(value: Array) -> Array:
    """Mean of every channel, over batch and places, float64[C]."""
    return np.asarray(value.mean(axis=(0, *range(2, value.ndim)), dtype=np.float64))
