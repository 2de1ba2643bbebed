"""Recipes: all of them are valid, and every mistake is named with file, key, value and what is allowed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from calib_data.registry import dataset_names
from eval.metric import make_metric
from quant import recipe as recipe_module
from quant.errors import InputError
from quant.planning import least_coverage
from quant.recipe import METRICS, RecipeError, Task, limited_to, load_recipe, recipe_names, recipes_dir
from quant.task import BoxPrediction, ClassPrediction, FormulaPrediction, TablePrediction, TextPrediction

REC = "PP-OCRv4_mobile_rec"
DET = "PP-OCRv4_mobile_det"
LINES = "PP-LCNet_x0_25_textline_ori"


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_opens_with_its_command(name: str) -> None:
    assert load_recipe(name).name == name
    first = (recipes_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# make quant MODEL={name}"


def test_the_two_first_models_have_a_recipe() -> None:
    assert {"PP-OCRv4_mobile_det", REC} <= set(recipe_names())


def test_a_recipe_wins_over_its_base_key_by_key() -> None:
    base = yaml.safe_load((recipes_dir() / "_base" / "text_recognition.yaml").read_text(encoding="utf-8"))
    recipe = load_recipe(REC)
    assert recipe.inference["Global"] == {"model_name": REC}, "from the recipe"
    assert recipe.inference["PreProcess"] == base["inference"]["PreProcess"], "from the base"
    assert recipe.latency.shape == base["latency"]["shape"]


def written(folder: Path, text: str) -> str:
    file = folder / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def problems(name: str, *overrides: str) -> dict[str, tuple[str, str, str]]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    assert all(str(problem) in str(caught.value) for problem in caught.value.problems)
    return {problem.key: (problem.file, problem.value, problem.allowed) for problem in caught.value.problems}


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "base: text_recognition\nname: bad name\ndescription: x\nmodel: {wheel: {package: p, folder: f, colour: red}}\n"
        "expect: {metric: m, value: high, source: s}\ncolour: red\n"
        "calibration: {samples: 0, range: median}\ntargets: {tflite: {}, paddle: {method: magic}}\n"
        "data: {splits: {calibration: 0.5, search: 0.5, report: 0.5}}\ngate: {max_drop: -1}\n",
    )
    found = problems(file)
    assert {place for place, _, _ in found.values()} == {"mine.yaml"}
    assert set(found) >= {
        "name",
        "expect.value",
        "colour",
        "model.wheel.colour",
        "calibration.samples",
        "calibration.range",
        "data.splits",
        "gate.max_drop",
    }
    assert found["calibration.range"][1] == "'median'"
    assert found["calibration.range"][2].startswith("Input should be 'minmax', 'percentile', 'mse', 'entropy'")
    assert "greater than or equal to 1" in found["calibration.samples"][2]
    assert found["data.splits"][2] == "calibration + search + report must be 1, not 1.5"
    assert found["colour"][1] == "'red'"
    assert "calibration" in found["colour"][2], "the keys that are allowed there"
    assert found["model.wheel.colour"][2] == "unknown key; allowed here: package, folder"
    assert any(
        "tflite" in key and "'onnxruntime', 'openvino', 'paddle' or 'tensorrt'" in text
        for key, (_, _, text) in found.items()
    )
    assert any(key.startswith("targets.paddle.method") for key in found)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    found = problems(written(tmp_path, "name: x\nschema: 1\n"))
    assert found["task"] == ("mine.yaml", "(missing)", "is required")
    assert len(found) > 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "unreadable"),
        ("- 1\n", "list"),
        ("", "NoneType"),
        ("base: nothing\n", "must be one of formula_recognition, image_classification, "),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError, match="mine.yaml") as caught:
        load_recipe(written(tmp_path, text))
    assert said in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00a")
    assert "(file)" in problems(str(tmp_path / "mine.yaml"))


def test_a_later_schema_is_refused() -> None:
    assert "schema" in problems(REC, "schema=2")


@pytest.mark.parametrize("name", ["nothing", "../PP-OCRv4_mobile_rec", "_base/text_detection", "", "nothing.yaml"])
def test_unknown_models_name_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match=rf"no recipe for model.*{REC}"):
        load_recipe(name)


def test_reading_recipes_loads_nothing_heavy() -> None:
    code = (
        "import sys; from quant.recipe import load_recipe, recipe_names; [load_recipe(name) for name in recipe_names()];"
        "print(*{'numpy', 'cv2', 'paddle', 'onnx', 'shapely'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "\n"


# --- what has to fit the rest of the recipe --------------------------------------------------------


def known_metrics() -> set[str]:
    with pytest.raises(InputError) as caught:
        make_metric("none of them")
    return set(str(caught.value).split("known metrics: ")[1].split(", "))


def test_every_task_has_metrics_and_every_metric_a_task() -> None:
    assert set(METRICS) == set(get_args(Task))
    assert {name for names in METRICS.values() for name in names} == known_metrics()


@pytest.mark.parametrize(
    ("task", "prediction", "label"),
    [
        ("text_detection", BoxPrediction([], []), []),
        ("text_recognition", TextPrediction("a", 1.0), "a"),
        ("image_classification", ClassPrediction(1, "180", 1.0, 2), 1),
        ("table_structure", TablePrediction("<table><tr><td></td></tr></table>", [], 1.0), "<table></table>"),
        ("formula_recognition", FormulaPrediction("a"), "a"),
    ],
)
def test_the_metrics_of_a_task_are_those_that_judge_its_predictions(task: Task, prediction: Any, label: Any) -> None:
    for name in known_metrics():
        if name in METRICS[task]:
            make_metric(name).score(prediction, label)
        else:
            with pytest.raises((AttributeError, TypeError)):
                make_metric(name).score(prediction, label)


@pytest.mark.parametrize("metric", ["foo", "hmean"])
def test_metrics_of_other_tasks_are_refused(metric: str) -> None:
    file, value, allowed = problems(REC, f"metric={metric}")["metric"]
    assert (file, value) == (f"{REC}.yaml", f"'{metric}'")
    assert allowed == "must be one of line_accuracy for text_recognition"


def test_sets_that_do_not_serve_the_task_are_refused() -> None:
    _, value, allowed = problems(REC, "data.sets=[nowhere, sroie_rec, sroie_det, ./mine]")["data.sets"]
    assert value == "['nowhere', 'sroie_det', './mine']"
    assert allowed == f"must be of {', '.join(dataset_names('text_recognition'))}; folders are given with --data"


def test_classifiers_of_orientation_take_upright_sets_too() -> None:
    assert load_recipe(LINES, ["data.sets=[sroie_rec, paddlex_textline_ori]"])
    value, allowed = problems(LINES, "data.sets=[sroie_rec, sroie_det]")["data.sets"][1:]
    assert value == "['sroie_det']"
    assert "sroie_rec" in allowed and "paddlex_textline_ori" in allowed and "sroie_det" not in allowed
    alone = problems(LINES, "data.rotations=null", "data.sets=[sroie_rec]")["data.sets"]
    assert alone[1] == "['sroie_rec']"


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("[1, {y: .inf}]", "inference.x.1.y"),
        ("[.inf]", "inference.x.0"),
        (".nan", "inference.x"),
        ("{y: {1: a}}", "inference.x.y.1"),
    ],
)
def test_values_that_json_does_not_know_are_refused(value: str, key: str, tmp_path: Path) -> None:
    assert set(problems(REC, f"inference.x={value}")) == {key}
    text = (recipes_dir() / f"{REC}.yaml").read_text(encoding="utf-8")
    file = written(tmp_path, text.replace("inference:\n", f"inference:\n  x: {value}\n"))
    assert set(problems(file)) == {key}


def test_values_that_json_knows_stay_as_they_are() -> None:
    value = {"a": [1, -2.5, True, None, "2024-01-01"], "b": {}}
    recipe = load_recipe(REC, [f"inference.x={json.dumps(value)}"])
    assert recipe.inference["x"] == value
    assert re.fullmatch("[0-9a-f]{64}", recipe.content_hash())


@pytest.mark.parametrize("value", ["2024-01-01", "2024-01-01 10:00:00", "2024-13-45"])
def test_dates_are_text(value: str) -> None:
    assert load_recipe(REC, [f"inference.x={value}"]).inference["x"] == value


@pytest.mark.parametrize("value", ["!!binary /w==", "!!set {a}", "!!timestamp 2024-01-01"])
def test_types_of_yaml_alone_are_refused(value: str, tmp_path: Path) -> None:
    assert problems(REC, f"inference.x={value}")["inference.x"][2] == "is not a YAML value"
    assert problems(written(tmp_path, f"a: {value}\n"))["(file)"][1] == "unreadable"


def test_problems_that_span_fields_are_named_at_once_by_their_keys() -> None:
    found = problems(
        LINES,
        "metric=hmean",
        "data.sets=[nowhere]",
        "data.rotations.angles=[0, 90, 180]",
        "targets.openvino.equalization=all",
        "targets.paddle.activations=uint8",
        "inference.x=.nan",
    )
    assert set(found) == {
        "metric",
        "data.sets",
        "data.rotations.angles",
        "targets.openvino.equalization",
        "targets.paddle.activations",
        "inference.x",
    }
    assert found["data.rotations.angles"][1:] == ("[0, 90, 180]", "has 3 angles, inference names 2 classes")


def test_problems_that_span_fields_of_one_part_are_named_by_their_keys() -> None:
    sha256 = "0" * 64
    found = problems(
        LINES,
        f"model.archives.1.sha256='{sha256}'",
        "data.rotations.angles=[0, 0]",
        "data.splits={calibration: 0.5, search: 0.5, report: 0.5}",
    )
    assert set(found) == {"model.archives.1.sha256", "data.rotations.angles", "data.splits"}
    assert "where packed is false" in found["model.archives.1.sha256"][2]
    assert found["data.rotations.angles"][1:] == ("[0, 0]", "an angle stands twice")
    assert load_recipe(LINES, [f"model.archives.0.sha256='{sha256}'"]).model.archives[0].sha256 == sha256


# --- --set -----------------------------------------------------------------------------------------


def test_overrides_are_yaml_and_descend_by_dots() -> None:
    recipe = load_recipe(
        REC, ["calibration.samples=7", "data.sets=[sroie_rec, iiit5k_rec]", "gate={max_drop: 2, max_relative_drop: 3}"]
    )
    assert recipe.calibration.samples == 7
    assert recipe.calibration.range == load_recipe(REC).calibration.range
    assert recipe.data.sets == ["sroie_rec", "iiit5k_rec"]
    assert (recipe.gate.max_drop, recipe.gate.max_relative_drop) == (2, 3)
    assert load_recipe(REC, ["seed=1", "seed=2"]).seed == 2
    assert load_recipe(REC, ["description=a=b"]).description == "a=b"


@pytest.mark.parametrize("override", ["calibration.samples", "=3", "name.x.y=1", "seed=[1"])
def test_overrides_that_make_no_sense(override: str) -> None:
    with pytest.raises(InputError, match="--set"):
        load_recipe(REC, [override])


def test_overrides_descend_into_lists_by_index() -> None:
    before = load_recipe(DET)
    steps = "inference.PreProcess.transform_ops"
    recipe = load_recipe(
        DET,
        [
            "model.archives.1.url=https://host/a.tar",
            f"{steps}.2.DetResizeForTest.resize_long=640",
            "latency.shape.3=320",
        ],
    )
    assert recipe.model.archives[0] == before.model.archives[0]
    assert (recipe.model.archives[1].url, recipe.model.archives[1].format) == ("https://host/a.tar", "paddle")
    assert recipe.inference["PreProcess"]["transform_ops"][2] == {"DetResizeForTest": {"resize_long": 640}}
    assert recipe.latency.shape == [1, 3, 640, 320]


@pytest.mark.parametrize("index", ["7", "-1", "url", ""])
def test_indexes_that_a_list_does_not_have(index: str) -> None:
    for key in (f"model.archives.{index}.url", f"model.archives.{index}"):
        file, value, allowed = problems(DET, f"{key}=x")[key]
        assert (file, value) == ("--set", "'x'")
        assert allowed == f"'{index}' must be an index, counted from 0, of a list of length 7"


def test_all_overrides_that_make_no_sense_are_named_at_once() -> None:
    found = problems(REC, "calibration.samples", "seed=1", "seed=[1", "name.x=1", "model.archives.7.url=x", "=3")
    assert {place for place, _, _ in found.values()} == {"--set"}
    assert {key: value for key, (_, value, _) in found.items()} == {
        "calibration.samples": "(missing)",
        "seed": "'[1'",
        "name.x": "'1'",
        "model.archives.7.url": "'x'",
        "(missing)": "'3'",
    }
    assert "write it as key=value" in found["calibration.samples"][2]


def test_overrides_are_checked_like_the_file() -> None:
    assert problems(REC, "calibration.samples=many")["calibration.samples"][1] == "'many'"
    assert "samples" in problems(REC, "calibration.sample=3")["calibration.sample"][2]


def test_what_a_runtime_does_not_compute_is_refused() -> None:
    found = problems(REC, "targets.openvino.equalization=all", "targets.paddle.activations=uint8")
    assert "allowed: none, depthwise" in found["targets.openvino.equalization"][2]
    assert "allowed: int8" in found["targets.paddle.activations"][2]
    assert load_recipe(REC, ["targets.onnxruntime.equalization=all"]).targets["onnxruntime"].equalization == "all"


def test_the_hash_changes_with_what_the_recipe_says_and_only_then() -> None:
    assert load_recipe(REC).content_hash() == load_recipe(REC).content_hash()
    assert load_recipe(REC, ["seed=1"]).content_hash() != load_recipe(REC).content_hash()
    same = load_recipe(REC).calibration.samples
    assert load_recipe(REC, [f"calibration.samples={same}"]).content_hash() == load_recipe(REC).content_hash()


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("PP-OCR")])
def test_text_models_stay_mostly_in_integers(name: str) -> None:
    """The ladder never ends below these, on targets where what goes back to FP32 buys little."""
    recipe = load_recipe(name)
    floors = {target: least_coverage(recipe, choice) for target, choice in recipe.targets.items()}
    assert floors["openvino"] >= 0.95 and floors["paddle"] >= 0.9
    assert floors["paddle"] == floors["tensorrt"], "they share a plan"


def test_targets_can_be_limited() -> None:
    recipe = load_recipe(REC)
    assert list(limited_to(recipe, ["paddle"]).targets) == ["paddle"]
    assert limited_to(recipe, []).targets == recipe.targets
    with pytest.raises(InputError, match="no target 'tflite'; it has onnxruntime"):
        limited_to(recipe, ["tflite"])


# --- where recipes are -----------------------------------------------------------------------------


def test_installed_recipes_win_over_those_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "quant"
    package.mkdir()
    shutil.copytree(recipes_dir(), tmp_path / "recipes")
    monkeypatch.setattr(recipe_module, "__file__", str(package / "recipe.py"))
    assert recipes_dir() == tmp_path / "recipes"
    assert load_recipe(REC).name == REC

    shutil.copytree(tmp_path / "recipes", package / "_recipes")
    (package / "_recipes" / "PP-OCRv4_mobile_det.yaml").unlink()
    assert recipes_dir() == package / "_recipes"
    assert "PP-OCRv4_mobile_det" not in recipe_names()
    assert load_recipe(REC).name == REC
