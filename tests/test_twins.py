"""Twins: their frame, their worlds, the operators that they share with the official graphs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_pipeline import NAME, RECIPE, colour_reader, judged, write_lines, write_model

from calib_data.notes import CODE_LETTERS
from calib_data.registry import cached_dir, resolve_dataset
from eval.dataset import Box, read_dataset, read_image
from quant import cli, twins
from quant.errors import InputError, Unavailable
from quant.job import Options
from quant.judging import evaluate_model
from quant.manifest import newest_run, newest_runs
from quant.pipeline import run_model
from quant.pir import operators
from quant.recipe import Recipe, limited_to, load_recipe, recipe_names
from quant.source import is_twin, read_model
from quant.task import make_task
from quant.twins import find_twin, load_module, ready_twin, train_twin, training, twin_names
from quant.twins.detection import inner_margin, inner_parts
from quant.twins.recognition import rough_places

DET, REC, ORI = "PP-OCRv4_server_det", "PP-OCRv4_server_rec", "PP-LCNet_x1_0_doc_ori"
Text = pytest.CaptureFixture[str]


def silent(what: str, done: int, total: int | None) -> None:
    pass


class Copied:
    """A module of a twin whose training copies a folder, and notes how often it was asked."""

    def __init__(self, model: Path) -> None:
        self.model, self.asked = model, Counter[str]()

    def train(self, folder: Path, seed: int, minutes: float) -> None:
        self.asked["train"] += 1
        shutil.copytree(self.model, folder)

    def write_world(self, folder: Path, count: int, seed: int) -> None:
        self.asked["world"] += 1
        assert seed == twins.WORLD_SEED
        write_lines(folder, count, 3, seed)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Of the tiny network that names colours, whose world is made of 60 lines."""
    data = {**RECIPE["data"], "generated": {"samples": 60}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "data": data}), encoding="utf-8")
    return limited_to(load_recipe(str(tmp_path / "recipe.yaml")), ["onnxruntime"])


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copied:
    module = Copied(write_model(tmp_path / "made", colour_reader()))
    monkeypatch.setattr(twins, "load_module", lambda model: module)
    return module


# --- the frame -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", twin_names())
def test_every_twin_of_a_recipe_has_the_two_functions(model: str) -> None:
    module = load_module(model)
    assert callable(module.train) and callable(module.write_world)


def test_a_model_without_a_twin() -> None:
    with pytest.raises(InputError, match=f"has no twin; models with one: {', '.join(twin_names())}"):
        load_module("PP-OCRv4_mobile_det")
    assert {DET, REC, ORI} <= set(twin_names()) <= set(recipe_names())


def test_a_trained_folder_is_marked(recipe: Recipe, copied: Copied, tmp_path: Path) -> None:
    folder = tmp_path / "twin"
    train_twin(recipe, folder, 0, 1)
    assert is_twin(recipe, folder) and not is_twin(recipe, copied.model)
    assert read_model(recipe, folder, "").twin and not read_model(recipe, copied.model, "").twin
    described = yaml.safe_load((folder / "inference.yml").read_text(encoding="utf-8"))
    assert described.pop("Global") == {"model_name": NAME, "twin": True}
    original = yaml.safe_load((copied.model / "inference.yml").read_text(encoding="utf-8"))
    assert described == {key: value for key, value in original.items() if key != "Global"}


def test_what_is_no_description_is_no_twin(recipe: Recipe, tmp_path: Path) -> None:
    for content in (b"", b"- a", b"Global: twin", b"Global: {twin: ", b"\xff"):
        (tmp_path / "inference.yml").write_bytes(content)
        assert not is_twin(recipe, tmp_path)
    assert not is_twin(recipe, tmp_path / "nothing")


