"""The plan's reference output: quantization written as plain float arithmetic.

Independent of any runtime's Q/DQ or integer kernels; exports are compared with it.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, helper

from quant.flow import GATE_READ_SCALE, GATE_SCALE, GATE_ZERO
from quant.graph import Graph
from quant.observer import affine_parameters
from quant.placement import place
from quant.plan import ActivationQuantizer, IntegerWeight, QuantPlan, dequantize_weight


def simulated_model(prepared: Graph, plan: QuantPlan) -> ModelProto:
    """The prepared graph in which quantized tensors are rounded and clipped in float32."""
    return place(prepared, plan, FloatWriter()).to_model()


class FloatWriter:
    """Quantization as float arithmetic (see `quant.placement.Writer`). Biases stay as they are."""

    def rounded(self, graph: Graph, before: NodeProto, tensor: str, scale: float, zero_point: int, dtype: str) -> str:
        return _rounded(graph, before, tensor, (scale, zero_point, dtype), (scale, zero_point))

    def constant(self, graph: Graph, before: NodeProto, stem: str, values: np.ndarray) -> str:
        integers, scale, zero_point = rounded_constant(values)
        return graph.add_constant(stem, (integers.astype(np.float32) - zero_point) * np.float32(scale))

    def gate(self, graph: Graph, before: NodeProto, tensor: str) -> str:
        return _rounded(graph, before, tensor, (GATE_SCALE, GATE_ZERO, "uint8"), (GATE_READ_SCALE, 0))

    def weight(self, graph: Graph, before: NodeProto, name: str, weight: IntegerWeight, axis: int) -> str:
        return graph.add_constant(f"{name}_simulated", dequantize_weight(weight, axis))

    def bias(self, graph: Graph, before: NodeProto, name: str, scale: np.ndarray) -> str:
        return name


def rounded_constant(values: np.ndarray) -> tuple[np.ndarray, float, int]:
    """A constant in U8: integers, scale, zero point."""
    scale, zero_point, low, high = affine_parameters(float(values.min()), float(values.max()), symmetric=False)
    integers = np.clip(np.rint(values / np.float32(scale)) + zero_point, low, high)
    return integers.astype(np.uint8), scale, zero_point


def _rounded(
    graph: Graph, before: NodeProto, tensor: str, written: tuple[float, int, str], read: tuple[float, int]
) -> str:
    """Nodes that round and clip as one quantizer does, and read the integers on another scale."""
    (scale, zero_point, dtype), (read_scale, read_zero_point) = written, read
    smallest, largest = integer_limits(dtype)
    values = {
        "scale": scale,
        "low": smallest - zero_point,
        "high": largest - zero_point,
        "move": zero_point - read_zero_point,
        "read_scale": read_scale,
    }
    number = {key: graph.add_constant(f"{tensor}_{key}", np.asarray(v, dtype=np.float32)) for key, v in values.items()}
    steps = [("Div", ["scale"]), ("Round", []), ("Clip", ["low", "high"]), ("Add", ["move"]), ("Mul", ["read_scale"])]
    for kind, keys in steps:
        if kind == "Add" and not values["move"]:
            continue
        name = graph.fresh_name(f"{tensor}_sim")
        node = helper.make_node(kind, [tensor, *(number[key] for key in keys)], [name], name=name)
        graph.insert_before(before, node)
        tensor = name
    return tensor


def integer_limits(dtype: str) -> tuple[int, int]:
    """Smallest and largest integer of a quantizer; S8 is symmetric in meaning but clips at -128."""
    return (0, 255) if dtype == "uint8" else (-128, 127)


def make_quantizer(tensor: str, low: float, high: float, dtype: str) -> ActivationQuantizer:
    """The quantizer of a tensor for a chosen range in real units."""
    scale, zero_point, _, _ = affine_parameters(low, high, symmetric=dtype == "int8")
    return ActivationQuantizer(tensor=tensor, dtype=dtype, scale=scale, zero_point=zero_point)  # type: ignore[arg-type]
