"""Calibration: run the prepared FP32 graph on pictures and remember what each tensor held.

Pictures pass one at a time; memory does not grow with their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, helper

from quant.arrays import write_arrays
from quant.bodies import inner_nodes, stepwise
from quant.errors import InputError
from quant.graph import Graph
from quant.observer import HALF_BINS, MOMENTUM, Histogram, MovingRange
from quant.plan import QUANTIZABLE
from quant.runtime import Feed, onnx_session

COUNTED = 2**21
"""Values of a tensor that its histogram counts, about, evenly over all pictures: counting all takes longest of all."""

_PICTURE = "calibration_picture"
"""Number of the picture, an input beside the graph's own."""

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
        pictures: how many feeds there are, about: of many each is counted in part, by the size of the first.

    Raises:
        InputError: there was no feed, or a tensor held NaN or infinity.
    """
    remaining = iter(feeds)
    first = next(remaining, None)
    if first is None:
        raise InputError("calibration: no readable picture; give another set with --data")
    sizes = _sizes(graph, tensors, first, threads)
    steps = [max(1, size * pictures // COUNTED) for size in sizes]
    exposed, places = stepwise(graph, tensors)
    found = dict(zip(places, steps, strict=True))
    watched = {place: _watch(exposed, place, found[place]) for place in exposed.last_first(places)}
    outputs = [name for place in places for name in watched[place]]
    model = exposed.to_light_model(outputs)
    model.model.graph.input.append(helper.make_tensor_value_info(_PICTURE, TensorProto.INT64, [1]))
    session = onnx_session(model, threads)
    statistics = {name: Histogram(average=MovingRange(momentum)) for name in tensors}
    for count, feed in enumerate(chain([first], remaining), start=1):
        arrays = session.run(feed | {_PICTURE: np.array([count])}, outputs)
        for name, low, high, values in zip(tensors, arrays[0::3], arrays[1::3], arrays[2::3], strict=True):
            try:
                statistics[name].update(values, (float(low), float(high)))
            except ValueError as error:
                place = f"calibration picture {count}, tensor '{name}'"
                raise InputError(f"{place}: {error}; the model is damaged") from error
    return statistics


def _sizes(graph: Graph, tensors: Sequence[str], feed: Feed, threads: int) -> list[int]:
    """How many values each tensor holds for a picture, in all steps of loops."""
    exposed, places = stepwise(graph, tensors)
    shapes = _add_shapes(exposed, places)
    asked = [shapes[place] for place in places]
    found = onnx_session(exposed.to_light_model(asked), threads).run(feed, asked)
    return [math.prod(map(int, shape)) for shape in found]


def _add_shapes(graph: Graph, tensors: Sequence[str]) -> dict[str, str]:
    """Have the runtime tell the sizes of tensors, and not the tensors; returns under which names."""
    names = {tensor: graph.fresh_name(f"{tensor}_shape") for tensor in graph.last_first(tensors)}
    graph.nodes += [helper.make_node("Shape", [tensor], [name], name=name) for tensor, name in names.items()]
    return names


def _watch(graph: Graph, tensor: str, step: int) -> list[str]:
    """Have the runtime reduce a tensor: names of its least and largest value, and of every step-th value.

    So whole tensors are never handed over, which takes longer than the reductions, and much memory. Which value is the
    first depends on the picture: a width may be a multiple of the step.
    """
    low, high, flat = (graph.fresh_name(f"{tensor}_{what}") for what in ("lowest", "highest", "flat"))
    line = graph.add_constant(f"{flat}_shape", np.array([-1]))
    graph.nodes += [
        helper.make_node("ReduceMin", [tensor], [low], name=low, keepdims=0),
        helper.make_node("ReduceMax", [tensor], [high], name=high, keepdims=0),
        helper.make_node("Reshape", [tensor, line], [flat], name=flat),
    ]
    if step == 1:
        return [low, high, flat]
    start, part = graph.fresh_name(f"{tensor}_start"), graph.fresh_name(f"{tensor}_part")
    steps, end, axis = (graph.add_constant(f"{part}_{n}", np.array([n])) for n in (step, np.iinfo(np.int64).max, 0))
    graph.nodes += [
        helper.make_node("Mod", [_PICTURE, steps], [start], name=start),
        helper.make_node("Slice", [flat, start, end, axis, steps], [part], name=part),
    ]
    return [low, high, part]


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
    return mean_work(graph, [feed], threads)


def mean_work(graph: Graph, feeds: Sequence[Feed], threads: int) -> Work:
    """The mean over several pictures, of which each may take a loop through another number of steps."""
    written = {node.output[0]: node for node in graph.nodes if node.output} | inner_nodes(graph)
    nodes = {name: node for name, node in written.items() if node.op_type in QUANTIZABLE}
    wanted = {*nodes, *(name for node in nodes.values() for name in node.input[:2] if not graph.is_constant(name))}
    ordered = sorted(wanted)
    exposed, places = stepwise(graph, ordered, "Shape")
    outer = _add_shapes(exposed, [name for name, place in zip(ordered, places, strict=True) if place == name])
    places = [outer.get(name, place) for name, place in zip(ordered, places, strict=True)]
    session = onnx_session(exposed.to_light_model(places), threads)
    known = {name: [value.shape] for name, value in graph.constants.items()}
    totals = dict.fromkeys(nodes, 0)
    for feed in feeds:
        found = zip(ordered, session.run(feed, places), strict=True)
        shapes = known | {name: [tuple(map(int, sizes)) for sizes in np.atleast_2d(array)] for name, array in found}
        for name, node in nodes.items():
            totals[name] += _macs(node, shapes)
    return Work({name: round(total / len(feeds)) for name, total in totals.items()})


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
