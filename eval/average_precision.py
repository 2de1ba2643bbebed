"""COCO's mean average precision of labelled boxes, for whole sets and for resampled ones.

pycocotools matches detections with labels page by page; what it finds is kept as one row of numbers a page. The
precision of a set depends on the order of all scores, so rows do not add up as counts of other metrics do: `values`
weighs the pages, runs through the detections in the order of their scores, and computes what pycocotools'
`accumulate` computes. With weights of 1 the results are equal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from eval.matching import Matching
from quant.errors import InputError

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Least IoU of a match, as COCO steps them; number 0 is 0.5."""

MOST_DETECTIONS = 300
"""Detections kept of a page: as many as the largest of these models writes."""

MOST_OF_A_CLASS = 100
"""Detections of one class that count on a page, the best first (COCO's maxDets)."""

SHOWN = 0.5
"""Score from which clients show a detection."""

_RECALLS = np.linspace(0.0, 1.0, 101)  # where COCO reads the precision
_NUMBERS = 4  # of a detection: class, score, bits of hits, bits of thresholds at which it is not judged
_AT_ONCE = 1_000_000  # float64 of one array while resampling: 8 MB
_WHOLE_PAGE = [0.0, 1e10]  # pixels: areas of all sizes


class LabelledBox(Protocol):
    """A labelled region: x, y, width, height in pixels; its class, None where nothing is judged; a crowd likewise."""

    @property
    def box(self) -> tuple[float, float, float, float]: ...

    @property
    def name(self) -> str | None: ...

    @property
    def crowd(self) -> bool: ...


class PageLabel(Protocol):
    """What is labelled on a page, and as which labelled class each class of the model counts.

    Detections of classes that `counted_as` does not name are not judged.
    """

    @property
    def regions(self) -> Sequence[LabelledBox]: ...

    @property
    def counted_as(self) -> Sequence[tuple[str, str]]: ...


class HasBoxes(Protocol):
    """Detections: boxes [n, 4] as x and y of two corners in pixels, scores [n], classes [n] as indexes of `labels`."""

    @property
    def boxes(self) -> FloatArray: ...

    @property
    def scores(self) -> FloatArray: ...

    @property
    def classes(self) -> IntArray: ...

    @property
    def labels(self) -> Sequence[str]: ...


