"""Paddle programs: every operator against onnxruntime, plans against their simulation, files, errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_plan import plan_of
from tiny_models import TinyNet, run, simulate, simulated_model, small_detector, small_recognizer

from quant.errors import InputError
from quant.graph import Graph
from quant.program import MODEL_FILE, PARAMS_FILE, import_paddle, write_program
from quant.runtime import Feed, open_session

Array = np.ndarray[Any, Any]
Build = Callable[[TinyNet], str]

# onednn or Paddle's own kernels, each under the new and the old IR: PaddleX can be set to any of them.
MODES = [(onednn, new_ir) for onednn in (True, False) for new_ir in (True, False)]


def predictor(folder: Path, *, onednn: bool = True, new_ir: bool = True) -> Callable[[Feed], list[Array]]:
    """Set up as PaddleX sets up its predictors."""
    import_paddle()
    from paddle import inference

    config = inference.Config(str(folder / MODEL_FILE), str(folder / PARAMS_FILE))
    config.disable_gpu()
    if onednn:
        config.enable_mkldnn()
        config.set_mkldnn_cache_capacity(10)
    else:
        config.disable_mkldnn()
    config.set_cpu_math_library_num_threads(1)
    config.enable_new_ir(new_ir)
    config.enable_new_executor()
    config.set_optimization_level(3)
    config.enable_memory_optim()
    config.disable_glog_info()
    paddle_predictor = inference.create_predictor(config)

    def compute(feed: Feed) -> list[Array]:
        for name, values in feed.items():
            paddle_predictor.get_input_handle(name).copy_from_cpu(values)
        paddle_predictor.run()
        return [paddle_predictor.get_output_handle(n).copy_to_cpu() for n in paddle_predictor.get_output_names()]

    return compute


def feeds(shapes: Sequence[Sequence[int]], scale: float = 1.0) -> list[Feed]:
    rng = np.random.default_rng(7)
    return [{"x": (scale * rng.standard_normal(shape)).astype(np.float32)} for shape in shapes]


def shape_of(net: TinyNet, data: str, axis: int) -> str:
    """The size of an axis as the importer writes it: int32, then back to int64."""
    sizes = net.op("Cast", net.op("Shape", data), to=onnx.TensorProto.INT32)
    one = net.op("Slice", sizes, *(net.const(np.array([v])) for v in (axis, axis + 1, 0, 1)))
    return net.op("Cast", one, to=onnx.TensorProto.INT64)


def ints(net: TinyNet, *values: int) -> str:
    return net.const(np.array(values, dtype=np.int64))


def nearest_to_computed_sizes(net: TinyNet) -> str:
    """To the size of a pooled map, from a smaller one: steps that are no whole pixels."""
    small = net.op("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    sizes = net.op(
        "Concat", *(shape_of(net, data, axis) for data, axis in ((small, 0), (small, 1), ("x", 2), ("x", 3))), axis=0
    )
    return net.op(
        "Resize",
        small,
        "",
        "",
        sizes,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def floats(net: TinyNet, *values: float) -> str:
    return net.const(np.array(values, dtype=np.float32))


def reshape_by_sizes(net: TinyNet) -> str:
    batch = net.op("Slice", net.op("Shape", "x"), ints(net, 0), ints(net, 2), ints(net, 0))
    return net.op("Reshape", "x", net.op("Concat", batch, ints(net, -1), axis=0))


def reshape_to_tokens(net: TinyNet) -> str:
    """[N, C, H, W] to [N, H * W, 2, C / 2], as attention does."""
    flat = net.op("Transpose", net.op("Reshape", "x", ints(net, 0, 4, -1)), perm=[0, 2, 1])
    tokens = shape_of(net, flat, 1)
    return net.op("Reshape", flat, net.op("Concat", ints(net, 0), tokens, ints(net, 2), ints(net, 2), axis=0))


def reshape_to_own_shape(net: TinyNet) -> str:
    return net.op("Reshape", net.op("Mul", "x", floats(net, 0.5)), net.op("Shape", "x"))


def reshape_to_two_open_sizes(net: TinyNet) -> str:
    target = net.op("Concat", shape_of(net, "x", 3), shape_of(net, "x", 2), ints(net, -1), axis=0)
    return net.op("Reshape", net.op("Relu", "x"), target)


def layer_norm(net: TinyNet) -> str:
    rows = net.op("Transpose", "x", perm=[0, 2, 3, 1])
    return net.op("LayerNormalization", rows, net.const(net.weights(4)), net.const(net.weights(4)), axis=-1)


def plain_layer_norm(net: TinyNet) -> str:
    rows = net.op("Transpose", "x", perm=[0, 2, 3, 1])
    return net.op("LayerNormalization", rows, net.const(net.weights(4)), axis=3, epsilon=1e-3)


def resized(mode: str, place: str, *, sizes: bool = False) -> Build:
    def build(net: TinyNet) -> str:
        target = ["", "", ints(net, 1, 4, 12, 20)] if sizes else ["", floats(net, 1, 1, 2, 2)]
        return net.op("Resize", "x", *target, mode=mode, coordinate_transformation_mode=place, nearest_mode="floor")

    return build


def unary(kind: str, **attributes: Any) -> Build:
    return lambda net: net.op(kind, "x", **attributes)


def with_constant(kind: str, *values: float, first: bool = False, channels: bool = False) -> Build:
    def build(net: TinyNet) -> str:
        array = np.array(values, dtype=np.float32).reshape((1, -1, 1, 1) if channels else -1)
        constant = net.const(array)
        return net.op(kind, constant, "x") if first else net.op(kind, "x", constant)

    return build


# Name -> the graph behind an input x [1, 4, 6, 10] of which batch, height and width are open.
OPERATORS: dict[str, Build] = {
    "conv": lambda net: net.conv("x", 4, 6),
    "conv without bias": lambda net: net.conv("x", 4, 6, bias=False),
    "conv with stride and dilation": lambda net: net.op(
        "Conv", "x", net.const(net.weights(6, 4, 3, 3)), strides=[2, 1], dilations=[1, 2], pads=[1, 2, 1, 2]
    ),
    "conv with uneven padding": lambda net: net.op("Conv", "x", net.const(net.weights(6, 4, 3, 3)), pads=[0, 1, 2, 1]),
    "depthwise conv": lambda net: net.conv("x", 4, 4, group=4),
    "conv in two groups": lambda net: net.conv("x", 4, 6, group=2),
    "transposed conv": lambda net: net.conv_transpose("x", 4, 3),
    "transposed conv in groups": lambda net: net.conv_transpose("x", 4, 4, group=2, bias=False),
    "transposed conv with output padding": lambda net: net.op(
        "ConvTranspose", "x", net.const(net.weights(4, 3, 3, 3)), strides=[2, 2], pads=[1] * 4, output_padding=[1, 1]
    ),
    "matmul": lambda net: net.matmul(net.op("Transpose", "x", perm=[0, 2, 3, 1]), 4, 5),
    "matmul of two activations": lambda net: net.op("MatMul", "x", net.op("Transpose", "x", perm=[0, 1, 3, 2])),
    "transpose without order": unary("Transpose"),
    "add number": with_constant("Add", 0.7),
    "add number first": with_constant("Add", 0.7, first=True),
    "add channels first": with_constant("Add", 1, 2, 3, 4, first=True, channels=True),
    "add tensors": lambda net: net.op("Add", "x", net.op("Relu", "x")),
    "sub number": with_constant("Sub", 0.7),
    "sub from number": with_constant("Sub", 0.7, first=True),
    "mul number": with_constant("Mul", -1.5),
    "mul by channels": with_constant("Mul", 1, 2, 3, 4, channels=True),
    "gate": lambda net: net.op("Mul", "x", net.op("Sigmoid", net.op("GlobalAveragePool", "x"))),
    "div by number": with_constant("Div", 3.0),
    "div number by": lambda net: net.op("Div", floats(net, 2), net.op("Exp", "x")),
    "mean divided by tensor": lambda net: net.op("Div", net.op("GlobalAveragePool", "x"), net.op("Exp", "x")),
    "mean minus tensor": lambda net: net.op("Sub", net.op("GlobalAveragePool", "x"), "x"),
    "tensor divided by tensor": lambda net: net.op("Div", "x", net.op("Exp", "x")),
    "tensor minus row": lambda net: net.op("Sub", "x", net.op("ReduceMean", "x", axes=[3])),
    "power of number": with_constant("Pow", 2.0, first=True),
    "square": with_constant("Pow", 2.0),
    "relu": unary("Relu"),
    "hard swish": unary("HardSwish"),
    "hard sigmoid": unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    "hard sigmoid by default": unary("HardSigmoid"),
    "leaky relu": unary("LeakyRelu", alpha=0.3),
    "sigmoid": unary("Sigmoid"),
    "tanh": unary("Tanh"),
    "erf": unary("Erf"),
    "exp": unary("Exp"),
    "sqrt of abs": lambda net: net.op("Sqrt", net.op("Abs", "x")),
    "softmax": unary("Softmax", axis=-1),
    "softmax over channels": unary("Softmax", axis=1),
    "clip": lambda net: net.op("Clip", "x", net.const(np.float32(0)), net.const(np.float32(0.6))),
    "clip below": lambda net: net.op("Clip", "x", net.const(np.float32(-0.1))),
    "layer norm": layer_norm,
    "layer norm without bias": plain_layer_norm,
    "global average pool": unary("GlobalAveragePool"),
    "average pool": unary("AveragePool", kernel_shape=[3, 2], strides=[3, 2]),
    "average pool with borders": unary("AveragePool", kernel_shape=[3, 3], pads=[1] * 4),
    "average pool that counts borders": unary("AveragePool", kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
    "max pool": unary("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
    "max pool rounding up": unary("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    "largest of rows": unary("ReduceMax", axes=[2], keepdims=0),
    "sum of pixels": lambda net: net.op("ReduceSum", "x", ints(net, 2, 3), keepdims=1),
    "product with a vector": lambda net: net.op(
        "MatMul", net.op("Slice", "x", ints(net, 0), ints(net, 6), ints(net, 3)), net.const(net.weights(6))
    ),
    "log of exp": lambda net: net.op("Log", net.op("Exp", "x")),
    "expand": lambda net: net.op("Expand", net.op("GlobalAveragePool", "x"), ints(net, 1, 1, 3, 5)),
    "tile": lambda net: net.op(
        "Tile", net.op("Slice", "x", ints(net, 0), ints(net, 1), ints(net, 1)), ints(net, 1, 3, 1, 2)
    ),
    "pad": lambda net: net.op("Pad", "x", ints(net, 0, 0, 0, 2, 0, 0, 1, 2)),
    "pad by nothing": lambda net: net.op("Relu", net.op("Pad", "x", ints(net, *[0] * 8))),
    "pad rows of channels": lambda net: net.op(
        "Pad",
        net.op("Transpose", "x", perm=[0, 2, 3, 1]),
        ints(net, 0, 0, 1, 0, 0, 2, 3, 0),
        net.const(np.float32(0.5)),
    ),
    "einsum": lambda net: net.op(
        "Einsum", net.op("Transpose", "x", perm=[0, 2, 3, 1]), net.const(net.weights(5, 4)), equation="nyxc,jc->nyxj"
    ),
    "einsum of two activations": lambda net: net.op("Einsum", "x", net.op("Relu", "x"), equation="nchw,ncjw->nchj"),
    "grid sample": lambda net: net.op(
        "GridSample",
        "x",
        net.op(
            "Transpose",
            net.op("Tanh", net.op("Slice", "x", ints(net, 0), ints(net, 2), ints(net, 1))),
            perm=[0, 2, 3, 1],
        ),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=0,
    ),
    "nearest to computed sizes": nearest_to_computed_sizes,
    "mean of rows": unary("ReduceMean", axes=[2], keepdims=0),
    "mean of pixels": unary("ReduceMean", axes=[2, 3]),
    "nearest": resized("nearest", "asymmetric"),
    "depth to space": unary("DepthToSpace", blocksize=2, mode="CRD"),
    "depth to space of several channels": lambda net: net.op(
        "DepthToSpace", net.conv("x", 4, 27), blocksize=3, mode="CRD"
    ),
    "bilinear": resized("linear", "half_pixel"),
    "bilinear to size": resized("linear", "half_pixel", sizes=True),
    "concat": lambda net: net.op("Concat", "x", net.op("Relu", "x"), axis=1),
    "concat with constant": lambda net: net.op(
        "Concat", net.op("GlobalAveragePool", "x"), net.const(net.weights(1, 2, 1, 1)), axis=-3
    ),
    "reshape": lambda net: net.op("Reshape", "x", ints(net, 0, 2, -1, 2)),
    "reshape by sizes": reshape_by_sizes,
    "reshape to tokens": reshape_to_tokens,
    "reshape to own shape": reshape_to_own_shape,
    "reshape to two open sizes": reshape_to_two_open_sizes,
    "flatten": unary("Flatten"),
    "slice": lambda net: net.op("Slice", "x", ints(net, 1), ints(net, 3), ints(net, 1)),
    "slice to the end": lambda net: net.op("Slice", "x", ints(net, 2, -4), ints(net, 2**63 - 1, -1), ints(net, 2, 3)),
    "slice with steps": lambda net: net.op(
        "Slice", "x", ints(net, 0, 1), ints(net, 2**31 - 1, 9), ints(net, 2, -1), ints(net, 2, 3)
    ),
    "gather one": lambda net: net.op("Gather", "x", net.const(np.array(-1)), axis=1),
    "gather some": lambda net: net.op("Gather", "x", ints(net, 2, 0), axis=1),
    "squeeze": lambda net: net.op("Squeeze", net.op("GlobalAveragePool", "x"), ints(net, 2, -1)),
    "unsqueeze": lambda net: net.op("Unsqueeze", "x", ints(net, -1, 0)),
    "size as a number": lambda net: net.op(
        "Mul", "x", net.op("Cast", shape_of(net, "x", 3), to=onnx.TensorProto.FLOAT)
    ),
}


@pytest.mark.parametrize("name", list(OPERATORS))
def test_an_operator_computes_what_onnxruntime_computes(name: str, tmp_path: Path) -> None:
    net = TinyNet((1, 4, 6, 10), free=(0, 2, 3))
    OPERATORS[name](net)
    model = net.model()
    write_program(Graph(model), tmp_path)
    batch = 1 if name in ("concat with constant", "bilinear to size") else 2
    for onednn in (True, False):
        compute = predictor(tmp_path, onednn=onednn)
        for feed in feeds([(1, 4, 6, 10), (1, 4, 8, 6), (batch, 4, 9, 12)]):
            expected, found = run(model, feed)[0], compute(feed)[0]
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)


def upsampling_detector() -> TinyNet:
    """Ends in the form that folding gives a transposed convolution to one channel."""
    net = TinyNet((1, 3, 8, 8), seed=4, free=(0, 2, 3))
    pixels = net.conv(net.op("Relu", net.conv("x", 3, 8)), 8, 4, kernel=1, pad=0)
    net.op("DepthToSpace", net.op("Sigmoid", pixels), blocksize=2, mode="CRD", name="map")
    return net


@pytest.mark.parametrize(
    "net",
    [small_detector(), upsampling_detector(), small_recognizer()],
    ids=["detector", "upsampling detector", "recognizer"],
)
@pytest.mark.parametrize(("onednn", "new_ir"), MODES)
def test_a_plan_computes_what_its_simulation_computes(net: TinyNet, onednn: bool, new_ir: bool, tmp_path: Path) -> None:
    graph, plan = net.graph(), plan_of(net, "int8")
    write_program(graph, tmp_path, plan)
    compute, simulated = predictor(tmp_path, onednn=onednn, new_ir=new_ir), simulated_model(graph, plan)
    wider = (*net.shape[:-1], net.shape[-1] + 4)
    differences, effects = [], []
    for feed in feeds([net.shape, wider, (3, *wider[1:])], scale=1.5):
        expected, found = simulate(simulated, feed)[0], compute(feed)[0]
        differences.append(np.abs(found - expected).ravel())
        effects.append(np.abs(run(graph.to_model(), feed)[0] - expected).ravel())
    # A value on the edge between two steps may fall to either side; most values are not near one.
    assert np.concatenate(differences).mean() < 0.05 * np.concatenate(effects).mean()
    assert np.median(np.concatenate(differences)) < 1e-6


@pytest.mark.parametrize("kind", ["product", "transpose"])
def test_a_reshape_to_computed_sizes_is_not_lost_behind_what_onednn_merges_it_into(kind: str, tmp_path: Path) -> None:
    """Paddle's pass reads the sizes in the program alone, where there are none."""
    net = TinyNet((2, 3, 8), free=(0, 1))
    target = net.op("Concat", shape_of(net, "x", 1), shape_of(net, "x", 0), ints(net, 4), ints(net, 2), axis=0)
    rows = net.op("Add", net.matmul("x", 8, 8), net.const(net.weights(8)))
    if kind == "transpose":
        rows = net.op("Transpose", net.op("Relu", rows), perm=[1, 0, 2])
    net.op("Mul", net.op("Reshape", rows, target), net.const(net.weights(2)))
    write_program(net.graph(), tmp_path)
    found = open_session("paddle", tmp_path, 1).run(net.feed())[0]
    np.testing.assert_allclose(found, run(net.model(), net.feed())[0], atol=1e-5)


