"""Writes a prepared graph, in FP32 or by a plan, as an old-IR Paddle inference program.

Tensors keep the names that they have in the graph. Paddle's `shape` operator gives int32, so every
integer tensor of the program is int32.

Quantization is written with operators that mean the same in all ways in which Paddle Inference 3.2.2
runs a program. PaddleSlim's own form does not: under the new IR, PaddleX's default, its
`dequantize_linear` fails on int8 weights and silently acts as `quantize_linear` on activations.
* an activation passes `quantize_linear`, which ignores its zero point (hence S8 symmetric), and `scale`;
* a weight is stored as int8 and passes `cast` and `elementwise_mul`, which the new IR folds when it loads.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto

from quant.errors import InputError
from quant.graph import Graph, attribute, reads
from quant.plan import Operator, QuantPlan
from quant.splice import cut_of, splice

MODEL_FILE = "inference.pdmodel"
PARAMS_FILE = "inference.pdiparams"

_INT32_MAX = 2**31 - 1

Array = npt.NDArray[Any]


def import_paddle() -> Any:
    """Paddle in static mode with old-IR programs and without its notices.

    The flag acts only before the first import of Paddle in a process.
    """
    os.environ.setdefault("FLAGS_enable_pir_api", "0")
    if "paddle" not in sys.modules:
        os.environ.setdefault("GLOG_minloglevel", "2")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No ccache found")
        import paddle

    paddle.enable_static()
    return paddle


def write_program(graph: Graph, folder: Path, plan: QuantPlan | None = None, original: Path | None = None) -> None:
    """Write `inference.pdmodel` and `inference.pdiparams`.

    Args:
        graph: prepared graph; its input and output names become the feed and fetch names.
        folder: made if it is missing.
        plan: which operators run in INT8; without it all stay in FP32.
        original: folder of the old-IR program that the graph was imported from, under the same names. It provides
            what has no counterpart here (see `quant.splice`).

    Raises:
        InputError: an operator that has no counterpart here; names the operator and its tensor. Or the plan quantizes
            one that comes after it.
        ValueError: the plan holds an activation that is not S8 symmetric.
    """
    _check_plan(plan)
    paddle = import_paddle()
    part = graph if original is None else part_before(graph, original)
    if plan is not None:
        _check_complete(part, plan)
    with _own_scope(paddle):
        builder = ProgramBuilder(paddle, part, plan)
        for node in part.nodes:
            builder.write(node)
        program, parameters = builder.serialize()
        if original is not None and part is not graph:
            program, parameters = _continued(paddle, program, original, part.outputs, graph)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_bytes(program)
    (folder / PARAMS_FILE).write_bytes(parameters)


def writable_part(graph: Graph) -> Graph:
    """What of a graph can be written here: all operators before the first of each path that has no counterpart.

    Returns:
        The graph itself where that is all of it, else a copy that ends before what is missing.
    """
    computed, refused = _writable(graph)
    if not refused:
        return graph
    behind = {name for node in graph.nodes if not computed.issuperset(node.output) for name in reads(node)}
    return graph.ending_at(sorted(computed & (behind | set(graph.outputs))))


def part_before(graph: Graph, original: Path) -> Graph:
    """What of a graph is written here where the original provides the rest; the graph itself where nothing is."""
    computed, refused = _writable(graph)
    return graph.ending_at(cut_of((original / MODEL_FILE).read_bytes(), computed)) if refused else graph


def unwritten(graph: Graph) -> dict[str, str]:
    """Why tensors are computed by no program written here: the first operator before each that has no counterpart."""
    return _writable(graph)[1]


def _writable(graph: Graph) -> tuple[set[str], dict[str, str]]:
    """Float tensors that can be computed by operators written here, and why each of the other tensors cannot."""
    paddle = import_paddle()
    refused: dict[str, str] = {}
    with _own_scope(paddle):
        builder = ProgramBuilder(paddle, graph, None)
        for node in graph.nodes:
            inherited = [refused[name] for name in reads(node) if name in refused]
            if reason := inherited[0] if inherited else _refusal(builder, node):
                refused.update(dict.fromkeys(node.output, reason))
        computed = {name for node in graph.nodes for name in node.output} - set(refused)
        return {name for name in computed if name and not builder.is_integer(name)}, refused


def _refusal(builder: ProgramBuilder, node: NodeProto) -> str:
    """Why a node has no counterpart; empty where it was written."""
    try:
        builder.write(node)
    except InputError as error:
        return str(error)
    return ""


def _check_complete(part: Graph, plan: QuantPlan) -> None:
    written = {name for node in part.nodes for name in node.output}
    for operator in plan.quantized().values():
        if operator.name not in written:
            raise InputError(
                f"operator {operator.op_type} '{operator.name}' comes after one that the Paddle program has no "
                "counterpart for, and cannot be in INT8 there; keep it in FP32 by the recipe's policy"
            )


@contextmanager
def _own_scope(paddle: Any) -> Iterator[None]:
    """Keeps parameters and names of different models apart.

    Works where somebody imported Paddle before us without the flag.
    """
    scope = paddle.static.scope_guard(paddle.static.Scope())
    with paddle.pir_utils.OldIrGuard(), scope, paddle.utils.unique_name.guard():
        yield


def _continued(paddle: Any, program: bytes, original: Path, cut: list[str], graph: Graph) -> tuple[bytes, bytes]:
    """The program with the rest of the original behind it, and the parameters of both."""
    spliced = splice(program, (original / MODEL_FILE).read_bytes(), cut)
    scope, executor = paddle.static.global_scope(), paddle.static.Executor(paddle.CPUPlace())
    with paddle.static.scope_guard(paddle.static.Scope()):
        paddle.static.load_inference_model(
            str(original), executor, model_filename=MODEL_FILE, params_filename=PARAMS_FILE
        )
        values = {name: np.array(paddle.static.global_scope().find_var(name).get_tensor()) for name in spliced.weights}
    for name, value in values.items():
        if scope.find_var(name) is None:
            scope.var(name).get_tensor().set(value, paddle.CPUPlace())
    joined = paddle.static.Program.parse_from_string(spliced.program)
    return serialize_program(paddle, joined, graph.inputs, graph.outputs)


def _check_plan(plan: QuantPlan | None) -> None:
    for quantizer in plan.used_activations().values() if plan else ():
        if quantizer.dtype != "int8" or quantizer.zero_point != 0:
            raise ValueError(
                f"{quantizer.tensor}: {quantizer.dtype} with zero point {quantizer.zero_point}; "
                "Paddle Inference knows only int8 with zero point 0"
            )


def serialize_program(paddle: Any, program: Any, inputs: list[str], outputs: list[str]) -> tuple[bytes, bytes]:
    """An inference program of what the outputs depend on, and its parameters in the sorted order of their names."""
    static, block = paddle.static, program.global_block()
    feeds, fetches = ([block.var(name) for name in names] for names in (inputs, outputs))
    normal = static.normalize_program(program, feeds, fetches)
    for operator in (operator for part in normal.blocks for operator in part.ops):
        if operator.has_attr("op_callstack"):
            operator.desc.remove_attr("op_callstack")  # holds paths of this machine
    parameters = static.serialize_persistables(feeds, fetches, static.Executor(paddle.CPUPlace()), program=normal)
    # `static.serialize_program` would add feed and fetch operators anew, call stacks included.
    return normal.desc.serialize_to_string(), parameters or b""


class ProgramBuilder:
    """A Paddle program under construction, one operator of the graph after the other."""

    def __init__(self, paddle: Any, graph: Graph, plan: QuantPlan | None) -> None:
        self._paddle = paddle
        self._graph = graph
        self._plan = plan
        self._quantized: dict[str, Operator] = plan.quantized() if plan else {}
        self._program = paddle.static.Program()
        self._block = self._program.global_block()
        self._values: dict[str, list[Entry]] = {}
        self._origins: dict[str, str] = {}
        for info in graph.to_light_model().model.graph.input:
            if info.name in graph.inputs:
                self._declare_input(info.name, info.type.tensor_type)

    def write(self, node: NodeProto) -> None:
        """Append the operators that compute a node."""
        writer = _WRITERS.get(node.op_type)
        if writer is None:
            raise unsupported(node, "the Paddle program has no counterpart for it")
        writer(self, node)

    def serialize(self) -> tuple[bytes, bytes]:
        """The finished program and its parameters (in the sorted order of their names)."""
        fed = {name for node in self._graph.nodes for name in node.input}
        inputs = [name for name in self._graph.inputs if name in fed]
        return serialize_program(self._paddle, self._program, inputs, self._graph.outputs)

    def emit(
        self,
        kind: str,
        inputs: Mapping[str, str | list[str]],
        outputs: Mapping[str, str | list[str]],
        **attributes: Any,
    ) -> None:
        """Append one Paddle operator; its outputs are declared here, their shapes by Paddle."""
        written = {slot: names if isinstance(names, list) else [names] for slot, names in outputs.items()}
        for name in (name for names in written.values() for name in names):
            if not self._block.has_var(name):
                self._block.create_var(name=name, dtype="float32", persistable=False)
        self._block.append_op(
            type=kind,
            inputs={slot: names if isinstance(names, list) else [names] for slot, names in inputs.items()},
            outputs=written,
            attrs=attributes,
        )

    def operand(self, node: NodeProto, index: int) -> str:
        """The variable of a node's input, behind quantization where the plan has the operator in INT8."""
        name = node.input[index]
        operator = self._quantized.get(node.output[0])
        if operator is not None and name == operator.weight:
            return self._integer_weight(name)
        if operator is not None and name in operator.activations:
            return self._rounded(name)
        return self.variable(name)

    def variable(self, name: str) -> str:
        """The variable of a tensor; a constant becomes a parameter when it is first asked for."""
        value = self.constant(name)
        if value is None or self._block.has_var(name):
            return name
        if value.dtype.kind == "f":
            return self.parameter(name, value.astype(np.float32))
        self.emit(
            "assign_value",
            {},
            {"Out": name},
            shape=list(value.shape),
            dtype=self.element_type("INT32"),
            values=[int(v) for v in value.ravel()],
        )
        return name

    def constant(self, name: str) -> Array | None:
        """The value of a constant; None for a tensor that is computed."""
        return self._graph.constants.get(name)

    def integers(self, node: NodeProto, index: int, what: str) -> list[int] | None:
        """A list of integers given as input; None where the input is left out."""
        if len(node.input) <= index or not node.input[index]:
            return None
        value = self.constant(node.input[index])
        if value is None:
            raise unsupported(node, f"its {what} must be constant")
        return [int(np.clip(v, -_INT32_MAX, _INT32_MAX)) for v in value.ravel()]

    def shape(self, name: str) -> list[int]:
        """The shape as far as it is known, -1 where it is not."""
        value = self.constant(name)
        return list(self._block.var(name).shape) if value is None else list(value.shape)

    def is_integer(self, name: str) -> bool:
        value = self.constant(name)
        if value is not None:
            return value.dtype.kind in "iu"
        return bool(self._block.var(name).dtype == self._paddle.int32)

    def entries(self, name: str) -> list[Entry] | None:
        """What is known of the elements of a small integer tensor; None where it is not one."""
        value = self.constant(name)
        if value is not None and value.dtype.kind in "iu" and value.ndim <= 1:
            return [int(v) for v in value.ravel()]
        return self._values.get(name)

    def origin(self, name: str) -> str:
        """The first tensor of a chain of element-wise operators, whose shape this tensor has."""
        return self._origins.get(name, name)

    def keep_shape(self, name: str, source: str) -> None:
        """Remember that a tensor has the shape of another one."""
        self._origins[name] = self.origin(source)

    def know(self, name: str, entries: list[Entry] | None) -> None:
        """Remember the elements of a small integer tensor."""
        if entries is not None:
            self._values[name] = entries

    def number(self, name: str, value: int) -> str:
        """An integer as a variable of one element."""
        kind = self.element_type("INT32")
        self.emit("fill_constant", {}, {"Out": name}, shape=[1], dtype=kind, value=float(value), str_value=str(value))
        return name

    def element_type(self, name: str) -> int:
        """Paddle's number for FP32, INT32 or INT8."""
        return int(getattr(self._paddle.base.core.VarDesc.VarType, name).value)

    def _declare_input(self, name: str, kind: Any) -> None:
        if kind.elem_type not in (TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64):
            raise InputError(f"input {name}: element type {TensorProto.DataType.Name(kind.elem_type)} is not supported")
        shape = [dim.dim_value or -1 for dim in kind.shape.dim]
        variable = self._block.create_var(
            name=name, shape=shape, dtype="float32" if kind.elem_type == TensorProto.FLOAT else "int32", is_data=True
        )
        variable.desc.set_need_check_feed(True)

    def parameter(self, name: str, value: Array) -> str:
        """Store a tensor once under its name, and return the name."""
        if not self._block.has_var(name):
            self._block.create_var(name=name, shape=value.shape, dtype=str(value.dtype), persistable=True)
            tensor = self._paddle.static.global_scope().var(name).get_tensor()
            tensor.set(np.ascontiguousarray(value), self._paddle.CPUPlace())
        return name

    def _rounded(self, name: str) -> str:
        """The tensor after rounding to its integers, once for all its readers.

        `quantize_linear` rounds half to even and clips to -128..127. Its `Scale` is what 127 stands for.
        """
        assert self._plan is not None
        result = f"{name}.quantized.dequantized"
        if not self._block.has_var(result):
            step = np.float32(self._plan.activations[name].scale)
            inputs: dict[str, str | list[str]] = {
                "X": self.variable(name),
                "Scale": self.parameter(f"{name}@scale", np.array([step * np.float32(127)], dtype=np.float32)),
                "ZeroPoint": self.parameter(f"{name}@zero_point", np.zeros(1, dtype=np.int32)),
            }
            self.emit(
                "quantize_linear",
                inputs,
                {"Y": f"{name}.quantized"},
                quant_axis=-1,
                bit_length=8,
                round_type=0,
                is_test=True,
                only_observer=False,
            )
            self.emit(
                "scale", {"X": f"{name}.quantized"}, {"Out": result}, scale=float(step), bias=0.0, bias_after_scale=True
            )
        return result

    def _integer_weight(self, name: str) -> str:
        """The float values of a weight that is stored as int8."""
        assert self._plan is not None
        result = f"{name}.dequantized"
        if not self._block.has_var(result):
            weight = self._plan.integers[name]
            shape = [1] * weight.values.ndim
            shape[self._plan.weights[name].axis] = -1
            self.emit(
                "cast",
                {"X": self.parameter(f"{name}.int8", weight.values)},
                {"Out": f"{name}.cast"},
                in_dtype=self.element_type("INT8"),
                out_dtype=self.element_type("FP32"),
            )
            scale = self.parameter(f"{name}@scale", weight.scale.reshape(shape).astype(np.float32))
            self.emit("elementwise_mul", {"X": f"{name}.cast", "Y": scale}, {"Out": result}, axis=-1)
        return result


