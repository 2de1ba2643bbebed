"""Artifacts: what is in the file, and that runtimes compute what the plan says."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import numpy_helper
from test_plan import plan_of
from test_simulation import plan_for
from tiny_models import TinyNet, run, session_values, simulate, simulated_model, small_detector, small_recognizer

from quant.errors import InputError
from quant.export import check_artifact, export_artifact, misread_operators, quantized_model
from quant.plan import QuantPlan
from quant.runtime import Feed, onnx_session, open_session

YML: dict[str, Any] = {
    "Global": {"model_name": "tiny"},
    "PostProcess": {"name": "CTCLabelDecode", "character_dict": ["a", "试", " ", 7]},
}
NETS = {"detector": small_detector, "recognizer": small_recognizer}


@pytest.fixture(params=list(NETS))
def net(request: pytest.FixtureRequest) -> TinyNet:
    return NETS[request.param]()


def exported(net: TinyNet, plan: QuantPlan, folder: Path) -> onnx.ModelProto:
    export_artifact("onnxruntime", net.graph(), plan, YML, folder)
    return onnx.load(folder / "inference.onnx")


def with_shifts(plan: QuantPlan) -> QuantPlan:
    shifts = {op.name: 0.01 * np.arange(1, 100, dtype=np.float32) for op in plan.operators if op.op_type != "MatMul"}
    sizes = {op.name: plan.integers[op.weight].scale.size for op in plan.operators if op.weight}
    plan.bias_shifts = {name: shift[: sizes[name]] for name, shift in shifts.items()}
    return plan


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("optimized", [False, True])
def test_onnxruntime_computes_the_plan(net: TinyNet, tmp_path: Path, dtype: str, optimized: bool) -> None:
    plan = with_shifts(plan_of(net, dtype))
    exported(net, plan, tmp_path)
    exact = run(net.graph().to_model(), net.feed())[0]
    expected = simulate(simulated_model(net.graph(), plan), net.feed())[0]
    found = session_values(tmp_path / "inference.onnx", net.feed(), optimized=optimized)[0]
    distance = float(np.abs(found - expected).max())
    # A kernel may round single values to the neighbouring step; the plan itself moves the output further.
    assert distance <= 1e-5 + 0.35 * float(np.abs(exact - expected).max())
    if not optimized:
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_openvino_computes_the_plan(net: TinyNet, tmp_path: Path, dtype: str) -> None:
    plan = with_shifts(plan_of(net, dtype))
    exported(net, plan, tmp_path)
    exact = run(net.graph().to_model(), net.feed())[0]
    expected = simulate(simulated_model(net.graph(), plan), net.feed())[0]
    found = open_session("openvino", tmp_path, 1).run(net.feed())[0]
    assert found.shape == expected.shape
    moved, distance = (float(np.abs(expected - other).mean()) for other in (exact, found))
    assert distance <= 1e-5 + moved


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_good_artifact_is_close_to_its_plan(net: TinyNet, tmp_path: Path, target: Any) -> None:
    plan = plan_of(net)
    exported(net, plan, tmp_path)
    assert check_artifact(target, tmp_path, net.graph(), plan, [net.feed(seed) for seed in range(3)], 1) < 0.05


def test_weights_are_int8_and_no_float_copy_is_left(net: TinyNet, tmp_path: Path) -> None:
    plan = plan_of(net)
    model = exported(net, plan, tmp_path)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    integers = [value for value in stored.values() if value.dtype == np.int8 and value.ndim > 1]
    assert len(integers) == len(plan.weights)
    for weight in plan.integers.values():
        assert any(np.array_equal(weight.values, value) for value in integers)
    assert not set(stored) & set(plan.weights), "the float weights are gone"
    assert all(value.ndim <= 1 for value in stored.values() if value.dtype == np.float32)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == len(plan.used_activations())
    assert kinds.count("DequantizeLinear") == len(plan.used_activations()) + len(plan.used_weights())


def test_names_sizes_and_opset_stay(net: TinyNet, tmp_path: Path) -> None:
    model = exported(net, plan_of(net), tmp_path)
    onnx.checker.check_model(model, full_check=True)
    original = net.model()
    assert model.graph.input == original.graph.input
    assert [info.name for info in model.graph.output] == [info.name for info in original.graph.output]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    names = [name for node in model.graph.node for name in node.output]
    assert len(names) == len(set(names))


def test_open_sizes_really_are_open(tmp_path: Path) -> None:
    net = small_detector()
    exported(net, plan_of(net), tmp_path)
    feed = {"x": np.ones((2, 3, 12, 20), np.float32)}
    for target in ("onnxruntime", "openvino"):
        assert open_session(target, tmp_path, 1).run(feed)[0].shape == (2, 1, 24, 40)  # type: ignore[arg-type]


def test_reverted_operators_keep_float_weights(tmp_path: Path) -> None:
    net = small_detector()
    plan = plan_of(net)
    kept = plan.operators[1].name
    less = plan.with_only({op.name for op in plan.operators} - {kept}, "test")
    model = exported(net, less, tmp_path)
    floats = [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 4]
    assert floats == [plan.operators[1].weight]
    expected = simulate(simulated_model(net.graph(), less), net.feed())[0]
    np.testing.assert_allclose(
        session_values(tmp_path / "inference.onnx", net.feed(), optimized=False)[0], expected, atol=2e-5
    )


def test_a_tensor_and_a_weight_shared_with_an_fp32_operator() -> None:
    net = TinyNet((1, 2, 4, 4))
    shared = net.op("Relu", "x")
    weight = net.const(net.weights(2, 2, 1, 1))
    first, second = net.op("Conv", shared, weight), net.op("Conv", shared, weight)
    third = net.op("Neg", shared)
    graph = net.graph(first, second, third)
    plan = plan_for(net, graph).with_only({first}, "test")
    model = quantized_model(graph, plan, {})
    onnx.checker.check_model(model, full_check=True)
    exact, expected = run(graph.to_model(), net.feed()), simulate(simulated_model(graph, plan), net.feed())
    found = run(model, net.feed())
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_array_equal(found[1], exact[1])
    np.testing.assert_array_equal(found[2], exact[2])


def test_rapidocr_finds_the_characters_in_the_metadata(tmp_path: Path) -> None:
    net = small_recognizer()
    model = exported(net, plan_of(net), tmp_path)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["character"].split("\n") == ["a", "试", " ", "7"]
    without = quantized_model(net.graph(), plan_of(net), {"PostProcess": {"name": "DBPostProcess"}})
    assert not without.metadata_props


def test_inference_yml_comes_along_as_it_was(tmp_path: Path) -> None:
    net = small_detector()
    exported(net, plan_of(net), tmp_path)
    assert yaml.safe_load((tmp_path / "inference.yml").read_text(encoding="utf-8")) == YML
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inference.onnx", "inference.yml"]


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        net = small_recognizer()
        exported(net, plan_of(net), tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name / "inference.onnx").read_bytes()).hexdigest())
    assert len(digests) == 1


# --- artifacts that are not what the plan says -----------------------------------------------------


def _weight_scale(model: onnx.ModelProto) -> None:
    _change(model, "_scale", lambda value: value * np.float32(3), of_channels=True)


def _activation_scale(model: onnx.ModelProto) -> None:
    _change(model, "x_scale", lambda value: value / np.float32(10))


def _zero_point(model: onnx.ModelProto) -> None:
    _change(model, "_zero_point", lambda value: (value // 2 + 3).astype(value.dtype))


def _weights(model: onnx.ModelProto) -> None:
    _change(model, "_int8", lambda value: value[::-1])


def _change(model: onnx.ModelProto, part: str, change: Callable[[Any], Any], of_channels: bool = False) -> None:
    for tensor in model.graph.initializer:
        if part in tensor.name and bool(tensor.dims) >= of_channels:
            tensor.CopyFrom(
                numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor))), tensor.name)
            )
            return
    raise AssertionError(f"no initializer with {part}")


def _not_a_number(model: onnx.ModelProto) -> None:
    _change(model, "_scale", lambda value: np.full_like(value, np.nan))


@pytest.mark.parametrize("spoil", [_weight_scale, _activation_scale, _zero_point, _weights, _not_a_number])
def test_a_changed_artifact_is_refused(tmp_path: Path, spoil: Callable[[onnx.ModelProto], None]) -> None:
    net = small_detector()
    plan = plan_of(net)
    model = exported(net, plan, tmp_path)
    spoil(model)
    onnx.save(model, tmp_path / "inference.onnx")
    with pytest.raises(InputError, match=r"target onnxruntime: the exported model differs.*--target"):
        check_artifact("onnxruntime", tmp_path, net.graph(), plan, [net.feed()], 1)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("content", [b"", b"foreign", None])
def test_a_missing_or_foreign_file_is_an_input_error(tmp_path: Path, target: Any, content: bytes | None) -> None:
    net = small_detector()
    exported(net, plan_of(net), tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    file = tmp_path / "bad" / "inference.onnx"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(InputError, match="bad"):
        open_session(target, tmp_path / "bad", 1)


def test_equal_zero_points_are_stored_once() -> None:
    net = small_detector()
    model = quantized_model(net.graph(), plan_of(net), YML)
    used = {node.input[2] for node in model.graph.node if node.op_type.endswith("uantizeLinear")}
    stored = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name in used]
    assert len({(array.dtype.name, array.shape, array.tobytes()) for array in stored}) == len(stored) == len(used)


def test_operators_that_a_runtime_computes_wrongly_in_int8_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that doubles its outputs as soon as one certain weight is in INT8."""
    net = small_recognizer()
    graph, plan = net.graph(), plan_of(net)
    bad = next(op for op in plan.quantized().values() if op.op_type == "Conv")

    class Doubling:
        def __init__(self, folder: Path) -> None:
            model = onnx.load(folder / "inference.onnx")
            self._factor = 2 if any(t.name.startswith(f"{bad.weight}_int8") for t in model.graph.initializer) else 1
            self._session = onnx_session(model, 1)

        def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[np.ndarray]:
            return [self._factor * value for value in self._session.run(feed, outputs)]

    monkeypatch.setattr("quant.export.open_session", lambda target, folder, threads: Doubling(folder))
    assert misread_operators("openvino", graph, plan, [net.feed()], 1) == [bad.name]
