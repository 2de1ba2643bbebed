"""Formula recognition: from the picture of a formula to its LaTeX, by the classes of PaddleX 3.7.2.

Set up from `inference.yml` as `FormulaRecRunnerPredictor` sets them up for PP-FormulaNet, with batch size 1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from quant.errors import InputError, Unavailable
from quant.task import (
    INPUT_NAME,
    FloatArray,
    FormulaPrediction,
    Image,
    Prepared,
    check_image,
    listed_operators,
    picture_reader,
    postprocess_section,
    prefer_offline,
)


class FormulaRecognition:
    """PP-FormulaNet. Input x [1, 1, H, W] of a fixed size, output [1, T] token ids, int64: 0 starts, 2 ends."""

    def __init__(self, inference_yml: Mapping[str, Any], model_name: str) -> None:
        operators = listed_operators(
            inference_yml,
            model_name,
            {
                "DecodeImage",
                "UniMERNetImgDecode",
                "UniMERNetTestTransform",
                "LatexImageFormat",
                "UniMERNetLabelEncode",
                "KeepKeys",
            },
            {"UniMERNetImgDecode", "UniMERNetTestTransform", "LatexImageFormat"},
        )
        size = operators["UniMERNetImgDecode"].get("input_size")
        if not isinstance(size, list) or len(size) != 2:
            raise InputError(f"inference.yml of {model_name}: UniMERNetImgDecode.input_size must be [height, width]")
        tokenizer = _tokenizer(inference_yml, model_name)
        prefer_offline()
        from paddlex.inference.models.formula_recognition.processors import (
            LatexImageFormat,
            ToBatch,
            UniMERNetDecode,
            UniMERNetImgDecode,
            UniMERNetTestTransform,
        )

        self._read = picture_reader(operators)
        self._crop_and_pad = UniMERNetImgDecode(size)
        self._normalize = UniMERNetTestTransform()
        self._format = LatexImageFormat()
        self._to_batch = ToBatch()
        try:
            self._decode = UniMERNetDecode(character_list=tokenizer)
        except Exception as error:  # the exceptions of tokenizers and of PaddleX derive from Exception alone
            raise _unreadable(error, model_name) from error

    def preprocess(self, image: Image) -> Prepared:
        """Context: None."""
        check_image(image)
        squares = self._crop_and_pad(imgs=self._read(imgs=[image]))
        (batch,) = self._to_batch(imgs=self._format(imgs=self._normalize(imgs=squares)))
        return Prepared({INPUT_NAME: np.ascontiguousarray(batch)}, None)

    def postprocess(self, outputs: list[Any], context: Any) -> FormulaPrediction:
        (text,) = self._decode([tokens.reshape([-1]) for tokens in outputs[0]])
        return FormulaPrediction(text)

    def expected_shapes(self, inputs: Mapping[str, FloatArray]) -> list[tuple[int | None, ...]]:
        return [(1, None)]


def _tokenizer(inference_yml: Mapping[str, Any], model_name: str) -> dict[str, Any]:
    """A copy of the tokenizer in the file, which PaddleX's decoder takes apart."""
    files = postprocess_section(inference_yml, model_name, "UniMERNetDecode").get("character_dict")
    if not isinstance(files, Mapping) or not files.get("fast_tokenizer_file"):
        raise InputError(
            f"inference.yml of {model_name}: PostProcess.character_dict.fast_tokenizer_file is missing; the tokenizer "
            "is published inside the model's own inference.yml: use the whole folder of the official archive"
        )
    return copy.deepcopy(dict(files))


def _unreadable(error: Exception, model_name: str) -> InputError | Unavailable:
    if "tokenizers" in str(error) or isinstance(error, ImportError):
        return Unavailable("the package tokenizers is not installed", "Install paddle-quant again with pip")
    why = " ".join(str(error).split())[:200]
    return InputError(f"inference.yml of {model_name}: its tokenizer cannot be read: {why}")
