"""What is kept of single pictures: the worst first, in slices, small, and the same every time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image

from eval import average_precision, exhibits
from eval.dataset import IGNORE, Box, Label, Sample, read_sample
from eval.evaluation import Outcomes
from eval.exhibits import Exhibits, Finding, Shape, load_exhibits, script_of, write_exhibits
from eval.layouts import Layout, LayoutRegion
from eval.metric import make_metric
from quant.errors import InputError
from quant.recipe import Angle
from quant.task import (
    BoxPrediction,
    ClassPrediction,
    FormulaPrediction,
    LayoutPrediction,
    TablePrediction,
    TextPrediction,
)


def pictures(folder: Path, labels: Sequence[Label], height: int = 20, width: int = 900) -> list[Sample]:
    samples = []
    for index, label in enumerate(labels):
        file = folder / f"{index}.png"
        assert cv2.imwrite(str(file), np.full((height, width, 3), 40 * index % 255, np.uint8))
        samples.append(Sample(f"{index:016x}", "even" if index % 2 == 0 else "odd", file, label))
    return samples


def made(
    folder: Path,
    task: str,
    metric: str,
    samples: Sequence[Sample],
    fp32: Sequence[Any],
    int8: Sequence[Any],
    scale: float = 1.0,
    **more: Any,
) -> Exhibits:
    """The record of predictions, scored as an evaluation scores them; the model sees pictures enlarged by `scale`."""
    judge = make_metric(metric)
    scores = [np.array([judge.score(p, s.label) for p, s in zip(ps, samples, strict=True)]) for ps in (fp32, int8)]
    outcomes = Outcomes([s.id for s in samples], [s.dataset for s in samples], *scores, [])
    found = {sample.id: pair for sample, *pair in zip(samples, fp32, int8, strict=True)}

    def input_size(width: int, height: int) -> tuple[int, int]:
        return round(width * scale), round(height * scale)

    write_exhibits(folder, task, judge, outcomes, samples, lambda sample: tuple(found[sample.id]), input_size, **more)
    return load_exhibits(folder)


def texts(*read: str) -> list[TextPrediction]:
    return [TextPrediction(text, 0.9) for text in read]


def test_lines_that_differ_are_kept_the_worst_first(tmp_path: Path) -> None:
    labels = ["abcd", "12345678", "中文", "abc", "a very long line of text", "same"]
    samples = pictures(tmp_path, labels, width=1800)
    fp32 = texts("abcd", "12345678", "中文", "abd", "a very long line of text", "same")
    int8 = texts("abce", "99999999", "中文", "abc", "a very long line of text", "same")
    record = made(tmp_path / "kept", "text_recognition", "line_accuracy", samples, fp32, int8, scale=2.4)
    assert (record.samples, record.differing) == (6, 3)
    assert [row.id[-1] for row in record.rows] == ["1", "0", "3"], "by score, then by similarity; what INT8 won is last"
    assert [(row.fp32, row.int8) for row in record.rows] == [(100, 0), (100, 0), (0, 100)]
    first = record.exhibits[0]
    assert (first.label.text, first.fp32_found.text, first.int8_found.text) == ("12345678", "12345678", "99999999")
    assert (first.width, first.height) == (1800, 20)
    stored = cv2.imread(str(tmp_path / "kept" / first.picture))
    assert stored.shape == (14, 1280, 3)
    parts = {(part.axis, part.name): part for part in record.slices}
    assert {axis for axis, _ in parts} == {"data set", "text length", "script", "size of text"}
    assert parts["script", "latin"].samples == 4 and parts["script", "digits"].drop == 100
    assert (parts["script", "latin"].worse, parts["script", "latin"].better) == (1, 1)
    assert [name for axis, name in parts if axis == "text length"] == [
        "up to 5 characters",
        "6 to 10 characters",
        "21 to 40 characters",
    ]
    assert parts["size of text", "up to 50 % of the model's 48 pixels"].samples == 6
    for axis in ("data set", "text length", "script"):
        assert sum(part.samples for part in record.slices if part.axis == axis) == 6


def test_the_same_bytes_again_and_never_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exhibits, "MOST_PICTURES", 2)
    monkeypatch.setattr(exhibits, "MOST_ROWS", 3)
    samples = pictures(tmp_path, ["a"] * 5)
    for place in ("one", "two"):
        record = made(tmp_path / place, "text_recognition", "line_accuracy", samples, texts(*"aaaaa"), texts(*"bbbbb"))
        assert (len(record.exhibits), len(record.rows), record.differing) == (2, 3, 5)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["00.jpg", "01.jpg", "exhibits.json"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def box(left: int, top: int, side: int = 40) -> list[list[int]]:
    return [[left, top], [left + side, top], [left + side, top + side], [left, top + side]]


def label_box(left: int, top: int, text: str) -> Box:
    return Box(tuple((float(x), float(y)) for x, y in box(left, top)), text)


def boxes(*places: tuple[int, int]) -> BoxPrediction:
    return BoxPrediction([np.array(box(*place), dtype=np.int32) for place in places], [0.9] * len(places))


def test_boxes_that_only_one_has_are_marked(tmp_path: Path) -> None:
    label = (label_box(10, 10, "one"), label_box(200, 10, "zwei"), label_box(400, 10, IGNORE))
    samples = pictures(tmp_path, [label], height=100)
    fp32, int8 = boxes((10, 10), (200, 10)), boxes((12, 11), (600, 50))
    record = made(tmp_path / "kept", "text_detection", "hmean", samples, [fp32], [int8], scale=0.5)
    (shown,) = record.exhibits
    assert [shape.alone for shape in shown.fp32_found.shapes] == [False, True]
    assert [shape.alone for shape in shown.int8_found.shapes] == [False, True]
    assert [shape.name for shape in shown.label.shapes] == ["one", "zwei", IGNORE]
    assert {part.axis: part.name for part in record.slices}[
        "size of text"
    ] == "17 to 24 pixels high as the model sees it"


def test_a_box_that_slips_off_its_label_is_marked(tmp_path: Path) -> None:
    """The models' boxes are partners, but only one of them is near enough to the label."""
    samples = pictures(tmp_path, [(label_box(100, 10, "one"), label_box(300, 10, "two"))], height=100)
    fp32, int8 = boxes((110, 10), (300, 10)), boxes((115, 10), (300, 10))
    (shown,) = made(tmp_path / "kept", "text_detection", "hmean", samples, [fp32], [int8]).exhibits
    assert (shown.fp32, shown.int8) == (100, 50)
    assert not any(shape.alone for found in (shown.fp32_found, shown.int8_found) for shape in found.shapes)
    assert [shape.extra for shape in shown.int8_found.shapes] == [True, False]
    assert [shape.name for shape in shown.int8_found.missed] == ["one"]
    assert not shown.fp32_found.missed and not any(shape.extra for shape in shown.fp32_found.shapes)


