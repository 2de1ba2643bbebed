"""Metrics: what one sample contributes, and how contributions make a number.

A metric turns every sample into a vector of *counts*, and the metric of a set is a function of the matrix
[samples, counts] and of a weight for each sample: so statistics can resample for any metric. Most metrics are a
function of the sum of the counts (`Summed`); mean average precision is not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import shapely
from rapidfuzz.distance import Levenshtein

from eval.average_precision import THRESHOLDS, MeanAveragePrecision
from eval.matching import Matching
from quant.errors import InputError

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

IGNORED = "###"
MIN_IOU = 0.5
MAX_IGNORED_SHARE = 0.5
_SAME_SCORE = 1e-9  # of 1: scores that differ by less differ by the rounding of floats


class Metric(Protocol):
    """A metric whose value does not change when all weights are multiplied by the same number."""

    name: str

    def score(self, prediction: Any, label: Any) -> FloatArray:
        """Counts of one sample, 1-D."""
        ...

    def value(self, counts: FloatArray) -> float:
        """The metric of a set in percent, from counts [samples, counts]."""
        ...

    def values(self, counts: FloatArray, weights: FloatArray) -> FloatArray:
        """The same for many resamples at once.

        Args:
            counts: [samples, counts].
            weights: how often, or how much, each sample counts, [resamples, samples].

        Returns:
            In percent, [resamples].
        """
        ...

    def report(self, counts: FloatArray) -> dict[str, float]:
        """This and related metrics of a set, all in percent, from counts [samples, counts]."""
        ...

    def outcome_differs(self, first: FloatArray, second: FloatArray) -> BoolArray:
        """Which samples came out differently: two arrays [..., counts] -> [...]."""
        ...

    def lost_sample(self, fp32: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Counts of FP32 and of INT8 on an imagined sample with the least damage that can be told apart.

        Args:
            fp32: counts of the real samples, [samples, counts].
        """
        ...


class Summed(ABC):
    """What metrics share that are a function of the sum of their samples' counts."""

    @abstractmethod
    def aggregates(self, totals: FloatArray) -> FloatArray:
        """The metric in percent for many sums at once: [resamples, counts] -> [resamples]."""

    @abstractmethod
    def details(self, total: FloatArray) -> dict[str, float]:
        """This and related metrics, all in percent, from summed counts [counts]."""

    def aggregate(self, total: FloatArray) -> float:
        """The metric in percent from summed counts [counts]."""
        return float(self.aggregates(total[None])[0])

    def value(self, counts: FloatArray) -> float:
        return self.aggregate(counts.sum(axis=0))

    def values(self, counts: FloatArray, weights: FloatArray) -> FloatArray:
        return self.aggregates(weights @ counts)

    def report(self, counts: FloatArray) -> dict[str, float]:
        return self.details(counts.sum(axis=0))


class HasText(Protocol):
    @property
    def text(self) -> str: ...


class HasPolygons(Protocol):
    @property
    def polygons(self) -> Sequence[npt.NDArray[Any]]: ...


class HasClass(Protocol):
    @property
    def index(self) -> int: ...

    @property
    def classes(self) -> int: ...


class Region(Protocol):
    """A labelled region: corners [corners, 2], x and y in pixels; the text `###` means: do not judge."""

    @property
    def points(self) -> npt.ArrayLike: ...

    @property
    def text(self) -> str: ...


class LineAccuracy(Summed):
    """Share of lines read exactly right, spaces removed first (PaddleOCR's RecMetric with ignore_space).

    Counts: right (0 or 1), normalized edit similarity (0..1), 1.
    Similarity: 1 - Levenshtein distance / length of the longer text; two empty texts are equal.
    """

    name = "line_accuracy"

    def score(self, prediction: HasText, label: str) -> FloatArray:
        read, true = prediction.text.replace(" ", ""), label.replace(" ", "")
        return np.array([read == true, Levenshtein.normalized_similarity(read, true), 1.0])

    def aggregates(self, totals: FloatArray) -> FloatArray:
        return _percent(totals[:, 0], totals[:, 2])

    def details(self, total: FloatArray) -> dict[str, float]:
        similarity = float(_percent(total[1:2], total[2:3])[0])
        return {"line_accuracy": self.aggregate(total), "normalized_edit_similarity": similarity}

    def outcome_differs(self, first: FloatArray, second: FloatArray) -> BoolArray:
        return np.asarray(first[..., 0] != second[..., 0])

    def lost_sample(self, fp32: FloatArray) -> tuple[FloatArray, FloatArray]:
        """One line that only FP32 reads: the worst that can happen to a line."""
        return np.array([1.0, 1.0, 1.0]), np.array([0.0, 0.0, 1.0])


