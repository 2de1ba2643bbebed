"""Data sets by name: which source wins, and what is said when none has it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from official_host import OfficialHost
from test_archive import files_below, interrupt, no_space, tar_of

from calib_data import generator, registry
from calib_data.registry import (
    FORMATS,
    DatasetEntry,
    dataset_names,
    generated_dataset,
    install_dataset,
    load_entry,
    resolve_dataset,
)
from quant import archive
from quant.errors import InputError, Unavailable
from quant.recipe import load_recipe, recipe_names
from quant.stage import SEAL

REC_SET = {"top/train.txt": b"images/1.png\tone\n", "top/val.txt": b"images/2.png\ttwo\n", "top/images/1.png": b"1"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QUANT_DATA_HOME", raising=False)
    monkeypatch.setattr(archive, "_unreachable", {})
    return tmp_path / "cache"


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[OfficialHost]:
    """The public host of paddlex_ocr_rec, on this machine."""
    server = OfficialHost()
    facts = load_entry("paddlex_ocr_rec").model_dump(by_alias=True)
    entry = DatasetEntry.model_validate({**facts, "archive": {"url": f"{server.url}/rec.tar"}})
    monkeypatch.setattr(registry, "load_entry", lambda name: entry if name == entry.name else load_entry(name))
    yield server
    server.close()


@pytest.mark.parametrize("name", dataset_names())
def test_every_entry_is_valid(name: str) -> None:
    entry = load_entry(name)
    assert entry.name == name
    assert entry.format in (FORMATS[entry.task], "latex_lines")
    assert entry.archive or entry.note, "a set that cannot be downloaded says how to get it"


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_name_known_sets(name: str) -> None:
    recipe = load_recipe(name)
    upright = dataset_names(recipe.data.rotations.of) if recipe.data.rotations else []
    assert set(recipe.data.sets) <= {*dataset_names(recipe.task), *upright}


def test_all_problems_of_an_entry_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "registry.py"))
    (tmp_path / "bad.yaml").write_text("schema: 2\nname: bad\nlabel_files: [../x]\nextra: 1\n")
    with pytest.raises(InputError) as caught:
        load_entry("bad")
    for key in ("schema", "label_files.0", "extra", "homepage"):
        assert f"bad.yaml: {key} =" in str(caught.value)
    (tmp_path / "bad.yaml").write_text("{")
    with pytest.raises(InputError, match=r"bad\.yaml: no YAML"):
        load_entry("bad")


def test_a_folder_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "label.txt").write_text("a.png\ttext\n")
    data = resolve_dataset(tmp_path / "mine", "text_recognition")
    assert (data.name, data.format, data.folder) == ("mine", "rec_label", tmp_path / "mine")
    assert data.label_files == (tmp_path / "mine" / "label.txt",)


def test_a_folder_of_classes(tmp_path: Path) -> None:
    """PaddleX's layout: train.txt and val.txt list pictures, label.txt names the classes."""
    (tmp_path / "train.txt").write_text("images/a.png 1\n")
    (tmp_path / "label.txt").write_text("1 180_degree\n0 0_degree\n")
    data = resolve_dataset(tmp_path, "image_classification", upright="text_recognition")
    assert (data.format, data.classes) == ("cls_label", ("0_degree", "180_degree"))
    assert [path.name for path in data.label_files] == ["train.txt"]
    (tmp_path / "label.txt").unlink()
    assert resolve_dataset(tmp_path, "image_classification").classes == ()
    (tmp_path / "label.txt").write_text("images/a.png\ttext\n")
    with pytest.raises(InputError, match=r"label\.txt is no list of classes; expected lines like 0 0_degree"):
        resolve_dataset(tmp_path, "image_classification")
    (tmp_path / "label.txt").write_text("1 one\n2 two\n")
    with pytest.raises(InputError, match=r"must number the classes from 0 without a gap, not \[1, 2\]"):
        resolve_dataset(tmp_path, "image_classification")


def test_upright_sets_serve_classifiers_of_orientation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sroie_rec").mkdir()
    (tmp_path / "sroie_rec" / "label.txt").write_text("a.png\ttext\n")
    data = resolve_dataset(tmp_path / "sroie_rec", "image_classification", upright="text_recognition")
    assert data.format == "rec_label"
    monkeypatch.setenv("QUANT_DATA_HOME", str(tmp_path))
    assert resolve_dataset("sroie_rec", "image_classification", None, "text_recognition").format == "rec_label"
    with pytest.raises(InputError, match="is for text_recognition, not image_classification"):
        resolve_dataset("sroie_rec", "image_classification")
    with pytest.raises(InputError, match="is for text_detection, not image_classification"):
        resolve_dataset("sroie_det", "image_classification", None, "text_recognition")
    with pytest.raises(InputError, match=r"train\.txt is missing; expected .*images/1\.jpg 0"):
        resolve_dataset(tmp_path / "sroie_rec", "image_classification")


def test_only_sets_of_classes_name_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = load_entry("paddlex_textline_ori").model_dump(mode="json", by_alias=True)
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "registry.py"))
    (tmp_path / "bad.yaml").write_text(json.dumps(good | {"classes": []}))
    with pytest.raises(InputError, match="classes must be named"):
        load_entry("bad")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"label\.txt is missing; expected .*<TAB>text"):
        resolve_dataset(tmp_path, "text_recognition")


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "../sroie_rec"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match=r"Known sets: .*sroie_rec"):
        resolve_dataset(name, "text_recognition")


def test_a_set_of_another_task() -> None:
    with pytest.raises(InputError, match="is for text_detection, not text_recognition"):
        resolve_dataset("sroie_det", "text_recognition")


