"""The plan's reference output: every quantized tensor rounded where it stands, all arithmetic in float32.

Independent of integer kernels and of what runtimes fuse; exports are compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto, helper

from quant.flow import GATE_READ_SCALE, GATE_SCALE, GATE_ZERO
from quant.graph import Graph
from quant.observer import affine_parameters
from quant.placement import place
from quant.plan import ActivationQuantizer, IntegerWeight, QuantPlan, dequantize_weight
from quant.runtime import Session, onnx_session


def simulated_session(prepared: Graph, plan: QuantPlan, threads: int) -> Session:
    """The simulation, ready to run."""
    return onnx_session(simulated(prepared, plan).to_light_model(), threads, integers=False)


def simulated(prepared: Graph, plan: QuantPlan) -> Graph:
    """The prepared graph in which quantized tensors are rounded and clipped; to be run without integer kernels."""
    return place(prepared, plan, FloatWriter())


@dataclass
class FloatWriter:
    """Quantization of float tensors in place (see `quant.placement.Writer`).

    Q and DQ stand side by side, so that whatever reads the tensor reads floats; weights are floats from the start.

    Attributes:
        bias_steps: of the integer biases written so far, float32[C] by what the convolution writes.
    """

    bias_steps: dict[str, np.ndarray] = field(default_factory=dict)

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
        # Backgrounds are flat: next to a boundary of the following quantizer half a step moves all of one.
        self.bias_steps[before.output[0]] = scale
        rounded = integer_bias(graph.constants[name], scale).astype(np.float32) * scale.astype(np.float32)
        return graph.add_constant(f"{name}_simulated", rounded)


def integer_bias(bias: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """A bias in S32 on a scale for each channel."""
    limits = np.iinfo(np.int32)
    return np.clip(np.rint(bias / scale.astype(np.float64)), limits.min, limits.max).astype(np.int32)


def rounded_constant(values: np.ndarray) -> tuple[np.ndarray, float, int]:
    """A constant in U8: integers, scale, zero point."""
    scale, zero_point, low, high = affine_parameters(float(values.min()), float(values.max()), symmetric=False)
    integers = np.clip(np.rint(values / np.float32(scale)) + zero_point, low, high)
    return integers.astype(np.uint8), scale, zero_point


def _rounded(
    graph: Graph, before: NodeProto, tensor: str, written: tuple[float, int, str], read: tuple[float, int]
) -> str:
    """Nodes that round and clip as one quantizer does, and read the integers on another scale."""
    stored = np.uint8 if written[2] == "uint8" else np.int8
    for kind, (scale, zero_point) in (("QuantizeLinear", written[:2]), ("DequantizeLinear", read)):
        numbers = [
            graph.add_constant(f"{tensor}_scale", np.asarray(scale, dtype=np.float32)),
            graph.add_constant(f"{tensor}_zero_point", np.asarray(zero_point, dtype=stored)),
        ]
        name = graph.fresh_name(f"{tensor}_sim")
        graph.insert_before(before, helper.make_node(kind, [tensor, *numbers], [name], name=name))
        tensor = name
    return tensor


def integer_limits(dtype: str) -> tuple[int, int]:
    """Smallest and largest integer of a quantizer; S8 is symmetric in meaning but clips at -128."""
    return (0, 255) if dtype == "uint8" else (-128, 127)


def make_quantizer(tensor: str, low: float, high: float, dtype: str) -> ActivationQuantizer:
    """The quantizer of a tensor for a chosen range in real units."""
    scale, zero_point, _, _ = affine_parameters(low, high, symmetric=dtype == "int8")
    return ActivationQuantizer(tensor=tensor, dtype=dtype, scale=scale, zero_point=zero_point)  # type: ignore[arg-type]