# An element of a shape: a number, or the axis of a tensor (its name and the axis).
Entry = int | tuple[str, int] | None
OpWriter = Callable[[ProgramBuilder, NodeProto], None]


def unsupported(node: NodeProto, why: str) -> InputError:
    return InputError(f"operator {node.op_type} that writes tensor '{node.output[0]}': {why}")


def _write_conv(builder: ProgramBuilder, node: NodeProto) -> None:
    weight = builder.shape(node.input[1])
    group = attribute(node, "group", 1)
    depthwise = group > 1 and group == weight[0] and weight[1] == 1
    inputs: dict[str, str | list[str]] = {"Input": builder.operand(node, 0), "Filter": builder.operand(node, 1)}
    result = _before_bias(node)
    builder.emit(
        "depthwise_conv2d" if depthwise else "conv2d",
        inputs,
        {"Output": result},
        **_window(builder, node),
        groups=group,
    )
    _write_bias(builder, node, result)


def _write_conv_transpose(builder: ProgramBuilder, node: NodeProto) -> None:
    if attribute(node, "output_shape") is not None:
        raise unsupported(node, "a fixed output_shape is not supported")
    inputs: dict[str, str | list[str]] = {"Input": builder.operand(node, 0), "Filter": builder.operand(node, 1)}
    result = _before_bias(node)
    builder.emit(
        "conv2d_transpose",
        inputs,
        {"Output": result},
        **_window(builder, node),
        groups=attribute(node, "group", 1),
        output_size=[],
        output_padding=list(attribute(node, "output_padding", [])),
    )
    _write_bias(builder, node, result)


