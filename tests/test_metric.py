"""Metrics against their definitions."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metric import Hmean, LineAccuracy, Top1, make_metric, polygon_iou
from quant.errors import InputError


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class TextRegion:
    points: np.ndarray[Any, Any]
    text: str


@dataclass(frozen=True)
class Boxes:
    polygons: list[np.ndarray[Any, Any]] = field(default_factory=list)


def square(x: float, y: float, width: float = 10, height: float = 10) -> np.ndarray[Any, Any]:
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])


def edit_distance(first: str, second: str) -> int:
    """Wagner-Fischer, the definition of the Levenshtein distance."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        previous, row = row, [i]
        for j, right in enumerate(second, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (left != right)))
    return row[-1]


TEXTS = st.text(alphabet="ab 游é", max_size=12)


@given(TEXTS, TEXTS)
def test_recognition_counts_follow_the_definition(read: str, true: str) -> None:
    right, similarity, one = LineAccuracy().score(Text(read), true)
    short_read, short_true = read.replace(" ", ""), true.replace(" ", "")
    longest = max(len(short_read), len(short_true))
    expected = 1 - edit_distance(short_read, short_true) / longest if longest else 1
    assert right == (short_read == short_true)
    assert similarity == pytest.approx(expected)
    assert one == 1


def test_line_accuracy_of_a_set() -> None:
    metric = LineAccuracy()
    lines = [("a b", "ab"), ("abcd", "abcx"), ("", "xy"), ("游人", "游人")]
    total = np.sum([metric.score(Text(read), true) for read, true in lines], axis=0)
    assert metric.aggregate(total) == 50
    assert metric.details(total) == {
        "line_accuracy": 50,
        "normalized_edit_similarity": pytest.approx(100 * (1 + 0.75 + 0 + 1) / 4),
    }


def test_a_line_is_discordant_only_when_right_turns_wrong_or_back() -> None:
    first = np.array([[1, 1, 1], [0, 0.5, 1], [1, 1, 1]], dtype=float)
    second = np.array([[1, 1, 1], [0, 0.8, 1], [0, 0.9, 1]], dtype=float)
    assert LineAccuracy().outcome_differs(first, second).tolist() == [False, False, True]


def test_hmean_of_a_hand_computed_page() -> None:
    """Three labels, one ignored region; four detections: one exact, one half off, one ignored, one false."""
    labels = [
        TextRegion(square(0, 0), "one"),
        TextRegion(square(100, 0), "two"),
        TextRegion(square(200, 0), "three"),
        TextRegion(square(300, 0, 50, 50), "###"),
    ]
    found = Boxes([square(0, 0), square(105, 0), square(310, 10), square(500, 500)])
    metric = Hmean()
    counts = metric.score(found, labels)
    assert counts.tolist() == [1, 3, 3]  # IoU of the second is 50 / 150
    assert metric.details(counts) == {
        "precision": pytest.approx(100 / 3),
        "recall": pytest.approx(100 / 3),
        "hmean": pytest.approx(100 / 3),
    }
    total = counts + np.array([2, 2, 5])
    precision, recall = 3 / 5, 3 / 8
    assert metric.aggregate(total) == pytest.approx(100 * 2 * precision * recall / (precision + recall))


@pytest.mark.parametrize(("shift", "judged"), [(4, 0), (5, 1), (6, 1)])
def test_a_detection_is_ignored_when_more_than_half_of_it_is(shift: float, judged: int) -> None:
    labels = [TextRegion(square(0, 0), "###")]
    assert Hmean().score(Boxes([square(shift, 0)]), labels).tolist() == [0, judged, 0]


def test_one_detection_serves_one_label_in_order() -> None:
    labels = [TextRegion(square(0, 0), "a"), TextRegion(square(0, 0), "b")]
    assert Hmean().score(Boxes([square(0, 0)]), labels).tolist() == [1, 1, 2]
    assert Hmean().score(Boxes([square(0, 0), square(1, 0)]), labels).tolist() == [2, 2, 2]


def test_an_iou_of_exactly_one_half_does_not_match() -> None:
    labels = [TextRegion(square(0, 0, 10, 10), "a")]
    assert Hmean().score(Boxes([square(0, 0, 20, 10)]), labels).tolist() == [0, 1, 1]