@pytest.mark.parametrize("seed", range(20))
def test_marks_are_as_many_as_the_metric_counts(seed: int) -> None:
    """Boxes that touch one another, some in places that are not judged; detections that clients do not show."""
    dice = np.random.default_rng(seed)
    places = dice.integers(0, 60, (12, 2)).tolist()
    label = tuple(label_box(x, y, IGNORE if number % 4 == 0 else "a") for number, (x, y) in enumerate(places[:6]))
    found = exhibits._found("text_detection", prediction := boxes(*map(tuple, places[6:])), label)
    matched, detected, labelled = make_metric("hmean").score(prediction, label)
    assert len(found.missed) == labelled - matched
    assert sum(shape.extra for shape in found.shapes) == detected - matched

    names = dice.choice(["text", "table", ""], 6).tolist()
    regions = [LayoutRegion((x, y, 40, 40), name or None) for (x, y), name in zip(places[:6], names, strict=True)]
    page = Layout(tuple(regions), (("text", "text"), ("table", "table")))
    corners = np.array([[x, y, x + 40, y + 40] for x, y in places[6:]], dtype=np.float64)
    classes = dice.integers(0, 3, 6)
    layouts = LayoutPrediction(corners, dice.uniform(0.3, 1.0, 6), classes, ("text", "table", "seal"))
    shown = exhibits._found("layout_detection", layouts, page)
    right, wrong = average_precision._shown(make_metric("map50").score(layouts, page)).sum(axis=0)
    assert len(shown.missed) == sum(name != "" for name in names) - right
    assert sum(shape.extra for shape in shown.shapes) == wrong


def test_boxes_of_another_name_or_without_area_are_no_partners() -> None:
    square = [(0.0, 0.0), (9.0, 0.0), (9.0, 9.0), (0.0, 9.0)]
    crossed = [square[0], square[2], square[1], square[3]]
    first = Finding(shapes=[Shape(points=square, name=name) for name in "ab"] + [Shape(points=crossed, name="a")])
    second = Finding(shapes=[Shape(points=square, name="a"), Shape(points=crossed, name="b")])
    marked = exhibits._told_apart(first, second)
    assert [[shape.alone for shape in finding.shapes] for finding in marked] == [[False, True, True], [False, True]]