def _before_bias(node: NodeProto) -> str:
    return f"{node.output[0]}.without_bias" if len(node.input) > 2 else node.output[0]


def _write_bias(builder: ProgramBuilder, node: NodeProto, result: str) -> None:
    if len(node.input) > 2:
        builder.emit(
            "elementwise_add", {"X": result, "Y": builder.variable(node.input[2])}, {"Out": node.output[0]}, axis=1
        )


def _window(builder: ProgramBuilder, node: NodeProto) -> dict[str, Any]:
    """Strides, paddings and dilations of a two-dimensional convolution."""
    if len(builder.shape(node.input[1])) != 4:
        raise unsupported(node, "only two-dimensional convolutions are supported")
    return {
        "strides": list(attribute(node, "strides", [1, 1])),
        "dilations": list(attribute(node, "dilations", [1, 1])),
        "paddings": _paddings(node),
        "padding_algorithm": "EXPLICIT",
        "data_format": "NCHW",
    }


def _paddings(node: NodeProto) -> list[int]:
    """ONNX [top, left, bottom, right] as Paddle's [height, width] or [top, bottom, left, right]."""
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto not in ("NOTSET", "VALID"):
        raise unsupported(node, f"auto_pad {auto} is not supported")
    top, left, bottom, right = attribute(node, "pads", [0, 0, 0, 0])
    return [top, left] if (top, left) == (bottom, right) else [top, bottom, left, right]


