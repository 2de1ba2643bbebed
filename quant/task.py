"""Tasks: from a picture to the model's inputs, and from the model's outputs to a prediction.

All arithmetic is done by the classes of PaddleX 3.7.2, set up from `inference.yml` as its own
predictors (`TextDetRunnerPredictor`, `TextRecRunnerPredictor`, `ClasRunnerPredictor`, `DetRunnerPredictor`) set them up
with default arguments and batch size 1. PaddleX is imported when an adapter is made, not when this module is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quant.errors import InputError

INPUT_NAME = "x"
_LARGEST_NUMBER = 4096
"""In what inference.yml says of pre-processing: the side of the largest picture that a model may ask for."""

Image = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prepared:
    """A picture as the model wants it.

    Args:
        inputs: input name -> float32 array with batch size 1.
        context: what `postprocess` must know about the picture, opaque to everyone else.
    """

    inputs: dict[str, FloatArray]
    context: Any


@dataclass(frozen=True)
class TextPrediction:
    """One line of text. `score` is the mean probability of the characters, 0..1 (0 for no text)."""

    text: str
    score: float


@dataclass(frozen=True)
class BoxPrediction:
    """Text regions of one picture, in the order in which PaddleX reports them.

    Args:
        polygons: int32 arrays [corners, 2], x and y in pixels of the original picture.
        scores: one per polygon, 0..1.
    """

    polygons: list[npt.NDArray[np.int32]]
    scores: list[float]


@dataclass(frozen=True)
class ClassPrediction:
    """The most probable class of a picture.

    Args:
        index: of the class, from 0.
        label: its name.
        score: its probability, 0..1.
        classes: how many classes the model knows.
    """

    index: int
    label: str
    score: float
    classes: int


@dataclass(frozen=True)
class LayoutPrediction:
    """Regions of a page, of every score above 0.

    Args:
        boxes: [n, 4] x and y of the upper left and lower right corner, in pixels of the original picture.
        scores: [n], 0..1.
        classes: [n] indexes of `labels`.
        labels: names of the model's classes.
    """

    boxes: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class TablePrediction:
    """The skeleton of a table.

    Args:
        html: `<html><body><table>...`, cells without their text.
        boxes: of the cells in their order, x and y of four corners in pixels of the original picture.
        score: mean probability of the tokens, 0..1 (0 for no token).
    """

    html: str
    boxes: list[list[int]]
    score: float


@dataclass(frozen=True)
class FormulaPrediction:
    """A formula."""

    latex: str


Prediction = TextPrediction | BoxPrediction | ClassPrediction | LayoutPrediction | TablePrediction | FormulaPrediction


class TaskAdapter(Protocol):
    """What the pipeline needs to know of a task."""

    def preprocess(self, image: Image) -> Prepared:
        """Args: image: uint8 BGR, [height, width, 3]."""
        ...

    def postprocess(self, outputs: list[FloatArray], context: Any) -> Prediction:
        """Args: outputs: the model's outputs for one prepared picture; context: from `Prepared`."""
        ...

    def expected_shapes(self, inputs: Mapping[str, FloatArray]) -> list[tuple[int | None, ...]]:
        """Shape of each output for these inputs, None where any size will do: it tells foreign models apart."""
        ...


