"""Calibration: run the prepared FP32 graph on pictures and remember what each tensor held.

Pictures pass one at a time; memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from quant.errors import InputError
from quant.graph import Graph
from quant.observer import HALF_BINS, MOMENTUM, Histogram, MovingRange
from quant.plan import QUANTIZABLE
from quant.runtime import Feed, onnx_session

Statistics = dict[str, Histogram]


def collect_statistics(
    graph: Graph, tensors: Sequence[str], feeds: Iterable[Feed], threads: int, momentum: float = MOMENTUM
) -> Statistics:
    """Histograms of the named tensors over all feeds.

    Args:
        graph: the prepared graph.
        tensors: names of graph inputs or intermediate tensors.
        feeds: input name -> array, one picture each; their order matters to the moving average alone.
        momentum: of the moving average of the extremes, 0..1.

    Raises:
        InputError: there was no feed, or a tensor held NaN or infinity.
    """
    session = onnx_session(graph.to_model(tensors), threads)
    statistics = {name: Histogram(average=MovingRange(momentum)) for name in tensors}
    count = 0
    for count, feed in enumerate(feeds, start=1):
        for name, values in zip(tensors, session.run(feed, tensors), strict=True):
            try:
                statistics[name].update(values)
            except ValueError as error:
                place = f"calibration picture {count}, tensor '{name}'"
                raise InputError(f"{place}: {error}; the model is damaged") from error
    if not count:
        raise InputError("calibration: no readable picture; give another set with --data")
    return statistics


def save_statistics(statistics: Statistics, file: Path) -> None:
    """Write histograms as one npz."""
    names = sorted(statistics)
    np.savez(
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
    """Multiply-accumulates by operator name (its output tensor) at one input shape."""

    macs: dict[str, int]


def count_work(graph: Graph, feed: Feed, threads: int) -> Work:
    """Count the multiply-accumulates of Conv, ConvTranspose and MatMul by running the graph once."""
    nodes = [node for node in graph.nodes if node.op_type in QUANTIZABLE]
    names = {node.output[0] for node in nodes}
    names |= {name for node in nodes for name in node.input[:2] if not graph.is_constant(name)}
    ordered = sorted(names)
    arrays = onnx_session(graph.to_model(ordered), threads).run(feed, ordered)
    shapes = {name: array.shape for name, array in zip(ordered, arrays, strict=True)}
    macs = {}
    for node in nodes:
        weight = graph.constants[node.input[1]].shape if graph.is_constant(node.input[1]) else shapes[node.input[1]]
        if node.op_type == "ConvTranspose":
            macs[node.output[0]] = int(np.prod(shapes[node.input[0]])) * int(np.prod(weight[1:]))
        else:
            per_output = weight[-2:][0] if node.op_type == "MatMul" else int(np.prod(weight[1:]))
            macs[node.output[0]] = int(np.prod(shapes[node.output[0]])) * per_output
    return Work(macs)
