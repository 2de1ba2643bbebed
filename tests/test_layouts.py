"""The generated pages, COCO files, and the translation of a set's classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from calib_data.layouts import CLASSES, PLAIN_CLASSES, write_layout_pages, write_plain_layout_pages
from calib_data.registry import generated_dataset, load_entry, resolve_dataset
from eval.dataset import in_model_words, read_dataset, read_image
from eval.layouts import BrokenLayout, Layout, LayoutRegion, in_words_of, read_layouts
from quant.errors import InputError
from quant.recipe import class_labels, load_recipe

LABELS = class_labels(load_recipe("PP-DocLayout-S"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write_layout_pages(folder, 30, seed=4)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def document(folder: Path) -> Any:
    return json.loads((folder / "instances.json").read_text(encoding="utf-8"))


def test_the_generator_knows_the_classes_of_the_models() -> None:
    assert list(CLASSES) == LABELS == class_labels(load_recipe("PP-DocLayout-L"))


def test_same_seed_same_bytes_and_a_larger_set_begins_with_the_smaller(tmp_path: Path) -> None:
    for name, count, seed in (("first", 2, 5), ("again", 2, 5), ("more", 3, 5), ("other", 2, 6)):
        write_layout_pages(tmp_path / name, count, seed)
    assert contents(tmp_path / "first") == contents(tmp_path / "again")
    assert contents(tmp_path / "first") != contents(tmp_path / "other")
    few, many = contents(tmp_path / "first"), contents(tmp_path / "more")
    assert all(many[name] == data for name, data in few.items() if name.startswith("images"))


def test_every_class_is_drawn_and_every_box_lies_on_its_page(pages: Path) -> None:
    found = document(pages)
    sizes = {image["id"]: (image["width"], image["height"]) for image in found["images"]}
    assert {entry["category_id"] for entry in found["annotations"]} == set(range(1, len(CLASSES) + 1))
    for image in found["images"]:
        picture = cv2.imread(str(pages / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3)
    for entry in found["annotations"]:
        x, y, width, height = entry["bbox"]
        assert x >= 0 and y >= 0 and min(width, height) >= 4
        right, bottom = sizes[entry["image_id"]]
        assert x + width <= right + 0.2 and y + height <= bottom + 0.2


def test_boxes_hold_the_ink_and_their_surroundings_do_not(tmp_path: Path) -> None:
    """Of text blocks: there is ink at each side of the box, and none just outside."""
    write_plain_layout_pages(tmp_path, 16, seed=2)
    found = document(tmp_path)
    names = {entry["id"]: entry["name"] for entry in found["categories"]}
    assert tuple(names.values()) == PLAIN_CLASSES
    seals = {e["image_id"] for e in found["annotations"] if names[e["category_id"]] == "seal"}
    checked = 0
    for image in found["images"]:
        if image["id"] in seals:
            continue
        grey = cv2.imread(str(tmp_path / image["file_name"]), cv2.IMREAD_GRAYSCALE).astype(float)
        dark = grey < np.median(grey) - 50
        for entry in found["annotations"]:
            if entry["image_id"] == image["id"] and names[entry["category_id"]] == "text":
                x, y, width, height = (int(v) for v in entry["bbox"])
                inside = dark[y : y + height, x : x + width]
                edges = (inside[:4], inside[-4:], inside[:, :4], inside[:, -4:])
                assert all(edge.any() for edge in edges)
                assert not dark[y - 6 : y - 3, x : x + width].any()
                checked += 1
    assert checked > 15


def test_the_generated_set_is_read_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path))
    dataset = read_dataset(generated_dataset("layout_pages", 8, 0))
    assert len(dataset.samples) == 8 and not dataset.broken
    ready = in_model_words(dataset, LABELS)
    label = ready.samples[0].label
    assert isinstance(label, Layout) and label.regions
    assert dict(label.counted_as) == {name: name for name in LABELS}
    assert "not judged" not in ready.folder.source
    assert read_image(ready.samples[0].image).ndim == 3


def coco(
    folder: Path, annotations: list[dict[str, Any]], names: tuple[str, ...] = ("text", "title"), count: int = 2
) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        cv2.imwrite(str(folder / "images" / f"{index}.png"), np.full((60, 40 + index, 3), 9 * index, np.uint8))
    text = {
        "images": [{"id": 7 + index, "file_name": f"images/{index}.png"} for index in range(count)],
        "annotations": annotations,
        "categories": [{"id": 3 + index, "name": name} for index, name in enumerate(names)],
    }
    (folder / "instances.json").write_text(json.dumps(text), encoding="utf-8")
    return folder


def box(image: int = 7, category: int = 3, bbox: Any = (1, 2, 30, 4), **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": bbox, **more}


def test_a_folder_of_coco(tmp_path: Path) -> None:
    folder = coco(tmp_path, [box(), box(category=4, bbox=[5, 6, 7, 8.5], iscrowd=1)])
    dataset = read_dataset(resolve_dataset(folder, "layout_detection"))
    first, second = dataset.samples
    assert first.label == Layout((LayoutRegion((1, 2, 30, 4), "text"), LayoutRegion((5, 6, 7, 8.5), "title", True)))
    assert second.label == Layout(())
    assert first.image == folder / "images" / "0.png"


def test_a_folder_as_paddlex_lays_it_out(tmp_path: Path) -> None:
    folder = coco(tmp_path, [box()])
    (folder / "annotations").mkdir()
    text = document(folder)
    for image in text["images"]:
        image["file_name"] = Path(image["file_name"]).name
    (folder / "instances.json").unlink()
    for name, kept in (("train", 0), ("val", 1)):
        part = {**text, "images": [text["images"][kept]], "annotations": text["annotations"] if not kept else []}
        (folder / "annotations" / f"instance_{name}.json").write_text(json.dumps(part), encoding="utf-8")
    dataset = read_dataset(resolve_dataset(folder, "layout_detection"))
    assert [sample.image.name for sample in dataset.samples] == ["0.png", "1.png"]


@pytest.mark.parametrize(
    "entry",
    [
        box(bbox=[1, 2, 3]),
        box(bbox=[1, 2, 0, 4]),
        box(bbox=[1, 2, float("nan"), 4]),
        box(category=9),
        box(bbox=None),
        box(bbox="abcd"),
    ],
)
def test_a_broken_box_leaves_its_page_out(tmp_path: Path, entry: dict[str, Any]) -> None:
    folder = coco(tmp_path, [entry, box(image=8)])
    dataset = read_dataset(resolve_dataset(folder, "layout_detection"))
    assert [sample.image.name for sample in dataset.samples] == ["1.png"]
    assert "images/0.png" in dataset.broken[0]
    assert isinstance(read_layouts(folder / "instances.json").pages[0][1], BrokenLayout)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"images": [], "annotations": [], "categories": []}', '{"images": 3}']
)
def test_a_file_that_is_no_coco(tmp_path: Path, text: str) -> None:
    (tmp_path / "instances.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"instances\.json (is no COCO file|lists no pictures)"):
        read_dataset(resolve_dataset(tmp_path, "layout_detection"))


def test_an_annotation_of_an_unknown_picture_breaks_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no COCO file"):
        read_dataset(resolve_dataset(coco(tmp_path, [box(image=99)]), "layout_detection"))


def test_classes_are_translated_as_the_set_declares() -> None:
    mapping = {"title": ["paragraph_title", "doc_title"], "list": [], "text": ["text"]}
    words = in_words_of(LABELS, ["text", "title", "list", "stamp"], mapping)
    assert words.unjudged == ("list", "stamp")
    regions = tuple(LayoutRegion((0, 0, 9, 9), name) for name in ("title", "list", "text", "stamp"))
    translated = words.translated(Layout(regions))
    assert [region.name for region in translated.regions] == ["paragraph_title", None, "text", None]
    assert set(translated.counted_as) == {
        ("paragraph_title", "paragraph_title"), ("doc_title", "paragraph_title"), ("text", "text"),
    }  # fmt: skip


def test_foreign_classes_are_refused() -> None:
    with pytest.raises(InputError, match="knows none"):
        in_words_of(LABELS, ["cat", "dog"], {})
    with pytest.raises(InputError, match="does not know: list"):
        in_words_of(LABELS, ["text"], {"text": ["list"]})


@pytest.mark.parametrize("name", ["publaynet_layout", "omnidocbench_layout"])
def test_declared_mappings_are_in_the_words_of_the_models(name: str) -> None:
    mapping = load_entry(name).mapping
    named = [own for group in mapping.values() for own in group]
    assert set(named) <= set(LABELS)
    assert len(set(named)) == len(named), "a class of the model counts as one class of the set"