def _write_matmul(builder: ProgramBuilder, node: NodeProto) -> None:
    weight = builder.constant(node.input[1])
    if weight is not None and weight.ndim == 1:  # PaddleSlim looks for the channels of every matmul's weight
        products = f"{node.output[0]}.products"
        inputs = {"X": builder.variable(node.input[0]), "Y": builder.variable(node.input[1])}
        builder.emit("elementwise_mul", inputs, {"Out": products}, axis=-1)
        builder.emit("reduce_sum", {"X": products}, {"Out": node.output[0]}, dim=[-1], keep_dim=False, reduce_all=False)
        return
    builder.emit(
        "matmul_v2",
        {"X": builder.operand(node, 0), "Y": builder.operand(node, 1)},
        {"Out": node.output[0]},
        trans_x=False,
        trans_y=False,
    )


def _elementwise(kind: str) -> OpWriter:
    def write(builder: ProgramBuilder, node: NodeProto) -> None:
        if len(node.input) != 2:
            raise unsupported(node, "exactly two inputs are supported")
        first, second = node.input
        if kind in ("elementwise_add", "elementwise_mul") and builder.constant(first) is not None:
            first, second = second, first  # Paddle expects the larger tensor first
        if not _write_scale(builder, node, kind, first, second):
            builder.emit(
                kind, {"X": builder.variable(first), "Y": builder.variable(second)}, {"Out": node.output[0]}, axis=-1
            )

    return write


def _write_div(builder: ProgramBuilder, node: NodeProto) -> None:
    dividend, divisor = node.input
    if builder.constant(divisor) is not None or builder.shape(dividend) == builder.shape(divisor):
        _elementwise("elementwise_div")(builder, node)
        return
    # The oneDNN kernel divides the wrong way round where the dividend is the smaller tensor.
    inverse = f"{node.output[0]}.inverse"
    builder.emit("reciprocal", {"X": divisor}, {"Out": inverse})
    builder.emit("elementwise_mul", {"X": inverse, "Y": builder.variable(dividend)}, {"Out": node.output[0]}, axis=-1)


def _write_scale(builder: ProgramBuilder, node: NodeProto, kind: str, data: str, other: str) -> bool:
    """A float tensor times or plus a single number as the `scale` operator; False where it is not that."""
    value = builder.constant(other)
    if value is None or value.size != 1 or value.dtype != np.float32 or value.ndim > len(builder.shape(data)):
        return False
    number = float(value.ravel()[0])
    attributes = {"elementwise_add": (1.0, number), "elementwise_sub": (1.0, -number), "elementwise_mul": (number, 0.0)}
    if kind not in attributes or builder.constant(data) is not None:
        return False
    scale, bias = attributes[kind]
    builder.emit("scale", {"X": data}, {"Out": node.output[0]}, scale=scale, bias=bias, bias_after_scale=True)
    builder.keep_shape(node.output[0], data)
    return True


