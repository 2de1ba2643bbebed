"""Coverage of files that others wrote: share of the multiply-accumulates whose operands are both in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from quant.calibration import count_work
from quant.execution import integer_operators
from quant.graph import Graph
from quant.plan import QUANTIZABLE
from quant.runtime import Feed
from quant.target import TargetName

IR = "inference.xml"
"""OpenVINO's own format, which some quantizers write."""

# Between an 8-bit value and the operator that reads it: layout, and the arithmetic of dequantization.
_TRANSPARENT = {"Convert", "Multiply", "Subtract", "Reshape", "Transpose", "Unsqueeze", "Squeeze"}
_IR_OPERATORS = {"Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul"}


def coverage(folder: Path, shape: list[int], threads: int) -> float | None:
    """Coverage of the model in a folder at an input shape, 0..1; None for Paddle programs."""
    if (folder / IR).is_file():
        return ir_coverage(folder / IR, shape)
    if (folder / "inference.onnx").is_file():
        return onnx_coverage(Graph(onnx.load(folder / "inference.onnx")), shape, threads)
    return None


def executed_share(target: TargetName, folder: Path, shape: list[int], threads: int) -> float | None:
    """Share of the multiply-accumulates on integer kernels, by the runtime's own account.

    Returns:
        None for Paddle programs, and for an IR: OpenVINO folds its batch normalization, and the convolutions' names go.
    """
    found = integer_operators(target, folder) if (folder / "inference.onnx").is_file() else None
    if found is None:
        return None
    graph = Graph(onnx.load(folder / "inference.onnx"))
    return _share(count_work(graph, _zeros(graph, shape), threads).macs, found)


def _share(macs: dict[str, int], names: set[str]) -> float:
    return sum(work for name, work in macs.items() if name in names) / (sum(macs.values()) or 1)


def _zeros(graph: Graph, shape: list[int]) -> Feed:
    return {name: np.zeros(shape, dtype=np.float32) for name in graph.inputs}


def onnx_coverage(graph: Graph, shape: list[int], threads: int) -> float:
    """Conv, ConvTranspose and MatMul whose two operands come from DequantizeLinear."""
    macs = count_work(graph, _zeros(graph, shape), threads).macs
    producers = graph.producers()
    names = set()
    for node in graph.nodes:
        if node.op_type in QUANTIZABLE:
            writers = [producers.get(name) for name in node.input[:2]]
            if all(writer is not None and writer.op_type == "DequantizeLinear" for writer in writers):
                names.add(node.output[0])
    return _share(macs, names)


def ir_coverage(file: Path, shape: list[int]) -> float:
    """Convolutions and MatMul whose two operands come from FakeQuantize or are stored as 8-bit integers."""
    import openvino

    model = openvino.Core().read_model(file)
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() in _IR_OPERATORS]
    # Sizes that the graph computes are known when it has run, not before.
    ports = [port for node in nodes for port in (node.input_value(0), node.output(0))]
    first = len(model.outputs)
    model.add_outputs(_unique(ports))
    request = openvino.compile_model(model, "CPU").create_infer_request()
    request.infer([np.zeros(shape, dtype=np.float32)])
    done = total = 0
    shapes = {_place(port): list(request.get_output_tensor(first + i).shape) for i, port in enumerate(_unique(ports))}
    for node in nodes:
        macs = _ir_macs(node, shapes[_place(node.input_value(0))], shapes[_place(node.output(0))])
        total += macs
        done += macs if all(_in_8_bits(node.input_value(index)) for index in (0, 1)) else 0
    return done / (total or 1)


def _ir_macs(node: Any, data: list[int], result: list[int]) -> int:
    kind = node.get_type_name()
    if kind == "MatMul":
        return int(np.prod(result)) * data[-2 if node.get_attributes()["transpose_a"] else -1]
    weight = list(node.input(1).get_shape())
    if kind == "ConvolutionBackpropData":  # weight: in, out, height, width
        return int(np.prod(data)) * int(np.prod(weight[1:]))
    return int(np.prod(result)) * int(np.prod(weight[2 if kind == "GroupConvolution" else 1 :]))


def _unique(ports: list[Any]) -> list[Any]:
    return list({_place(port): port for port in ports}.values())


def _place(port: Any) -> tuple[str, int]:
    return port.get_node().get_name(), port.get_index()


def _in_8_bits(port: Any) -> bool:
    node = port.get_node()
    while node.get_type_name() in _TRANSPARENT:
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Constant":
        return str(node.get_element_type().get_type_name()) in ("i8", "u8")
    return bool(node.get_type_name() == "FakeQuantize")
