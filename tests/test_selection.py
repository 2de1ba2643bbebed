"""Which pictures serve what, for classifiers of orientation: turned sets, labelled sets, nothing that was seen."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from quant.errors import InputError
from quant.recipe import Recipe, RecipeError, load_recipe
from quant.selection import find_datasets, select, unused, warn_of_few

LINES, PAGES = "PP-LCNet_x0_25_textline_ori", "PP-LCNet_x1_0_doc_ori"

pytestmark = pytest.mark.usefixtures("own_cache")


def pictures(folder: Path, count: int, width: int = 32) -> list[str]:
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        cv2.imwrite(str(folder / "images" / f"{number}.png"), np.full((8, width, 3), number, np.uint8))
    return [f"images/{number}.png" for number in range(count)]


def upright_lines(folder: Path, count: int = 40) -> str:
    text = "".join(f"{name}\ttext\n" for name in pictures(folder, count))
    (folder / "label.txt").write_text(text)
    return str(folder)


def labelled(folder: Path, classes: int) -> str:
    names = pictures(folder, 40)
    (folder / "train.txt").write_text("".join(f"{name} {i % classes}\n" for i, name in enumerate(names)))
    (folder / "label.txt").write_text("".join(f"{i} class {i}\n" for i in range(classes)))
    return str(folder)


def test_an_upright_folder_of_lines_is_turned(tmp_path: Path) -> None:
    chosen = select(load_recipe(LINES), [upright_lines(tmp_path / "mine")], None)
    parts = (chosen.calibration, chosen.search, chosen.report)
    assert sum(len(part) for part in parts) == 80
    for part in parts:
        assert sorted(sample.label for sample in part) == [0] * (len(part) // 2) + [1] * (len(part) // 2)
    record = chosen.records["mine"]
    assert record.calibration + record.search + record.report == 80
    assert record.source.endswith("turned by 0, 180 degrees")


def test_a_labelled_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (dataset,), _ = find_datasets(load_recipe(LINES), [labelled(tmp_path / "mine", 2)], None)
    assert [sample.label for sample in dataset.samples[:4]] == [0, 1, 0, 1]
    assert {sample.turn for sample in dataset.samples} == {0}


def test_a_set_with_the_classes_of_another_model(tmp_path: Path) -> None:
    folder = labelled(tmp_path / "mine", 2)
    with pytest.raises(InputError, match=r"classes class 0, class 1, the model PP-LCNet_x1_0_doc_ori has 0, 90, 180"):
        find_datasets(load_recipe(PAGES), [folder], None)


def test_no_rotation_of_a_picture_that_was_used_is_judged(tmp_path: Path) -> None:
    datasets, _ = find_datasets(load_recipe(LINES), [upright_lines(tmp_path / "mine", 4)], None)
    first, second = datasets[0].samples[:2]
    assert first.picture == second.picture
    for used in (first, second):
        kept, dropped = unused((sample for dataset in datasets for sample in dataset.samples), {used.id})
        assert dropped == 2 and first not in kept and second not in kept


@pytest.mark.parametrize(("model", "kind"), [(LINES, "text_lines"), (PAGES, "document_pages")])
def test_without_any_set_generated_pictures_are_turned(model: str, kind: str) -> None:
    recipe: Recipe = load_recipe(model, ["data.sets=[]", "data.generated.samples=8"])
    (dataset,), _ = find_datasets(recipe, (), None)
    assert recipe.data.rotations is not None
    angles = recipe.data.rotations.angles
    assert dataset.folder.name == f"generated-{kind}"
    assert [sample.turn for sample in dataset.samples[: len(angles)]] == angles
    assert len({sample.id for sample in dataset.samples}) == len(dataset.samples)


def test_angles_have_to_be_the_classes_of_the_model() -> None:
    with pytest.raises(RecipeError, match="has 3 angles, inference names 2 classes"):
        load_recipe(LINES, ["data.rotations.angles=[0, 90, 180]"])
    with pytest.raises(RecipeError, match="an angle stands twice"):
        load_recipe(LINES, ["data.rotations.angles=[0, 0]"])


def test_folders_of_one_name_are_told_apart_and_share_no_sample(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = (upright_lines(tmp_path / place / "pooled", count) for place, count in (("a", 30), ("b", 40)))
    with (tmp_path / "b" / "pooled" / "label.txt").open("a") as labels:
        labels.write("images/none.png\ttext\n")
    chosen = select(load_recipe("PP-OCRv4_mobile_rec"), [one, other], None)
    first, second = "folder-pooled", "folder-pooled-2"
    assert list(chosen.records) == [first, second]
    counts = {name: r.calibration + r.search + r.report for name, r in chosen.records.items()}
    assert counts == {first: 30, second: 10}, "the other thirty pictures of the second folder are those of the first"
    assert {sample.dataset for sample in chosen.report} == {first, second}
    (said,) = caplog.messages
    assert said.startswith("folder-pooled: 1 broken label lines") and "none.png" in said


@pytest.mark.parametrize(
    ("generated", "change", "said"),
    [
        (False, "calibration.samples=64", "asks for 64; give more by --data, or take a larger share than 0.1"),
        (False, "calibration.samples=1", None),
        (False, "data.splits={calibration: 0.6, search: 0.2, report: 0.2}", "asks for 192; give more by --data"),
        (True, "data.generated.samples=40", "generate more by --set data.generated.samples="),
    ],
)
def test_fewer_for_calibration_than_asked_for_are_said(
    generated: bool, change: str, said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With what to do about it, which is a setting that recipes take."""
    recipe = load_recipe(LINES, ["data.sets=[]", change])
    chosen = select(recipe, [] if generated else [upright_lines(tmp_path / "mine")], None)
    warn_of_few(recipe, chosen)
    if said is None:
        assert caplog.messages == []
        return
    (message,) = caplog.messages
    assert f"{len(chosen.calibration)} samples calibrate" in message and said in message
    words = shlex.split(message)
    settings = [setting.strip(",") for word, setting in pairwise(words) if word == "--set"]
    assert len(settings) == generated + (recipe.data.splits.calibration < 0.5)
    load_recipe(LINES, settings)