def _unary(kind: str, **attributes: Any) -> OpWriter:
    def write(builder: ProgramBuilder, node: NodeProto) -> None:
        builder.emit(kind, {"X": builder.variable(node.input[0])}, {"Out": node.output[0]}, **attributes)

    return write


def _write_hard_sigmoid(builder: ProgramBuilder, node: NodeProto) -> None:
    _unary("hard_sigmoid", slope=attribute(node, "alpha", 0.2), offset=attribute(node, "beta", 0.5))(builder, node)


def _write_leaky_relu(builder: ProgramBuilder, node: NodeProto) -> None:
    _unary("leaky_relu", alpha=attribute(node, "alpha", 0.01))(builder, node)


def _write_clip(builder: ProgramBuilder, node: NodeProto) -> None:
    limits = []
    for index, default in ((1, np.finfo(np.float32).min), (2, np.finfo(np.float32).max)):
        given = len(node.input) > index and node.input[index]
        value = builder.constant(node.input[index]) if given else np.array(default)
        if value is None:
            raise unsupported(node, "its limits must be constant")
        limits.append(float(value.ravel()[0]))
    _unary("clip", min=limits[0], max=limits[1])(builder, node)


def _write_softmax(builder: ProgramBuilder, node: NodeProto) -> None:
    _unary("softmax", axis=attribute(node, "axis", -1))(builder, node)


def _write_layer_norm(builder: ProgramBuilder, node: NodeProto) -> None:
    rank = len(builder.shape(node.input[0]))
    scale = builder.constant(node.input[1])
    if scale is None or scale.ndim != 1:
        raise unsupported(node, "its scale must be a constant vector")
    if len(node.input) > 2 and node.input[2]:
        bias = builder.variable(node.input[2])
    else:  # the oneDNN kernel computes nonsense without one
        bias = builder.parameter(f"{node.output[0]}.zero_bias", np.zeros_like(scale))
    builder.emit(
        "layer_norm",
        {"X": builder.variable(node.input[0]), "Scale": builder.variable(node.input[1]), "Bias": bias},
        {"Y": node.output[0], "Mean": f"{node.output[0]}.mean", "Variance": f"{node.output[0]}.variance"},
        epsilon=attribute(node, "epsilon", 1e-5),
        begin_norm_axis=attribute(node, "axis", -1) % rank,
    )


def _write_global_pool(builder: ProgramBuilder, node: NodeProto) -> None:
    _unary("pool2d", pooling_type="avg", ksize=[1, 1], adaptive=True, data_format="NCHW")(builder, node)


def _pool(kind: str) -> OpWriter:
    def write(builder: ProgramBuilder, node: NodeProto) -> None:
        size = list(attribute(node, "kernel_shape"))
        dilated = any(d != 1 for d in attribute(node, "dilations", [1, 1]))
        if len(size) != 2 or dilated or len(node.output) > 1:
            raise unsupported(node, "only plain two-dimensional pooling is supported")
        _unary(
            "pool2d",
            pooling_type=kind,
            ksize=size,
            strides=list(attribute(node, "strides", [1, 1])),
            paddings=_paddings(node),
            padding_algorithm="EXPLICIT",
            data_format="NCHW",
            ceil_mode=bool(attribute(node, "ceil_mode", 0)),
            exclusive=not attribute(node, "count_include_pad", 0),
        )(builder, node)

    return write


def _write_depth_to_space(builder: ProgramBuilder, node: NodeProto) -> None:
    """`pixel_shuffle` takes the channels of a block one after the other, as mode CRD does."""
    if attribute(node, "mode", "DCR") != "CRD":
        raise unsupported(node, "only mode CRD is supported")
    _unary("pixel_shuffle", upscale_factor=attribute(node, "blocksize"), data_format="NCHW")(builder, node)


def _write_resize(builder: ProgramBuilder, node: NodeProto) -> None:
    """Only what all kernels do alike: Paddle's oneDNN kernels ignore `align_corners` and `align_mode`.

    They take pixel centers for the place of a pixel, which changes nothing where whole pixels are repeated.
    """
    if len(node.input) > 3 and node.input[3] and builder.constant(node.input[3]) is None:
        _write_resize_to(builder, node, node.input[3])
        return
    mode = attribute(node, "mode", "nearest")
    place = attribute(node, "coordinate_transformation_mode", "half_pixel")
    rounding = attribute(node, "nearest_mode", "round_prefer_floor")
    target = _resize_target(builder, node)
    exact = (mode, place) == ("linear", "half_pixel")
    whole = all(scale.is_integer() for scale in target["scale"] or [0.5])
    repeated = (mode, place, rounding) == ("nearest", "asymmetric", "floor") and whole
    if len(builder.shape(node.input[0])) != 4 or not (exact or repeated):
        raise unsupported(node, f"mode {mode}, {place}, {rounding} means different things in Paddle's kernels")
    kind = "bilinear" if mode == "linear" else "nearest"
    how = {"align_corners": False, "align_mode": 0, "data_layout": "NCHW", "out_d": -1}
    _unary(f"{kind}_interp_v2", interp_method=kind, **how, **target)(builder, node)


