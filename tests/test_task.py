"""The task adapters against PaddleX itself, on the real PP-OCRv4 mobile weights."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from quant.errors import InputError
from quant.judging import _input_size
from quant.recipe import load_recipe
from quant.runtime import open_session
from quant.task import BoxPrediction, ClassPrediction, Prediction, TaskAdapter, TextPrediction, make_task

Image = np.ndarray[Any, Any]

DET = "PP-OCRv4_mobile_det"
REC = "PP-OCRv4_mobile_rec"
LINE_ORI = "PP-LCNet_x0_25_textline_ori"
PAGE_ORI = "PP-LCNet_x1_0_doc_ori"


def drawn_page(height: int = 500, width: int = 700) -> Image:
    page = np.full((height, width, 3), 235, np.uint8)
    for index, text in enumerate(["Total amount 12.80", "Invoice 2024-05-17", "thank you", "B 4711"]):
        cv2.putText(page, text, (30 + 40 * index, 90 + 100 * index), cv2.FONT_HERSHEY_DUPLEX, 1.4, (40, 30, 20), 2)
    return page


def drawn_line(text: str, width: int = 400) -> Image:
    line = np.full((44, width, 3), 220, np.uint8)
    cv2.putText(line, text, (6, 32), cv2.FONT_HERSHEY_SIMPLEX, 1, (20, 60, 10), 2)
    return line


def real_pictures(folder: str, count: int) -> list[Image]:
    """Pictures of the development sets, where QUANT_DATA_HOME points at them."""
    home = os.environ.get("QUANT_DATA_HOME")
    paths = sorted((Path(home) / folder / "images").glob("*.jpg"))[:count] if home else []
    pictures = [cv2.imread(str(path)) for path in paths]
    return [picture for picture in pictures if picture is not None]


def inference_yml(name: str) -> dict[str, Any]:
    """What a PaddleX model folder would hold; the characters come from the package that ships the weights."""
    recipe = load_recipe(name)
    document: dict[str, Any] = {**recipe.inference, "PostProcess": dict(recipe.inference["PostProcess"])}
    if recipe.model.character_dict:
        path = package_folder(recipe.model.character_dict.package) / recipe.model.character_dict.path
        document["PostProcess"]["character_dict"] = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return document


def package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent


def adapter(name: str) -> TaskAdapter:
    return make_task(load_recipe(name).task, inference_yml(name), name)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(700, 1000, (672, 960)), (500, 700, (512, 704)), (2000, 300, (960, 128)), (20, 30, (32, 32))],
)
def test_pages_are_resized_as_the_predictor_does(height: int, width: int, expected: tuple[int, int]) -> None:
    """Longest side at most 960, sides multiples of 32: not what `resize_long` alone would mean."""
    prepared = adapter(DET).preprocess(np.zeros((height, width, 3), np.uint8))
    assert list(prepared.inputs) == ["x"]
    assert prepared.inputs["x"].shape == (1, 3, *expected)
    assert prepared.inputs["x"].dtype == np.float32


def test_the_size_in_which_a_model_sees_a_picture() -> None:
    assert _input_size(adapter(DET))(1000, 700) == (960, 672)
    assert _input_size(adapter(REC))(400, 44) == (436, 48)


def test_pages_are_normalized_in_bgr_order() -> None:
    pixel = np.full((64, 64, 3), (10, 20, 30), np.uint8)
    values = adapter(DET).preprocess(pixel).inputs["x"][0, :, 0, 0]
    expected = (np.array([10, 20, 30]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(values, expected, atol=1e-6)


@pytest.mark.parametrize(("width", "expected"), [(48, 320), (400, 436), (5000, 3200)])
def test_lines_keep_their_ratio_and_are_padded(width: int, expected: int) -> None:
    x = adapter(REC).preprocess(np.full((44, width, 3), 255, np.uint8)).inputs["x"]
    assert x.shape == (1, 3, 48, expected)
    assert x.dtype == np.float32
    assert x[0, 0, 0, 0] == 1
    assert (x[0, 0, 0, -1] == 0) == (width == 48)


def test_no_boxes_and_no_text() -> None:
    detection, recognition = adapter(DET), adapter(REC)
    page = detection.preprocess(np.zeros((64, 96, 3), np.uint8))
    assert detection.postprocess([np.zeros((1, 1, 64, 96), np.float32)], page.context) == BoxPrediction([], [])
    blank = np.zeros((1, 40, 6625), np.float32)
    blank[..., 0] = 1
    assert recognition.postprocess([blank], None) == TextPrediction("", 0.0)


@pytest.mark.parametrize("size", [(40, 300), (700, 500), (30, 20), (224, 224)])
def test_a_classifier_gets_pictures_of_one_size(size: tuple[int, int]) -> None:
    picture = np.zeros((*size, 3), np.uint8)
    for name, shape in ((LINE_ORI, (1, 3, 80, 160)), (PAGE_ORI, (1, 3, 224, 224))):
        x = adapter(name).preprocess(picture).inputs["x"]
        assert (x.shape, x.dtype) == (shape, np.float32)


def test_a_page_is_cropped_in_its_middle() -> None:
    page = np.zeros((512, 1024, 3), np.uint8)
    page[:, 480:544] = 255
    x = adapter(PAGE_ORI).preprocess(page).inputs["x"][0, 0]
    bright = np.flatnonzero(x.mean(axis=0) > 1)
    assert bright.min() + bright.max() == 223 and len(bright) == 32


@pytest.mark.parametrize("name", [LINE_ORI, PAGE_ORI])
def test_classifiers_read_rgb(name: str) -> None:
    values = adapter(name).preprocess(np.full((64, 64, 3), (10, 20, 30), np.uint8)).inputs["x"][0, :, 0, 0]
    expected = (np.array([30, 20, 10]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_the_most_probable_class() -> None:
    found = adapter(PAGE_ORI).postprocess([np.array([[0.1, 0.2, 0.6, 0.1]], np.float32)], None)
    assert found == ClassPrediction(2, "180", pytest.approx(0.6), 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"PostProcess": {"Topk": {"topk": 1}}}, "Topk.label_list is missing"),
        ({"PostProcess": {"name": "CTCLabelDecode"}}, "Topk.label_list is missing"),
        ({"PreProcess": {"transform_ops": [{"ResizeImage": None}]}}, "lacks NormalizeImage, ToCHWImage"),
        (
            {"PreProcess": {"transform_ops": [{"ResizeImage": None}, {"NormalizeImage": None}, {"ToCHWImage": None}]}},
            "ResizeImage needs size or resize_short",
        ),
    ],
)
def test_files_that_describe_no_classifier(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_task("image_classification", {**inference_yml(LINE_ORI), **change}, LINE_ORI)


def test_what_cannot_be_a_task_is_said_in_a_sentence() -> None:
    with pytest.raises(InputError, match="unknown task 'poetry'; known tasks: text_detection, text_recognition"):
        make_task("poetry", {}, REC)
    yml = inference_yml(DET)
    with pytest.raises(InputError, match="section PreProcess is missing"):
        make_task("text_detection", {}, DET)
    with pytest.raises(InputError, match="unknown operator .*DetResizeForTest"):
        make_task("text_recognition", yml, REC)
    with pytest.raises(InputError, match="character_dict is missing"):
        make_task("text_recognition", load_recipe(REC).inference, REC)
    with pytest.raises(InputError, match="must be uint8"):
        make_task("text_detection", yml, DET).preprocess(np.zeros((0, 5, 3), np.uint8))


def test_a_scale_is_a_number_and_no_program() -> None:
    yml = inference_yml(DET)
    operators = yml["PreProcess"]["transform_ops"]
    evil = [
        {**op, "NormalizeImage": {"scale": "__import__('os').getpid()"}} if "NormalizeImage" in op else op
        for op in operators
    ]
    with pytest.raises(InputError, match="must be a number or a fraction"):
        make_task("text_detection", {**yml, "PreProcess": {"transform_ops": evil}}, DET)


def test_importing_the_module_loads_no_framework() -> None:
    code = "import sys, quant.task; sys.exit(any(m in sys.modules for m in ('paddle', 'paddlex', 'cv2')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def old_ir_paddle() -> Iterator[Any]:
    """Paddle reading old-IR models as such; the flag counts only before the first import."""
    os.environ.setdefault("FLAGS_enable_pir_api", "0")
    os.environ.setdefault("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")
    yield pytest.importorskip("paddle.inference")


def model_folder(name: str, folder: Path) -> Path:
    source = load_recipe(name).model.wheel
    assert source is not None
    shipped = package_folder(source.package) / source.folder
    for file in ("inference.pdmodel", "inference.pdiparams"):
        shutil.copy(shipped / file, folder / file)
    (folder / "inference.yml").write_text(yaml.safe_dump(inference_yml(name), allow_unicode=True), encoding="utf-8")
    return folder


def ours(inference: Any, name: str, folder: Path, pictures: list[Image]) -> list[Prediction]:
    config = inference.Config(str(folder / "inference.pdmodel"), str(folder / "inference.pdiparams"))
    config.disable_gpu()
    config.disable_mkldnn()
    config.enable_new_ir(False)
    config.enable_new_executor()
    config.set_optimization_level(3)
    config.enable_memory_optim()
    config.disable_glog_info()
    config.set_cpu_math_library_num_threads(1)
    predictor = inference.create_predictor(config)
    task = adapter(name)
    predictions = []
    for picture in pictures:
        prepared = task.preprocess(picture)
        for key, value in prepared.inputs.items():
            predictor.get_input_handle(key).copy_from_cpu(value)
        predictor.run()
        outputs = [predictor.get_output_handle(output).copy_to_cpu() for output in predictor.get_output_names()]
        predictions.append(task.postprocess(outputs, prepared.context))
    return predictions


def theirs(name: str, folder: Path, pictures: list[Image]) -> list[dict[str, Any]]:
    from paddlex import create_model

    model = create_model(
        name,
        model_dir=str(folder),
        device="cpu",
        engine="paddle_static",
        engine_config={"run_mode": "paddle", "cpu_threads": 1, "enable_new_ir": False},
    )
    return [dict(result) for result in model.predict(pictures, batch_size=1)]


@pytest.mark.slow
def test_lines_are_read_as_paddlex_reads_them(old_ir_paddle: Any, tmp_path: Path) -> None:
    lines = [drawn_line("Total 12.80"), drawn_line("hello world", 260), drawn_line("Rechnung Nr. 4711", 600)]
    lines += [np.zeros((30, 100, 3), np.uint8)]
    for dataset in ("omnidocbench_rec", "icdar2015_rec", "sroie_rec"):
        lines += real_pictures(dataset, 10)
    folder = model_folder(REC, tmp_path)
    read = ours(old_ir_paddle, REC, folder, lines)
    expected = theirs(REC, folder, lines)
    assert read == [TextPrediction(result["rec_text"], result["rec_score"]) for result in expected]
    assert read[0].text.replace(" ", "") == "Total12.80"  # type: ignore[union-attr]


@pytest.mark.slow
def test_boxes_are_found_as_paddlex_finds_them(old_ir_paddle: Any, tmp_path: Path) -> None:
    pages = [drawn_page(), drawn_page(700, 1100), np.full((40, 20, 3), 255, np.uint8)]
    pages += real_pictures("icdar2015_det", 2) + real_pictures("sroie_det", 2)
    folder = model_folder(DET, tmp_path)
    found = ours(old_ir_paddle, DET, folder, pages)
    expected = theirs(DET, folder, pages)
    for ours_, theirs_ in zip(found, expected, strict=True):
        assert isinstance(ours_, BoxPrediction)
        assert [p.tolist() for p in ours_.polygons] == [np.asarray(p).tolist() for p in theirs_["dt_polys"]]
        assert ours_.scores == [float(score) for score in theirs_["dt_scores"]]
    assert isinstance(found[0], BoxPrediction)
    assert len(found[0].polygons) >= 4


def test_lines_are_classified_as_paddlex_classifies_them(tmp_path: Path) -> None:
    """The real weights, on Paddle Inference in both: every class and probability is the same."""
    home = Path(os.environ.get("QUANT_MODEL_HOME", "").split(os.pathsep)[0])
    if not (home / LINE_ORI / "inference.json").is_file():
        pytest.skip(f"QUANT_MODEL_HOME has no folder {LINE_ORI}")
    from paddlex import create_model

    lines = [drawn_line("Total 12.80"), drawn_line("hello world", 260), drawn_line("Rechnung Nr. 4711", 600)]
    for dataset in ("omnidocbench_rec", "icdar2015_rec", "sroie_rec"):
        lines += real_pictures(dataset, 10)
    lines += [np.ascontiguousarray(np.rot90(line, 2)) for line in lines]
    model = create_model(LINE_ORI, model_dir=str(home / LINE_ORI), device="cpu", engine="paddle_static")
    theirs_ = [dict(result) for result in model.predict(lines, batch_size=1)]
    yml = yaml.safe_load((home / LINE_ORI / "inference.yml").read_text(encoding="utf-8"))
    task = make_task("image_classification", yml, LINE_ORI)
    session = open_session("paddle", home / LINE_ORI, 1)
    for line, result in zip(lines, theirs_, strict=True):
        prepared = task.preprocess(line)
        found = task.postprocess(session.run(prepared.inputs), prepared.context)
        assert isinstance(found, ClassPrediction)
        assert (found.index, found.label) == (result["class_ids"][0], result["label_names"][0])
        assert found.score == pytest.approx(result["scores"][0], abs=1e-4)
    described = inference_yml(LINE_ORI)
    assert all(described[part] == yml[part] for part in ("Global", "PreProcess", "PostProcess"))
