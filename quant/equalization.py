"""Channel equalization: even out the channels of what a convolution reads, so that one scale fits them all.

Activations have one scale per tensor, so a channel that is small beside the others loses its resolution. Before the
quantizer each channel is centred and divided by a factor; the weights that read it are multiplied by the factor, and
the bias takes back what centring took away: `W x + b = (W diag(f)) ((x - c) / f) + (b + W c)`. The network computes
the same; only what is rounded changes. Used for the operators of a plan that are in INT8, never for the others.

Factors: Xiao et al., "SmoothQuant", 2022, equation 4; centres: Wei et al., "Outlier Suppression+", 2023, section 3.1.
A depthwise convolution has a weight scale for each channel, so there the whole imbalance can move into the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import NodeProto, helper

from quant.errors import InputError
from quant.flow import HARD_SWISH_END, LARGEST_STEP, Chain
from quant.fold import evened_writer, is_depthwise
from quant.graph import Graph, attribute
from quant.runtime import Feed, onnx_session
from quant.storage import write_bytes
from quant.target import EqualizationScope

STRENGTH = 0.5
"""SmoothQuant's alpha: the share of the imbalance that moves from activations to weights."""

FLOOR = 1 / 64
"""Smallest channel reach that counts, relative to the tensor's largest: a still channel may speak up later."""

_SMALLEST = 1e-12
_FILE = "equalizers.safetensors"


@dataclass(frozen=True)
class Equalizer:
    """What happens to the input channels of one operator: `(x - centre) / factor`, both float32[C]."""

    factor: np.ndarray
    centre: np.ndarray


@dataclass
class _Reach:
    """Smallest and largest value of every channel, float32[C]."""

    low: np.ndarray
    high: np.ndarray

    def update(self, low: np.ndarray, high: np.ndarray) -> None:
        """Take in those of some pictures, float32[N, C]."""
        self.low, self.high = np.minimum(self.low, low.min(axis=0)), np.maximum(self.high, high.max(axis=0))


def make_equalizers(
    graph: Graph,
    scope: EqualizationScope,
    feeds: Iterable[Feed],
    threads: int,
    chains: Collection[Chain] | None = None,
) -> dict[str, Equalizer]:
    """Equalizers, by operator name, for the convolutions of a scope that read an inner tensor.

    Args:
        graph: the prepared graph.
        feeds: calibration pictures, one at a time; a channel's reach is that of the rarest of them, so all count (with
            a quarter of 128 lines the error of recognition in INT8 rose by half).
        chains: where outputs are stored, those that are to flow in integers. There what has to fit one scale is the
            output of the convolution before, not what hard-swish leaves of it; and a depthwise convolution that reads
            another one's output needs no equalizer beside what `quant.fold` did for both.
    """
    nodes = [node for node in graph.nodes if _in_scope(graph, node, scope)]
    if chains is not None:
        nodes = [node for node in nodes if evened_writer(graph, node) is None]
    writers = {chain.reader: chain.writer for chain in chains or ()}
    source = {node.output[0]: writers.get(node.output[0], node.input[0]) for node in nodes}
    if not source:
        return {}
    reaches = _channel_reaches(graph, list(dict.fromkeys(source.values())), feeds, threads)
    equalizers = {}
    for node in nodes:
        name, reach = node.output[0], reaches[source[node.output[0]]]
        found = _chain_equalizer(reach) if name in writers else _equalizer(graph, node, reach)
        if found is not None:
            equalizers[name] = found
    return equalizers


def equalize(graph: Graph, equalizers: Mapping[str, Equalizer], operators: Collection[str]) -> Graph:
    """A copy in which the named operators read equalized channels; names depend on the operators alone."""
    result = graph.copy()
    for node in list(result.nodes):
        name = node.output[0] if node.output else ""
        if name in equalizers and name in operators:
            _rewrite(result, node, equalizers[name])
    result.prune()
    return result


def save_equalizers(equalizers: Mapping[str, Equalizer], folder: Path) -> None:
    """Write equalizers.safetensors, the same bytes for the same equalizers."""
    from safetensors.numpy import save

    write_bytes(folder / _FILE, save(equalizer_tensors(equalizers)))


def load_equalizers(folder: Path) -> dict[str, Equalizer]:
    """Read what `save_equalizers` wrote."""
    from safetensors.numpy import load_file

    parts = load_file(folder / _FILE)
    return read_equalizers(parts, sorted(key.removesuffix(":factor") for key in parts if key.endswith(":factor")))


def equalizer_tensors(equalizers: Mapping[str, Equalizer]) -> dict[str, np.ndarray]:
    """Equalizers as they are stored, `<operator>:factor` and `<operator>:centre`."""
    tensors = {}
    for name in sorted(equalizers):
        tensors[f"{name}:factor"] = np.ascontiguousarray(equalizers[name].factor)
        tensors[f"{name}:centre"] = np.ascontiguousarray(equalizers[name].centre)
    return tensors