def _write_resize_to(builder: ProgramBuilder, node: NodeProto, sizes: str) -> None:
    """To computed sizes, by picking rows and columns: the oneDNN kernel errs where steps are no whole pixels.

    Pixel i of n comes from pixel floor(i * m / n) of m.
    """
    places = (attribute(node, "mode", "nearest"), attribute(node, "coordinate_transformation_mode", "half_pixel"))
    if places != ("nearest", "asymmetric") or attribute(node, "nearest_mode", "round_prefer_floor") != "floor":
        raise unsupported(node, f"mode {places[0]}, {places[1]} to computed sizes is not supported")
    data, result = node.input[0], node.output[0]
    builder.emit("shape", {"Input": builder.variable(data)}, {"Out": f"{result}.shape"})
    for axis, name in ((2, f"{result}.rows"), (3, result)):
        for source, end in ((sizes, "new"), (f"{result}.shape", "old")):
            part = {"axes": [0], "starts": [axis], "ends": [axis + 1], "infer_flags": [1], "decrease_axis": []}
            builder.emit("slice", {"Input": source}, {"Out": f"{name}.{end}"}, **part)
        ends = {key: builder.number(f"{name}.{key}", value) for key, value in (("start", 0), ("step", 1))}
        span = {"Start": ends["start"], "End": f"{name}.new", "Step": ends["step"]}
        builder.emit("range", span, {"Out": f"{name}.counted"})
        builder.emit("elementwise_mul", {"X": f"{name}.counted", "Y": f"{name}.old"}, {"Out": f"{name}.far"}, axis=-1)
        places_of = {"X": f"{name}.far", "Y": f"{name}.new"}
        builder.emit("elementwise_floordiv", places_of, {"Out": f"{name}.places"}, axis=-1)
        builder.emit(
            "gather", {"X": builder.variable(data), "Index": f"{name}.places"}, {"Out": name}, axis=axis, overwrite=True
        )
        data = name


def _resize_target(builder: ProgramBuilder, node: NodeProto) -> dict[str, Any]:
    """Constant scales, or constant sizes, of height and width."""
    if len(node.input) > 3 and node.input[3]:
        sizes = builder.integers(node, 3, "sizes") or []
        return {"scale": [], "out_h": sizes[2], "out_w": sizes[3]}
    scales = builder.constant(node.input[2])
    if scales is None or scales.size != 4 or any(scales[:2] != 1):
        raise unsupported(node, "its scales must be constant and resize height and width only")
    return {"scale": [float(s) for s in scales[2:]], "out_h": -1, "out_w": -1}


def _write_split(builder: ProgramBuilder, node: NodeProto) -> None:
    sizes = builder.integers(node, 1, "sizes") or []
    parts = {"num": 0 if sizes else len(node.output), "sections": sizes, "axis": attribute(node, "axis", 0)}
    builder.emit("split", {"X": builder.variable(node.input[0])}, {"Out": list(node.output)}, **parts)


def _write_expand(builder: ProgramBuilder, node: NodeProto) -> None:
    """ONNX lets a size of 1 keep the tensor's own, Paddle a size of -1."""
    sizes = builder.integers(node, 1, "shape") or []
    rank = len(builder.shape(node.input[0]))
    wanted = [-1 if size == 1 and index >= len(sizes) - rank else size for index, size in enumerate(sizes)]
    _unary("expand_v2", shape=wanted)(builder, node)


def _write_tile(builder: ProgramBuilder, node: NodeProto) -> None:
    _unary("tile", repeat_times=builder.integers(node, 1, "repeats") or [])(builder, node)


def _write_pad(builder: ProgramBuilder, node: NodeProto) -> None:
    """Constant borders, joined on axis by axis: the oneDNN kernel of `pad` writes beyond its tensor (Paddle 3.3)."""
    if attribute(node, "mode", "constant") != "constant" or builder.integers(node, 3, "axes") is not None:
        raise unsupported(node, "only constant borders of all axes are supported")
    widths = np.array(builder.integers(node, 1, "widths")).reshape(2, -1).T
    value = builder.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.float32(0)
    if value is None or (widths < 0).any():
        raise unsupported(node, "its value must be constant, and no width negative")
    data, result = builder.variable(node.input[0]), node.output[0]
    padded = [axis for axis, both in enumerate(widths) if both.any()] or [0]
    for axis in padded:
        name = result if axis == padded[-1] else f"{result}.axis{axis}"
        before, after = (
            _border(builder, data, f"{name}.{side}", axis, int(width), value.item())
            for side, width in zip(("before", "after"), widths[axis], strict=True)
        )
        builder.emit("concat", {"X": [*before, data, *after]}, {"Out": name}, axis=axis)
        data = name


def _border(builder: ProgramBuilder, data: str, name: str, axis: int, width: int, value: float) -> list[str]:
    """A border of one value along one axis of a tensor; empty where it has no width."""
    if not width:
        return []
    first = {"axes": [axis], "starts": [0], "ends": [1], "infer_flags": [1], "decrease_axis": []}
    builder.emit("slice", {"Input": data}, {"Out": f"{name}.place"}, **first)
    builder.emit("fill_any_like", {"X": f"{name}.place"}, {"Out": f"{name}.value"}, value=value, dtype=-1)
    times = [width if other == axis else 1 for other in range(len(builder.shape(data)))]
    builder.emit("tile", {"X": f"{name}.value"}, {"Out": name}, repeat_times=times)
    return [name]