class TextDetection:
    """DB text detection. Input x [1, 3, H, W] with H and W multiples of 32, output [1, 1, H, W] in 0..1."""

    def __init__(self, inference_yml: Mapping[str, Any], model_name: str) -> None:
        operators = listed_operators(
            inference_yml,
            model_name,
            {"DecodeImage", "DetLabelEncode", "DetResizeForTest", "NormalizeImage", "ToCHWImage", "KeepKeys"},
            {"DetResizeForTest", "NormalizeImage", "ToCHWImage"},
        )
        post = postprocess_section(inference_yml, model_name, "DBPostProcess")
        prefer_offline()
        from paddlex.inference.models.common import ToBatch, ToCHWImage
        from paddlex.inference.models.text_detection.predictor import (
            _get_text_det_postprocess_defaults,
            _get_text_det_resize_defaults,
        )
        from paddlex.inference.models.text_detection.processors import DBPostProcess, DetResizeForTest, NormalizeImage

        # PaddleX's predictor takes `limit_side_len` and `limit_type` of the file as arguments of its own
        # and does not use them: the model's name and `resize_long` decide.
        resize = {k: v for k, v in operators["DetResizeForTest"].items() if k not in ("limit_side_len", "limit_type")}
        side, limit_type = _get_text_det_resize_defaults(model_name, resize)
        thresh, box_thresh, unclip_ratio = _get_text_det_postprocess_defaults({"PostProcess": post})

        self._read = picture_reader(operators)
        self._resize = DetResizeForTest(limit_side_len=side, limit_type=limit_type, **resize)
        self._normalize = NormalizeImage(**_normalization(operators["NormalizeImage"]))
        self._to_chw = ToCHWImage()
        self._to_batch = ToBatch()
        self._decode = DBPostProcess(
            thresh=thresh,
            box_thresh=box_thresh,
            unclip_ratio=unclip_ratio,
            max_candidates=post.get("max_candidates", 1000),
            use_dilation=post.get("use_dilation", False),
            score_mode=post.get("score_mode", "fast"),
            box_type=post.get("box_type", "quad"),
        )

    def preprocess(self, image: Image) -> Prepared:
        """Context: [[source height, source width, height ratio, width ratio]]."""
        check_image(image)
        resized, shapes = self._resize(imgs=self._read(imgs=[image]))
        (batch,) = self._to_batch(imgs=self._to_chw(imgs=self._normalize(imgs=resized)))
        return Prepared({INPUT_NAME: np.ascontiguousarray(batch)}, shapes)

    def postprocess(self, outputs: list[FloatArray], context: Any) -> BoxPrediction:
        polygons, scores = self._decode(outputs, context)
        return BoxPrediction(
            [np.asarray(polygon, dtype=np.int32) for polygon in polygons[0]], [float(score) for score in scores[0]]
        )

    def expected_shapes(self, inputs: Mapping[str, FloatArray]) -> list[tuple[int | None, ...]]:
        height, width = inputs[INPUT_NAME].shape[2:]
        return [(1, 1, height, width)]


class TextRecognition:
    """CTC text line recognition. Input x [1, 3, 48, W], output [1, T, characters + 2], softmax."""

    def __init__(self, inference_yml: Mapping[str, Any], model_name: str) -> None:
        operators = listed_operators(
            inference_yml,
            model_name,
            {"DecodeImage", "MultiLabelEncode", "RecResizeImg", "KeepKeys"},
            {"RecResizeImg"},
        )
        post = postprocess_section(inference_yml, model_name, "CTCLabelDecode")
        characters = post.get("character_dict")
        if not characters:
            raise InputError(
                f"inference.yml of {model_name}: PostProcess.character_dict is missing; "
                "it must list the characters that the model was trained on"
            )
        image_shape = operators["RecResizeImg"].get("image_shape")
        if not isinstance(image_shape, list) or len(image_shape) != 3:
            raise InputError(
                f"inference.yml of {model_name}: RecResizeImg.image_shape must be [channels, height, width]"
            )
        prefer_offline()
        from paddlex.inference.models.text_recognition.processors import CTCLabelDecode, OCRReisizeNormImg, ToBatch

        self._read = picture_reader(operators)
        self._resize = OCRReisizeNormImg(rec_image_shape=image_shape)
        self._to_batch = ToBatch()
        self._decode = CTCLabelDecode(character_list=[str(character) for character in characters])
        self._classes = len(characters) + 2  # the blank before, the space behind

    def preprocess(self, image: Image) -> Prepared:
        """Context: None."""
        check_image(image)
        (batch,) = self._to_batch(imgs=self._resize(imgs=self._read(imgs=[image])))
        return Prepared({INPUT_NAME: np.ascontiguousarray(batch)}, None)

    def postprocess(self, outputs: list[FloatArray], context: Any) -> TextPrediction:
        texts, scores = self._decode(outputs)
        return TextPrediction(texts[0], float(scores[0]))

    def expected_shapes(self, inputs: Mapping[str, FloatArray]) -> list[tuple[int | None, ...]]:
        return [(1, None, self._classes)]


