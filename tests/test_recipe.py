"""Recipes: all of them are valid, and every mistake is named with file, key, value and what is allowed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from quant import recipe as recipe_module
from quant.errors import InputError
from quant.recipe import RecipeError, limited_to, load_recipe, recipe_names, recipes_dir

REC = "PP-OCRv4_mobile_rec"


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
        "calibration: {samples: 0, range: median}\ntargets: {tensorrt: {}, paddle: {method: magic}}\n"
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
    assert found["calibration.range"][1:] == ("'median'", "Input should be 'minmax', 'percentile' or 'mse'")
    assert "greater than or equal to 1" in found["calibration.samples"][2]
    assert found["data.splits"][2] == "calibration + search + report must be 1, not 1.5"
    assert found["colour"][1] == "'red'"
    assert "calibration" in found["colour"][2], "the keys that are allowed there"
    assert found["model.wheel.colour"][2] == "unknown key; allowed here: package, folder"
    assert any(
        "tensorrt" in key and "'onnxruntime', 'openvino' or 'paddle'" in text for key, (_, _, text) in found.items()
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
        ("base: nothing\n", "must be one of image_classification, text_detection"),
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


# --- --set -----------------------------------------------------------------------------------------


def test_overrides_are_yaml_and_descend_by_dots() -> None:
    recipe = load_recipe(REC, ["calibration.samples=7", "data.sets=[a, b]", "gate={max_drop: 2, max_relative_drop: 3}"])
    assert recipe.calibration.samples == 7
    assert recipe.calibration.range == load_recipe(REC).calibration.range
    assert recipe.data.sets == ["a", "b"]
    assert (recipe.gate.max_drop, recipe.gate.max_relative_drop) == (2, 3)
    assert load_recipe(REC, ["seed=1", "seed=2"]).seed == 2
    assert load_recipe(REC, ["description=a=b"]).description == "a=b"


@pytest.mark.parametrize("override", ["calibration.samples", "=3", "name.x.y=1", "seed=[1"])
def test_overrides_that_make_no_sense(override: str) -> None:
    with pytest.raises(InputError, match="--set"):
        load_recipe(REC, [override])


def test_overrides_are_checked_like_the_file() -> None:
    assert problems(REC, "calibration.samples=many")["calibration.samples"][1] == "'many'"
    assert "samples" in problems(REC, "calibration.sample=3")["calibration.sample"][2]


def test_what_openvino_computes_wrongly_is_refused() -> None:
    found = problems(REC, "targets.openvino.equalization=all")
    assert "allowed: none, depthwise" in found["targets"][2]
    assert load_recipe(REC, ["targets.onnxruntime.equalization=all"]).targets["onnxruntime"].equalization == "all"


def test_the_hash_changes_with_what_the_recipe_says_and_only_then() -> None:
    assert load_recipe(REC).content_hash() == load_recipe(REC).content_hash()
    assert load_recipe(REC, ["seed=1"]).content_hash() != load_recipe(REC).content_hash()
    same = load_recipe(REC).calibration.samples
    assert load_recipe(REC, [f"calibration.samples={same}"]).content_hash() == load_recipe(REC).content_hash()


def test_targets_can_be_limited() -> None:
    recipe = load_recipe(REC)
    assert list(limited_to(recipe, ["paddle"]).targets) == ["paddle"]
    assert limited_to(recipe, []).targets == recipe.targets
    with pytest.raises(InputError, match="no target 'tensorrt'; it has onnxruntime"):
        limited_to(recipe, ["tensorrt"])


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
