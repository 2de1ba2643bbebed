"""Weight rounding that minds the layer's output: later weights make up for the rounding of earlier ones.

Nearest rounding makes every weight as exact as can be, but what counts is the sum over inputs that move together.
Weights are rounded one input after the other; the error of each is passed on to the inputs not yet rounded, by the
second moments of the inputs (Frantar et al., "GPTQ", 2022, equations 2 and 3; Hassibi and Stork, "Optimal Brain
Surgeon", 1993). No gradient and no labels; the scales stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from quant.graph import Graph, attribute
from quant.plan import FULL_WEIGHTS, IntegerWeight, Operator, QuantPlan
from quant.runtime import Feed, onnx_session

POSITIONS = 128
"""Output positions of a picture that are looked at, at most."""

LARGEST = 2304
"""Most inputs of an output channel: the moments of more take too much memory, nearest rounding remains."""

_BLOCK = 32
"""Inputs whose errors are passed on to those behind them at once, as one matrix product."""

_DAMPING = 1e-3  # of the mean variance: keeps the inverse finite for inputs that never move


@dataclass
class Moments:
    """Streaming mean and second moment of the inputs of an operator, of each of its groups, around an origin.

    A channel may vary by far less than its mean; beside its first mean float32 products are exact enough, and they
    take half of the time.

    Attributes:
        origin: float32[groups, inputs], the mean over the first picture.
        count: positions seen.
        total: float64[groups, inputs].
        square: float64[groups, inputs, inputs].
    """

    origin: np.ndarray
    count: int
    total: np.ndarray
    square: np.ndarray

    @classmethod
    def of(cls, patches: np.ndarray) -> Moments:
        """Those of the first picture, float32[groups, positions, inputs]."""
        groups, _, inputs = patches.shape
        found = cls(patches.mean(axis=1), 0, np.zeros((groups, inputs)), np.zeros((groups, inputs, inputs)))
        found.update(patches)
        return found

    def update(self, patches: np.ndarray) -> None:
        """Take in float32[groups, positions, inputs]."""
        moved = patches - self.origin[:, None, :]
        self.count += moved.shape[1]
        self.total += moved.sum(axis=1)
        self.square += np.matmul(moved.transpose(0, 2, 1), moved)

    def covariance(self) -> np.ndarray:
        mean = self.total / self.count
        return self.square / self.count - mean[:, :, None] * mean[:, None, :]

    def second_moment(self) -> np.ndarray:
        mean = self.total / self.count + self.origin
        return self.covariance() + mean[:, :, None] * mean[:, None, :]


def collect_moments(
    graph: Graph, operators: Iterable[Operator], feeds: Iterable[Feed], threads: int, seed: int
) -> dict[str, Moments]:
    """Input moments of every quantized operator whose layout is supported, by operator name.

    Args:
        graph: the graph that the plan was made on.
        feeds: calibration pictures, one at a time.
        seed: of the positions that are looked at.
    """
    nodes = {node.output[0]: node for node in graph.nodes if node.output}
    found = [nodes[op.name] for op in operators if op.quantized and not op.in_loop]
    chosen = [node for node in found if _supported(graph, node)]
    tensors = list(dict.fromkeys(node.input[0] for node in chosen))
    inner = [name for name in tensors if name not in graph.inputs]
    session = onnx_session(graph.to_model(inner), threads)
    rng = np.random.default_rng(seed)
    moments: dict[str, Moments] = {}
    for feed in feeds:
        arrays = feed | dict(zip(inner, session.run(feed, inner), strict=True))
        for node in chosen:
            patches = _patches(graph, node, arrays[node.input[0]], rng)
            if node.output[0] in moments:
                moments[node.output[0]].update(patches)
            else:
                moments[node.output[0]] = Moments.of(patches)
    return moments


def round_by_moments(
    graph: Graph, plan: QuantPlan, moments: Mapping[str, Moments], *, biases_follow: bool
) -> dict[str, IntegerWeight]:
    """The plan's integer weights, rounded anew on the same scales; those without moments stay as they are.

    Args:
        biases_follow: the biases of convolutions take up the mean error later on, so there only the covariance counts.
    """
    nodes = {node.output[0]: node for node in graph.nodes if node.output}
    integers = dict(plan.integers)
    for operator in plan.quantized().values():
        found = moments.get(operator.name)
        if found is None or operator.weight is None:
            continue
        node = nodes[operator.name]
        exact = graph.constants[operator.weight]
        scale = integers[operator.weight].scale
        rows = _rows(node, exact, attribute(node, "group", 1))
        wide = np.broadcast_to(
            np.expand_dims(scale, _other_axes(exact.ndim, plan.weights[operator.weight].axis)), exact.shape
        )
        steps = _rows(node, wide, attribute(node, "group", 1))[:, :, 0]
        hessian = found.covariance() if biases_follow and node.op_type != "MatMul" else found.second_moment()
        noise = plan.activations[operator.activations[0]].scale ** 2 / 12
        limit = int(np.abs(integers[operator.weight].values).max())  # nearest rounding reaches it in every channel
        values = _round_rows(rows / steps[:, :, None], hessian, noise, limit)
        integers[operator.weight] = IntegerWeight(_unrow(node, values, exact.shape), scale)
    return integers


def _round_rows(rows: np.ndarray, hessian: np.ndarray, noise: float, limit: int = FULL_WEIGHTS) -> np.ndarray:
    """Integers float64[groups, rows, inputs] for weights in units of their scales."""
    inputs = rows.shape[2]
    diagonal = np.arange(inputs)
    hessian = hessian.copy()
    largest = np.abs(hessian).max(axis=(1, 2))[:, None]
    spread = hessian[:, diagonal, diagonal].mean(axis=1, keepdims=True)
    hessian[:, diagonal, diagonal] += noise + np.maximum(_DAMPING * spread, 1e-9 * largest + 1e-12)
    order = np.argsort(-hessian[:, diagonal, diagonal], axis=1, kind="stable")
    hessian = np.take_along_axis(np.take_along_axis(hessian, order[:, :, None], 1), order[:, None, :], 2)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).transpose(0, 2, 1)
    # Inputs before rows: what one step changes lies together.
    left = np.take_along_axis(rows.astype(np.float64).transpose(0, 2, 1), order[:, :, None], 1)
    result = np.empty_like(left)
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        errors = np.empty_like(left[:, start:end])
        for k in range(start, end):
            result[:, k] = np.clip(np.rint(left[:, k]), -limit, limit)
            errors[:, k - start] = (left[:, k] - result[:, k]) / upper[:, k, k, None]
            left[:, k + 1 : end] -= upper[:, k, k + 1 : end, None] * errors[:, None, k - start]
        left[:, end:] -= np.matmul(upper[:, start:end, end:].transpose(0, 2, 1), errors)
    back = np.empty_like(result)
    np.put_along_axis(back, np.broadcast_to(order[:, :, None], result.shape), result, 1)
    return back.transpose(0, 2, 1)


def _supported(graph: Graph, node: NodeProto) -> bool:
    if not graph.is_constant(node.input[1]):
        return False
    weight = graph.constants[node.input[1]]
    if node.op_type == "MatMul":
        return weight.shape[0] <= LARGEST
    if weight.ndim != 4 or attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        return False
    if node.op_type == "ConvTranspose":  # each output pixel must come from one input pixel
        plain = list(attribute(node, "strides", [1, 1])) == list(weight.shape[2:])
        return plain and not any(attribute(node, "pads", [0])) and weight.shape[0] <= LARGEST
    return bool(np.prod(weight.shape[1:]) <= LARGEST)


def _rows(node: NodeProto, weight: np.ndarray, groups: int) -> np.ndarray:
    """A weight as [groups, output rows, inputs]."""
    if node.op_type == "Conv":
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    return np.moveaxis(weight, 0, -1).reshape(1, -1, weight.shape[0])


def _unrow(node: NodeProto, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if node.op_type == "Conv":
        return rows.reshape(shape).astype(np.int8)
    return np.ascontiguousarray(np.moveaxis(rows.reshape(*shape[1:], shape[0]), -1, 0)).astype(np.int8)


def _other_axes(ndim: int, axis: int) -> tuple[int, ...]:
    return tuple(other for other in range(ndim) if other != axis)


def _patches(graph: Graph, node: NodeProto, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What single output positions read, float32[groups, positions, inputs]."""
    if node.op_type == "MatMul":
        return _some(values.reshape(-1, values.shape[-1]), rng)[None]
    if node.op_type == "ConvTranspose":
        return _some(np.moveaxis(values, 1, -1).reshape(-1, values.shape[1]), rng)[None]
    kernel = graph.constants[node.input[1]].shape[2:]
    groups = attribute(node, "group", 1)
    strides, dilations = attribute(node, "strides", [1, 1]), attribute(node, "dilations", [1, 1])
    top, left, bottom, right = attribute(node, "pads", [0, 0, 0, 0])
    padded = np.pad(values, ((0, 0), (0, 0), (top, bottom), (left, right)))
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    height, width = ((size - r) // s + 1 for size, r, s in zip(padded.shape[2:], reach, strides, strict=True))
    count = len(padded) * height * width
    places = rng.choice(count, min(count, POSITIONS), replace=False)
    picture, row, column = np.unravel_index(places, (len(padded), height, width))
    down = row[:, None, None] * strides[0] + np.arange(kernel[0])[None, :, None] * dilations[0]
    across = column[:, None, None] * strides[1] + np.arange(kernel[1])[None, None, :] * dilations[1]
    taken = padded[picture[:, None, None], :, down, across]  # [positions, kh, kw, channels]
    taken = np.moveaxis(taken, -1, 1)
    grouped = taken.reshape(len(places), groups, -1)
    return np.ascontiguousarray(grouped.transpose(1, 0, 2))


def _some(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if len(rows) <= POSITIONS:
        return rows
    return rows[rng.choice(len(rows), POSITIONS, replace=False)]
