"""Models with a loop: their ONNX form, and the check that every step of every call is right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from quant.comparison import side_by_side
from quant.conversion import import_model
from quant.errors import InputError, Unavailable
from quant.graph import Graph
from quant.loop import check_calls, check_repeats, check_runtime, first_step_apart, has_loop, with_clean_bodies
from quant.prepare import prepare
from quant.runtime import Feed, onnx_session, openvino_session, writes_in_steps
from quant.sensitivity import compare_outputs, relative_errors
from tests.tiny_pir import write_tiny_loop

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def halving_model() -> ModelProto:
    """Halves x until all of it is below 1 and lists every step, [1, steps, 3], as paddle2onnx writes loops.

    The list begins with a row of zeros. Inside of the loop, what it carries bears the names from around it, and the condition claims a wrong rank.
    """
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "half"], ["halved"]),
            helper.make_node("Unsqueeze", ["halved", "one"], ["step"]),
            helper.make_node("Concat", ["steps", "step"], ["longer"], axis=1),
            helper.make_node("ReduceMax", ["halved"], ["largest"], keepdims=0),
            helper.make_node("Less", ["largest", "limit"], ["small"]),
            helper.make_node("Not", ["small"], ["again"]),
        ],
        "body",
        [info("count", INT, []), info("go", BOOL, []), info("x", FLOAT, [1, 3]), info("steps", FLOAT, [1, "T", 3])],
        [info("again", BOOL, [1, 1]), info("halved", FLOAT, [1, 3]), info("longer", FLOAT, [1, "T", 3])],
    )
    constants = {
        "half": np.float32(0.5),
        "one": np.array([1]),
        "limit": np.float32(1),
        "go": np.array(True),
        "steps": np.zeros((1, 1, 3), np.float32),
    }
    graph = helper.make_graph(
        [helper.make_node("Loop", ["", "go", "x", "steps"], ["last", "listed"], body=body)],
        "halving",
        [info("x", FLOAT, [1, 3])],
        [info("listed", FLOAT, [1, None, 3])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feeds() -> list[Feed]:
    return [{"x": np.array([[5, 1, -2]], np.float32)}, {"x": np.array([[40, 3, 0.5]], np.float32)}]


def halved(feed: Feed) -> list[np.ndarray]:
    values = [np.zeros((1, 3)), feed["x"] / 2]
    while values[-1].max() >= 1:
        values.append(values[-1] / 2)
    return [np.stack(values, axis=1)]


def test_bodies_get_names_of_their_own(tmp_path: Path) -> None:
    model = halving_model()
    with pytest.raises(Exception, match="differ in rank"):
        onnx.checker.check_model(model, full_check=True)
    clean = with_clean_bodies(model)
    onnx.checker.check_model(clean, full_check=True)
    body = clean.graph.node[0].attribute[0].g
    around = {tensor.name for tensor in clean.graph.initializer} | {"x"}
    assert not around & {value.name for value in body.input}
    assert model == halving_model(), "the model that was given stays as it is"
    assert has_loop(Graph(clean))
    for candidate in (model, clean):
        check_calls(onnx_session(candidate, 1), feeds(), [halved(feed) for feed in feeds()], 1e-6, "it differs")


def test_openvino_loads_the_clean_form_alone(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    onnx.save(halving_model(), tmp_path / "raw.onnx")
    with pytest.raises(RuntimeError):
        openvino_session(tmp_path / "raw.onnx", 1)
    onnx.save(with_clean_bodies(halving_model()), tmp_path / "inference.onnx")
    check_runtime("openvino", tmp_path, feeds(), 1e-6, 1)
    session = openvino_session(tmp_path / "inference.onnx", 1)
    check_calls(session, feeds(), [halved(feed) for feed in feeds()], 1e-6, "it differs")


class Forgetful:
    """A session that starts its third call with what the second one left behind."""

    def __init__(self) -> None:
        self.calls = 0

    def run(self, feed: Feed, outputs: Any = None) -> list[np.ndarray]:
        self.calls += 1
        (values,) = halved(feed)
        if self.calls > 2:
            values = values.copy()
            values[:, 1:] += 0.5
        return [values]


def test_a_call_that_goes_wrong_later_is_found() -> None:
    reference = [halved(feed) for feed in feeds()]
    with pytest.raises(InputError, match=r"it differs in call 3, after 2 calls without a difference, from step 2 on"):
        check_calls(Forgetful(), feeds(), reference, 1e-6, "it differs")


def test_a_runtime_that_differs_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(with_clean_bodies(halving_model()), tmp_path / "inference.onnx")
    monkeypatch.setattr("quant.loop.open_session", lambda *_: Forgetful())
    with pytest.raises(Unavailable, match="FP32 on openvino differs from onnxruntime in call 3") as caught:
        check_runtime("openvino", tmp_path, feeds(), 1e-6, 1)
    assert "--target onnxruntime" in caught.value.fix


def test_an_artifact_that_carries_something_from_call_to_call_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(with_clean_bodies(halving_model()), tmp_path / "inference.onnx")
    check_repeats("onnxruntime", tmp_path, feeds(), 1e-6, 1)
    monkeypatch.setattr("quant.loop.open_session", lambda *_: Forgetful())
    with pytest.raises(InputError, match="for onnxruntime differs from its own first call in call 3"):
        check_repeats("onnxruntime", tmp_path, feeds(), 1e-6, 1)


IDS = np.array([[0, 7, 5, 2]])


@pytest.mark.parametrize(
    ("found", "expected", "step"),
    [
        (IDS, IDS, None),
        (IDS + np.array([0, 0, 1, 0]), IDS, 3),
        (IDS[:, :3], IDS, 4),
        (np.concatenate([IDS, IDS], 1), IDS, 5),
        (np.zeros((1, 3, 2)), np.full((1, 3, 2), 1e-4), None),  # within the tolerance
        (np.full((1, 3, 2), np.nan), np.zeros((1, 3, 2)), 1),
        (np.zeros((1, 3, 2)), np.zeros((1, 3, 5)), 1),
    ],
)
def test_the_first_step_that_differs(found: np.ndarray, expected: np.ndarray, step: int | None) -> None:
    assert first_step_apart([found], [expected], 1e-3) == step


def test_the_earliest_of_several_outputs_counts() -> None:
    boxes = np.zeros((1, 4, 8))
    assert first_step_apart([boxes + 1, IDS + np.array([0, 1, 0, 0])], [boxes, IDS], 1e-3) == 1


def test_token_ids_differ_or_not() -> None:
    """One of four tokens: a quarter, however far apart the two numbers are."""
    other = IDS + np.array([0, 900, 0, 0])
    assert relative_errors([[other]], [[IDS]]) == [0.25]
    assert compare_outputs([[other]], [[IDS]]).damage == 0.25


def test_missing_steps_count_as_wrong() -> None:
    assert relative_errors([[IDS[:, :2]]], [[IDS]]) == [0.5]
    assert relative_errors([[np.ones((1, 1, 4))]], [[np.ones((1, 2, 4))]]) == [0.5]
    ((found, exact),) = side_by_side([np.ones((1, 3), np.float32)], [np.ones((1, 2), np.float32)])
    assert found.shape == exact.shape == (1, 3)
    assert exact[0, 2] == 0


def test_a_paddle_model_with_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model chooses tokens by what it chose before, and stops by itself, sooner or later."""
    files = write_tiny_loop(tmp_path / "model")
    pictures = [
        {"x": np.random.default_rng(seed).uniform(-2, 2, (1, 3, 8, 16)).astype(np.float32)} for seed in range(5)
    ]
    imported = import_model(files, pictures, tmp_path / "import")
    assert {outputs[0].shape[1] for outputs in imported.reference} == {2, 3, 5, 13}
    session = onnx_session(with_clean_bodies(onnx.load(imported.onnx)), 1)
    check_calls(session, pictures, imported.reference, 1e-4, "it differs")

    reference = [[ids.copy() for ids in outputs] for outputs in imported.reference]
    reference[1][0][0, 2] += 1
    monkeypatch.setattr("quant.prepare.import_model", lambda *_: replace(imported, reference=reference))
    with pytest.raises(InputError, match=r"ONNX import differs from Paddle in call 2, after 1 call .*from step 3 on"):
        prepare(files, pictures, 1e-4, 1, tmp_path)


def test_a_program_that_speaks_of_loops_has_none(tmp_path: Path) -> None:
    """Old-IR programs keep the source lines of the network, also those of loops that were unrolled."""
    files = write_tiny_loop(tmp_path / "model")
    assert writes_in_steps(files.model)
    (tmp_path / "inference.pdmodel").write_bytes(b"\x1a\x06conv2d convert_while_loop while")
    assert not writes_in_steps(tmp_path / "inference.pdmodel")