def test_a_failed_training_leaves_nothing_and_names_its_last_line(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(Copied):
        def train(self, folder: Path, seed: int, minutes: float) -> None:
            training.train_in_child("quant.twins.nothing", folder, seed, minutes)

    monkeypatch.setattr(twins, "load_module", lambda model: Broken(tmp_path))
    with pytest.raises(InputError, match="was not trained: .*No module named quant.twins.nothing"):
        train_twin(recipe, tmp_path / "twin", 0, 1)
    assert not (tmp_path / "twin").exists()


def test_no_twin_is_trained_on_what_it_is_judged_on(recipe: Recipe, copied: Copied, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--seed 1000: must be at least 0 and below 1000"):
        train_twin(recipe, tmp_path / "twin", twins.WORLD_SEED, 1)


def test_twin_and_world_are_made_once(
    recipe: Recipe,
    copied: Copied,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Unavailable, match="not trained yet") as caught:
        find_twin(recipe)
    assert caught.value.fix == f"Run `quant run --twins {NAME}`"
    first = ready_twin(recipe, silent)
    assert first == ready_twin(recipe, silent) == find_twin(recipe)
    assert copied.asked == {"train": 1, "world": 1}
    assert ready_twin(recipe, silent, seed=1).folder != first.folder
    assert copied.asked == {"train": 2, "world": 1}


def test_only_a_generated_folder_of_the_cache_counts_as_generated(own_cache: Path, tmp_path: Path) -> None:
    made = write_lines(cached_dir("generated-twin-1"), 2, 3, 0)
    mine = write_lines(tmp_path / "generated-twin-1", 2, 3, 0)
    assert resolve_dataset(made, "text_recognition").name == "generated-twin-1"
    assert resolve_dataset(mine, "text_recognition").name == "folder-generated-twin-1"


def test_a_run_of_a_twin_says_so_and_lies_apart(
    recipe: Recipe, copied: Copied, own_cache: Path, tmp_path: Path
) -> None:
    twin = ready_twin(recipe, silent)
    options = Options(tmp_path, 2, silent, twin.folder, (str(twin.world),), report_split=True)
    finished = run_model(recipe, options)
    assert finished.folder.parent == tmp_path / "twins" / NAME
    assert newest_run(tmp_path, NAME) is None and newest_runs(tmp_path) == []
    assert newest_runs(tmp_path / "twins") == [finished.folder]
    assert all(row.twin and row.gate.evidence == "generated" for row in judged(finished))
    again = evaluate_model(recipe, options)
    timed = {"fp32_ms", "fp32_prepared_ms", "int8_ms", "speedup"}
    assert [row.model_dump(exclude=timed) for row in again.rows] == [
        r.model_dump(exclude=timed) for r in judged(finished)
    ]
    artifact = yaml.safe_load((finished.folder / "onnxruntime" / "inference.yml").read_text(encoding="utf-8"))
    assert artifact["Global"]["twin"] is True, "nor does an artifact pass for the official model's"
    real = evaluate_model(recipe, Options(tmp_path, 2, silent, copied.model))
    assert [(row.status, row.twin) for row in real.rows] == [("skipped", False)]


# --- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--twins", "PP-OCRv4_mobile_det"], "PP-OCRv4_mobile_det has no twin; models with one: "),
        (["run", "--twins", DET, "--model-dir", "."], "leave out --model-dir, or --twins"),
        (["twins", "PP-OCRv4_mobile_det"], "PP-OCRv4_mobile_det has no twin"),
        (["twins", DET, "--seed", "1000"], "below 1000"),
    ],
)
def test_wrong_use(own_cache: Path, capfd: Text, arguments: list[str], said: str) -> None:
    assert cli._guarded(arguments) == 2
    assert said in capfd.readouterr().err


def test_eval_shows_twins_beside_the_models(own_cache: Path, tmp_path: Path, capfd: Text) -> None:
    models = [DET, "PP-OCRv4_mobile_det"]
    assert cli._guarded(["eval", *models, "--twins", "--json", "--out", str(tmp_path)]) == 2
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert {row["model"] for row in rows if "twin" not in row} == set(models)
    of_twins = [row for row in rows if row.get("twin")]
    assert {row["model"] for row in of_twins} == {DET}
    assert all(row["fix"] == f"Run `quant run --twins {row['model']}`" for row in of_twins)
    targets = ["--target", "openvino", "--target", "paddle"]
    assert cli._guarded(["eval", DET, "--twins", *targets, "--out", str(tmp_path)]) == 2
    command = f"quant run --twins {DET} {' '.join(targets)}"
    said = f"skipped: {DET} (twin), openvino, paddle: its twin is not trained yet. Run `{command}`"
    assert said in capfd.readouterr().out