class ImageClassification:
    """Classification of a whole picture. Input x [1, 3, H, W] of a fixed size, output [1, classes], softmax."""

    def __init__(self, inference_yml: Mapping[str, Any], model_name: str) -> None:
        operators = listed_operators(
            inference_yml,
            model_name,
            {"ResizeImage", "CropImage", "NormalizeImage", "ToCHWImage"},
            {"ResizeImage", "NormalizeImage", "ToCHWImage"},
        )
        labels = _class_labels(inference_yml, model_name)
        prefer_offline()
        from paddlex.inference.common.reader import ReadImage
        from paddlex.inference.models.common import Normalize, ToBatch, ToCHWImage
        from paddlex.inference.models.image_classification.processors import Crop, Topk

        normalization = _normalization(operators["NormalizeImage"])
        del normalization["order"]  # PaddleX's predictor allows none here: always height, width, channel
        crop = operators.get("CropImage")
        steps = [
            # PaddleX's predictor reads RGB whatever the file says.
            ReadImage(format="RGB"),
            _class_resize(operators["ResizeImage"], model_name),
            *([Crop(crop_size=crop.get("size", 224))] if crop is not None else []),
            Normalize(**normalization),
            ToCHWImage(),
        ]
        self._steps: list[Callable[..., Any]] = steps
        self._to_batch = ToBatch()
        self._classes = len(labels)
        self._decode = Topk(class_ids=labels)

    def preprocess(self, image: Image) -> Prepared:
        """Context: None."""
        check_image(image)
        images: Any = [image]
        for step in self._steps:
            images = step(imgs=images)
        (batch,) = self._to_batch(imgs=images)
        return Prepared({INPUT_NAME: np.ascontiguousarray(batch)}, None)

    def postprocess(self, outputs: list[FloatArray], context: Any) -> ClassPrediction:
        indexes, scores, names = self._decode(outputs, topk=1)
        return ClassPrediction(int(indexes[0][0]), str(names[0][0]), float(scores[0][0]), self._classes)

    def expected_shapes(self, inputs: Mapping[str, FloatArray]) -> list[tuple[int | None, ...]]:
        return [(1, self._classes)]


def _layout_detection(inference_yml: Mapping[str, Any], model_name: str) -> TaskAdapter:
    from quant.layout import LayoutDetection  # not above: it imports this module

    return LayoutDetection(inference_yml, model_name)


def _table_structure(inference_yml: Mapping[str, Any], model_name: str) -> TaskAdapter:
    from quant.table import TableStructure

    return TableStructure(inference_yml, model_name)


def _formula_recognition(inference_yml: Mapping[str, Any], model_name: str) -> TaskAdapter:
    from quant.formula import FormulaRecognition

    return FormulaRecognition(inference_yml, model_name)


_TASKS: dict[str, Callable[[Mapping[str, Any], str], TaskAdapter]] = {
    "text_detection": TextDetection,
    "text_recognition": TextRecognition,
    "image_classification": ImageClassification,
    "layout_detection": _layout_detection,
    "table_structure": _table_structure,
    "formula_recognition": _formula_recognition,
}


def make_task(task: str, inference_yml: Mapping[str, Any], model_name: str) -> TaskAdapter:
    """The adapter of a task.

    Args:
        task: a task that recipes may name.
        inference_yml: the parsed file that lies beside a PaddleX model.
        model_name: PaddleX derives defaults from it.

    Raises:
        InputError: unknown task, or the file does not describe a model of this task.
    """
    if task not in _TASKS:
        raise InputError(f"unknown task '{task}'; known tasks: {', '.join(_TASKS)}")
    _check_sizes(inference_yml, model_name)
    trial = np.full((48, 96, 3), 255, dtype=np.uint8)
    trial[12:36, 24:72] = 0
    try:
        adapter = _TASKS[task](inference_yml, model_name)
        adapter.preprocess(trial)
    except (InputError, ImportError):
        raise
    except Exception as error:  # PaddleX's classes raise whatever they trip over
        why = " ".join(f"{error.__class__.__name__}: {error}".split())[:200]
        raise InputError(
            f"inference.yml of {model_name}: PaddleX cannot work by it ({why}); take the file that belongs to the model"
        ) from error
    return adapter


def _check_sizes(inference_yml: Mapping[str, Any], model_name: str) -> None:
    """Sizes of resized pictures have to stay in a range that memory has room for."""
    waiting = [inference_yml.get(key) for key in ("PreProcess", "Preprocess")]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, int | float) and not abs(value) <= _LARGEST_NUMBER:
            raise InputError(
                f"inference.yml of {model_name}: {value} in its pre-processing is beyond {_LARGEST_NUMBER}"
            )


