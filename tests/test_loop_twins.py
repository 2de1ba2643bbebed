"""Twins of models with a loop: their words, and what a network that has hardly been trained writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
from quant.pir import all_kinds
from quant.recipe import load_recipe
from quant.runtime import onnx_session, openvino_session
from quant.source import read_model
from quant.task import make_task
from quant.twins import decoder, formula, table, vision


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


@pytest.mark.parametrize("twin", [formula, vision])
def test_the_decoder_joins_a_formula_again(twin: Any, tmp_path: Path) -> None:
    twin.write_world(tmp_path, 5, 0)
    adapter = make_task("formula_recognition", twin.inference_yml(), twin.MODEL)
    for line in (tmp_path / "label.txt").read_text(encoding="utf-8").splitlines():
        words = latex_tokens(line.partition("\t")[2])
        numbers = [0, *(decoder.VOCABULARY.index(word) for word in words), 2]
        found: Any = adapter.postprocess([np.array([numbers])], None)
        assert latex_tokens(found.latex) == words


def test_formulas_are_made_of_all_words_that_the_twins_know(tmp_path: Path) -> None:
    decoder.write_world(tmp_path, 60, 0)
    lines = (tmp_path / "label.txt").read_text(encoding="utf-8").splitlines()
    written = {word for line in lines for word in latex_tokens(line.partition("\t")[2])}
    assert {"<s>", "<pad>", "</s>", "<unk>", *written} == set(decoder.VOCABULARY)


@pytest.mark.parametrize(("top", "bottom"), [(100, 150), (0, 20), (300, 384)])
def test_batches_of_formulas_are_cut_to_their_rows(top: int, bottom: int) -> None:
    pictures = np.full((2, 1, 384, 384), -1, np.float32)
    pictures[0, 0, top : top + 10, 5] = pictures[1, 0, bottom - 10 : bottom, 380] = 1
    strips = [decoder.strip(picture) for picture in pictures]
    assert sum(one.rows.size for one in strips) == 2 * 10 * 384
    assert (decoder.stacked(strips, None) == pictures).all()
    cut = decoder.stacked(strips, 32)
    assert (cut == 1).sum() == 20 and cut.shape[2] <= bottom - top + 64
    first = int(
        np.flatnonzero((pictures == 1).any(axis=(0, 1, 3)))[0] - np.flatnonzero((cut == 1).any(axis=(0, 1, 3)))[0]
    )
    assert first % 32 == 0, "the encoder sees each row at the place in its stride where it is in the whole picture"
    assert (cut == pictures[:, :, first : first + cut.shape[2]]).all()


VISION = """
import sys
from pathlib import Path
import numpy as np
import paddle
from quant.twins import decoder, vision
from quant.twins.training import save_inference

paddle.seed(0)
net = decoder.network(vision.SCHOOLING.encoder)
encoder, draw = net.encoder, np.random.default_rng(0).normal
attention = encoder.layers[0].attention.attention
for table in (attention.down, attention.along):
    table.set_value(draw(size=table.shape).astype("float32"))
grey = paddle.to_tensor(draw(size=(1, 1, vision.SIDE, vision.SIDE)).astype("float32"))
maps = paddle.to_tensor(draw(size=(2, vision.Sizes().window, vision.Sizes().window, decoder.WIDTH)).astype("float32"))
taught, seen = encoder.coarse(grey), attention(maps)
net.eval()
weights = {name: value.numpy() for name, value in attention.state_dict().items()}
np.savez(sys.argv[2], taught=taught, shown=encoder.coarse(grey), maps=maps, seen=seen, **weights)
save_inference(net, {"x": [None, 1, vision.SIDE, vision.SIDE]}, {}, Path(sys.argv[1]))
"""

VISION_KINDS = (
    "argmax arange concat conv2d einsum embedding gelu layer_norm matmul mean pad pow repeat_interleave softmax sqrt "
    "transpose unbind where while"
)
"""What the published code of PP-FormulaNet-L makes of its encoder and its decoder, among others."""


@pytest.fixture(scope="module")
def vision_written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the untrained vision transformer as PIR, and with parts of it in numbers."""
    folder = tmp_path_factory.mktemp("vision")
    environment = os.environ | {"FLAGS_enable_pir_api": "1"}
    command = [sys.executable, "-c", VISION, str(folder), str(folder / "parts.npz")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return folder


def test_the_vision_transformer_has_the_contract_and_the_operators_of_the_official_one(vision_written: Path) -> None:
    document = json.loads((vision_written / "inference.json").read_text(encoding="utf-8"))
    assert all_kinds(document) >= set(VISION_KINDS.split())
    written = document["program"]["regions"][0]["blocks"][0]["ops"]
    values = {op["#"]: op["O"][0]["TT"]["D"] for op in written if op["#"] in ("1.data", "1.fetch")}
    assert values["1.data"][1] == [-1, 1, 768, 768] and values["1.fetch"][1] == [-1, -1]
    assert [values[kind][0]["#"] for kind in ("1.data", "1.fetch")] == ["0.t_f32", "0.t_i64"]


def test_one_channel_in_training_is_three_equal_ones_at_work(vision_written: Path) -> None:
    parts = np.load(vision_written / "parts.npz")
    np.testing.assert_allclose(parts["taught"], parts["shown"], atol=1e-5)


def test_what_a_place_sees_depends_on_how_far_away_it_is(vision_written: Path) -> None:
    """Attention by its definition (Li et al. 2022), place by place."""
    parts = np.load(vision_written / "parts.npz")
    side, each = parts["maps"].shape[1], parts["down"].shape[1]
    asked = parts["maps"].reshape(2, side * side, -1) @ parts["ask.weight"] + parts["ask.bias"]
    heads = asked.reshape(2, side * side, 3, -1, each)
    places = [(row, column) for row in range(side) for column in range(side)]
    expected = np.zeros_like(heads[:, :, 0])
    for picture, head in np.ndindex(2, heads.shape[3]):
        queries, keys, values = heads[picture, :, :, head].transpose(1, 0, 2)
        for place, (row, column) in enumerate(places):
            down = [parts["down"][row - other + side - 1] for other, _ in places]
            along = [parts["along"][column - other + side - 1] for _, other in places]
            match = keys @ queries[place] * each**-0.5 + (np.array(down) + np.array(along)) @ queries[place]
            weights = np.exp(match - match.max())
            expected[picture, place, head] = weights @ values / weights.sum()
    mixed = expected.reshape(2, side * side, -1) @ parts["out.weight"] + parts["out.bias"]
    np.testing.assert_allclose(parts["seen"], mixed.reshape(parts["seen"].shape), atol=1e-4)


@pytest.mark.family
@pytest.mark.parametrize("twin", [table, formula, vision])
def test_a_twin_is_right_on_every_runtime(twin: Any, tmp_path: Path) -> None:
    """Two minutes of training show whether converted models take the same steps as Paddle, call after call."""
    twin.train(tmp_path / "model", seed=0, minutes=2.0)
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
