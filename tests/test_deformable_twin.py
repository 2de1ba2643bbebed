"""The twin of PP-DocLayout-L: who answers for a region, the official graph's operators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.conversion import import_model
from quant.prepare import prepare
from quant.recipe import load_recipe
from quant.source import read_model
from quant.task import make_task
from quant.twins.deformable import MODEL, QUERIES, SIZE, STRIDES, anchors, places_of, train
from quant.twins.pages import Page, batches

Array = np.ndarray[Any, Any]

OPERATORS = {
    "add", "arange", "assign_value_", "batch_norm_", "cast", "clip", "combine", "concat", "conv2d", "data",
    "depthwise_conv2d", "divide", "fetch", "flatten", "flip", "floor", "floor_divide", "full", "full_int_array",
    "full_like", "gather_nd", "gelu", "grid_sample", "layer_norm", "log", "matmul", "max", "multiply", "nearest_interp",
    "p", "pool2d", "relu", "remainder", "reshape", "scale", "shape64", "sigmoid", "silu", "slice", "softmax", "split",
    "split_with_num", "stack", "subtract", "sum", "tile", "topk", "transpose", "unsqueeze", "where",
}  # fmt: skip
"""Of the official graphs of this family."""


def page(*boxes: tuple[float, ...]) -> Page:
    return Page(np.zeros((3, SIZE, SIZE), np.float32), np.array(boxes, np.float32), np.arange(len(boxes)))


def test_every_place_starts_from_a_box_around_itself() -> None:
    boxes = anchors()
    assert len(boxes) == sum((SIZE // stride) ** 2 for stride in STRIDES)
    assert (boxes[0, :2] * SIZE).tolist() == [8, 8] and (boxes[-1, :2] * SIZE).tolist() == [608, 608]
    assert len(set(map(tuple, boxes[:, 2:].tolist()))) == len(STRIDES)


@pytest.mark.parametrize(
    ("box", "scale"), [((100, 100, 180, 130), 0), ((60, 60, 220, 200), 1), ((30, 30, 500, 300), 2)]
)
def test_one_place_answers_for_a_region_on_the_scale_of_its_size(box: tuple[float, ...], scale: int) -> None:
    (answering,), (near,) = places_of(page(box))
    middle = (np.array(box[:2]) + box[2:]) / 2
    assert np.searchsorted(np.cumsum([(SIZE // stride) ** 2 for stride in STRIDES]), answering, "right") == scale
    assert np.abs(anchors()[answering, :2] * SIZE - middle).max() <= STRIDES[scale] / 2
    assert answering in near and 1 < len(near) <= 16


def test_regions_with_one_middle_have_a_place_each() -> None:
    answering, near = places_of(page((100, 100, 180, 130), (102, 96, 178, 134), (101, 101, 179, 129)))
    assert len(set(answering.tolist())) == 3
    assert all(answering[0] in places for places in near)


def test_a_page_without_regions_teaches_nothing() -> None:
    empty = Page(np.zeros((3, SIZE, SIZE), np.float32), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    answering, near = places_of(empty)
    assert not len(answering) and near == []


def test_a_page_has_no_more_regions_than_there_are_queries() -> None:
    boxes = [(10.0 * index, 10.0, 10.0 * index + 8, 20.0) for index in range(QUERIES + 1)]
    assert len(set(places_of(page(*boxes[:-1]))[0].tolist())) == QUERIES
    with pytest.raises(ValueError, match=f"{QUERIES + 1} regions for {QUERIES} queries"):
        places_of(page(*boxes))


def test_each_page_is_seen_once_before_any_is_seen_again() -> None:
    order = batches(9, 3, seed=0)
    for _ in range(2):
        assert sorted(np.concatenate([next(order) for _ in range(3)]).tolist()) == list(range(9))


def operators(file: Path) -> set[str]:
    document = json.loads(file.read_text(encoding="utf-8"))
    written = document["program"]["regions"][0]["blocks"][0]["ops"]
    return {operator["#"].partition(".")[2] or operator["#"] for operator in written}


@pytest.mark.slow
def test_a_twin_of_a_moment_has_the_official_inputs_outputs_and_operators(tmp_path: Path) -> None:
    train(tmp_path / "twin", seed=0, minutes=0.0)
    recipe = load_recipe(MODEL)
    files = read_model(recipe, tmp_path / "twin", "the test")
    assert operators(files.model) <= OPERATORS and {"grid_sample", "topk"} <= operators(files.model)
    adapter = make_task(recipe.task, files.inference_yml, MODEL)
    feed = adapter.preprocess(np.full((300, 200, 3), 200, np.uint8)).inputs
    assert sorted(feed) == ["im_shape", "image", "scale_factor"]
    (tmp_path / "prepared").mkdir()
    proof = prepare(files, [feed], recipe.tolerance, 2, tmp_path / "prepared")
    assert proof.bridge == "equal bit for bit"
    boxes, number = import_model(files, [feed], tmp_path / "import").reference[0]
    assert boxes.shape == (QUERIES, 6) and number.tolist() == [QUERIES] and number.dtype == np.int32