def test_twins_are_trained_into_a_folder(
    copied: Copied, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Text
) -> None:
    assert cli._guarded(["twins", DET, REC, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    folders = [tmp_path / "out" / name for name in (DET, REC)]
    assert capfd.readouterr().out == "".join(f"{folder.name}: {folder}\n" for folder in folders)
    assert all(is_twin(load_recipe(folder.name), folder) for folder in folders)
    assert cli._guarded(["twins", DET, "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capfd.readouterr().err


# --- worlds and what is learned of them ------------------------------------------------------------


def test_worlds_are_what_their_tasks_read(tmp_path: Path) -> None:
    for model, task in ((DET, "text_detection"), (REC, "text_recognition")):
        load_module(model).write_world(tmp_path / model, 4, 1000)
        data = read_dataset(resolve_dataset(tmp_path / model, task))  # type: ignore[arg-type]
        assert len(data.samples) == 4 and not data.broken
        for sample in data.samples:
            height, width = read_image(sample.image).shape[:2]
            if model == REC:
                assert set(str(sample.label)) <= set(CODE_LETTERS)
                continue
            assert height % 32 == width % 32 == 0, "detection sees it as it is"
            corners = np.array([box.points for box in sample.label])  # type: ignore[union-attr]
            assert (corners > -3).all() and (corners < (width + 3, height + 3)).all()


@given(st.floats(4, 400), st.floats(4, 400), st.floats(1, 3))
def test_post_processing_restores_the_box(width: float, height: float, ratio: float) -> None:
    """Widened by area * ratio / perimeter, the inner part is the box again."""
    margin = inner_margin(width, height, ratio)
    inner_width, inner_height = width - 2 * margin, height - 2 * margin
    assert min(inner_width, inner_height) > 0
    assert inner_width * inner_height * ratio / (2 * (inner_width + inner_height)) == pytest.approx(margin, abs=1e-3)


def test_exact_inner_parts_are_decoded_to_the_boxes() -> None:
    """What the twin for detection is taught is what PaddleX's post-processing needs."""
    wanted = [(20, 20, 220, 48), (20, 80, 90, 100), (30, 150, 300, 190)]
    boxes = [Box(((x0, y0), (x1, y0), (x1, y1), (x0, y1)), "a") for x0, y0, x1, y1 in wanted]
    adapter = make_task("text_detection", load_recipe(DET).inference, DET)
    context = adapter.preprocess(np.zeros((224, 320, 3), np.uint8)).context
    found = adapter.postprocess([inner_parts(boxes, 224, 320, 1.5)[None, None]], context)
    corners = sorted((*p.min(axis=0), *p.max(axis=0)) for p in found.polygons)  # type: ignore[union-attr]
    assert np.abs(np.array(corners) - np.array(sorted(wanted))).max() <= 3


@pytest.mark.parametrize(("width", "places"), [(8, [1, 1, 1, 1, 2, 2, 2, 2, 0, 0]), (4, [1, 1, 2, 2] + 6 * [0])])
def test_letters_share_the_width_of_their_line(width: float, places: list[int]) -> None:
    assert rough_places([1, 2], width, 10).tolist() == places


OFFICIAL = {
    ORI: "conv2d batch_norm_ hardswish depthwise_conv2d full_int_array pool2d reshape add relu hardsigmoid multiply "
    "full dropout flatten matmul softmax data fetch",
    DET: "conv2d batch_norm_ relu full_int_array pool2d full combine concat reshape add sigmoid multiply "
    "depthwise_conv2d nearest_interp conv2d_transpose scale data fetch",
    REC: "conv2d batch_norm_ relu depthwise_conv2d full combine concat full_int_array pool2d reshape add sigmoid "
    "multiply assign swish shape64 slice flatten transpose layer_norm matmul scale softmax dropout stack squeeze "
    "data fetch",
}
"""Kinds of operators in the published graphs (of PP-OCRv4_server_rec: in its sibling for documents)."""

CONTRACT = {
    ORI: ([-1, 3, 224, 224], [-1, 4]),
    DET: ([-1, 3, -1, -1], [-1, 1, -1, -1]),
    REC: ([-1, 3, 48, -1], [-1, -1, 18]),
}

WRITER = """
import sys
from pathlib import Path
from quant.twins import detection, orientation, recognition
from quant.twins.training import save_inference
nets = {"ORI": orientation.network(4), "DET": detection.network(), "REC": recognition.network(18)}
shapes = {"ORI": [None, 3, 224, 224], "DET": [None, 3, None, None], "REC": [None, 3, 48, None]}
for name, net in nets.items():
    save_inference(net, {"x": shapes[name]}, {}, Path(sys.argv[1]) / name)
"""


def test_operators_inputs_and_outputs_are_those_of_the_official_graphs(tmp_path: Path) -> None:
    environment = os.environ | {"FLAGS_enable_pir_api": "1"}
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], env=environment, check=True, capture_output=True)
    for name, model in (("ORI", ORI), ("DET", DET), ("REC", REC)):
        document = json.loads((tmp_path / name / "inference.json").read_text(encoding="utf-8"))
        assert {operator.kind for operator in operators(document)} == set(OFFICIAL[model].split()), model
        written = document["program"]["regions"][0]["blocks"][0]["ops"]
        values = {op["#"]: op["O"][0]["TT"]["D"][1] for op in written if op["#"] in ("1.data", "1.fetch")}
        names = [a["AT"]["D"] for op in written if op["#"] == "1.data" for a in op["A"] if a["N"] == "name"]
        assert (values["1.data"], values["1.fetch"], names) == (*CONTRACT[model], ["x"])