def test_a_set_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANT_DATA_HOME", str(tmp_path / "home"))
    with pytest.raises(Unavailable) as caught:
        resolve_dataset("sroie_rec", "text_recognition")
    assert str(tmp_path / "home" / "sroie_rec") in caught.value.reason
    assert "no open address" in caught.value.reason
    assert "https://rrc.cvc.uab.es" in caught.value.fix
    assert "QUANT_DATA_HOME" in caught.value.fix


def test_the_search_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setenv("QUANT_DATA_HOME", os.pathsep.join(str(home) for home in homes))
    (homes[1] / "sroie_rec").mkdir(parents=True)
    with pytest.raises(InputError, match=r"label\.txt is missing"):
        resolve_dataset("sroie_rec", "text_recognition")
    (homes[1] / "sroie_rec" / "label.txt").write_text("a.png\ttext\n")
    data = resolve_dataset("sroie_rec", "text_recognition")
    assert (data.folder, data.source) == (homes[1] / "sroie_rec", f"QUANT_DATA_HOME ({homes[1]})")


def test_a_registered_name_is_not_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sroie_rec").mkdir()
    (tmp_path / "sroie_rec" / "label.txt").write_text("a.png\ttext\n")
    with pytest.raises(Unavailable):
        resolve_dataset("sroie_rec", "text_recognition")
    assert resolve_dataset("./sroie_rec", "text_recognition").folder == tmp_path / "sroie_rec"


def test_a_public_archive(host: OfficialHost, cache: Path) -> None:
    host.put("/rec.tar", tar_of(REC_SET))
    data = resolve_dataset("paddlex_ocr_rec", "text_recognition")
    assert data.source == f"the public archive {host.url}/rec.tar"
    assert [path.name for path in data.label_files] == ["train.txt", "val.txt"]
    assert all(path.is_file() for path in data.label_files)
    assert resolve_dataset("paddlex_ocr_rec", "text_recognition").source.startswith("the cache")
    assert install_dataset("paddlex_ocr_rec").folder == cache / "data" / "paddlex_ocr_rec"
    assert host.requests == ["/rec.tar"]


def test_a_public_archive_without_labels(host: OfficialHost, cache: Path) -> None:
    host.put("/rec.tar", tar_of({"top/train.txt": b""}))
    with pytest.raises(InputError, match=r"val\.txt is missing"):
        resolve_dataset("paddlex_ocr_rec", "text_recognition")
    assert files_below(cache / "data") == []


def test_a_public_archive_that_is_gone(host: OfficialHost, cache: Path) -> None:
    with pytest.raises(Unavailable, match="404"):
        resolve_dataset("paddlex_ocr_rec", "text_recognition")
    assert files_below(cache) == []


def test_the_generated_set_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, int, int | None]] = []
    first = generated_dataset("text_lines", 8, 3, lambda *step: steps.append(step))
    assert steps[-1] == ("generating text lines", 8, 8)
    assert first.folder.parent == cache / "data"
    assert first.name == "generated-text_lines"
    assert len(first.label_files[0].read_text(encoding="utf-8").splitlines()) == 8
    monkeypatch.setattr(generator, "write_text_lines", interrupt)
    assert generated_dataset("text_lines", 8, 3) == first
    monkeypatch.setattr(generator, "GENERATOR_VERSION", -1)
    with pytest.raises(KeyboardInterrupt):
        generated_dataset("text_lines", 8, 3)
    assert os.listdir(cache / "data") == [first.folder.name]


@pytest.mark.parametrize("gone", [True, False])
def test_a_damaged_generated_set_is_made_again(gone: bool) -> None:
    """Else a label file that is gone would be missed for ever, and a picture that is cut off would be left out."""
    made = generated_dataset("text_lines", 4, 3)
    files = sorted(path for path in made.folder.rglob("*") if path.is_file() and path.name != SEAL)
    before = [path.read_bytes() for path in files]
    for path in files if gone else files[-1:]:
        path.unlink() if gone else path.write_bytes(path.read_bytes()[:9])
    assert generated_dataset("text_lines", 4, 3) == made
    assert [path.read_bytes() for path in files] == before


def test_generated_sets_differ_by_what_they_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(directory: Path, count: int, seed: int, progress: Callable[[int], None] | None) -> None:
        (directory / "label.txt").write_text(json.dumps([count, seed]))

    monkeypatch.setattr(generator, "write_text_lines", write)
    monkeypatch.setattr(generator, "write_text_pages", write)
    monkeypatch.setattr(generator, "write_document_pages", write)
    sets = [
        generated_dataset("text_lines", 8, 0),
        generated_dataset("text_lines", 9, 0),
        generated_dataset("text_lines", 8, 1),
        generated_dataset("text_pages", 8, 0),
        generated_dataset("document_pages", 8, 0),
    ]
    assert len({data.folder for data in sets}) == 5
    assert [data.format for data in sets] == ["rec_label"] * 3 + ["det_label"] * 2


def test_two_processes_generate_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(directory: Path, count: int, seed: int, progress: Callable[[int], None] | None) -> None:
        if not others:
            others.append(directory)
            generated_dataset("text_lines", count, seed)
        (directory / "label.txt").write_text("x.png\ttext\n")

    others: list[Path] = []
    monkeypatch.setattr(generator, "write_text_lines", write)
    data = generated_dataset("text_lines", 8, 0)
    assert files_below(cache) == [f"data/{data.folder.name}/{name}" for name in (SEAL, "label.txt")]


def test_a_full_disk_while_generating(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "write_text_lines", no_space)
    with pytest.raises(Unavailable, match="No space left"):
        generated_dataset("text_lines", 8, 0)
    assert files_below(cache) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(Unavailable) as caught:
        generated_dataset("text_lines", 8, 0)
    assert "QUANT_CACHE" in caught.value.fix