def _write_einsum(builder: ProgramBuilder, node: NodeProto) -> None:
    """Beside the product stand lists, a value for each operand, that only its gradient reads."""
    operands, result = [builder.variable(name) for name in node.input], node.output[0]
    unread = {slot: [f"{result}.{slot}{place}" for place in range(len(operands))] for slot in ("InnerCache", "XShape")}
    builder.emit("einsum", {"Operands": operands}, {"Out": result, **unread}, equation=attribute(node, "equation"))


def _write_top_k(builder: ProgramBuilder, node: NodeProto) -> None:
    count = builder.integers(node, 1, "number") or []
    values, places = node.output
    found = {"Out": values, "Indices": f"{places}.int64"}
    how = {"axis": attribute(node, "axis", -1), "largest": bool(attribute(node, "largest", 1)), "sorted": True}
    builder.emit("top_k_v2", {"X": builder.variable(node.input[0])}, found, k=count[0], **how)
    types = {"in_dtype": builder.element_type("INT64"), "out_dtype": builder.element_type("INT32")}
    builder.emit("cast", {"X": f"{places}.int64"}, {"Out": places}, **types)


def _write_grid_sample(builder: ProgramBuilder, node: NodeProto) -> None:
    mode, padding = attribute(node, "mode", "linear"), attribute(node, "padding_mode", "zeros")
    inputs: dict[str, str | list[str]] = {"X": builder.variable(node.input[0]), "Grid": builder.variable(node.input[1])}
    how = {"mode": {"linear": "bilinear"}.get(mode, mode), "padding_mode": padding}
    corners = bool(attribute(node, "align_corners", 0))
    builder.emit("grid_sampler", inputs, {"Output": node.output[0]}, **how, align_corners=corners)


def _write_concat(builder: ProgramBuilder, node: NodeProto) -> None:
    builder.emit(
        "concat",
        {"X": [builder.variable(name) for name in node.input]},
        {"Out": node.output[0]},
        axis=attribute(node, "axis"),
    )
    parts = [builder.entries(name) for name in node.input]
    if all(part is not None for part in parts):
        builder.know(node.output[0], [entry for part in parts for entry in part or []])


def _write_transpose(builder: ProgramBuilder, node: NodeProto) -> None:
    rank = len(builder.shape(node.input[0]))
    builder.emit(
        "transpose2",
        {"X": builder.variable(node.input[0])},
        _with_shape(node),
        axis=list(attribute(node, "perm", list(range(rank))[::-1])),
    )


def _with_shape(node: NodeProto) -> dict[str, str]:
    """Outputs of Paddle's `...2` operators, which also hand back the shape of their input."""
    return {"Out": node.output[0], "XShape": f"{node.output[0]}.x_shape"}


def _write_reshape(builder: ProgramBuilder, node: NodeProto) -> None:
    if attribute(node, "allowzero", 0):
        raise unsupported(node, "allowzero is not supported")
    data, target = node.input[0], node.input[1]
    entries = builder.entries(target)
    if entries is None:
        rank = builder.shape(target)[0]
        entries = [None] * rank if rank > 0 else []
    if not entries:
        raise unsupported(node, "the length of its shape is unknown")
    origin = builder.origin(data)
    shape = [
        0 if entry == (origin, axis) else entry if isinstance(entry, int) else -1 for axis, entry in enumerate(entries)
    ]
    inputs: dict[str, str | list[str]] = {"X": builder.variable(data)}
    if shape.count(-1) > 1:  # sizes that are only known at run time
        inputs["Shape"], shape = builder.variable(target), []
    builder.emit("reshape2", inputs, _with_shape(node), shape=shape)


def _write_shape(builder: ProgramBuilder, node: NodeProto) -> None:
    data, result = node.input[0], node.output[0]
    if attribute(node, "start", 0) or attribute(node, "end") is not None:
        raise unsupported(node, "start and end are not supported")
    builder.emit("shape", {"Input": builder.variable(data)}, {"Out": result})
    sizes, origin = builder.shape(data), builder.origin(data)
    builder.know(result, [(origin, axis) if size < 0 else size for axis, size in enumerate(sizes)])


def _write_slice(builder: ProgramBuilder, node: NodeProto) -> None:
    starts = builder.integers(node, 1, "starts") or []
    ends = builder.integers(node, 2, "ends") or []
    axes = builder.integers(node, 3, "axes") or list(range(len(starts)))
    steps = builder.integers(node, 4, "steps") or [1] * len(starts)
    data, result = node.input[0], node.output[0]
    axes = [axis % len(builder.shape(data)) for axis in axes]
    if all(step == 1 for step in steps):
        builder.emit(
            "slice",
            {"Input": builder.variable(data)},
            {"Out": result},
            axes=axes,
            starts=starts,
            ends=ends,
            infer_flags=[1] * len(axes),
            decrease_axis=[],
        )
    elif all(step > 0 for step in steps):
        builder.emit(
            "strided_slice",
            {"Input": builder.variable(data)},
            {"Out": result},
            axes=axes,
            starts=starts,
            ends=ends,
            strides=steps,
            infer_flags=[1] * len(axes),
            decrease_axis=[],
        )
    else:
        raise unsupported(node, "negative steps are not supported")
    entries = builder.entries(data)
    builder.know(result, entries[starts[0] : ends[0] : steps[0]] if entries is not None else None)