def test_polygons_that_are_none_are_left_out() -> None:
    bow = np.array([[0, 0], [10, 10], [10, 0], [0, 10]])
    line = np.array([[0, 0], [10, 0], [5, 0]])
    labels = [TextRegion(bow, "a"), TextRegion(line, "b"), TextRegion(np.zeros((2, 2)), "c"), TextRegion(bow, "###")]
    assert Hmean().score(Boxes([bow, line]), labels).tolist() == [0, 0, 0]
    assert Hmean().aggregate(np.zeros(3)) == 0


def icdar_counts(found: list[Any], labels: list[tuple[Any, bool]]) -> list[int]:
    """The rules in their plainest form, every pair compared."""
    labelled = [(shapely.Polygon(points), ignored) for points, ignored in labels]
    detected = [shapely.Polygon(points) for points in found]
    keep = [
        all(box.intersection(area).area / box.area <= 0.5 for area, ignored in labelled if ignored) for box in detected
    ]
    used_labels: set[int] = set()
    used_boxes: set[int] = set()
    for i, j in product(range(len(labelled)), range(len(detected))):
        area, ignored = labelled[i]
        if ignored or not keep[j] or i in used_labels or j in used_boxes:
            continue
        if area.intersection(detected[j]).area / area.union(detected[j]).area > 0.5:
            used_labels.add(i)
            used_boxes.add(j)
    return [len(used_boxes), sum(keep), sum(not ignored for _, ignored in labelled)]


RECTANGLES = st.builds(square, *[st.integers(0, 12)] * 2, *[st.integers(4, 14)] * 2)


@settings(max_examples=150, deadline=None)
@given(st.lists(RECTANGLES, max_size=6), st.lists(st.tuples(RECTANGLES, st.booleans()), max_size=6))
def test_detection_counts_follow_the_rules(found: list[Any], labels: list[tuple[Any, bool]]) -> None:
    regions = [TextRegion(points, "###" if ignored else "text") for points, ignored in labels]
    assert Hmean().score(Boxes(found), regions).tolist() == icdar_counts(found, labels)


@settings(deadline=None)
@given(RECTANGLES, RECTANGLES)
def test_iou_of_rectangles_on_a_grid_is_a_count_of_cells(first: Any, second: Any) -> None:
    cells = np.zeros((2, 32, 32), dtype=bool)
    for layer, points in enumerate((first, second)):
        (left, top), (right, bottom) = points[0], points[2]
        cells[layer, top:bottom, left:right] = True
    expected = cells.all(axis=0).sum() / cells.any(axis=0).sum()
    assert polygon_iou(shapely.Polygon(first), shapely.Polygon(second)) == pytest.approx(expected)


def test_any_count_that_differs_makes_a_page_discordant() -> None:
    first, second = np.array([[1.0, 2, 3], [1, 2, 3]]), np.array([[1.0, 2, 3], [1, 3, 3]])
    assert Hmean().outcome_differs(first, second).tolist() == [False, True]


def test_metrics_by_name() -> None:
    assert make_metric("line_accuracy").name == "line_accuracy"
    with pytest.raises(InputError, match="'wer'; known metrics: line_accuracy, hmean"):
        make_metric("wer")


@dataclass(frozen=True)
class Class:
    index: int
    classes: int = 4


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_top1_is_the_share_of_right_classes_in_all_and_in_each(pairs: list[tuple[int, int]]) -> None:
    total = np.sum([Top1().score(Class(found), label) for found, label in pairs], axis=0)
    right = [found == label for found, label in pairs]
    assert Top1().aggregate(total) == pytest.approx(100 * np.mean(right))
    details = Top1().details(total)
    assert details.pop("top1") == Top1().aggregate(total)
    labels = [label for _, label in pairs]
    expected = {c: 100 * np.mean([r for r, label in zip(right, labels, strict=True) if label == c]) for c in labels}
    assert details == pytest.approx({f"class_{c}": share for c, share in expected.items()})


def test_only_right_or_wrong_makes_a_picture_discordant() -> None:
    right, wrong, other = (Top1().score(Class(index), 1) for index in (1, 0, 3))
    assert Top1().outcome_differs(np.stack([right, wrong]), np.stack([wrong, other])).tolist() == [True, False]
    before, after = Top1().lost_sample(np.stack([right, wrong]))
    assert Top1().aggregate(before) == 100 and Top1().aggregate(after) == 0
    assert Top1().outcome_differs(before, after)


def test_a_label_that_the_model_does_not_know() -> None:
    with pytest.raises(InputError, match="labelled as class 4, but the model knows 4 classes"):
        Top1().score(Class(0), 4)
