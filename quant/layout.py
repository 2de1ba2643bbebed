"""Layout detection: regions of a page and their classes, by models that read several inputs and write two outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from quant.errors import InputError
from quant.task import FloatArray, Image, LayoutPrediction, Prepared, check_image, prefer_offline

_INPUTS = {"img_size": "im_shape", "img": "image", "scale_factors": "scale_factor"}
"""Names of the models' inputs by PaddleX's keys: size of the resized picture, the picture, resized / source size."""

_ALL = 0.0
"""The least score: precision is judged over all detections, where clients show those from 0.5."""


class LayoutDetection:
    """Input image [1, 3, H, W] of a fixed size, and height and width each: scale_factor [1, 2], maybe im_shape [1, 2].

    Outputs: boxes [N, 6] as class, score, x and y of two corners in pixels of the original picture; their number [1].
    """

    def __init__(self, inference_yml: Mapping[str, Any], model_name: str) -> None:
        steps, labels = _steps(inference_yml, model_name), _labels(inference_yml, model_name)
        prefer_offline()
        from paddlex.inference.models.object_detection.predictor import DetRunnerPredictor
        from paddlex.inference.models.object_detection.processors import DetPostProcess, ReadImage

        # PaddleX's predictor reads RGB whatever the file says, and knows by the model's name which inputs there are.
        makers = {
            "Resize": DetRunnerPredictor.build_resize,
            "NormalizeImage": DetRunnerPredictor.build_normalize,
            "Permute": DetRunnerPredictor.build_to_chw,
        }
        made = (makers[name](None, **arguments) for name, arguments in steps)
        self._steps: list[Callable[..., Any]] = [ReadImage(format="RGB"), *made]
        self._to_batch = DetRunnerPredictor.build_to_batch(SimpleNamespace(model_name=model_name))
        self._per_picture = DetRunnerPredictor._format_output
        self._decode = DetPostProcess(labels=labels)
        self._labels = tuple(labels)

    def preprocess(self, image: Image) -> Prepared:
        """Context: PaddleX's record of the picture without its pixels."""
        check_image(image)
        records: Any = [image]
        for step in self._steps:
            records = step(records)
        names = (_INPUTS[key] for key in self._to_batch.ordered_required_keys)
        inputs = {name: np.ascontiguousarray(v) for name, v in zip(names, self._to_batch(records), strict=True)}
        return Prepared(inputs, [{"ori_img_size": records[0]["ori_img_size"]}])

    def postprocess(self, outputs: list[FloatArray], context: Any) -> LayoutPrediction:
        (found,) = self._decode(self._per_picture(None, outputs), context, threshold=_ALL)
        return LayoutPrediction(
            boxes=np.array([box["coordinate"] for box in found], dtype=np.float64).reshape(-1, 4),
            scores=np.array([box["score"] for box in found], dtype=np.float64),
            classes=np.array([box["cls_id"] for box in found], dtype=np.int64),
            labels=self._labels,
        )

    def expected_shapes(self, inputs: Mapping[str, FloatArray]) -> list[tuple[int | None, ...]]:
        return [(None, 6), (1,)]


def _steps(inference_yml: Mapping[str, Any], model_name: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of each step of Preprocess."""
    listed = inference_yml.get("Preprocess")
    if not isinstance(listed, list) or not all(isinstance(step, Mapping) and "type" in step for step in listed):
        raise InputError(f"inference.yml of {model_name}: Preprocess must be a list of operators with a type")
    steps = [(str(step["type"]), {key: value for key, value in step.items() if key != "type"}) for step in listed]
    names = [name for name, _ in steps]
    if sorted(names) != ["NormalizeImage", "Permute", "Resize"]:
        raise InputError(
            f"inference.yml of {model_name}: Preprocess lists {', '.join(names) or 'nothing'}; "
            "known for this task: Resize, NormalizeImage and Permute, each once"
        )
    size = dict(steps)["Resize"].get("target_size")
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise InputError(f"inference.yml of {model_name}: Resize.target_size = {size} must be [height, width]")
    return steps


def _labels(inference_yml: Mapping[str, Any], model_name: str) -> list[str]:
    labels = inference_yml.get("label_list")
    if not isinstance(labels, list) or not labels:
        raise InputError(f"inference.yml of {model_name}: label_list is missing; it must name the model's classes")
    return [str(label) for label in labels]
