"""Weight rounding that minds the layer's output: later weights make up for the rounding of earlier ones.

Nearest rounding makes every weight as exact as can be, but what counts is the sum over inputs that move together.
Weights are rounded one input after the other; the error of each is passed on to the inputs not yet rounded, by the
second moments of the inputs (Frantar et al., "GPTQ", 2022, equations 2 and 3; Hassibi and Stork, "Optimal Brain
Surgeon", 1993). No gradient and no labels; the scales stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from quant.graph import Graph
from quant.patches import is_supported, patches, rows_of, unrow
from quant.plan import FULL_WEIGHTS, IntegerWeight, Operator, QuantPlan
from quant.runtime import Feed, onnx_session

POSITIONS = 128
"""Output positions of a picture that are looked at, at most."""

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
    chosen = [node for node in found if is_supported(graph, node)]
    tensors = list(dict.fromkeys(node.input[0] for node in chosen))
    inner = [name for name in tensors if name not in graph.inputs]
    session = onnx_session(graph.to_light_model(inner), threads)
    # Each has a generator of its own, so that it does not matter in which order threads draw.
    draws = {node.output[0]: np.random.default_rng([seed, number]) for number, node in enumerate(chosen)}
    moments: dict[str, Moments] = {}

    def take_in(node: NodeProto) -> None:
        name = node.output[0]
        read = patches(graph, node, arrays[node.input[0]], draws[name], POSITIONS)
        if name in moments:
            moments[name].update(read)
        else:
            moments[name] = Moments.of(read)

    with ThreadPoolExecutor(threads) as pool:
        for feed in feeds:
            arrays = feed | dict(zip(inner, session.run(feed, inner), strict=True))
            list(pool.map(take_in, chosen))
    return {node.output[0]: moments[node.output[0]] for node in chosen if node.output[0] in moments}


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
        rows = rows_of(node, exact)
        wide = np.broadcast_to(
            np.expand_dims(scale, _other_axes(exact.ndim, plan.weights[operator.weight].axis)), exact.shape
        )
        steps = rows_of(node, wide)[:, :, 0]
        hessian = found.covariance() if biases_follow and node.op_type != "MatMul" else found.second_moment()
        noise = plan.activations[operator.activations[0]].scale ** 2 / 12
        limit = int(np.abs(integers[operator.weight].values).max())  # nearest rounding reaches it in every channel
        values = round_rows(rows / steps[:, :, None], hessian, noise, limit)
        integers[operator.weight] = IntegerWeight(unrow(node, values, exact.shape), scale)
    return integers


def round_rows(rows: np.ndarray, hessian: np.ndarray, noise: float, limit: int = FULL_WEIGHTS) -> np.ndarray:
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


def _other_axes(ndim: int, axis: int) -> tuple[int, ...]:
    return tuple(other for other in range(ndim) if other != axis)