def _write_gather(builder: ProgramBuilder, node: NodeProto) -> None:
    data, result, axis = node.input[0], node.output[0], attribute(node, "axis", 0)
    index = builder.constant(node.input[1])
    if index is not None and index.ndim == 0:
        axis, start = axis % len(builder.shape(data)), int(index)
        builder.emit(
            "slice",
            {"Input": builder.variable(data)},
            {"Out": result},
            axes=[axis],
            starts=[start],
            ends=[start + 1 if start != -1 else _INT32_MAX],
            infer_flags=[1],
            decrease_axis=[axis],
        )
        entries = builder.entries(data)
        builder.know(result, [entries[start]] if entries is not None else None)
    elif len(builder.shape(node.input[1])) == 1 and (index is None or index.min() >= 0):
        builder.emit(
            "gather",
            {"X": builder.variable(data), "Index": builder.variable(node.input[1])},
            {"Out": result},
            axis=axis,
            overwrite=True,
        )
    else:
        raise unsupported(node, "the indices must be one number or a list of numbers that are not negative")


def _write_squeeze(builder: ProgramBuilder, node: NodeProto) -> None:
    builder.emit(
        "squeeze2",
        {"X": builder.variable(node.input[0])},
        _with_shape(node),
        axes=builder.integers(node, 1, "axes") or [],
    )
    builder.know(node.output[0], builder.entries(node.input[0]))


def _write_unsqueeze(builder: ProgramBuilder, node: NodeProto) -> None:
    axes = builder.integers(node, 1, "axes") or []
    rank = len(builder.shape(node.input[0])) + len(axes)
    # ONNX counts axes in the result, Paddle inserts one after the other.
    builder.emit(
        "unsqueeze2",
        {"X": builder.variable(node.input[0])},
        _with_shape(node),
        axes=sorted(axis % rank for axis in axes),
    )
    builder.know(node.output[0], builder.entries(node.input[0]) if rank == 1 else None)


def _write_flatten(builder: ProgramBuilder, node: NodeProto) -> None:
    if attribute(node, "axis", 1) != 1:
        raise unsupported(node, "only axis 1 is supported")
    builder.emit("reshape2", {"X": builder.variable(node.input[0])}, _with_shape(node), shape=[0, -1])


def _write_cast(builder: ProgramBuilder, node: NodeProto) -> None:
    data, result, kind = node.input[0], node.output[0], attribute(node, "to")
    if kind not in (TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64):
        raise unsupported(node, f"element type {TensorProto.DataType.Name(kind)} is not supported")
    integer = kind != TensorProto.FLOAT
    if integer and builder.is_integer(data):
        _unary("assign")(builder, node)
        builder.know(result, builder.entries(data))
    else:
        before, after = ("INT32" if builder.is_integer(data) else "FP32"), ("INT32" if integer else "FP32")
        _unary("cast", in_dtype=builder.element_type(before), out_dtype=builder.element_type(after))(builder, node)


def _reduction(kind: str) -> OpWriter:
    def write(builder: ProgramBuilder, node: NodeProto) -> None:
        axes = attribute(node, "axes") or builder.integers(node, 1, "axes")
        if not axes:
            raise unsupported(node, "it must name its axes")
        keep = bool(attribute(node, "keepdims", 1))
        _unary(kind, dim=list(axes), keep_dim=keep, reduce_all=False)(builder, node)

    return write


_WRITERS: dict[str, OpWriter] = {
    "Abs": _unary("abs"),
    "Add": _elementwise("elementwise_add"),
    "AveragePool": _pool("avg"),
    "Cast": _write_cast,
    "Clip": _write_clip,
    "Concat": _write_concat,
    "Conv": _write_conv,
    "ConvTranspose": _write_conv_transpose,
    "DepthToSpace": _write_depth_to_space,
    "Div": _write_div,
    "Einsum": _write_einsum,
    "Erf": _unary("erf"),
    "Exp": _unary("exp"),
    "Expand": _write_expand,
    "Flatten": _write_flatten,
    "Gather": _write_gather,
    "GlobalAveragePool": _write_global_pool,
    "GridSample": _write_grid_sample,
    "HardSigmoid": _write_hard_sigmoid,
    "HardSwish": _unary("hard_swish", threshold=6.0, scale=6.0, offset=3.0),
    "LayerNormalization": _write_layer_norm,
    "LeakyRelu": _write_leaky_relu,
    "Log": _unary("log"),
    "MatMul": _write_matmul,
    "MaxPool": _pool("max"),
    "Mul": _elementwise("elementwise_mul"),
    "Pad": _write_pad,
    "Pow": _elementwise("elementwise_pow"),
    "ReduceMax": _reduction("reduce_max"),
    "ReduceMean": _reduction("reduce_mean"),
    "ReduceSum": _reduction("reduce_sum"),
    "Relu": _unary("relu"),
    "Reshape": _write_reshape,
    "Resize": _write_resize,
    "Shape": _write_shape,
    "Sigmoid": _unary("sigmoid"),
    "Slice": _write_slice,
    "Softmax": _write_softmax,
    "Split": _write_split,
    "Sqrt": _unary("sqrt"),
    "Squeeze": _write_squeeze,
    "Sub": _elementwise("elementwise_sub"),
    "Tanh": _unary("tanh"),
    "Tile": _write_tile,
    "TopK": _write_top_k,
    "Transpose": _write_transpose,
    "Unsqueeze": _write_unsqueeze,
}