@pytest.mark.parametrize(
    ("orientation", "turn", "height"), [(1, 0, 30), (6, 0, 90), (1, 90, 90), (8, 270, 30), (3, 180, 30)]
)
def test_the_size_of_a_line_is_that_of_the_picture_as_it_is_read(
    orientation: int, turn: Angle, height: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (90, 30)).save(tmp_path / "line.jpg", exif=exif)
    sample = Sample("a", "set", tmp_path / "line.jpg", "text", turn)
    assert read_sample(sample).shape[0] == height
    name = {30: "51 to 75 % of the model's 48 pixels", 90: "over 150 % of the model's 48 pixels"}[height]
    assert exhibits._slices_of(sample, "text_recognition", lambda w, h: (w, 48), ())["size of text"][1] == name


@pytest.mark.parametrize(
    ("size", "expected"),
    [((400, 200), "25 to 32 pixels"), ((200, 100), "up to 16 pixels"), ((400, 100), "17 to 24 pixels")],
)
def test_the_size_of_text_in_a_page_is_that_which_the_model_sees(
    size: tuple[int, int], expected: str, tmp_path: Path
) -> None:
    """A line of 100 x 30 pixels at 45 degrees, in a page that is resized."""
    Image.new("RGB", (400, 200)).save(tmp_path / "page.png")
    along, across = np.array([100, 100]) / np.sqrt(2), np.array([-30, 30]) / np.sqrt(2)
    corners = np.array([[150, 50], [150, 50] + along, [150, 50] + along + across, [150, 50] + across])
    sample = Sample("a", "set", tmp_path / "page.png", (Box(tuple(map(tuple, corners.tolist())), "text"),))
    name = exhibits._slices_of(sample, "text_detection", lambda w, h: size, ())["size of text"][1]
    assert name == f"{expected} high as the model sees it"


def layout(*classes: int) -> LayoutPrediction:
    corners = np.array([[0.0, 0, 50, 50]] * len(classes)).reshape(-1, 4)
    scores = np.linspace(0.9, 0.4, len(classes))
    return LayoutPrediction(corners, scores, np.array(classes, dtype=np.int64), ("text", "table"))


def test_every_other_task_is_shown(tmp_path: Path) -> None:
    regions = Layout((LayoutRegion((0, 0, 50, 50), "text"),), (("text", "text"), ("table", "table")))
    table = "<html><body><table><tr><td>a</td><td>b</td></tr></table></body></html>"
    cells = [TablePrediction(table.replace("<td>b</td>", other), [], 1.0) for other in ("<td></td>", "")]
    classes = [ClassPrediction(index, name, 0.9, 2) for index, name in enumerate(("0_degree", "180_degree"))]
    cases: list[tuple[str, str, Label, Any, Any]] = [
        ("layout_detection", "map50", regions, layout(0, 1), layout(1, 0)),
        ("table_structure", "teds_struct", table, cells[0], cells[1]),
        ("formula_recognition", "bleu", "a+b", FormulaPrediction("a+b"), FormulaPrediction("a-b")),
        ("image_classification", "top1", 0, classes[0], classes[1]),
    ]
    for task, metric, label, fp32, int8 in cases:
        (place := tmp_path / task).mkdir()
        samples, names = pictures(place, [label]), ("0_degree", "180_degree")
        record = made(place / "kept", task, metric, samples, [fp32], [int8], classes=names)
        (shown,) = record.exhibits
        assert shown.fp32_found != shown.int8_found and shown.label.text + str(shown.label.shapes)
        if task == "layout_detection":
            assert [(s.name, s.alone) for s in shown.fp32_found.shapes] == [("text", True)], "clients show no other"
        if task == "image_classification":
            assert (shown.label.text, shown.int8_found.text) == names
        assert {part.axis for part in record.slices} > {"data set"}


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Total", "latin"),
        ("12.50", "digits"),
        ("中文", "cjk"),
        ("A中", "mixed"),
        ("--", "signs"),
        ("Привет 5", "cyrillic"),
    ],
)
def test_scripts(text: str, script: str) -> None:
    assert script_of(text) == script


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "exhibits.json").write_text(json.dumps({"schema": 1}), encoding="utf-8")
    with pytest.raises(InputError, match=r"exhibits.json: missing or damaged"):
        load_exhibits(tmp_path)
