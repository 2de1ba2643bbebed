"""Exhibits: what an evaluation keeps of single pictures, so that a report can show where FP32 and INT8 part.

A folder of a bounded size: `exhibits.json` with the slices of the set, the pictures that came out differently, the
worst first, and of the worst ones both predictions and a JPEG large enough to read. The same evaluation gives the same
bytes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely
from pydantic import BaseModel, ConfigDict, Field

from eval.average_precision import SHOWN, matched_boxes
from eval.dataset import IGNORE, Box, Label, Sample, picture_size, read_sample
from eval.evaluation import Outcomes
from eval.formula_metric import latex_tokens
from eval.layouts import Layout, LayoutRegion
from eval.matching import Matching
from eval.metric import MIN_IOU, Metric, matched_regions, polygon_iou
from quant.errors import InputError
from quant.record import read_record

MOST_PICTURES = 24
"""Pictures kept of a target, the worst."""

MOST_ROWS = 1000
"""Differing samples listed of a target, the worst."""

RECORD = "exhibits.json"

_LONGEST_SIDE = 1280  # pixels; on an A4 page, letters of 10 points can still be read
_QUALITY = 60
_MOST_SHAPES = 300
_LENGTHS = (5, 10, 20, 40)  # characters
_HEIGHTS = (16, 24, 32, 48)  # pixels
_SHARES = (50, 75, 100, 150)  # percent
_COUNTS = (5, 20, 50, 100)  # regions, cells, tokens

Predict = Callable[[Sample], tuple[Any, Any]]
"""What FP32 and INT8 make of a sample."""

InputSize = Callable[[int, int], tuple[int, int]]
"""From width and height of a picture to those in which the model sees it."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)


class Shape(_Part):
    """A region: corners in pixels of the original picture, and what is said of it."""

    points: list[tuple[float, float]]
    name: str = ""
    alone: bool = Field(default=False, description="the other model has none that matches it")
    extra: bool = Field(default=False, description="no label matches it, as the metric judges")


class Finding(_Part):
    """A label or a prediction: a text, the HTML of a table, LaTeX, the name of a class, or shapes."""

    text: str = ""
    shapes: list[Shape] = []
    missed: list[Shape] = Field(
        default=[], description="labels that a prediction has nothing for, as the metric judges"
    )


class Differing(_Part):
    """A sample that came out differently, its scores in percent."""

    id: str
    dataset: str
    fp32: float
    int8: float
    slices: dict[str, str]


class Exhibit(_Part):
    """One picture with what is true, what FP32 and what INT8 found."""

    id: str
    dataset: str
    fp32: float
    int8: float
    picture: str = Field(description="name of the JPEG", pattern=r"^\w[\w.-]*$")
    width: int = Field(description="of the original picture, to which the shapes refer")
    height: int
    label: Finding
    fp32_found: Finding
    int8_found: Finding


class Slice(_Part):
    """The samples that share something."""

    axis: str
    name: str
    samples: int
    fp32: float
    int8: float
    worse: int = Field(description="samples that INT8 does worse on")
    better: int

    @property
    def drop(self) -> float:
        return self.fp32 - self.int8


