"""Table structure recognition: from the picture of a table to its HTML, by the classes of PaddleX 3.7.2.

Set up from `inference.yml` as `TableRunnerPredictor` sets them up, with batch size 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quant.errors import InputError
from quant.task import (
    INPUT_NAME,
    FloatArray,
    Image,
    Prepared,
    TablePrediction,
    check_image,
    listed_operators,
    picture_reader,
    postprocess_section,
    prefer_offline,
)

_BOX_NUMBERS = 8  # x and y of four corners


class TableStructure:
    """SLANet's table structure. Input x [1, 3, 488, 488]; outputs: boxes [1, T, 8] and tokens [1, T, 50], softmax.

    T, the number of steps of the model's loop, differs from picture to picture.
    """

    def __init__(self, inference_yml: Mapping[str, Any], model_name: str) -> None:
        operators = listed_operators(
            inference_yml,
            model_name,
            {
                "DecodeImage",
                "TableLabelEncode",
                "TableBoxEncode",
                "ResizeTableImage",
                "NormalizeImage",
                "PaddingTableImage",
                "ToCHWImage",
                "KeepKeys",
            },
            {"TableLabelEncode", "ResizeTableImage", "NormalizeImage", "PaddingTableImage", "ToCHWImage"},
        )
        post = postprocess_section(inference_yml, model_name, "TableLabelDecode")
        tokens = post.get("character_dict")
        if not isinstance(tokens, list) or not tokens:
            raise InputError(
                f"inference.yml of {model_name}: PostProcess.character_dict is missing; "
                "it must list the HTML tokens that the model was trained on"
            )
        merged = bool(operators["TableLabelEncode"].get("merge_no_span_structure", True))
        prefer_offline()
        from paddlex.inference.models.common import Normalize, ResizeByLong, ToBatch, ToCHWImage
        from paddlex.inference.models.table_structure_recognition.processors import Pad, TableLabelDecode

        normalize = operators["NormalizeImage"]
        padding = operators["PaddingTableImage"]
        self._read = picture_reader({"DecodeImage": {"img_mode": "BGR", **operators.get("DecodeImage", {})}})
        self._resize = ResizeByLong(target_long_edge=operators["ResizeTableImage"].get("max_len", 488))
        # PaddleX's predictor takes mean and std of the file; its scale is always 1/255.
        self._normalize = Normalize(
            mean=normalize.get("mean", [0.485, 0.456, 0.406]), std=normalize.get("std", [0.229, 0.224, 0.225])
        )
        self._pad = Pad(target_size=padding.get("size", [488, 448])[0], val=padding.get("pad_value", 0))
        self._to_chw = ToCHWImage()
        self._to_batch = ToBatch()
        # The decoder changes the list that it is given.
        self._decode = TableLabelDecode(
            model_name=model_name, merge_no_span_structure=merged, dict_character=[str(token) for token in tokens]
        )
        self._classes = len(self._decode.character)

    def preprocess(self, image: Image) -> Prepared:
        """Context: sizes of the padded and of the original picture, each [width, height]."""
        check_image(image)
        resized = self._normalize(imgs=self._resize(imgs=self._read(imgs=[image])))
        ((padded, size),) = self._pad(imgs=resized)
        (batch,) = self._to_batch(imgs=self._to_chw(imgs=[padded]))
        height, width = image.shape[:2]
        return Prepared({INPUT_NAME: np.ascontiguousarray(batch)}, (size, [width, height]))

    def postprocess(self, outputs: list[FloatArray], context: Any) -> TablePrediction:
        padded, original = context
        (table,) = self._decode(pred=outputs, img_size=[padded], ori_img_size=[original])
        return TablePrediction("".join(table["structure"]), table["bbox"], float(table["structure_score"]))

    def expected_shapes(self, inputs: Mapping[str, FloatArray]) -> list[tuple[int | None, ...]]:
        return [(1, None, _BOX_NUMBERS), (1, None, self._classes)]
