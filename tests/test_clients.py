"""Acceptance: the exported folders load unmodified in real clients and give what our eval path gives."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from main_jobs import THREADS, MainJobs, together
from test_card import card_of, code_of, run_snippet

from eval.dataset import Sample, read_image
from quant.clients import PICTURE
from quant.job import Job, Options, start
from quant.manifest import load_manifest
from quant.recipe import load_recipe
from quant.runtime import open_session
from quant.target import TARGETS, TargetName
from quant.task import BoxPrediction, TextPrediction
from quant.verification import seal, verify

pytestmark = pytest.mark.slow

DET, REC = "PP-OCRv4_mobile_det", "PP-OCRv4_mobile_rec"
PICTURES = 8
LARGEST_UNSHRUNK = 960
SCORE_NOISE = 0.01  # onnxruntime sums in another order with another number of threads; single values round differently


@dataclass(frozen=True)
class Exported:
    """A finished run and some pictures that it did not calibrate on."""

    job: Job
    folder: Path
    samples: list[Sample]

    def ours(self, target: TargetName) -> list[Any]:
        """Predictions of our eval path; what cannot be run here on its target's runtime is run on onnxruntime."""
        runtime = target if TARGETS[target].executed else "onnxruntime"
        session = open_session(runtime, self.folder / target, threads=THREADS)
        adapter = self.job.adapter
        prepared = [adapter.preprocess(read_image(sample.image)) for sample in self.samples]
        return [adapter.postprocess(session.run(p.inputs), p.context) for p in prepared]


