"""Calibration: run the prepared FP32 graph on pictures and remember what each tensor held.

Pictures pass one at a time; memory does not grow with their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from onnx import NodeProto

from quant.arrays import write_arrays
from quant.bodies import inner_nodes, stepwise
from quant.errors import InputError
from quant.graph import Graph
from quant.observer import HALF_BINS, MOMENTUM, Histogram, MovingRange
from quant.plan import QUANTIZABLE
from quant.runtime import Feed, onnx_session

COUNTED = 2**23
"""Values of a tensor that its histogram counts, about, evenly over all pictures: counting all takes longest of all."""

Statistics = dict[str, Histogram]
Shape = tuple[int, ...]


def collect_statistics(
    graph: Graph,
    tensors: Sequence[str],
    feeds: Iterable[Feed],
    threads: int,
    momentum: float = MOMENTUM,
    pictures: int = 1,
) -> Statistics:
    """Histograms of the named tensors over all feeds.

    Args:
        graph: the prepared graph.
        tensors: names of graph inputs or intermediate tensors, those inside of loops too (all steps count).
        feeds: input name -> array, one picture each; their order matters to the moving average alone.
        momentum: of the moving average of the extremes, 0..1.
        pictures: how many feeds there are, about: of many each is counted in part.

    Raises:
        InputError: there was no feed, or a tensor held NaN or infinity.
    """
    exposed, places = stepwise(graph, tensors)
    session = onnx_session(exposed.to_model(places), threads)
    statistics = {name: Histogram(average=MovingRange(momentum)) for name in tensors}
    count = 0
    for count, feed in enumerate(feeds, start=1):
        for name, values in zip(tensors, session.run(feed, places), strict=True):
            step = max(1, values.size * pictures // COUNTED)
            try:
                statistics[name].update(values, step, count % step)  # a width may be a multiple of the step
            except ValueError as error:
                place = f"calibration picture {count}, tensor '{name}'"
                raise InputError(f"{place}: {error}; the model is damaged") from error
    if not count:
        raise InputError("calibration: no readable picture; give another set with --data")
    return statistics


def save_statistics(statistics: Statistics, file: Path) -> None:
    """Write histograms as one npz."""
    names = sorted(statistics)
    write_arrays(
        file,
        names=np.array(names),
        limits=np.array([statistics[n].limit for n in names]),
        extremes=np.array([(statistics[n].minimum, statistics[n].maximum) for n in names]),
        averages=np.array([astuple(statistics[n].average) for n in names]),
        counts=np.stack([statistics[n].counts for n in names]),
    )


def load_statistics(file: Path) -> Statistics:
    """Read what `save_statistics` wrote."""
    with np.load(file, allow_pickle=False) as stored:
        columns = (stored[key] for key in ("names", "limits", "extremes", "averages", "counts"))
        return {
            str(name): Histogram(
                float(limit), counts.reshape(2 * HALF_BINS), float(low), float(high), MovingRange(*map(float, average))
            )
            for name, limit, (low, high), average, counts in zip(*columns, strict=True)
        }


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates by operator name (its output tensor) at one input shape, over all steps of a loop."""

    macs: dict[str, int]


def count_work(graph: Graph, feed: Feed, threads: int) -> Work:
    """Multiply-accumulates of Conv, ConvTranspose and MatMul, in all steps of loops, by running the graph once."""
    written = {node.output[0]: node for node in graph.nodes if node.output} | inner_nodes(graph)
    nodes = {name: node for name, node in written.items() if node.op_type in QUANTIZABLE}
    wanted = {*nodes, *(name for node in nodes.values() for name in node.input[:2] if not graph.is_constant(name))}
    ordered = sorted(wanted)
    exposed, places = stepwise(graph, ordered, "Shape")
    arrays = onnx_session(exposed.to_model(places), threads).run(feed, places)
    shapes = {
        name: [array.shape] if place == name else [tuple(map(int, sizes)) for sizes in array]
        for name, place, array in zip(ordered, places, arrays, strict=True)
    }
    shapes |= {name: [value.shape] for name, value in graph.constants.items()}
    return Work({name: _macs(node, shapes) for name, node in nodes.items()})


def mean_work(graph: Graph, feeds: Sequence[Feed], threads: int) -> Work:
    """The mean over several pictures, of which each may take a loop through another number of steps."""
    found = [count_work(graph, feed, threads).macs for feed in feeds]
    return Work({name: round(sum(macs[name] for macs in found) / len(found)) for name in found[0]})


def _macs(node: NodeProto, shapes: Mapping[str, Sequence[Shape]]) -> int:
    """Of all steps; what is no part of the step has one shape for all."""
    used = [shapes[name] for name in (*node.input[:2], node.output[0])]
    steps = len(used[-1])
    repeated = (values if len(values) == steps else steps * [values[0]] for values in used)
    return sum(_macs_once(node.op_type, *each) for each in zip(*repeated, strict=True))


def _macs_once(kind: str, data: Shape, weight: Shape, written: Shape) -> int:
    if kind == "ConvTranspose":
        return math.prod(data) * math.prod(weight[1:])
    return math.prod(written) * (weight[-2:][0] if kind == "MatMul" else math.prod(weight[1:]))
