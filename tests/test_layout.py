"""Layout detection: what the adapter feeds and reads is what PaddleX feeds and reads."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from client_code import code_for, run_clients
from onnx import TensorProto, helper, numpy_helper

from quant.errors import InputError
from quant.job import feed_of, picture_input
from quant.layout import LayoutDetection
from quant.recipe import load_recipe
from quant.task import LayoutPrediction, make_task

MODELS = ("PP-DocLayout-S", "PP-DocLayout-L")
FOUND = np.array(
    [[2, 0.91, 30.5, 40, 300, 200], [8, 0.4, -5, 10, 90, 700], [1, 0.7, 0, 0, 400, 310], [16, 0.02, 50, 60, 50, 90]],
    np.float32,
)
"""One box is clipped, one fills the page and is an image, one has no width."""


def picture(seed: int = 0, height: int = 310, width: int = 400) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def inference(model: str) -> dict[str, Any]:
    return copy.deepcopy(load_recipe(model).inference)


def constant_model(folder: Path, model: str, side: int) -> Path:
    """A model that writes FOUND whatever it reads; it reads all of its inputs."""
    names = ["im_shape", "image", "scale_factor"] if model.endswith("L") else ["image", "scale_factor"]
    shapes = {"im_shape": [1, 2], "image": [1, 3, side, side], "scale_factor": [1, 2]}
    nodes = [helper.make_node("ReduceSum", [name], [f"{name}_sum"], keepdims=0) for name in names]
    nodes += [
        helper.make_node("Sum", [f"{name}_sum" for name in names], ["total"]),
        helper.make_node("Mul", ["total", "zero"], ["nothing"]),
        helper.make_node("Add", ["found", "nothing"], ["boxes"]),
        helper.make_node("Identity", ["count"], ["number"]),
    ]
    graph = helper.make_graph(
        nodes, "layout", [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in names],
        [helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [None, 6]),
         helper.make_tensor_value_info("number", TensorProto.INT32, [1])],
        [numpy_helper.from_array(np.float32(0), "zero"), numpy_helper.from_array(FOUND, "found"),
         numpy_helper.from_array(np.array([len(FOUND)], np.int32), "count")],
    )  # fmt: skip
    folder.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "inference.onnx"
    )
    (folder / "inference.yml").write_text(yaml.safe_dump(inference(model)), encoding="utf-8")
    return folder


class Tap:
    """Stands before PaddleX's runner and keeps what it is given."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.seen: list[np.ndarray[Any, Any]] = []

    def __call__(self, x: list[np.ndarray[Any, Any]]) -> Any:
        self.seen = x
        return self.runner(x)


@pytest.mark.parametrize("model", MODELS)
def test_it_feeds_and_reads_what_the_clients_of_the_card_do(model: str, tmp_path: Path) -> None:
    adapter = make_task("layout_detection", inference(model), model)
    prepared = adapter.preprocess(picture())
    folder = constant_model(tmp_path / "deploy" / "artifact", model, prepared.inputs["image"].shape[2])
    left = run_clients(code_for("onnxruntime", "layout_detection", model), folder, picture())
    client = left["PaddleX"]["model"]
    client._predictor.runner = Tap(client._predictor.runner)
    (result,) = client.predict(picture(), batch_size=1, threshold=0.0)
    for own, theirs in zip(prepared.inputs.values(), client._predictor.runner.seen, strict=True):
        assert own.dtype == theirs.dtype == np.float32
        np.testing.assert_array_equal(own, theirs)
    prediction = adapter.postprocess([FOUND, np.array([len(FOUND)], np.int32)], prepared.context)
    assert isinstance(prediction, LayoutPrediction)
    assert [prediction.labels[index] for index in prediction.classes] == [box["label"] for box in result["boxes"]]
    np.testing.assert_allclose(prediction.boxes, [box["coordinate"] for box in result["boxes"]])
    np.testing.assert_allclose(prediction.scores, [box["score"] for box in result["boxes"]])
    assert [box["label"] for box in result["boxes"]] == ["text", "table"], "PaddleX drops images that fill the page"
    shown = [[box["label"] for box in names["result"]["boxes"]] for names in left.values()]
    assert shown == [["text"], ["text"]], "of a score of at least 0.5"


def test_inputs_are_named_and_measured_as_the_models_want_them() -> None:
    small = make_task("layout_detection", inference(MODELS[0]), MODELS[0]).preprocess(picture(1, 100, 50)).inputs
    assert list(small) == ["image", "scale_factor"]
    assert small["image"].shape == (1, 3, 480, 480)
    np.testing.assert_allclose(small["scale_factor"], [[4.8, 9.6]])
    large = make_task("layout_detection", inference(MODELS[1]), MODELS[1]).preprocess(picture(1, 100, 50)).inputs
    assert list(large) == ["im_shape", "image", "scale_factor"]
    np.testing.assert_allclose(large["im_shape"], [[640, 640]])
    low, high = large["image"].min(), large["image"].max()
    assert low >= 0 and 0.9 < high <= 1


def test_what_a_model_is_timed_on_has_all_of_its_inputs() -> None:
    for model, side in zip(MODELS, (480, 640), strict=True):
        job: Any = SimpleNamespace(
            recipe=load_recipe(model), adapter=make_task("layout_detection", inference(model), model)
        )
        feed = feed_of(job, [8, 3, side, side])
        assert picture_input(feed) == "image"
        assert {name: values.shape for name, values in feed.items() if name != "image"} == {
            name: (8, 2) for name in feed if name != "image"
        }
        assert feed["image"].shape == (8, 3, side, side) and feed["image"].min() < 0
        np.testing.assert_array_equal(feed["scale_factor"], np.ones((8, 2)))


def test_only_the_boxes_of_the_picture_are_read() -> None:
    adapter = make_task("layout_detection", inference(MODELS[0]), MODELS[0])
    context = adapter.preprocess(picture()).context
    prediction = adapter.postprocess([FOUND, np.array([1], np.int32)], context)
    assert isinstance(prediction, LayoutPrediction) and prediction.boxes.tolist() == [[30.5, 40, 300, 200]]
    nothing = adapter.postprocess([FOUND[:0], np.array([0], np.int32)], context)
    assert isinstance(nothing, LayoutPrediction) and nothing.boxes.shape == (0, 4)
    assert adapter.expected_shapes({}) == [(None, 6), (1,)]


def without(key: str) -> dict[str, Any]:
    document = inference(MODELS[0])
    del document[key]
    return document


def with_step(place: int, step: Any) -> dict[str, Any]:
    document = inference(MODELS[0])
    document["Preprocess"][place] = step
    return document


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (without("Preprocess"), "Preprocess must be a list"),
        (without("label_list"), "label_list is missing"),
        (with_step(2, {"type": "Pad"}), "known for this task: Resize, NormalizeImage and Permute"),
        (with_step(2, "Permute"), "Preprocess must be a list of operators with a type"),
        (with_step(0, {"type": "Resize", "target_size": 480}), "target_size = 480 must be"),
    ],
)
def test_files_of_other_models_are_refused(document: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        LayoutDetection(document, MODELS[0])


def test_the_files_of_the_adapter_are_not_changed() -> None:
    document = inference(MODELS[0])
    LayoutDetection(document, MODELS[0])
    assert document == inference(MODELS[0])
