"""The clients that load an artifact, each with the few lines of Python that do it.

The lines stand in model cards (see `quant.card`) and run inside the artifact's folder; tests execute them. The picture
that they read lies outside, since `quant verify` names every file that was added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant.runtime import target_format
from quant.target import TargetName

Shapes = Mapping[str, Sequence[int]]
"""Names of a model's inputs and the shape of each; all hold float32."""

PICTURE = "../../picture.png"
"""What the lines read: two folders up is outside of an exported folder, and of the run that an artifact lies in."""

_RESULTS = {
    "text_detection": "dt_polys",
    "text_recognition": "rec_text",
    "image_classification": "label_names",
    "layout_detection": "boxes",
    "table_structure": "structure",
    "formula_recognition": "rec_formula",
}
"""What PaddleX calls the result of each task."""

_CLASSES = {
    "text_detection": "TextDetection",
    "text_recognition": "TextRecognition",
    "layout_detection": "LayoutDetection",
    "table_structure": "TableStructureRecognition",
    "formula_recognition": "FormulaRecognition",
}
_CLASSIFIERS = {"textline_ori": "TextLineOrientationClassification", "doc_ori": "DocImgOrientationClassification"}
_ENGINES = {"onnx": "onnxruntime", "paddle": "paddle_static"}


@dataclass(frozen=True)
class Snippet:
    """How one client loads an artifact: its name, code that runs as it is, and what to know about it."""

    client: str
    code: str
    note: str = ""


def snippets(target: TargetName, task: str, model_name: str, inputs: Shapes, steps: bool) -> list[Snippet]:
    """Every client that loads the artifact, the runtime that it was judged on first.

    Args:
        model_name: as PaddleX knows it, `Global.model_name` of `inference.yml`.
        steps: whether the model writes in a loop.
    """
    kind = target_format(target)
    clients = [_paddlex(task, model_name, _ENGINES[kind]), *_paddleocr(task, model_name, _ENGINES[kind])]
    if kind == "paddle":
        return [_paddle_inference(inputs, steps), *clients]
    runtimes = [_onnxruntime(inputs), _openvino(inputs, steps)]
    if target == "openvino":
        runtimes.reverse()
    return [*runtimes, *clients, *_rapidocr(task)]


def _paddlex(task: str, model_name: str, engine: str) -> Snippet:
    return Snippet(
        "PaddleX",
        f"""from paddlex import create_model

model = create_model("{model_name}", model_dir=".", device="cpu", engine="{engine}")
for result in model.predict("{PICTURE}", batch_size=1):
    print(result["{_RESULTS[task]}"])
""",
    )


def _paddleocr(task: str, model_name: str, engine: str) -> list[Snippet]:
    ends = (name for end, name in _CLASSIFIERS.items() if model_name.endswith(end))
    name = _CLASSES.get(task) or next(ends, None)
    if name is None:
        return []
    code = f"""from paddleocr import {name}

model = {name}(model_name="{model_name}", model_dir=".", device="cpu", engine="{engine}")
for result in model.predict("{PICTURE}", batch_size=1):
    print(result["{_RESULTS[task]}"])
"""
    return [Snippet("PaddleOCR", code)]


def _onnxruntime(inputs: Shapes) -> Snippet:
    return Snippet(
        "onnxruntime",
        f"""import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("inference.onnx", providers=["CPUExecutionProvider"])
{_feed(inputs)}
print([output.shape for output in session.run(None, feed)])
""",
    )


def _openvino(inputs: Shapes, steps: bool) -> Snippet:
    settings, note = '{"PERFORMANCE_HINT": "LATENCY"}', ""
    if steps:
        settings = '{"PERFORMANCE_HINT": "LATENCY", "CPU_RUNTIME_CACHE_CAPACITY": "0"}'
        note = "Without `CPU_RUNTIME_CACHE_CAPACITY` 0 OpenVINO computes long outputs of this model's loop wrongly."
    code = f"""import numpy as np
import openvino

model = openvino.Core().compile_model("inference.onnx", "CPU", {settings})
{_feed(inputs)}
results = model(feed)
print([results[port].shape for port in model.outputs])
"""
    return Snippet("OpenVINO", code, note)


def _paddle_inference(inputs: Shapes, steps: bool) -> Snippet:
    onednn = "config.disable_mkldnn()" if steps else "config.enable_mkldnn()"
    note = "oneDNN fails on the empty caches that this model's loop begins with." if steps else ""
    code = f"""import os

os.environ["FLAGS_enable_pir_api"] = "0"  # before paddle is imported: the program is in the old format

import numpy as np
from paddle import inference

config = inference.Config("inference.pdmodel", "inference.pdiparams")
config.disable_gpu()
{onednn}
predictor = inference.create_predictor(config)
{_feed(inputs)}
for name, values in feed.items():
    predictor.get_input_handle(name).copy_from_cpu(values)
predictor.run()
print([predictor.get_output_handle(name).copy_to_cpu().shape for name in predictor.get_output_names()])
"""
    return Snippet("Paddle Inference", code, note)


def _rapidocr(task: str) -> list[Snippet]:
    """RapidOCR has stages for detection and recognition; its classifier prepares lines otherwise than PP-LCNet's."""
    note = "RapidOCR pads, enlarges and rounds pictures its own way: results differ a little from PaddleX's."
    if task == "text_detection":
        code = f"""from rapidocr import RapidOCR

settings = {{
    "Det.model_path": "inference.onnx",
    "Det.mean": [0.485, 0.456, 0.406],
    "Det.std": [0.229, 0.224, 0.225],
    "Det.box_thresh": 0.6,
    "Det.unclip_ratio": 1.5,
    "Det.use_dilation": False,
}}
result = RapidOCR(params=settings)("{PICTURE}", use_det=True, use_cls=False, use_rec=False)
print(result.boxes)
"""
        return [Snippet("RapidOCR", code, note)]
    if task == "text_recognition":
        code = f"""from rapidocr import RapidOCR

engine = RapidOCR(params={{"Rec.model_path": "inference.onnx"}})
result = engine("{PICTURE}", use_det=False, use_cls=False, use_rec=True)
print(result.txts)
"""
        return [Snippet("RapidOCR", code, note)]
    return []


def _feed(inputs: Shapes) -> str:
    """The line that makes inputs; what stands in for a picture is empty."""
    arrays = [
        f'"{name}": np.{"zeros" if len(shape) == 4 else "ones"}({tuple(shape)}, np.float32)'
        for name, shape in inputs.items()
    ]
    return f"feed = {{{', '.join(arrays)}}}  # pictures are pre-processed as inference.yml says"
