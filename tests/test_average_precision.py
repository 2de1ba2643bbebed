"""Mean average precision against pycocotools' own evaluation of the same boxes."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from eval.average_precision import MOST_DETECTIONS, THRESHOLDS
from eval.metric import make_metric
from eval.statistics import estimate_drop
from quant.errors import InputError

Array = np.ndarray[Any, Any]
LABELS = ("text", "table", "image", "seal")
ALL = tuple((name, name) for name in LABELS)


@dataclass(frozen=True)
class Labelled:
    box: tuple[float, float, float, float]
    name: str | None
    crowd: bool = False


@dataclass(frozen=True)
class Page:
    regions: tuple[Labelled, ...]
    counted_as: tuple[tuple[str, str], ...] = ALL


@dataclass(frozen=True)
class Found:
    boxes: Array
    scores: Array
    classes: Array
    labels: tuple[str, ...] = LABELS


def page(random: np.random.Generator, most: int = 40, digits: int = 2) -> tuple[Found, Page]:
    """Labels, and detections of which some lie near labels and some anywhere."""
    count = int(random.integers(0, 12))
    corner, size = random.uniform(0, 800, (count, 2)), random.uniform(20, 300, (count, 2))
    classes = random.integers(0, 3, count)  # seals are never labelled
    regions = [
        Labelled((x, y, w, h), LABELS[number], bool(random.random() < 0.1))
        for (x, y), (w, h), number in zip(corner.tolist(), size.tolist(), classes, strict=True)
    ]
    near = random.integers(0, count, most // 2) if count else np.zeros(0, int)
    shifts = random.normal(0, 0.08, (len(near), 4)) * np.hstack([size[near], size[near]])
    boxes = np.hstack([corner[near], corner[near] + size[near]]) + shifts
    stray = random.uniform(0, 800, (most - len(near), 2))
    boxes = np.vstack([boxes, np.hstack([stray, stray + random.uniform(20, 300, stray.shape)])])
    found = np.append(classes[near], random.integers(0, 4, len(stray)))
    scores = np.round(random.uniform(0, 1, len(boxes)), digits)  # two digits: some are equal
    return Found(boxes, scores, found), Page(tuple(regions))


def by_pycocotools(pages: list[tuple[Found, Page]]) -> tuple[float, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = [{"id": index} for index in range(len(pages))]
    categories = [{"id": number, "name": name} for number, name in enumerate(LABELS)]
    annotations, results = [], []
    for index, (found, label) in enumerate(pages):
        for region in label.regions:
            annotations.append(
                {"image_id": index, "category_id": LABELS.index(str(region.name)), "bbox": list(region.box),
                 "area": region.box[2] * region.box[3], "iscrowd": int(region.crowd), "id": len(annotations) + 1}
            )  # fmt: skip
        for box, score, number in zip(found.boxes, found.scores, found.classes, strict=True):
            wide, high = box[2] - box[0], box[3] - box[1]
            results.append({"image_id": index, "category_id": int(number), "score": float(score),
                            "bbox": [float(box[0]), float(box[1]), float(wide), float(high)]})  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"images": images, "annotations": annotations, "categories": categories}
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return 100 * float(judge.stats[0]), 100 * float(judge.stats[1])


@pytest.mark.parametrize("seed", range(6))
def test_it_is_what_pycocotools_computes(seed: int) -> None:
    random = np.random.default_rng(seed)
    pages = [page(random, most=int(random.integers(2, 300))) for _ in range(20)]
    rows = np.array([make_metric("map").score(*one) for one in pages])
    whole, half = by_pycocotools(pages)
    assert 2 < whole < half
    assert make_metric("map").value(rows) == pytest.approx(whole, abs=1e-9)
    assert make_metric("map50").value(rows) == pytest.approx(half, abs=1e-9)
    report = make_metric("map50").report(rows)
    assert [report.pop("map"), report.pop("map50")] == pytest.approx([whole, half], abs=1e-9)
    assert set(report) == {"ap50_class_0", "ap50_class_1", "ap50_class_2"}
    assert np.mean(list(report.values())) == pytest.approx(half)


def test_weights_are_how_often_a_page_stands_in_the_set() -> None:
    random = np.random.default_rng(1)
    pages = [page(random, digits=12) for _ in range(9)]
    weights = random.integers(0, 3, (4, 9)).astype(float)
    metric = make_metric("map")
    rows = np.array([metric.score(*one) for one in pages])
    for weight, value in zip(weights, metric.values(rows, weights), strict=True):
        several = [one for one, times in zip(pages, weight, strict=True) for _ in range(int(times))]
        assert value == pytest.approx(by_pycocotools(several)[0], abs=1e-9)
    assert metric.values(rows, weights * 4).tolist() == metric.values(rows, weights).tolist()


def test_classes_that_are_not_labelled_are_not_judged() -> None:
    box = np.array([[10.0, 10, 60, 60]])
    label = Page((Labelled((10, 10, 50, 50), "text"),), (("text", "text"),))
    right = Found(np.repeat(box, 2, axis=0), np.array([0.9, 0.95]), np.array([0, 1]))
    metric = make_metric("map50")
    assert metric.value(metric.score(right, label)[None]) == 100
    judged = metric.score(right, Page(label.regions, ALL))
    assert metric.value(judged[None]) == 100  # a class without labels does not count on one page
    table = metric.score(right, Page((Labelled((300, 0, 50, 50), "table"),), ALL))
    assert metric.value(np.stack([judged, table])) < 100


def test_finer_classes_of_the_model_count_as_the_coarser_one_of_the_set() -> None:
    label = Page((Labelled((10, 10, 50, 50), "image"),), (("image", "image"), ("seal", "image")))
    seal = Found(np.array([[10.0, 10, 60, 60]]), np.array([0.9]), np.array([3]))
    assert make_metric("map50").value(make_metric("map50").score(seal, label)[None]) == 100


def test_detections_in_a_region_without_a_class_are_not_judged() -> None:
    regions = (Labelled((10, 10, 50, 50), "text"), Labelled((100, 100, 400, 400), None))
    boxes = np.array([[150.0, 150, 250, 170], [10, 10, 60, 60]])
    found = Found(boxes, np.array([0.99, 0.5]), np.array([0, 0]))
    metric = make_metric("map50")
    assert metric.value(metric.score(found, Page(regions))[None]) == 100
    assert metric.value(metric.score(found, Page(regions[:1]))[None]) == 50


def test_more_detections_than_a_row_holds_leave_the_best() -> None:
    random = np.random.default_rng(2)
    found, label = page(random, most=2 * MOST_DETECTIONS)
    row = make_metric("map").score(found, label)
    assert len(row) == len(LABELS) + 4 * MOST_DETECTIONS
    kept = row[len(LABELS) :].reshape(-1, 4)
    assert (np.diff(kept[kept[:, 0] >= 0, 1]) <= 0).all()
    assert kept[:, 2].max() < 2 ** len(THRESHOLDS)


def test_unknown_classes_are_named() -> None:
    with pytest.raises(InputError, match="does not know: list"):
        make_metric("map").score(
            Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)),
            Page((Labelled((0, 0, 9, 9), "list"),), (("list", "list"),)),
        )


def test_a_page_without_detections_lowers_recall() -> None:
    label = Page((Labelled((10, 10, 50, 50), "text"),))
    nothing = Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    all_found = Found(np.array([[10.0, 10, 60, 60]]), np.array([0.9]), np.array([0]))
    metric = make_metric("map50")
    rows = np.array([metric.score(nothing, label), metric.score(all_found, label)])
    assert metric.value(rows) == pytest.approx(100 * 51 / 101)


def test_the_outcome_of_a_page_is_what_clients_show() -> None:
    label = Page((Labelled((10, 10, 50, 50), "text"),))
    box = np.array([[10.0, 10, 60, 60], [300, 300, 400, 400]])
    rows = [
        make_metric("map50").score(Found(box, np.array(scores), np.array([0, 1])), label)
        for scores in ([0.9, 0.3], [0.8, 0.4], [0.9, 0.6], [0.45, 0.3])
    ]
    differs = [bool(make_metric("map50").outcome_differs(rows[0], row)) for row in rows]
    assert differs == [False, False, True, True]


def test_the_bound_is_above_the_drop_and_not_zero_for_equal_outcomes() -> None:
    random = np.random.default_rng(5)
    pages = [page(random) for _ in range(40)]
    metric = make_metric("map50")
    fp32 = np.array([metric.score(*one) for one in pages])
    same = estimate_drop(metric, fp32, fp32, resamples=2000)
    assert same.drop == 0 and same.discordance == 0 and 0 < same.drop_upper95 < 1
    worse = [(Found(found.boxes + 12, found.scores, found.classes), label) for found, label in pages]
    int8 = np.array([metric.score(*one) for one in worse])
    estimate = estimate_drop(metric, fp32, int8, resamples=2000)
    assert 0 < estimate.drop < estimate.drop_upper95
    names = [f"picture{index // 2}" for index in range(40)]
    grouped = estimate_drop(metric, fp32, int8, resamples=2000, pictures=names)
    assert grouped.drop == estimate.drop and grouped.drop_upper95 != estimate.drop_upper95


def test_the_bound_is_that_of_resampling_pages() -> None:
    random = np.random.default_rng(6)
    pages = [page(random) for _ in range(60)]
    metric = make_metric("map")
    fp32 = np.array([metric.score(*one) for one in pages])
    worse = [
        (Found(found.boxes + random.normal(0, 8, 4), found.scores, found.classes), label) for found, label in pages
    ]
    int8 = np.array([metric.score(*one) for one in worse])
    weights = random.multinomial(60, np.full(60, 1 / 60), 3000).astype(float)
    drops = metric.values(fp32, weights) - metric.values(int8, weights)
    estimate = estimate_drop(metric, fp32, int8, resamples=3000)
    assert estimate.drop_error == pytest.approx(drops.std(), rel=0.12)
    assert estimate.drop_upper95 == pytest.approx(np.quantile(drops, 0.95), abs=0.25 * drops.std())
