"""Tiny ONNX graphs, built operator by operator, and short ways to run them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from quant.graph import Graph
from quant.plan import QuantPlan
from quant.runtime import Feed, onnx_session
from quant.simulation import simulated

Array = np.ndarray[Any, Any]
OPSET = 17


class TinyNet:
    """Adds operators one after the other; every method returns the name of the new tensor.

    Args:
        shape: of the input `x`.
        seed: of all weights.
        free: axes of the input whose size stays open.
    """

    def __init__(self, shape: Sequence[int], seed: int = 0, free: Sequence[int] = ()) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = tuple(shape)
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, Array] = {}
        declared = [f"size{axis}" if axis in free else size for axis, size in enumerate(shape)]
        self._input = helper.make_tensor_value_info("x", TensorProto.FLOAT, declared)

    def const(self, value: Any, name: str = "") -> str:
        name = name or f"c{len(self.constants)}"
        array = np.asarray(value)
        self.constants[name] = array.astype(np.float32) if array.dtype.kind == "f" else array
        return name

    def op(self, kind: str, *inputs: str, name: str = "", outputs: int = 1, **attributes: Any) -> str:
        names = [name or f"t{len(self.nodes)}", *(f"t{len(self.nodes)}_{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"node_{names[0]}", **attributes))
        return names[0]

    def weights(self, *shape: int) -> Array:
        fan = max(1, int(np.prod(shape[1:])))
        return (self.rng.standard_normal(shape) / np.sqrt(fan)).astype(np.float32)

    def conv(
        self, data: str, channels: int, out: int, *, kernel: int = 3, pad: int = 1, group: int = 1, bias: bool = True
    ) -> str:
        inputs = [data, self.const(self.weights(out, channels // group, kernel, kernel))]
        if bias:
            inputs.append(self.const(self.weights(out)))
        return self.op("Conv", *inputs, pads=[pad] * 4, group=group, kernel_shape=[kernel, kernel])

    def conv_transpose(self, data: str, channels: int, out: int, *, group: int = 1, bias: bool = True) -> str:
        inputs = [data, self.const(self.weights(channels, out // group, 2, 2))]
        if bias:
            inputs.append(self.const(self.weights(out)))
        return self.op("ConvTranspose", *inputs, strides=[2, 2], kernel_shape=[2, 2], group=group)

    def matmul(self, data: str, rows: int, columns: int) -> str:
        return self.op("MatMul", data, self.const(self.weights(rows, columns)))

    def batch_norm(self, data: str, channels: int) -> str:
        gamma, beta, mean = (self.rng.uniform(low, 1.5, channels) for low in (0.5, -1.5, -1.5))
        variance = self.rng.uniform(0.5, 2.0, channels)
        stored = [self.const(value.astype(np.float32)) for value in (gamma, beta, mean, variance)]
        return self.op("BatchNormalization", data, *stored, epsilon=1e-3)

    def model(self, *outputs: str) -> ModelProto:
        """The graph as a checked model; the last tensor is the output unless others are named."""
        names = outputs or (self.nodes[-1].output[0],)
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        initializers = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "tiny", [self._input], infos, initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        inferred = onnx.shape_inference.infer_shapes(model)
        del model.graph.output[:]
        model.graph.output.extend(inferred.graph.output)
        onnx.checker.check_model(model, full_check=True)
        return model

    def graph(self, *outputs: str) -> Graph:
        return Graph(self.model(*outputs))

    def feed(self, seed: int = 1, scale: float = 1.0) -> Feed:
        return {"x": (scale * np.random.default_rng(seed).standard_normal(self.shape)).astype(np.float32)}


def run(model: ModelProto, feed: Feed, *outputs: str) -> list[Array]:
    return onnx_session(model, 1).run(feed, outputs or None)


def simulate(model: ModelProto, feed: Feed, *outputs: str) -> list[Array]:
    return onnx_session(model, 1, integers=False).run(feed, outputs or None)


def simulated_model(prepared: Graph, plan: QuantPlan) -> ModelProto:
    """The reference output of a plan as a model."""
    return simulated(prepared, plan).to_model()


def kinds(graph: Graph) -> list[str]:
    return [node.op_type for node in graph.nodes]


def session_values(file: Path, feed: Feed, *, optimized: bool) -> list[Array]:
    """Outputs of an ONNX file in onnxruntime, with all its graph optimizations or with none."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def small_detector() -> TinyNet:
    """Convolution, depthwise convolution, HardSwish, ConvTranspose and Sigmoid, as in a DB detector."""
    net = TinyNet((1, 3, 8, 8), seed=3, free=(0, 2, 3))
    stem = net.op("HardSwish", net.conv("x", 3, 8))
    deep = net.op("Relu", net.conv(stem, 8, 8, group=8))
    up = net.conv_transpose(deep, 8, 4)
    net.op("Sigmoid", net.conv(up, 4, 1, kernel=1, pad=0), name="map")
    return net


def small_recognizer() -> TinyNet:
    """Convolution, then attention: MatMul by weights and of two activations, Softmax."""
    net = TinyNet((1, 3, 4, 8), seed=5, free=(0, 3))
    stem = net.op("HardSwish", net.conv("x", 3, 6))
    pooled = net.op("ReduceMean", stem, axes=[2], keepdims=0)
    tokens = net.op("Transpose", pooled, perm=[0, 2, 1])
    query, key = net.matmul(tokens, 6, 6), net.matmul(tokens, 6, 6)
    scores = net.op("MatMul", query, net.op("Transpose", key, perm=[0, 2, 1]))
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), tokens)
    net.op("Softmax", net.matmul(mixed, 6, 9), axis=-1, name="characters")
    return net