def read_equalizers(tensors: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, Equalizer]:
    """The inverse of `equalizer_tensors` for some operators; raises KeyError where one is missing."""
    return {name: Equalizer(tensors[f"{name}:factor"], tensors[f"{name}:centre"]) for name in names}


def _rewrite(graph: Graph, node: NodeProto, equalizer: Equalizer) -> None:
    name, factor, centre = node.output[0], equalizer.factor, equalizer.centre
    weight = graph.constants[node.input[1]]
    source = node.input[0]
    if centre.any():
        offset = graph.add_constant(f"{name}_centre", centre.reshape(1, -1, 1, 1))
        step = helper.make_node("Sub", [source, offset], [f"{name}_centred"], name=f"{name}_centred")
        graph.insert_before(node, step)
        source = step.output[0]
        bias = graph.constants[node.input[2]] if len(node.input) > 2 else np.zeros(weight.shape[0])
        taken = weight.reshape(weight.shape[0], -1).astype(np.float64) @ centre
        node.input[:] = [*node.input[:2], graph.add_constant(f"{name}_centred_bias", (bias + taken).astype(np.float32))]
    inverse = graph.add_constant(f"{name}_factors", (1 / factor).reshape(1, -1, 1, 1))
    step = helper.make_node("Mul", [source, inverse], [f"{name}_equalized"], name=f"{name}_equalized")
    graph.insert_before(node, step)
    node.input[0] = step.output[0]
    along = (-1, 1, 1, 1) if is_depthwise(graph, node) else (1, -1, 1, 1)
    node.input[1] = f"{name}_equalized_weight"  # plans name it: no running number
    graph.constants[node.input[1]] = (weight * factor.reshape(along)).astype(np.float32)


def _equalizer(graph: Graph, node: NodeProto, reach: _Reach) -> Equalizer | None:
    weight = graph.constants[node.input[1]]
    centre = (reach.low + reach.high) / 2 if _is_pointwise(graph, node) else np.zeros_like(reach.low)
    largest = np.maximum(reach.high - centre, centre - reach.low)
    if largest.max() <= 0:
        return None
    factor = largest = np.maximum(largest, FLOOR * largest.max())
    if not is_depthwise(graph, node):
        weights = np.abs(weight).max(axis=(0, 2, 3))
        weights = np.maximum(weights, FLOOR * max(float(weights.max()), _SMALLEST))
        factor = largest**STRENGTH / weights ** (1 - STRENGTH)
    return Equalizer((factor / np.exp(np.log(factor).mean())).astype(np.float32), centre.astype(np.float32))


def _chain_equalizer(reach: _Reach) -> Equalizer | None:
    """Factors in steps that 8 bits hold exactly, since integer kernels multiply with them."""
    largest = np.maximum(np.abs(np.maximum(reach.low, HARD_SWISH_END)), reach.high)
    if largest.max() <= 0:
        return None
    steps = np.rint(LARGEST_STEP * np.maximum(largest / largest.max(), FLOOR))
    return Equalizer((steps / LARGEST_STEP).astype(np.float32), np.zeros_like(largest))


def _in_scope(graph: Graph, node: NodeProto, scope: EqualizationScope) -> bool:
    if node.op_type != "Conv" or not graph.is_constant(node.input[1]):
        return False
    if node.input[0] in graph.inputs or graph.is_constant(node.input[0]):
        return False
    if len(node.input) > 2 and not graph.is_constant(node.input[2]):
        return False
    depthwise = is_depthwise(graph, node)
    dense = graph.constants[node.input[1]].ndim == 4 and attribute(node, "group", 1) == 1
    return scope != "none" and (depthwise or (dense and scope == "all"))


def _is_pointwise(graph: Graph, node: NodeProto) -> bool:
    """Dense and without padding: every output reads every channel once, so a constant can move to the bias."""
    shape = graph.constants[node.input[1]].shape
    padded = any(attribute(node, "pads", [0])) or attribute(node, "auto_pad", "NOTSET") != "NOTSET"
    return shape[2:] == (1, 1) and attribute(node, "group", 1) == 1 and not padded


def _channel_reaches(graph: Graph, tensors: list[str], feeds: Iterable[Feed], threads: int) -> dict[str, _Reach]:
    extremes = {name: (f"{name}_lowest", f"{name}_highest") for name in graph.last_first(tensors)}
    bench = graph.copy()
    for name, (low, high) in extremes.items():
        for kind, output in (("ReduceMin", low), ("ReduceMax", high)):
            bench.nodes.append(helper.make_node(kind, [name], [output], name=output, axes=[2, 3], keepdims=0))
    wanted = [name for pair in extremes.values() for name in pair]
    session = onnx_session(bench.to_light_model(wanted), threads)
    reaches: dict[str, _Reach] = {}
    for feed in feeds:
        found = dict(zip(wanted, session.run(feed, wanted), strict=True))
        for name, (low, high) in extremes.items():
            reaches.setdefault(name, _Reach(found[low][0], found[high][0])).update(found[low], found[high])
    if not reaches:
        raise InputError("no calibration picture can be read; give another set with --data")
    return reaches
