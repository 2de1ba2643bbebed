"""Operators as products of matrices: their weights as rows, what single positions read and what they write.

A position is a pixel that a convolution writes, a pixel that a transposed one reads, a row of a product.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from quant.graph import Graph, attribute

LARGEST = 2304
"""Most inputs of a row: second moments of more take too much memory."""


def is_supported(graph: Graph, node: NodeProto) -> bool:
    """Whether a Conv, ConvTranspose or MatMul has constant weights in a layout that this module knows."""
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


def rows_of(node: NodeProto, weight: np.ndarray) -> np.ndarray:
    """A weight as [groups, rows, inputs]; a row of a ConvTranspose is a pixel of an output channel."""
    if node.op_type == "Conv":
        groups = attribute(node, "group", 1)
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    return np.moveaxis(weight, 0, -1).reshape(1, -1, weight.shape[0])


def unrow(node: NodeProto, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The int8 weight of this shape whose rows are these."""
    if node.op_type == "Conv":
        return rows.reshape(shape).astype(np.int8)
    return np.ascontiguousarray(np.moveaxis(rows.reshape(*shape[1:], shape[0]), -1, 0)).astype(np.int8)


def patches(graph: Graph, node: NodeProto, values: np.ndarray, rng: np.random.Generator, most: int) -> np.ndarray:
    """What some positions read, float32[groups, positions, inputs].

    Args:
        values: the operator's input.
        rng: draws the positions; in the same state it draws the same ones as for `written`.
        most: positions.
    """
    if node.op_type == "MatMul":
        return _some(values.reshape(-1, values.shape[-1]), rng, most)[None]
    if node.op_type == "ConvTranspose":
        return _some(np.moveaxis(values, 1, -1).reshape(-1, values.shape[1]), rng, most)[None]
    kernel = graph.constants[node.input[1]].shape[2:]
    groups = attribute(node, "group", 1)
    strides, dilations = attribute(node, "strides", [1, 1]), attribute(node, "dilations", [1, 1])
    top, left, bottom, right = attribute(node, "pads", [0, 0, 0, 0])
    padded = np.pad(values, ((0, 0), (0, 0), (top, bottom), (left, right)))
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    height, width = ((size - r) // s + 1 for size, r, s in zip(padded.shape[2:], reach, strides, strict=True))
    picture, row, column = _places((len(padded), height, width), rng, most)
    down = row[:, None, None] * strides[0] + np.arange(kernel[0])[None, :, None] * dilations[0]
    across = column[:, None, None] * strides[1] + np.arange(kernel[1])[None, None, :] * dilations[1]
    taken = padded[picture[:, None, None], :, down, across]  # [positions, kh, kw, channels]
    taken = np.moveaxis(taken, -1, 1)
    grouped = taken.reshape(len(picture), groups, -1)
    return np.ascontiguousarray(grouped.transpose(1, 0, 2))


def written(graph: Graph, node: NodeProto, values: np.ndarray, rng: np.random.Generator, most: int) -> np.ndarray:
    """What some positions write, float32[groups, positions, rows]; see `patches`.

    Args:
        values: the operator's output.
    """
    if node.op_type == "MatMul":
        return _some(values.reshape(-1, values.shape[-1]), rng, most)[None]
    if node.op_type == "ConvTranspose":
        high, wide = graph.constants[node.input[1]].shape[2:]
        count, channels, height, width = values.shape
        pixels = values.reshape(count, channels, height // high, high, width // wide, wide)
        return _some(pixels.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels * high * wide), rng, most)[None]
    groups = attribute(node, "group", 1)
    picture, row, column = _places((len(values), *values.shape[2:]), rng, most)
    taken = values[picture, :, row, column].reshape(len(picture), groups, -1)
    return np.ascontiguousarray(taken.transpose(1, 0, 2))


def _places(shape: tuple[int, ...], rng: np.random.Generator, most: int) -> tuple[np.ndarray, ...]:
    count = int(np.prod(shape))
    return np.unravel_index(rng.choice(count, min(count, most), replace=False), shape)


def _some(rows: np.ndarray, rng: np.random.Generator, most: int) -> np.ndarray:
    return rows if len(rows) <= most else rows[rng.choice(len(rows), most, replace=False)]