class MeanAveragePrecision:
    """Mean over classes of the average precision, 101 recalls, all areas, at most 100 detections of a class a page.

    A row holds the number of labelled regions of each class, then MOST_DETECTIONS times class, score, and as bits (bit
    t is threshold t): where it is a hit, where it is not judged. Absent detections have class -1. Classes without a
    labelled region do not count.
    """

    def __init__(self, name: str, thresholds: Sequence[int]) -> None:
        """Args: thresholds: indexes into THRESHOLDS whose mean is the metric."""
        self.name = name
        self._thresholds = thresholds

    def score(self, prediction: HasBoxes, label: PageLabel) -> FloatArray:
        """The row of one page.

        Raises:
            InputError: the page is labelled with classes that the model does not know.
        """
        numbers = {name: index for index, name in enumerate(prediction.labels)}
        if unknown := sorted({name for pair in label.counted_as for name in pair} - numbers.keys()):
            raise InputError(f"a page is labelled with classes that the model does not know: {', '.join(unknown)}")
        counted = {numbers[own]: numbers[judged] for own, judged in label.counted_as}
        labelled = np.zeros(len(prediction.labels))
        detections: list[FloatArray] = []
        for number in sorted(set(counted.values())):
            truth = [label.regions[i] for i in _regions_of(label.regions, number, numbers)]
            labelled[number] = sum(region.name is not None and not region.crowd for region in truth)
            detections.append(_judged(number, counted, prediction, truth))
        found = np.concatenate([*detections, np.zeros((0, _NUMBERS))])
        best = found[np.argsort(-found[:, 1], kind="stable")[:MOST_DETECTIONS]]
        padded = np.full((MOST_DETECTIONS, _NUMBERS), -1.0)
        padded[: len(best)] = best
        return np.concatenate([labelled, padded.ravel()])

    def value(self, counts: FloatArray) -> float:
        return float(self.values(counts, np.ones((1, len(counts))))[0])

    def values(self, counts: FloatArray, weights: FloatArray) -> FloatArray:
        return 100 * _mean(_precisions(counts, weights, self._thresholds))

    def report(self, counts: FloatArray) -> dict[str, float]:
        """Both means, and the precision at IoU 0.5 of each class that is labelled."""
        found = _precisions(counts, np.ones((1, len(counts))), range(len(THRESHOLDS)))
        halves = {number: precision[:, :1] for number, precision in found.items()}
        single = {f"ap50_class_{number}": 100 * float(half[0, 0]) for number, half in halves.items()}
        return {"map": 100 * float(_mean(found)[0]), "map50": 100 * float(_mean(halves)[0]), **single}

    def outcome_differs(self, first: FloatArray, second: FloatArray) -> BoolArray:
        """Pages on which other numbers of right or of wrong boxes are shown in any class, at IoU 0.5."""
        return np.asarray((_shown(first) != _shown(second)).any(axis=(-2, -1)))

    def lost_sample(self, fp32: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The page with the median number of hits, and the same when one of them, of median score, is none."""
        hits = _hits(fp32)
        counts = hits.sum(axis=1)
        order = np.argsort(counts, kind="stable")
        page = int(order[max(len(order) // 2, int((counts == 0).sum()))] if counts.any() else order[-1])
        before, after = fp32[page], fp32[page].copy()
        places = np.flatnonzero(hits[page])
        if len(places):
            _numbers(after)[places[len(places) // 2], 2] = 0
        return before, after


def matched_boxes(prediction: HasBoxes, label: PageLabel) -> Matching:
    """What of a page's regions is judged at IoU 0.5 among the detections that clients show, and what matches."""
    numbers = {name: index for index, name in enumerate(prediction.labels)}
    counted = {numbers[own]: numbers[judged] for own, judged in label.counted_as}
    labelled, detected = set[int](), set[int]()
    pairs = []
    for number in sorted(set(counted.values())):
        places = _regions_of(label.regions, number, numbers)
        labelled |= {i for i in places if label.regions[i].name is not None and not label.regions[i].crowd}
        chosen, result = _evaluated(number, counted, prediction, [label.regions[i] for i in places])
        if result is None:
            continue
        for rank, identity in enumerate(result["dtIds"]):
            detection, match = int(chosen[identity - 1]), int(result["dtMatches"][0, rank])
            if prediction.scores[detection] >= SHOWN and not result["dtIgnore"][0, rank]:
                detected.add(detection)
                pairs += [(places[match - 1], detection)] if match else []
    return Matching(frozenset(labelled), frozenset(detected), pairs)


def _regions_of(regions: Sequence[LabelledBox], number: int, numbers: Mapping[str, int]) -> list[int]:
    """Places of the regions that matter to a class: its own, and those where nothing is judged."""
    return [i for i, region in enumerate(regions) if region.name is None or numbers[region.name] == number]


def _judged(number: int, counted: Mapping[int, int], prediction: HasBoxes, truth: Sequence[LabelledBox]) -> FloatArray:
    """Class, score and bits of the detections that count as class `number`, by pycocotools."""
    _, result = _evaluated(number, counted, prediction, truth)
    if result is None:
        return np.zeros((0, _NUMBERS))
    bits = 2.0 ** np.arange(len(THRESHOLDS))
    spared = result["dtIgnore"].astype(bool)
    hits = (result["dtMatches"] > 0) & ~spared
    columns = (np.full(hits.shape[1], number), result["dtScores"], bits @ hits, bits @ spared)
    return np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)