class Exhibits(_Part):
    """exhibits.json."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    task: str
    metric: str
    samples: int
    differing: int = Field(description="samples that came out differently")
    rows: list[Differing]
    slices: list[Slice]
    exhibits: list[Exhibit]


def write_exhibits(
    folder: Path,
    task: str,
    metric: Metric,
    outcomes: Outcomes,
    samples: Iterable[Sample],
    predict: Predict,
    input_size: InputSize,
    classes: Sequence[str] = (),
) -> None:
    """Fill a folder with what is worth showing of an evaluation.

    Args:
        input_size: of the model, asked for texts only.
        classes: names of the classes that a classifier's labels count.
    """
    known = {(sample.dataset, sample.id): sample for sample in samples}
    judged = [known[key] for key in zip(outcomes.datasets, outcomes.ids, strict=True)]
    places = [_slices_of(sample, task, input_size, classes) for sample in judged]
    order = _worst_first(outcomes, metric)
    rows = [_differing(judged[i], i, outcomes, metric, places[i]) for i in order[:MOST_ROWS]]
    folder.mkdir(parents=True, exist_ok=True)
    exhibits = [
        _exhibit(folder, number, row, judged[i], task, predict, classes)
        for number, (i, row) in enumerate(zip(order[:MOST_PICTURES], rows, strict=False))
    ]
    record = Exhibits(
        task=task,
        metric=metric.name,
        samples=len(judged),
        differing=len(order),
        rows=rows,
        slices=_slices(outcomes, metric, places),
        exhibits=exhibits,
    )
    (folder / RECORD).write_text(record.model_dump_json(by_alias=True) + "\n", encoding="utf-8")


def load_exhibits(folder: Path) -> Exhibits:
    """Read what `write_exhibits` wrote.

    Raises:
        InputError: missing or not readable.
    """
    try:
        return read_record(folder / RECORD, Exhibits)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / RECORD}: missing or damaged; delete the run's folder and run again") from error


def _worst_first(outcomes: Outcomes, metric: Metric) -> list[int]:
    """Indexes of the samples that came out differently: what INT8 lost most on, in the end what it won."""

    def damage(index: int) -> tuple[float, float, str, str]:
        fp32, int8 = (metric.report(counts[index : index + 1]) for counts in (outcomes.fp32, outcomes.int8))
        loss = fp32[metric.name] - int8[metric.name]
        beside = sum(fp32[name] - int8[name] for name in fp32 if name in int8)
        return -loss, -beside, outcomes.datasets[index], outcomes.ids[index]

    return sorted(map(int, np.flatnonzero(metric.outcome_differs(outcomes.fp32, outcomes.int8))), key=damage)


def _differing(sample: Sample, index: int, outcomes: Outcomes, metric: Metric, places: dict[str, _Place]) -> Differing:
    fp32, int8 = (metric.value(counts[index : index + 1]) for counts in (outcomes.fp32, outcomes.int8))
    names = {axis: name for axis, (_, name) in places.items()}
    return Differing(id=sample.id, dataset=sample.dataset, fp32=fp32, int8=int8, slices=names)


# --- slices ----------------------------------------------------------------------------------------

_Place = tuple[int, str]
"""Where a sample stands on an axis: a number to sort by, and the name of the slice."""


def _slices(outcomes: Outcomes, metric: Metric, places: Sequence[dict[str, _Place]]) -> list[Slice]:
    differs = metric.outcome_differs(outcomes.fp32, outcomes.int8)
    losses = np.zeros(len(places))
    for i in np.flatnonzero(differs):
        losses[i] = metric.value(outcomes.fp32[i : i + 1]) - metric.value(outcomes.int8[i : i + 1])
    found = []
    for axis in dict.fromkeys(axis for place in places for axis in place):
        for place in sorted({p[axis] for p in places if axis in p}):
            chosen = np.array([p.get(axis) == place for p in places])
            found.append(
                Slice(
                    axis=axis,
                    name=place[1],
                    samples=int(chosen.sum()),
                    fp32=metric.value(outcomes.fp32[chosen]),
                    int8=metric.value(outcomes.int8[chosen]),
                    worse=int((losses[chosen] > 0).sum()),
                    better=int((losses[chosen] < 0).sum()),
                )
            )
    return found


def _slices_of(sample: Sample, task: str, input_size: InputSize, classes: Sequence[str]) -> dict[str, _Place]:
    """What a sample has in common with others, by axis."""
    places: dict[str, _Place] = {"data set": (0, sample.dataset)}
    label = sample.label
    if task == "text_recognition":
        text = str(label)
        places["text length"] = _bucket(len(text), _LENGTHS, "characters")
        places["script"] = (0, script_of(text))
        size = picture_size(sample)
        height = input_size(*size)[1]
        places["size of text"] = _bucket(100 * size[1] / height, _SHARES, f"% of the model's {height} pixels")
    elif task == "image_classification" and isinstance(label, int):
        places["class"] = (label, _class_name(label, classes))
        places["size of picture"] = _bucket(picture_size(sample)[1], _HEIGHTS, "pixels high")
    elif isinstance(label, Layout):
        places["regions"] = _bucket(len(label.regions), _COUNTS, "regions")
    elif isinstance(label, tuple):
        boxes = [box for box in label if isinstance(box, Box) and box.text != IGNORE]
        places["regions"] = _bucket(len(boxes), _COUNTS, "regions")
        places["script"] = (0, script_of(" ".join(box.text for box in boxes)))
        if boxes:
            size = picture_size(sample)
            scale = np.divide(input_size(*size), size)
            thickness = median(_thickness(np.asarray(box.points) * scale) for box in boxes)
            places["size of text"] = _bucket(thickness, _HEIGHTS, "pixels high as the model sees it")
    elif task == "table_structure":
        places["cells"] = _bucket(str(label).count("<td"), _COUNTS, "cells")
    elif task == "formula_recognition":
        places["length"] = _bucket(len(latex_tokens(str(label))), _COUNTS, "tokens")
    return places


def script_of(text: str) -> str:
    """The one script of a text's letters, `mixed` for several, `digits` or `signs` where it has no letter."""
    letters = {unicodedata.name(sign, "OTHER").split()[0].lower() for sign in text if sign.isalpha()}
    if letters:
        return letters.pop() if len(letters) == 1 else "mixed"
    return "digits" if any(sign.isdigit() for sign in text) else "signs"


def _bucket(value: float, limits: Sequence[int], unit: str) -> _Place:
    for index, limit in enumerate(limits):
        if value <= limit:
            first = f"{limits[index - 1] + 1} to " if index else "up to "
            return index, f"{first}{limit} {unit}"
    return len(limits), f"over {limits[-1]} {unit}"


def _thickness(corners: npt.NDArray[np.float64]) -> float:
    """Height of a line of text, however it is turned: the short side of the smallest rectangle around it."""
    import cv2

    _, sides, _ = cv2.minAreaRect(corners.astype(np.float32))
    return min(sides)


def _class_name(index: int, classes: Sequence[str]) -> str:
    return classes[index] if 0 <= index < len(classes) else f"class {index}"