class Hmean(Summed):
    """Harmonic mean of precision and recall of text regions, by the ICDAR 2015 rules as PaddleOCR applies them.

    Counts: matched, detected, labelled. A pair matches when IoU > 0.5; labels and, within a label,
    detections are taken in their given order, the first free detection that matches wins. Labels `###` are
    not judged, nor are detections of which more than half lies in one such label. Polygons that are no
    valid polygon (crossing sides, fewer than three corners, no area) are left out on both sides.
    """

    name = "hmean"

    def score(self, prediction: HasPolygons, label: Sequence[Region]) -> FloatArray:
        found = matched_regions(prediction.polygons, label)
        return np.array([len(found.pairs), len(found.detected), len(found.labelled)], dtype=np.float64)

    def aggregates(self, totals: FloatArray) -> FloatArray:
        # 2 p r / (p + r) with p = matched / detected and r = matched / labelled
        return _percent(2 * totals[:, 0], totals[:, 1] + totals[:, 2])

    def details(self, total: FloatArray) -> dict[str, float]:
        precision, recall = _percent(np.repeat(total[:1], 2), total[1:3])
        return {"precision": float(precision), "recall": float(recall), "hmean": self.aggregate(total)}

    def outcome_differs(self, first: FloatArray, second: FloatArray) -> BoolArray:
        return np.asarray((first != second).any(axis=-1))

    def lost_sample(self, fp32: FloatArray) -> tuple[FloatArray, FloatArray]:
        """A page of average counts on which one matched region no longer matches."""
        before: FloatArray = fp32.mean(axis=0)
        after = before.copy()
        after[0] = max(0.0, before[0] - 1)
        return before, after


class Top1(Summed):
    """Share of pictures whose most probable class is the labelled one (PaddleX's and PaddleClas' top-1).

    Counts: right (0 or 1), 1, then for each class: right of this class, pictures of this class.
    """

    name = "top1"

    def score(self, prediction: HasClass, label: int) -> FloatArray:
        if not 0 <= label < prediction.classes:
            raise InputError(
                f"a picture is labelled as class {label}, but the model knows {prediction.classes} classes"
            )
        counts = np.zeros((1 + prediction.classes, 2))
        counts[[0, 1 + label]] = prediction.index == label, 1
        return counts.ravel()

    def aggregates(self, totals: FloatArray) -> FloatArray:
        return _percent(totals[:, 0], totals[:, 1])

    def details(self, total: FloatArray) -> dict[str, float]:
        """Top-1, and for each class that has pictures the share of them that are right."""
        per_class = total.reshape(-1, 2)[1:]
        shares = _percent(per_class[:, 0], per_class[:, 1])
        seen = {f"class_{i}": float(share) for i, share in enumerate(shares) if per_class[i, 1]}
        return {"top1": self.aggregate(total), **seen}

    def outcome_differs(self, first: FloatArray, second: FloatArray) -> BoolArray:
        return np.asarray(first[..., 0] != second[..., 0])

    def lost_sample(self, fp32: FloatArray) -> tuple[FloatArray, FloatArray]:
        """One picture that only FP32 gets right."""
        before = np.zeros(fp32.shape[1])
        before[:4] = 1  # of class 0; which one changes nothing
        after = before.copy()
        after[[0, 2]] = 0
        return before, after