@pytest.fixture(scope="module", params=together(DET, REC))
def exported(request: pytest.FixtureRequest, main_jobs: MainJobs, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model: str = request.param
    done = main_jobs.on_real_data(model)
    folder = tmp_path_factory.mktemp("exported") / model
    for target in load_manifest(done.folder).artifacts:
        shutil.copytree(done.folder / target, folder / target)
        seal(folder / target, model, done.folder.name, target)  # as `quant export` does
    job = start(load_recipe(model), Options(done.results, THREADS, lambda what, done, total: None))
    return Exported(job, folder, job.selection.report[:PICTURES])


def paddlex_predictions(exported: Exported, target: str, **arguments: Any) -> list[Any]:
    from paddlex import create_model

    name = exported.job.recipe.name
    model = create_model(name, model_dir=str(exported.folder / target), device="cpu", batch_size=1, **arguments)
    return [next(iter(model.predict(str(sample.image)))) for sample in exported.samples]


def assert_equal(ours: list[Any], theirs: list[Any]) -> None:
    for mine, result in zip(ours, theirs, strict=True):
        if isinstance(mine, TextPrediction):
            assert result["rec_text"] == mine.text
            assert result["rec_score"] == pytest.approx(mine.score, abs=SCORE_NOISE)
        else:
            assert isinstance(mine, BoxPrediction)
            assert len(result["dt_polys"]) == len(mine.polygons)
            for one, other in zip(result["dt_polys"], mine.polygons, strict=True):
                np.testing.assert_array_equal(np.asarray(one), other)


@pytest.mark.parametrize(("target", "engine"), [("onnxruntime", "onnxruntime"), ("paddle", "paddle_static")])
def test_paddlex_create_model(exported: Exported, target: TargetName, engine: str) -> None:
    assert_equal(exported.ours(target), paddlex_predictions(exported, target, engine=engine))


@pytest.mark.parametrize(("target", "engine"), [("onnxruntime", "onnxruntime"), ("paddle", "paddle_static")])
def test_paddleocr_classes(exported: Exported, target: TargetName, engine: str) -> None:
    from paddleocr import TextDetection, TextRecognition

    name = exported.job.recipe.name
    make = TextDetection if name == DET else TextRecognition
    model = make(model_name=name, model_dir=str(exported.folder / target), device="cpu", engine=engine)
    theirs = [model.predict(str(sample.image), batch_size=1)[0] for sample in exported.samples]
    assert_equal(exported.ours(target), theirs)


def test_rapidocr(exported: Exported) -> None:
    from rapidocr import RapidOCR

    folder = exported.folder / "onnxruntime" / "inference.onnx"
    detects = exported.job.recipe.name == DET
    stage = "Det" if detects else "Rec"
    # RapidOCR pads low and long lines and enlarges small ones; PaddleX does not.
    as_they_are = {"Global.min_height": 1, "Global.width_height_ratio": -1, "Global.min_side_len": 1}
    settings: dict[str, Any] = {f"{stage}.model_path": str(folder), **as_they_are}
    if detects:  # RapidOCR's own thresholds and resizing set to PaddleX's: it then leaves small pictures as they are
        settings |= {"Det.thresh": 0.3, "Det.box_thresh": 0.6, "Det.unclip_ratio": 1.5, "Det.use_dilation": False}
        settings |= {"Det.limit_side_len": 32, "Det.limit_type": "min"}
        settings |= {"Det.mean": [0.485, 0.456, 0.406], "Det.std": [0.229, 0.224, 0.225]}
    engine = RapidOCR(params=settings)
    session = open_session("onnxruntime", folder.parent, threads=THREADS)
    boxes = strange = 0
    for sample in exported.samples:
        image = unshrunk(read_image(sample.image)) if detects else read_image(sample.image)
        prepared = exported.job.adapter.preprocess(image)
        mine = exported.job.adapter.postprocess(session.run(prepared.inputs), prepared.context)
        if detects:
            assert isinstance(mine, BoxPrediction)
            found = engine.text_det(image).boxes
            theirs = [] if found is None else list(np.asarray(found, dtype=np.float64))
            boxes += len(mine.polygons) + len(theirs)
            strange += without_partner(mine.polygons, theirs) + without_partner(theirs, mine.polygons)
        else:
            assert isinstance(mine, TextPrediction)
            result = engine(image, use_det=False, use_cls=False, use_rec=True)
            assert (result.txts or ("",))[0].strip() == mine.text.strip()
    if detects:
        assert boxes > 100 and strange <= boxes / 20


def unshrunk(image: np.ndarray) -> np.ndarray:
    """The picture made small enough that neither side shrinks it again: the two round sizes differently."""
    factor = LARGEST_UNSHRUNK / max(image.shape)
    return image if factor >= 1 else cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def without_partner(some: list[np.ndarray], others: list[np.ndarray]) -> int:
    """How many boxes have none within three pixels among the others.

    RapidOCR sorts its boxes and rounds corners its own way, and sums in another order: a value on the verge that rounds
    to the next of 256 steps is carried on by the integers behind it, moves edges of the map, and now and then takes a
    box over the threshold. So a share of all boxes counts: a picture may have five boxes, one of them on the verge.
    """
    return sum(min((np.abs(box - other).max() for other in others), default=99) > 3.0 for box in some)


@pytest.mark.parametrize("target", TARGETS)
def test_the_code_in_the_card_runs(exported: Exported, target: TargetName, tmp_path: Path) -> None:
    """Every snippet in a folder as `quant export` makes it, which stays whole; PaddleX reads what our eval path reads."""
    folder = Path(shutil.copytree(exported.folder / target, tmp_path / "deploy" / "artifact"))
    assert cv2.imwrite(str(folder / PICTURE), read_image(exported.samples[0].image))
    snippets = code_of(card_of(exported.folder, target))
    said = {client: run_snippet(code, folder).rstrip("\n").rsplit("\n", 1)[-1] for client, code in snippets.items()}
    clients = {"PaddleX", "PaddleOCR"}
    clients |= {"Paddle Inference"} if target == "paddle" else {"onnxruntime", "OpenVINO", "RapidOCR"}
    assert set(said) == clients
    if exported.job.recipe.name == REC and target != "openvino":  # another runtime than PaddleX's
        assert said["PaddleX"] == exported.ours(target)[0].text
    assert said["PaddleX"] == said["PaddleOCR"]
    assert verify(folder).good
