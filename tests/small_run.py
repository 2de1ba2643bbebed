"""The folder of a run as small as can be, with every file that reports and checks read; nothing was quantized for it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
from test_manifest import manifest
from test_report import SKIPPED, row

from eval.exhibits import RECORD, Differing, Exhibit, Exhibits, Finding, Shape, Slice
from eval.gate import EvalReport
from quant.advice import GroupImpact, OperatorImpact
from quant.archive import file_sha256
from quant.histograms import RANGES, RangeChart, save_ranges
from quant.ladder import Rung, SearchScore
from quant.manifest import EXHIBITS, artifact_digests
from quant.plan import ActivationQuantizer, IntegerWeight, Operator, QuantPlan, WeightQuantizer
from quant.report import SearchPoint
from quant.sensitivity_report import Sensitivity

MODEL, RUN, TARGET = "m", "0123456789ab", "onnxruntime"
LADDER = {"max_error": 0.08, "max_discordance": 3.0, "margin": 0.3}
GATE = {"max_drop": 1.0, "max_relative_drop": 1.0}
SCORE = SearchScore(0.5, 0.6, 2.0, 40)


def write_small_run(results: Path) -> Path:
    """The run's folder below a results folder, and the model's sensitivity beside it."""
    folder = results / MODEL / RUN
    (folder / TARGET).mkdir(parents=True)
    (folder / TARGET / "inference.onnx").write_bytes(b"model")
    plans = folder / "plans" / TARGET
    _plan().save(plans)
    save_ranges([RangeChart("x", -1.0, 2.0, [3, 4, 5], -1.0, 1.5, 0.01)], plans / RANGES)
    points = [SearchPoint(name, SCORE, latency, True, False) for name, latency in (("a", 0.5), ("b", 0.7))]
    (plans / "search.json").write_text(json.dumps([asdict(point) for point in points]), encoding="utf-8")
    _write_exhibits(folder / EXHIBITS / TARGET)
    report = EvalReport(rows=[row(), row(dataset="set"), SKIPPED])
    (folder / "metrics.json").write_text(report.to_json(), encoding="utf-8")
    rungs = [Rung("ptq", 1.0, 0, 0.1, None, False), Rung("qat", 1.0, 0, 0.05, SCORE, True, 60.0)]
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    manifest(
        run=RUN,
        recipe={"description": "a model", "targets": {TARGET: {"method": "ours"}}, "ladder": LADDER, "gate": GATE},
        ladder={TARGET: rungs},
        artifacts={TARGET: artifact_digests(folder / TARGET)},
        files={name: file_sha256(path) for name, path in files.items() if not name.startswith(f"{TARGET}/")},
        processor={"name": "a processor"},
    ).save(folder)
    (results / MODEL / "sensitivity").mkdir()
    place = results / MODEL / "sensitivity" / f"{TARGET}.json"
    place.write_text(_sensitivity().to_json(), encoding="utf-8")
    return folder


def _plan() -> QuantPlan:
    operator = Operator(
        name="y", op_type="Conv", activations=["x"], weight="w", macs=100, parameters=8, quantized=True, damage=0.25
    )
    return QuantPlan(
        model=MODEL,
        target=TARGET,
        method="ptq",
        prepared_sha256="0" * 64,
        operators=[operator, operator.model_copy(update={"name": "z", "quantized": False, "reason": "why"})],
        activations={"x": ActivationQuantizer(tensor="x", dtype="uint8", scale=0.01, zero_point=100)},
        weights={"w": WeightQuantizer(tensor="w", axis=0)},
        integers={"w": IntegerWeight(np.ones((2, 4, 1, 1), np.int8), np.ones(2, np.float32))},
        bias_shifts={"y": np.ones(2, np.float32)},
        notes=["a note"],
    )


def _write_exhibits(folder: Path) -> None:
    folder.mkdir(parents=True)
    assert cv2.imwrite(str(folder / "00.jpg"), np.zeros((10, 20, 3), np.uint8))
    shape = Shape(points=[(0, 0), (9, 0), (9, 5)], name="one")
    exhibit = Exhibit(
        id="a",
        dataset="set",
        fp32=100,
        int8=50,
        picture="00.jpg",
        width=20,
        height=10,
        label=Finding(text="abc"),
        fp32_found=Finding(text="abc"),
        int8_found=Finding(shapes=[shape]),
    )
    record = Exhibits(
        task="text_recognition",
        metric="line_accuracy",
        samples=40,
        differing=1,
        rows=[Differing(id="a", dataset="set", fp32=100, int8=50, slices={"script": "latin"})],
        slices=[Slice(axis="script", name="latin", samples=40, fp32=90, int8=89.5, worse=1, better=0)],
        exhibits=[exhibit],
    )
    (folder / RECORD).write_text(record.model_dump_json(by_alias=True), encoding="utf-8")


def _sensitivity() -> Sensitivity:
    numbers = {"macs_share": 0.5, "weights_share": 0.5, "damage": 0.1, "snr_db": 9.0, "discordance": 2.0, "drop": 0.5}
    operator = OperatorImpact(name="y", op_type="Conv", kind="Conv", position=1, channels=6, **numbers)
    return Sensitivity(MODEL, TARGET, [operator], [GroupImpact(kind="Conv", operators=2, **numbers)], ["advice"])