def prefer_offline() -> None:
    """To be called before PaddleX is imported, which probes its model hosters unless this is set."""
    os.environ.setdefault("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")


def picture_reader(operators: Mapping[str, Mapping[str, Any]]) -> Any:
    from paddlex.inference.common.reader import ReadImage

    return ReadImage(format=operators.get("DecodeImage", {}).get("img_mode", "RGB"))


def listed_operators(
    inference_yml: Mapping[str, Any], model_name: str, known: set[str], required: set[str]
) -> dict[str, dict[str, Any]]:
    """Name -> arguments of PreProcess.transform_ops."""
    steps = _section(inference_yml, model_name, "PreProcess").get("transform_ops")
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) and step for step in steps):
        raise InputError(f"inference.yml of {model_name}: PreProcess.transform_ops must be a list of operators")
    operators: dict[str, dict[str, Any]] = {}
    for step in steps:
        name = next(iter(step))
        operators[name] = dict(step[name] or {})
    if unknown := sorted(set(operators) - known):
        raise InputError(
            f"inference.yml of {model_name}: unknown operator {', '.join(unknown)} in PreProcess.transform_ops; "
            f"known for this task: {', '.join(sorted(known))}"
        )
    if missing := sorted(required - set(operators)):
        raise InputError(f"inference.yml of {model_name}: PreProcess.transform_ops lacks {', '.join(missing)}")
    return operators


def postprocess_section(inference_yml: Mapping[str, Any], model_name: str, expected: str) -> Mapping[str, Any]:
    section = _section(inference_yml, model_name, "PostProcess")
    if section.get("name") != expected:
        raise InputError(
            f"inference.yml of {model_name}: PostProcess.name is {section.get('name')}, expected {expected}"
        )
    return section


def _section(inference_yml: Mapping[str, Any], model_name: str, key: str) -> Mapping[str, Any]:
    section = inference_yml.get(key)
    if not isinstance(section, Mapping):
        raise InputError(f"inference.yml of {model_name}: the section {key} is missing")
    return section


def _class_labels(inference_yml: Mapping[str, Any], model_name: str) -> list[str]:
    section = _section(inference_yml, model_name, "PostProcess").get("Topk")
    labels = section.get("label_list") if isinstance(section, Mapping) else None
    if not isinstance(labels, list) or not labels:
        raise InputError(
            f"inference.yml of {model_name}: PostProcess.Topk.label_list is missing; it must name the model's classes"
        )
    return [str(label) for label in labels]


def _class_resize(arguments: Mapping[str, Any], model_name: str) -> Any:
    """`ResizeImage` of a classifier: to a fixed `size` [width, height], or the short side to `resize_short`."""
    from paddlex.inference.models.common import Resize, ResizeByShort

    how = {
        "size_divisor": None,
        "interp": arguments.get("interpolation", "LINEAR"),
        "backend": arguments.get("backend", "cv2"),
    }
    if short := arguments.get("resize_short"):
        return ResizeByShort(target_short_edge=short, **how)
    if size := arguments.get("size"):
        return Resize(target_size=size, **how)
    raise InputError(f"inference.yml of {model_name}: ResizeImage needs size or resize_short")


def _normalization(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of NormalizeImage with the predictor's defaults.

    PaddleX evaluates a `scale` that is text as Python; here only a number or a fraction is let through.
    """
    scale = arguments.get("scale", 1 / 255)
    if isinstance(scale, str):
        fraction = re.fullmatch(r"\s*(\d+\.?\d*(?:[eE][+-]?\d+)?)\s*(?:/\s*(\d+\.?\d*))?\s*", scale)
        if not fraction or (fraction[2] and not float(fraction[2])):
            raise InputError(
                f"inference.yml: NormalizeImage.scale = {scale!r} must be a number or a fraction like 1./255."
            )
        scale = float(fraction[1]) / float(fraction[2] or 1)
    return {
        "mean": arguments.get("mean", [0.485, 0.456, 0.406]),
        "std": arguments.get("std", [0.229, 0.224, 0.225]),
        "scale": scale,
        "order": arguments.get("order", ""),
    }


def check_image(image: Image) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise InputError(
            f"a picture must be uint8 [height, width, 3] with at least one pixel, not {image.dtype} {list(image.shape)}"
        )