def _evaluated(
    number: int, counted: Mapping[int, int], prediction: HasBoxes, truth: Sequence[LabelledBox]
) -> tuple[IntArray, dict[str, Any] | None]:
    """The detections that count as class `number`, and what pycocotools says; None without detections and labels.

    Its numbers start at 1, those of detections in the order of the first result, those of labels in that of `truth`.
    """
    from pycocotools.cocoeval import COCOeval

    own = [index for index, judged in counted.items() if judged == number]
    chosen = np.flatnonzero(np.isin(prediction.classes, own))
    corners, scores = prediction.boxes[chosen], prediction.scores[chosen]
    boxes = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])
    judge = COCOeval(iouType="bbox")
    judge.params.iouThrs = THRESHOLDS
    judge._gts, judge._dts = defaultdict(list), defaultdict(list)
    place = (0, number)
    judge._gts[place] = [_labelled(index, region) for index, region in enumerate(truth, start=1)]
    judge._dts[place] = [
        {"id": index, "bbox": list(map(float, box)), "area": float(box[2] * box[3]), "score": float(score)}
        for index, (box, score) in enumerate(zip(boxes, scores, strict=True), start=1)
    ]
    judge.ious = {place: judge.computeIoU(*place)}
    return chosen, judge.evaluateImg(*place, _WHOLE_PAGE, MOST_OF_A_CLASS)


def _labelled(index: int, region: LabelledBox) -> dict[str, object]:
    """A label in pycocotools' form; its numbers start at 1, as 0 means there: no match."""
    ignored = int(region.crowd or region.name is None)
    area = region.box[2] * region.box[3]
    return {"id": index, "bbox": list(region.box), "area": area, "iscrowd": ignored, "ignore": ignored}


def _numbers(rows: FloatArray) -> FloatArray:
    """The detections in rows [..., n]: a view [..., MOST_DETECTIONS, 4]."""
    return rows[..., rows.shape[-1] - MOST_DETECTIONS * _NUMBERS :].reshape(*rows.shape[:-1], MOST_DETECTIONS, _NUMBERS)


def _hits(rows: FloatArray) -> BoolArray:
    """Which detections are hits at IoU 0.5: [..., MOST_DETECTIONS]."""
    numbers = _numbers(rows)
    return np.asarray((numbers[..., 0] >= 0) & (numbers[..., 2].astype(np.int64) & 1 == 1))


def _shown(rows: FloatArray) -> IntArray:
    """Right and wrong boxes of each class that a client shows, at IoU 0.5: [..., classes, 2]."""
    numbers = _numbers(rows)
    classes = rows.shape[-1] - MOST_DETECTIONS * _NUMBERS
    shown = (numbers[..., 0] >= 0) & (numbers[..., 1] >= SHOWN)
    spared = numbers[..., 3].astype(np.int64) & 1 == 1
    hits = _hits(rows)
    kinds = (shown & hits, shown & ~hits & ~spared)
    each = numbers[..., 0, None] == np.arange(classes)
    return np.stack([(each & kind[..., None]).sum(axis=-2) for kind in kinds], axis=-1)


@dataclass(frozen=True)
class _Ranked:
    """Detections of one class in all pages, the best first; of equal scores those of earlier pages first.

    Attributes:
        labelled: regions of the class on each page, [pages].
        pages: page of each detection, [detections].
        hits, judged: [thresholds, detections].
    """

    labelled: FloatArray
    pages: IntArray
    hits: BoolArray
    judged: BoolArray


def _ranked(counts: FloatArray, thresholds: Sequence[int]) -> Iterator[tuple[int, _Ranked]]:
    """Every class that is labelled anywhere."""
    numbers = _numbers(counts)
    pages, slots = np.nonzero(numbers[..., 0] >= 0)
    found = numbers[pages, slots]
    bits = np.asarray(thresholds, dtype=np.int64)[:, None]
    for number in np.flatnonzero(counts[:, : counts.shape[1] - MOST_DETECTIONS * _NUMBERS].any(axis=0)):
        own = np.flatnonzero(found[:, 0] == number)
        own = own[np.argsort(-found[own, 1], kind="stable")]
        hits, spared = (found[own, column].astype(np.int64) >> bits & 1 == 1 for column in (2, 3))
        yield int(number), _Ranked(counts[:, number], pages[own], hits, ~spared)