@pytest.mark.parametrize(("onednn", "new_ir"), MODES)
def test_activations_round_half_to_even_and_clip_at_both_ends(onednn: bool, new_ir: bool, tmp_path: Path) -> None:
    net = TinyNet((1, 8))
    net.op("MatMul", "x", net.const(np.eye(8, dtype=np.float32)))
    plan = plan_of(net, "int8")
    plan.activations["x"] = plan.activations["x"].model_copy(update={"scale": 0.5})
    write_program(net.graph(), tmp_path, plan)
    steps = np.array([[0.5, 1.5, -0.5, -2.5, 126.4, 300, -127.4, -300]], dtype=np.float32)
    found = predictor(tmp_path, onednn=onednn, new_ir=new_ir)({"x": steps * 0.5})[0] / 0.5
    np.testing.assert_allclose(found, [[0, 2, 0, -2, 126, 127, -127, -128]], rtol=1e-6)


@pytest.mark.parametrize("new_ir", [True, False])
def test_a_tensor_and_a_weight_shared_with_an_fp32_operator(new_ir: bool, tmp_path: Path) -> None:
    net = TinyNet((1, 4, 5, 5), free=(0,))
    weight = net.const(net.weights(4, 4, 3, 3))
    first = net.op("Conv", "x", weight, pads=[1] * 4)
    second = net.op("Conv", "x", weight, pads=[1] * 4)
    net.op("Concat", first, second, axis=1)
    plan = plan_of(net, "int8").with_only({first}, "for the test")
    write_program(net.graph(), tmp_path, plan)
    (feed,) = feeds([(2, 4, 5, 5)])
    found = predictor(tmp_path, onednn=False, new_ir=new_ir)(feed)[0]
    np.testing.assert_allclose(found, simulate(simulated_model(net.graph(), plan), feed)[0], atol=1e-5)
    assert np.abs(found[:, :4] - found[:, 4:]).max() > 1e-4


