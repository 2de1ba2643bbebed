"""Reconstruction in closed form: layer after layer, the weights that come nearest to FP32 from what each really reads.

A layer behind quantized ones reads other values than it was trained on. Front to back, with everything before it
quantized and fitted, its weights are solved anew by least squares from what it reads to what FP32 writes (He et al.,
"Channel Pruning for Accelerating Very Deep Neural Networks", 2017, section 3.1; Li et al., "GPTAQ: Efficient
Finetuning-Free Quantization for Asymmetric Calibration", 2025), held near the trained ones by a ridge, rounded by the
second moments of what it reads on the plan's scales, and put right on average by its bias. One picture in four is held
back: it chooses the ridge, and a layer that comes no nearer to FP32 on these keeps its weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from onnx import NodeProto
from threadpoolctl import threadpool_limits

from quant.bias import Simulated, channel_means, corrected_operators
from quant.errors import NotTrainable
from quant.graph import Graph
from quant.patches import is_supported, patches, rows_of, unrow, written
from quant.plan import IntegerWeight, Operator, QuantPlan, corrected_graph, dequantize_weight
from quant.rounding import round_rows
from quant.runtime import Feed, onnx_session
from quant.segments import Segment, segments_of

Array = np.ndarray

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Pull towards the trained weights, in units of the mean variance of a layer's inputs."""

HELD_BACK = 4
"""One picture of so many is not learned from, but decides."""

POSITIONS = 1024
"""Most positions of a picture that are looked at."""

_TAUGHT = 2**26
"""Most float32 values of FP32 that are kept at a time."""

_TINY = 1e-12


@dataclass(frozen=True)
class PartResult:
    """What changing a part gave on held-back pictures: squared error in units of the aim's variance.

    Attributes:
        aim: the tensor that is compared with FP32.
        exact: with FP32's own weights on what the quantized part reads: what is lost before it; None where weights were
            not solved for.
        solved: with the weights that were solved for, before they are rounded; None likewise.
    """

    aim: str
    before: float
    after: float
    exact: float | None = None
    solved: float | None = None


class Joint:
    """Streaming moments of what a layer reads and of what its exact weights miss, around the first picture's means.

    Channels vary by far less than their means; beside an origin float32 products are exact enough.

    Args:
        read: the first picture's, float32[groups, positions, inputs].
        missed: FP32's output less what the exact weights make of `read`, float32[groups, positions, rows].
        central: whether means are taken out, since a bias takes them up.
    """

    def __init__(self, read: Array, missed: Array, *, central: bool) -> None:
        self._central = central
        self._origin = read.mean(axis=1, keepdims=True) if central else np.zeros_like(read[:, :1])
        self._offset = missed.mean(axis=1, keepdims=True) if central else np.zeros_like(missed[:, :1])
        self._count = 0
        inputs, rows = read.shape[2], missed.shape[2]
        self._sums = np.zeros((len(read), 1, inputs)), np.zeros((len(read), 1, rows))
        self._squares = np.zeros((len(read), inputs, inputs))
        self._products = np.zeros((len(read), inputs, rows))
        self._missed = 0.0

    def update(self, read: Array, missed: Array) -> None:
        """Take in a picture."""
        read, missed = read - self._origin, missed - self._offset
        self._count += read.shape[1]
        for total, values in zip(self._sums, (read, missed), strict=True):
            total += values.sum(axis=1, keepdims=True)
        across = read.transpose(0, 2, 1)
        self._squares += np.matmul(across, read)
        self._products += np.matmul(across, missed)
        self._missed += float(np.square(missed, dtype=np.float64).sum())

    def squares(self) -> Array:
        """Second moments of what is read, float64[groups, inputs, inputs]."""
        mean = self._mean(0)
        return self._squares / self._count - mean.transpose(0, 2, 1) * mean

    def products(self) -> Array:
        """Of what is read and what is missed, float64[groups, inputs, rows]."""
        return self._products / self._count - self._mean(0).transpose(0, 2, 1) * self._mean(1)

    def error(self, change: Array) -> float:
        """Mean squared error of a position with weights that differ from the exact ones, [groups, rows, inputs]."""
        missed = self._missed / self._count - float(np.square(self._mean(1)).sum())
        pull = float((change * self.products().transpose(0, 2, 1)).sum())
        return max(missed - 2 * pull + float((np.matmul(change, self.squares()) * change).sum()), 0.0)

    def _mean(self, part: int) -> Array:
        mean = self._sums[part] / self._count
        return mean if self._central else np.zeros_like(mean)


