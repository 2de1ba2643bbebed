"""Twins of models with a loop: their words, and what a network that has hardly been trained writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

from eval.dataset import read_image
from eval.formula_metric import latex_tokens
from quant.conversion import import_model
from quant.loop import check_calls, with_clean_bodies
from quant.recipe import load_recipe
from quant.runtime import onnx_session, openvino_session
from quant.source import read_model
from quant.task import make_task
from quant.twins import formula, table


def test_tokens_of_a_table_are_those_that_slanet_writes() -> None:
    html = (
        '<html><body><table><thead><tr><td rowspan="2" colspan="3">a</td><td>b</td></tr></thead></table></body></html>'
    )
    assert table.structure_tokens(html) == [
        "<thead>", "<tr>", "<td", ' rowspan="2"', ' colspan="3"', ">", "</td>", "<td></td>", "</tr>", "</thead>",
    ]  # fmt: skip


def test_the_decoder_joins_a_table_again(tmp_path: Path) -> None:
    """Tokens of a world's tables, given to PaddleX's decoder as a model would, are the tables without text."""
    table.write_world(tmp_path, 5, 0)
    inference = load_recipe(table.MODEL).inference
    vocabulary = table.vocabulary(inference)
    adapter = make_task("table_structure", inference, table.MODEL)
    context = adapter.preprocess(np.full((60, 90, 3), 255, np.uint8)).context
    for line in (tmp_path / "label.jsonl").read_text(encoding="utf-8").splitlines():
        tokens = [*table.structure_tokens(json.loads(line)["html"]), "eos"]
        probabilities = np.eye(len(vocabulary), dtype=np.float32)[[vocabulary.index(token) for token in tokens]]
        outputs = [np.zeros((1, len(tokens), 8), np.float32), probabilities[None]]
        found: Any = adapter.postprocess(outputs, context)
        assert table.structure_tokens(found.html) == tokens[:-1]


def test_the_decoder_joins_a_formula_again(tmp_path: Path) -> None:
    formula.write_world(tmp_path, 5, 0)
    adapter = make_task("formula_recognition", formula.inference_yml(), formula.MODEL)
    for line in (tmp_path / "label.txt").read_text(encoding="utf-8").splitlines():
        words = latex_tokens(line.partition("\t")[2])
        numbers = [0, *(formula.VOCABULARY.index(word) for word in words), 2]
        found: Any = adapter.postprocess([np.array([numbers])], None)
        assert latex_tokens(found.latex) == words


@pytest.mark.parametrize(("top", "bottom"), [(100, 150), (0, 20), (300, 384)])
def test_batches_of_formulas_are_cut_to_their_rows(top: int, bottom: int) -> None:
    pictures = np.zeros((2, 1, 384, 384), np.float32)
    pictures[0, 0, top : top + 10, 5] = pictures[1, 0, bottom - 10 : bottom, 380] = 1
    cut = formula.drawn_rows(pictures)
    assert cut.sum() == pictures.sum() and cut.shape[2] <= bottom - top + 64
    first = int(np.flatnonzero((pictures == 1).any(axis=(0, 1, 3)))[0] - np.flatnonzero(cut.any(axis=(0, 1, 3)))[0])
    assert first % 32 == 0, "the encoder sees each row at the place in its stride where it is in the whole picture"


@pytest.mark.family
@pytest.mark.parametrize("twin", [table, formula])
def test_a_twin_is_right_on_every_runtime(twin: Any, tmp_path: Path) -> None:
    """A minute of training is enough to see whether converted models take the same steps as Paddle, call after call."""
    twin.train(tmp_path / "model", seed=0, minutes=1.0)
    twin.write_world(tmp_path / "world", 3, 1000)
    recipe = load_recipe(twin.MODEL)
    document = yaml.safe_load((tmp_path / "model" / "inference.yml").read_text(encoding="utf-8"))
    adapter = make_task(recipe.task, document, twin.MODEL)
    pictures = [read_image(path) for path in sorted((tmp_path / "world" / "images").iterdir())]
    feeds = [adapter.preprocess(picture).inputs for picture in pictures]
    imported = import_model(read_model(recipe, tmp_path / "model", "test"), feeds, tmp_path / "import")
    shapes = [output.shape for output in imported.reference[0]]
    assert [len(shape) for shape in shapes] == [len(shape) for shape in adapter.expected_shapes(feeds[0])]
    file = tmp_path / "inference.onnx"
    onnx.save(with_clean_bodies(onnx.load(imported.onnx)), file)
    for session in (onnx_session(file, 2), openvino_session(file, 2)):
        check_calls(session, feeds, imported.reference, 1e-3, "it differs from Paddle")