def test_quantized_weights_are_stored_as_int8_alone(tmp_path: Path) -> None:
    net = small_recognizer()
    write_program(net.graph(), tmp_path, plan_of(net, "int8"))
    stored = parameters(tmp_path)
    weights = {op.weight for op in plan_of(net, "int8").operators if op.weight}
    assert weights
    for name in weights:
        assert stored[f"{name}.int8"].dtype == np.int8
        assert name not in stored


def parameters(folder: Path) -> dict[str, Array]:
    """Stored tensors by name."""
    paddle = import_paddle()
    executor = paddle.static.Executor(paddle.CPUPlace())
    with paddle.static.scope_guard(paddle.static.Scope()):
        program, _, _ = paddle.static.load_inference_model(
            str(folder), executor, model_filename=MODEL_FILE, params_filename=PARAMS_FILE
        )
        scope = paddle.static.global_scope()
        names = [v.name for v in program.list_vars() if v.persistable and v.name not in ("feed", "fetch")]
        return {name: np.array(scope.find_var(name).get_tensor()) for name in names}


def test_names_stay_and_sizes_stay_open(tmp_path: Path) -> None:
    paddle = import_paddle()
    write_program(small_detector().graph(), tmp_path)
    executor = paddle.static.Executor(paddle.CPUPlace())
    with paddle.static.scope_guard(paddle.static.Scope()):
        program, names, (fetch,) = paddle.static.load_inference_model(
            str(tmp_path), executor, model_filename=MODEL_FILE, params_filename=PARAMS_FILE
        )
    assert names == ["x"]
    assert fetch.name == "map"
    assert tuple(program.global_block().var("x").shape) == (-1, 3, -1, -1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([MODEL_FILE, PARAMS_FILE])


_WRITE = """
import sys
from pathlib import Path
from test_plan import plan_of
from tiny_models import small_recognizer
from quant.program import write_program
net = small_recognizer()
write_program(net.graph(), Path(sys.argv[1]), plan_of(net, "int8"))
"""


@pytest.mark.parametrize("program_flag", ["0", "1"])
def test_another_process_writes_the_same_bytes(
    program_flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one in which Paddle's new IR is on, and whose code lies elsewhere."""
    net = small_recognizer()
    write_program(net.graph(), tmp_path / "first", plan_of(net, "int8"))
    monkeypatch.setenv("FLAGS_enable_pir_api", program_flag)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    script = tmp_path / "elsewhere.py"
    script.write_text(_WRITE, encoding="utf-8")
    subprocess.run([sys.executable, str(script), str(tmp_path / "second")], check=True, capture_output=True)
    for file in (MODEL_FILE, PARAMS_FILE):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert b".py" not in (tmp_path / "first" / MODEL_FILE).read_bytes()


def test_a_model_leaves_nothing_behind_for_the_next(tmp_path: Path) -> None:
    nets = [TinyNet((1, 4, 5, 5), seed=seed) for seed in (1, 2)]
    for net in nets:
        net.conv("x", 4, 4)
    (feed,) = feeds([(1, 4, 5, 5)])
    for index, net in enumerate(nets):
        write_program(net.graph(), tmp_path / str(index))
    for index, net in enumerate(nets):
        found = predictor(tmp_path / str(index))(feed)[0]
        np.testing.assert_allclose(found, run(net.model(), feed)[0], atol=1e-5)


UNSUPPORTED: dict[str, tuple[Build, str]] = {
    "unknown operator": (lambda net: net.op("Selu", "x", name="odd"), "Selu.*'odd'"),
    "automatic padding": (
        lambda net: net.op("Conv", "x", net.const(net.weights(4, 4, 3, 3)), auto_pad="SAME_UPPER", name="odd"),
        "Conv.*'odd'.*SAME_UPPER",
    ),
    "backwards slice": (
        lambda net: net.op("Slice", "x", *(ints(net, v) for v in (-1, -9, 2, -1)), name="odd"),
        "Slice.*'odd'.*negative",
    ),
    "other rounding": (
        lambda net: net.op("Resize", "x", "", floats(net, 1, 1, 2, 2), mode="nearest", name="odd"),
        "Resize.*'odd'.*half_pixel",
    ),
    "nearest to a size": (resized("nearest", "asymmetric", sizes=True), "Resize.*means different things"),
    "bilinear between corners": (resized("linear", "align_corners"), "Resize.*align_corners"),
    "blocks before channels": (
        lambda net: net.op("DepthToSpace", "x", blocksize=2, name="odd"),
        "DepthToSpace.*'odd'.*CRD",
    ),
    "reflected borders": (
        lambda net: net.op("Pad", "x", ints(net, 0, 0, 1, 1, 0, 0, 1, 1), mode="reflect", name="odd"),
        "Pad.*'odd'.*constant borders",
    ),
    "cut borders": (
        lambda net: net.op("Pad", "x", ints(net, 0, 0, -1, 0, 0, 0, 0, 0), name="odd"),
        "Pad.*'odd'.*no width negative",
    ),
    "flattened at the end": (lambda net: net.op("Flatten", "x", axis=2, name="odd"), "Flatten.*'odd'"),
}


@pytest.mark.parametrize("name", list(UNSUPPORTED))
def test_what_paddle_cannot_hold_is_named(name: str, tmp_path: Path) -> None:
    net = TinyNet((1, 4, 6, 10), free=(2,))
    build, message = UNSUPPORTED[name]
    build(net)
    with pytest.raises(InputError, match=message):
        write_program(net.graph(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_asymmetric_plan_is_refused(tmp_path: Path) -> None:
    net = small_detector()
    with pytest.raises(ValueError, match=r"x: uint8.*Paddle Inference knows only int8"):
        write_program(net.graph(), tmp_path, plan_of(net, "uint8"))