# --- pictures --------------------------------------------------------------------------------------


def _exhibit(
    folder: Path, number: int, row: Differing, sample: Sample, task: str, predict: Predict, classes: Sequence[str]
) -> Exhibit:
    image, (fp32, int8) = read_sample(sample), predict(sample)
    name = f"{number:02}.jpg"
    (folder / name).write_bytes(_jpeg(image))
    found = _told_apart(*(_found(task, prediction, sample.label) for prediction in (fp32, int8)))
    return Exhibit(
        **row.model_dump(exclude={"slices"}),
        picture=name,
        width=image.shape[1],
        height=image.shape[0],
        label=_labelled(sample, classes),
        fp32_found=_bounded(found[0]),
        int8_found=_bounded(found[1]),
    )


def _jpeg(image: npt.NDArray[np.uint8]) -> bytes:
    import cv2

    factor = _LONGEST_SIDE / max(image.shape[:2])
    if factor < 1:
        size = [max(1, round(side * factor)) for side in (image.shape[1], image.shape[0])]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    done, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    if not done:
        raise ValueError(f"a picture of {image.shape} cannot be written as JPEG")
    return encoded.tobytes()


def _found(task: str, prediction: Any, label: Label) -> Finding:
    """A prediction as it is shown, with what of it and of the label has no partner."""
    if isinstance(label, tuple):
        matching = matched_regions(prediction.polygons, label)
        corners = [_corners(polygon) for polygon in prediction.polygons]
        return _judged_finding(matching, {i: Shape(points=points) for i, points in enumerate(corners)}, label)
    if isinstance(label, Layout):
        certain = [i for i, score in enumerate(prediction.scores) if score >= SHOWN]
        corners = [_rectangle(*map(float, prediction.boxes[i])) for i in certain]
        names = [prediction.labels[prediction.classes[i]] for i in certain]
        shapes = {i: Shape(points=p, name=n) for i, p, n in zip(certain, corners, names, strict=True)}
        return _judged_finding(matched_boxes(prediction, label), shapes, label.regions)
    attribute = {
        "text_recognition": "text",
        "image_classification": "label",
        "table_structure": "html",
        "formula_recognition": "latex",
    }[task]
    return Finding(text=str(getattr(prediction, attribute)))


def _judged_finding(matching: Matching, shapes: dict[int, Shape], labels: Sequence[Box | LayoutRegion]) -> Finding:
    """Args: shapes: by the number of the detection."""
    extra = set(matching.extra)
    judged = [shape.model_copy(update={"extra": number in extra}) for number, shape in shapes.items()]
    return Finding(shapes=judged, missed=[_label_shape(labels[number]) for number in matching.missed])


def _bounded(finding: Finding) -> Finding:
    shapes = {"shapes": finding.shapes[:_MOST_SHAPES], "missed": finding.missed[:_MOST_SHAPES]}
    return finding.model_copy(update=shapes)


def _label_shape(label: Box | LayoutRegion) -> Shape:
    if isinstance(label, Box):
        return Shape(points=_corners(label.points), name=label.text)
    x, y, width, height = label.box
    return Shape(points=_rectangle(x, y, x + width, y + height), name=label.name or "")


def _labelled(sample: Sample, classes: Sequence[str]) -> Finding:
    label = sample.label
    if isinstance(label, Layout):
        regions = [region for region in label.regions if region.name][:_MOST_SHAPES]
        return Finding(shapes=[_label_shape(region) for region in regions])
    if isinstance(label, tuple):
        return Finding(shapes=[_label_shape(box) for box in label[:_MOST_SHAPES]])
    return Finding(text=_class_name(label, classes) if isinstance(label, int) else label)


def _told_apart(first: Finding, second: Finding) -> tuple[Finding, Finding]:
    """Both, with the shapes marked that have no partner in the other."""
    outlines, others = _outlines(first), _outlines(second)
    return _marked(first, outlines, second, others), _marked(second, others, first, outlines)


def _outlines(finding: Finding) -> list[shapely.Polygon]:
    """The polygons of the shapes; an empty one for what is no polygon, which has no partner."""
    outlines = (shapely.Polygon(shape.points) for shape in finding.shapes)
    return [outline if outline.is_valid else shapely.Polygon() for outline in outlines]


def _marked(
    finding: Finding, outlines: Sequence[shapely.Polygon], other: Finding, others: Sequence[shapely.Polygon]
) -> Finding:
    near = shapely.STRtree(others)

    def alone(shape: Shape, outline: shapely.Polygon) -> bool:
        named = (int(i) for i in near.query(outline) if other.shapes[i].name == shape.name)
        return not any(polygon_iou(outline, others[i]) > MIN_IOU for i in named)

    pairs = zip(finding.shapes, outlines, strict=True)
    shapes = [shape.model_copy(update={"alone": alone(shape, outline)}) for shape, outline in pairs]
    return finding.model_copy(update={"shapes": shapes})


def _corners(points: Any) -> list[tuple[float, float]]:
    return [(round(float(x), 1), round(float(y), 1)) for x, y in points]


def _rectangle(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return _corners([(left, top), (right, top), (right, bottom), (left, bottom)])
