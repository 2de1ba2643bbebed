"""What a student learns from: the FP32 network's soft labels, and the values of chosen tensors inside.

Where an output ends in Softmax or Sigmoid, the student is given the teacher's probabilities (Hinton et al., "Distilling
the Knowledge in a Neural Network", 2015): the divergence of its own from them, counted from the values before. Other
outputs, and the inner tensors that a recipe names (Romero et al., "FitNets", 2015), count by their squared distance in
units of their variance; so do logits or probabilities where the recipe prefers them to soft labels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from onnx import NodeProto, helper

from quant.errors import InputError
from quant.graph import Graph, attribute
from quant.kernels import Array, Value, tensor
from quant.plan import quantizable_operators
from quant.recipe import OutputLoss
from quant.runtime import Feed, onnx_session
from quant.training import relative_square

_KEEPING = ("Cast", "DepthToSpace", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that only move values about."""

_SMALLEST = 1e-9


@dataclass(frozen=True)
class Aim:
    """A tensor that is compared with the teacher's.

    Attributes:
        axis: of the classes, for softmax.
        weight: in the sum of all.
    """

    tensor: str
    kind: Literal["softmax", "sigmoid", "plain"]
    axis: int = -1
    weight: float = 1.0


def aims(
    prepared: Graph,
    nodes: Sequence[str | int] = (),
    *,
    outputs: OutputLoss = "soft_labels",
    nodes_weight: float = 1.0,
    ends: Sequence[str] | None = None,
    within: Collection[str] | None = None,
) -> list[Aim]:
    """One for each output, and for each inner tensor of `nodes`; raises InputError for one that there is not.

    Args:
        ends: tensors that count as outputs; those of the network where none are given.
        within: operators, by name, that are counted where a node is a number; all where none are given.
        nodes: names of tensors; a negative number stands for what an operator with weights reads, counted from the end.
        nodes_weight: of all of them, beside an output.
        outputs: what counts of outputs that end in Softmax or Sigmoid.
    """
    producers = prepared.producers()
    names = [_node_name(prepared, node, within) for node in nodes]
    if unknown := [name for name in names if name not in producers]:
        raise InputError(f"qat.nodes: '{unknown[0]}' is no tensor of the prepared model; see its inference.onnx")
    inner = [Aim(name, "plain", weight=nodes_weight / len(names)) for name in names]
    ending = prepared.outputs if ends is None else ends
    outer = {aim.tensor: aim for aim in (_chosen(_output_aim(producers, name), name, outputs) for name in ending)}
    return [*outer.values(), *inner]


def _node_name(prepared: Graph, node: str | int, within: Collection[str] | None) -> str:
    if isinstance(node, str):
        return node
    weighted = [op for op in quantizable_operators(prepared, {}) if op.weight is not None and not op.in_loop]
    weighted = [op for op in weighted if within is None or op.name in within]
    if -node > len(weighted):
        raise InputError(f"qat.nodes: {node} is before the first of {len(weighted)} operators with weights")
    return weighted[node].activations[0]


def _chosen(aim: Aim, output: str, outputs: OutputLoss) -> Aim:
    """What a recipe wants compared of an output, given its aim by soft labels."""
    if outputs == "soft_labels" or aim.kind == "plain":
        return aim
    return Aim(aim.tensor if outputs == "logits" else output, "plain")


def _output_aim(producers: Mapping[str, NodeProto], output: str) -> Aim:
    node = producers[output]
    while node.op_type in _KEEPING and node.input[0] in producers:
        node = producers[node.input[0]]
    if node.op_type == "Softmax":
        return Aim(node.input[0], "softmax", attribute(node, "axis", -1))
    return Aim(node.input[0], "sigmoid") if node.op_type == "Sigmoid" else Aim(output, "plain")


class Teacher:
    """The FP32 network, on onnxruntime: no gradient ever reaches it.

    Args:
        convs: convolutions whose channels' means are told too.
    """

    def __init__(self, prepared: Graph, sought: Sequence[Aim], threads: int, convs: Sequence[str] = ()) -> None:
        self._names, self._convs = [aim.tensor for aim in sought], [*convs]
        graph = prepared.ending_at([*self._names, *self._convs])
        self._means = [_add_mean(graph, name) for name in self._convs]
        self._session = onnx_session(graph.to_light_model([*self._names, *self._means]), threads)

    def answer(self, feed: Feed) -> tuple[list[Array], dict[str, Array]]:
        """Its values of the sought tensors, and the mean of each channel of `convs` over the batch, float32[C]."""
        found = self._session.run(feed, [*self._names, *self._means])
        count = len(self._names)
        means = (pooled.mean(axis=0).reshape(-1) for pooled in found[count:])
        return found[:count], dict(zip(self._convs, means, strict=True))


def _add_mean(graph: Graph, name: str) -> str:
    mean = graph.fresh_name(f"{name}_mean")
    graph.nodes.append(helper.make_node("GlobalAveragePool", [name], [mean], name=mean))
    return mean


def loss(sought: Sequence[Aim], found: Mapping[str, Value], exact: Sequence[Array]) -> Any:
    """How far a student is from the teacher, 0 where it gives the same."""
    pairs = zip(sought, exact, strict=True)
    return sum(aim.weight * _distance(aim, found[aim.tensor], taught) for aim, taught in pairs)


def _distance(aim: Aim, found: Any, taught: Array) -> Any:
    from paddle.nn import functional
    from scipy.special import expit

    if aim.kind == "plain":
        return relative_square(found, taught)
    if aim.kind == "softmax":
        labels = _softmax(taught, aim.axis)
        entropy = -float((labels * np.log(labels + _SMALLEST)).sum(aim.axis).mean())
        return -(tensor(labels) * functional.log_softmax(found, aim.axis)).sum(aim.axis).mean() - entropy
    labels = expit(taught.astype(np.float64)).astype(np.float32)
    off = 1 - labels
    entropy = -float((labels * np.log(labels + _SMALLEST) + off * np.log(off + _SMALLEST)).mean())
    return functional.binary_cross_entropy_with_logits(found, tensor(labels)) - entropy


def _softmax(values: Array, axis: int) -> Array:
    raised = np.exp(values - values.max(axis, keepdims=True))
    return np.asarray(raised / raised.sum(axis, keepdims=True))
