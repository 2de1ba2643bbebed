"""The twin of PP-DocLayout-S: places that learn a region, the official graph's operators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib_data.registry import resolve_dataset
from eval.dataset import in_model_words, read_dataset, read_sample
from quant.conversion import import_model
from quant.recipe import class_labels, load_recipe
from quant.runtime import onnx_session
from quant.source import read_model
from quant.task import make_task
from quant.twins.layout import MODEL, SIZE, STRIDES, assigned, points, train, write_world

Array = np.ndarray[Any, Any]

OPERATORS = {
    "add", "batch_norm_", "concat", "conv2d", "data", "depthwise_conv2d", "divide", "fetch", "full", "full_int_array",
    "hardsigmoid", "hardswish", "matmul", "multiclass_nms3", "multiply", "nearest_interp", "pool2d", "relu", "reshape",
    "scale", "sigmoid", "softmax", "split_with_num", "sqrt", "transpose", "p", "combine", "split",
}  # fmt: skip
"""Of the official PP-DocLayout-S."""


def decoded(number: int) -> tuple[Array, Array]:
    middles, strides = points()
    return middles[number], strides[number]


def test_there_is_a_place_for_every_cell_of_every_level() -> None:
    middles, strides = points()
    assert len(middles) == sum((-(-SIZE // stride)) ** 2 for stride in STRIDES) == 4789
    assert middles[0].tolist() == [4, 4] and strides[-1].tolist() == [64]


@pytest.mark.parametrize(
    ("box", "stride"), [((100, 100, 160, 130), 8), ((60, 60, 220, 200), 16), ((30, 30, 400, 300), 32)]
)
def test_a_region_is_learnt_where_its_edges_can_be_reached(box: tuple[float, ...], stride: int) -> None:
    targets = assigned(np.array([box], np.float32), np.array([5]))
    middles, strides = points()
    assert set(strides[targets.places, 0]) == {stride}
    assert (middles[targets.places] > box[:2]).all() and (middles[targets.places] < box[2:]).all()
    reach = np.abs(middles[targets.places, None] - np.reshape(box, (1, 2, 2))).max()
    assert reach < 7 * stride
    assert set(targets.classes) == {5} and (targets.boxes == box).all()


def test_the_smaller_of_two_regions_has_the_shared_places() -> None:
    boxes = np.array([[0, 0, 90, 90], [36, 36, 54, 54]], np.float32)
    targets = assigned(boxes, np.array([0, 1]))
    inner = [number for number, owner in zip(targets.places, targets.classes, strict=True) if owner == 1]
    assert inner and set(targets.classes) == {0, 1}
    assert all((decoded(number)[0] > 36).all() and (decoded(number)[0] < 54).all() for number in inner)


def test_a_region_thinner_than_the_grid_is_learnt_too() -> None:
    targets = assigned(np.array([[100, 101, 106, 103]], np.float32), np.array([2]))
    assert len(targets.places) == 1


def operators(file: Path) -> set[str]:
    document = json.loads(file.read_text(encoding="utf-8"))
    written = document["program"]["regions"][0]["blocks"][0]["ops"]
    return {operator["#"].partition(".")[2] or operator["#"] for operator in written}


def test_a_twin_of_a_moment_has_the_official_inputs_outputs_and_operators(tmp_path: Path) -> None:
    train(tmp_path / "twin", seed=0, minutes=0.0)
    recipe = load_recipe(MODEL)
    files = read_model(recipe, tmp_path / "twin", "the test")
    assert files.format == "pir"
    assert operators(files.model) <= OPERATORS
    write_world(tmp_path / "world", 2, seed=1000)
    adapter = make_task(recipe.task, files.inference_yml, MODEL)
    dataset = in_model_words(read_dataset(resolve_dataset(tmp_path / "world", recipe.task)), class_labels(recipe))
    feeds = [adapter.preprocess(read_sample(sample)).inputs for sample in dataset.samples]
    imported = import_model(files, feeds, tmp_path / "import")
    assert sorted(imported.inputs) == ["image", "scale_factor"]
    boxes, number = imported.reference[0]
    assert boxes.shape[1] == 6 and number.dtype == np.int32 and number.tolist() == [len(boxes)] and len(boxes) <= 100
    converted = onnx_session(imported.onnx, 2).run(feeds[0])
    assert [array.shape for array in converted] == [array.shape for array in imported.reference[0]]