class MeanScore(Summed):
    """Mean over samples of a score 0..1: a base for metrics whose samples are neither right nor wrong.

    Counts: the scores that `scores` names, the first of which judges, then 1, then whatever `details` needs.
    """

    name: str
    scores: tuple[str, ...]

    def aggregates(self, totals: FloatArray) -> FloatArray:
        return _percent(totals[:, 0], totals[:, len(self.scores)])

    def details(self, total: FloatArray) -> dict[str, float]:
        """The mean of each score."""
        count = len(self.scores)
        means = _percent(total[:count], np.repeat(total[count : count + 1], count))
        return dict(zip(self.scores, map(float, means), strict=True))

    def outcome_differs(self, first: FloatArray, second: FloatArray) -> BoolArray:
        return np.asarray(np.abs(first[..., 0] - second[..., 0]) > _SAME_SCORE)

    def lost_sample(self, fp32: FloatArray) -> tuple[FloatArray, FloatArray]:
        """One sample that FP32 gets wholly right and INT8 wholly wrong: the worst that can happen to it."""
        count = len(self.scores)
        before, after = np.zeros(fp32.shape[1]), np.zeros(fp32.shape[1])
        before[: count + 1] = 1
        after[count] = 1
        return before, after


def _teds_struct() -> Metric:
    from eval.table_metric import TedsStruct

    return TedsStruct()


def _bleu() -> Metric:
    from eval.formula_metric import Bleu

    return Bleu()


_METRICS: dict[str, Callable[[], Metric]] = {
    **{metric.name: metric for metric in (LineAccuracy, Hmean, Top1)},
    "map50": partial(MeanAveragePrecision, "map50", (0,)),
    "map": partial(MeanAveragePrecision, "map", range(len(THRESHOLDS))),
    "teds_struct": _teds_struct,
    "bleu": _bleu,
}


def make_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        InputError: there is none.
    """
    if name not in _METRICS:
        raise InputError(f"unknown metric '{name}'; known metrics: {', '.join(_METRICS)}")
    return _METRICS[name]()


def matched_regions(polygons: Sequence[npt.NDArray[Any]], label: Sequence[Region]) -> Matching:
    """What of a picture's text regions is judged, and what matches, by the rules of `Hmean`."""
    regions = _valid_polygons(region.points for region in label)
    ignored = {index: polygon for index, polygon in regions.items() if label[index].text == IGNORED}
    labelled = {index: polygon for index, polygon in regions.items() if index not in ignored}
    detected = _judged(_valid_polygons(polygons), ignored)
    return Matching(frozenset(labelled), frozenset(detected), _matches(labelled, detected))


def polygon_iou(first: shapely.Polygon, second: shapely.Polygon) -> float:
    """Area of the intersection over area of the union of two valid polygons, 0..1."""
    shared = first.intersection(second).area
    union = first.area + second.area - shared
    return float(shared / union) if union > 0 else 0.0


def _percent(part: FloatArray, whole: FloatArray) -> FloatArray:
    """100 * part / whole, and 0 where there is nothing."""
    return np.divide(100.0 * part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole > 0)


_Polygons = dict[int, shapely.Polygon]
"""By the number of their outlines."""


def _valid_polygons(outlines: Iterable[npt.ArrayLike]) -> _Polygons:
    corners = {number: np.asarray(points, dtype=np.float64) for number, points in enumerate(outlines)}
    polygons = {number: shapely.Polygon(points) for number, points in corners.items() if len(points) >= 3}
    return {number: polygon for number, polygon in polygons.items() if polygon.is_valid and polygon.area > 0}


def _judged(detected: _Polygons, ignored: _Polygons) -> _Polygons:
    """Detections that do not lie mostly in one ignored region."""
    covered = {
        inner
        for inner, outer in _touching(detected, ignored)
        if detected[inner].intersection(ignored[outer]).area / detected[inner].area > MAX_IGNORED_SHARE
    }
    return {number: polygon for number, polygon in detected.items() if number not in covered}


def _matches(labelled: _Polygons, detected: _Polygons) -> list[tuple[int, int]]:
    taken: set[int] = set()
    pairs: dict[int, int] = {}
    for label, detection in sorted(_touching(labelled, detected)):
        free = label not in pairs and detection not in taken
        if free and polygon_iou(labelled[label], detected[detection]) > MIN_IOU:
            pairs[label] = detection
            taken.add(detection)
    return list(pairs.items())


def _touching(first: _Polygons, second: _Polygons) -> list[tuple[int, int]]:
    """Pairs of polygons that share a point: all others have no common area."""
    if not first or not second:
        return []
    numbers, others = list(first), list(second)
    pairs = shapely.STRtree(list(second.values())).query(list(first.values()), predicate="intersects")
    return [(numbers[left], others[right]) for left, right in pairs.T]