def _precisions(counts: FloatArray, weights: FloatArray, thresholds: Sequence[int]) -> dict[int, FloatArray]:
    """Average precision [resamples, thresholds] by class, 0..1; NaN where a resample holds no label of a class."""
    result = {}
    for number, ranked in _ranked(counts, thresholds):
        size = max(1, _AT_ONCE // (int(ranked.hits.sum(axis=1).max()) + 1))
        parts = [_class_precision(ranked, weights[start : start + size]) for start in range(0, len(weights), size)]
        result[number] = np.concatenate(parts)
    return result


def _class_precision(ranked: _Ranked, weights: FloatArray) -> FloatArray:
    """[resamples, thresholds] of one class."""
    labelled = weights @ ranked.labelled
    result = np.zeros((len(weights), len(ranked.hits)))
    for column, (hits, judged) in enumerate(zip(ranked.hits, ranked.judged, strict=True)):
        places = np.flatnonzero(hits)
        if len(places):
            found = np.cumsum(weights[:, ranked.pages[places]], axis=1)
            count = _judged_up_to(places, np.flatnonzero(judged), ranked.pages, weights)
            result[:, column] = _average(found, count, labelled)
    result[labelled <= 0] = np.nan
    return result


def _judged_up_to(places: IntArray, judged: IntArray, pages: IntArray, weights: FloatArray) -> FloatArray:
    """Weight of the judged detections up to each hit, [resamples, hits].

    There are many more detections than hits: their numbers on each page up to each hit, times the weights of the
    pages, is far less work than the sum along all of them.

    Args:
        places, judged: ranks of the hits, and of the detections that are judged, rising.
        pages: page of each detection.
    """
    hit = np.searchsorted(places, judged)  # the first at or behind a detection
    hit, page = hit[hit < len(places)], pages[judged[hit < len(places)]]
    result = np.zeros((len(weights), len(places)))
    at_once = max(1, _AT_ONCE // len(places))
    for start in range(0, weights.shape[1], at_once):
        chosen = (page >= start) & (page < start + at_once)
        numbers = np.zeros((min(at_once, weights.shape[1] - start), len(places)))
        np.add.at(numbers, (page[chosen] - start, hit[chosen]), 1)
        result += weights[:, start : start + at_once] @ np.cumsum(numbers, axis=1)
    return result


def _average(found: FloatArray, count: FloatArray, labelled: FloatArray) -> FloatArray:
    """Mean precision over the 101 recalls, [resamples].

    Between two hits precision only falls, and COCO takes the best at a recall or above: hits alone decide.

    Args:
        found, count: hits, and judged detections, up to each hit, [resamples, hits].
        labelled: [resamples].
    """
    precision = np.divide(found, count, out=np.zeros_like(found), where=count > 0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = np.divide(found, labelled[:, None], out=np.zeros_like(found), where=labelled[:, None] > 0)
    reached = np.minimum((recall * 100 + 1e-9).astype(np.int64), 100)
    reached -= _RECALLS[reached] > recall  # as pycocotools compares them
    steps = np.diff(reached, axis=1, prepend=-1)
    return np.asarray((best * steps).sum(axis=1) / len(_RECALLS))


def _mean(precisions: Mapping[int, FloatArray]) -> FloatArray:
    """Mean over thresholds and labelled classes, [resamples]; 0 where nothing is labelled."""
    if not precisions:
        return np.zeros(1)
    means = np.stack([precision.mean(axis=1) for precision in precisions.values()])
    present = np.isfinite(means)
    total = np.where(present, means, 0.0).sum(axis=0)
    return np.asarray(total / np.maximum(present.sum(axis=0), 1))