def fitted_operators(graph: Graph, plan: QuantPlan) -> list[Operator]:
    """Quantized operators whose weights can be solved for, in the plan's order: those of a known layout, read once."""
    nodes = {node.output[0]: node for node in graph.nodes if node.output}
    readers = Counter(name for node in graph.nodes for name in node.input)
    return [
        op
        for op in plan.operators
        if op.quantized and op.weight is not None and not op.in_loop
        if readers[op.weight] == 1 and is_supported(graph, nodes[op.name])
    ]


def refit(
    graph: Graph,
    plan: QuantPlan,
    feeds: Sequence[Feed],
    threads: int,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> tuple[QuantPlan, list[PartResult]]:
    """The plan with weights and biases fitted to the operators that it quantizes, and what that gave layer by layer.

    Args:
        graph: the prepared graph.
        feeds: calibration pictures, at least two; the values at one cut of all of them are kept in memory.
        seed: of the positions that are looked at.
        advance: called after each layer.

    Raises:
        NotTrainable: there are fewer than two pictures.
    """
    if len(feeds) < 2:
        raise NotTrainable("fitting weights takes at least two calibration pictures, one of them to judge by")
    convs = corrected_operators(plan)
    means = channel_means(graph, convs, feeds, threads)
    simulated = Simulated.of(graph, plan, means)
    layers = _layers(corrected_graph(graph, plan), plan, simulated.graph, seed)
    lessons = _lessons(graph, [*layers.values()], feeds, threads)
    values = [dict(feed) for feed in feeds]
    integers, shifts, results = dict(plan.integers), dict[str, Array](), list[PartResult]()
    for segment in segments_of(simulated.graph, {*convs, *layers, *(layer.reads for layer in layers.values())}):
        if segment.end in layers:
            layer = layers[segment.end]
            # On a busy machine the threads of small products wait for one another far longer than they work.
            with threadpool_limits(limits=1, user_api="blas"):
                weight, result = layer.fitted(plan, values, next(lessons))
            results.append(result)
            integers[layer.weight] = weight
            segment = layer.put_into(segment, weight, simulated.factors.get(segment.end), plan)
        if segment.end is None:
            break
        if segment.nodes:
            segment.run(values, segment.session(values[0], threads))
        if segment.end in means:
            shifts[segment.end] = simulated.put_right(values, segment.end, means[segment.end], len(feeds))
        if segment.end in layers:
            advance()
    return replace(plan, integers=integers, bias_shifts=shifts), results


def _layers(exact: Graph, plan: QuantPlan, simulated: Graph, seed: int) -> dict[str, _Layer]:
    """The fitted operators in the order in which the simulation computes them, by name."""
    fitted = {op.name: op for op in fitted_operators(exact, plan)}
    nodes = [node for node in simulated.nodes if node.output and node.output[0] in fitted]
    return {node.output[0]: _Layer(exact, fitted[node.output[0]], node, seed) for node in nodes}


def _lessons(graph: Graph, layers: Sequence[_Layer], feeds: Sequence[Feed], threads: int) -> Iterator[list[Array]]:
    """What FP32 writes at the positions that are looked at, layer by layer, picture by picture.

    As many layers share a pass of the network as their values have room in memory.
    """
    waiting = [*layers]
    while waiting:
        room = accumulate(layer.values * len(feeds) for layer in waiting)
        count = max(sum(values <= _TAUGHT for values in room), 1)
        group, waiting = waiting[:count], waiting[count:]
        names = [layer.name for layer in group]
        session = onnx_session(graph.ending_at(names).to_light_model(), threads)
        taught: list[list[Array]] = [[] for _ in group]
        for index, feed in enumerate(feeds):
            for layer, found, values in zip(group, taught, session.run(feed, names), strict=True):
                found.append(layer.written(values, index))
        while taught:
            yield taught.pop(0)


def _drawn(seed: int, picture: int) -> np.random.Generator:
    """Draws the positions of a picture: the same ones of what a layer reads and of what FP32 writes."""
    return np.random.default_rng([seed, picture])


class _Layer:
    """One operator of a plan that is solved for.

    Attributes:
        weight: name of its weight in the plan.
        reads: the tensor that it reads in the simulation.
        values: that it writes at the positions of a picture, at most.
    """

    def __init__(self, exact_graph: Graph, operator: Operator, simulated: NodeProto, seed: int) -> None:
        assert operator.weight is not None
        self.weight, self.reads = operator.weight, simulated.input[0]
        self._graph, self._operator, self._seed = exact_graph, operator, seed
        self._constant = simulated.input[1]
        self._node = next(node for node in exact_graph.nodes if operator.name in node.output)
        self._exact = rows_of(self._node, exact_graph.constants[self.weight]).astype(np.float64)
        groups, rows, _ = self._exact.shape
        self.values = POSITIONS * groups * rows

    @property
    def name(self) -> str:
        return self._operator.name

    def written(self, values: Array, picture: int) -> Array:
        """The positions that are looked at of what FP32 writes, [groups, positions, rows]."""
        return written(self._graph, self._node, values, _drawn(self._seed, picture), POSITIONS)

    def fitted(
        self, plan: QuantPlan, values: Sequence[Mapping[str, Array]], taught: Sequence[Array]
    ) -> tuple[IntegerWeight, PartResult]:
        """Its integers, changed where that brings it nearer to FP32 on held-back pictures."""
        old = plan.integers[self.weight]
        learned, held, variance = self._moments(values, taught)
        best = min((self._solved(learned, ridge) for ridge in RIDGES), key=held.error)
        steps = self._steps(plan, old)
        limit = int(np.abs(old.values).max())  # nearest rounding reaches it in every channel
        rows = round_rows((self._exact + best) / steps, learned.squares(), 0.0, limit)
        new = IntegerWeight(unrow(self._node, rows, old.values.shape), old.scale)
        before = held.error(rows_of(self._node, old.values) * steps - self._exact)
        after = held.error(rows * steps - self._exact)
        ideal = [held.error(change) / variance for change in (np.zeros_like(best), best)]
        result = PartResult(self._operator.name, before / variance, min(before, after) / variance, *ideal)
        return (new if after < before else old), result

    def _moments(self, values: Sequence[Mapping[str, Array]], taught: Sequence[Array]) -> tuple[Joint, Joint, float]:
        """Of pictures that are learned from, of those held back, and the variance of what FP32 writes there."""
        joints: dict[bool, Joint] = {}
        central = self._node.op_type != "MatMul"
        exact = self._exact.transpose(0, 2, 1).astype(np.float32)
        for index, (kept, aim) in enumerate(zip(values, taught, strict=True)):
            read = patches(self._graph, self._node, kept[self.reads], _drawn(self._seed, index), POSITIONS)
            missed = aim - np.matmul(read, exact)
            if (part := index % HELD_BACK == 0) not in joints:
                joints[part] = Joint(read, missed, central=central)
            joints[part].update(read, missed)
        seen = np.concatenate(taught[::HELD_BACK], axis=1)
        return joints[False], joints[True], max(float(seen.var(axis=1, dtype=np.float64).sum()), _TINY)

    def _solved(self, joint: Joint, ridge: float) -> Array:
        """The change of the exact weights that is best for a ridge, [groups, rows, inputs]."""
        squares = joint.squares()
        diagonal = np.arange(squares.shape[1])
        height = max(ridge * float(squares[:, diagonal, diagonal].mean()), _TINY)
        squares[:, diagonal, diagonal] += height
        return np.linalg.solve(squares, joint.products()).transpose(0, 2, 1)

    def _steps(self, plan: QuantPlan, weight: IntegerWeight) -> Array:
        """Step of each row, [groups, rows, 1]."""
        axis = plan.weights[self.weight].axis
        places = [1] * weight.values.ndim
        places[axis] = -1
        wide = np.broadcast_to(weight.scale.reshape(places), weight.values.shape)
        return rows_of(self._node, wide)[:, :, :1].astype(np.float64)

    def put_into(self, segment: Segment, weight: IntegerWeight, factor: Array | None, plan: QuantPlan) -> Segment:
        """The segment that ends in it, with this weight."""
        scaled = weight.scale if factor is None else (weight.scale * factor).astype(np.float32)
        values = dequantize_weight(IntegerWeight(weight.values, scaled), plan.weights[self.weight].axis)
        return replace(segment, constants=segment.constants | {self._constant: values})
