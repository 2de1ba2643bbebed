"""The main job on the real models: the figures that the project promises."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from eval.metric import make_metric
from quant.job import Options, start
from quant.recipe import load_recipe
from quant.task import BoxPrediction, Prediction, TextPrediction

pytestmark = pytest.mark.slow

QUANT = Path(sys.executable).parent / "quant"
DET, REC = "PP-OCRv4_mobile_det", "PP-OCRv4_mobile_rec"
TARGETS = ["onnxruntime", "openvino", "paddle"]
LEAST_SAMPLES = {DET: 80, REC: 1000}
LEAST_COVERAGE = {"onnxruntime": 0.85, "openvino": 0.85, "paddle": 0.75}
LARGEST_ONNX = 0.32
ROUNDING_POINTS = 0.2  # other kernels, other sums: two or three of 1,300 lines may differ in a letter

needs_real_data = pytest.mark.skipif("QUANT_DATA_HOME" not in os.environ, reason="QUANT_DATA_HOME is not set")


def quant(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(QUANT), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def pooled(output: str) -> dict[str, dict[str, Any]]:
    rows = json.loads(output)["rows"]
    return {row["target"]: row for row in rows if row["status"] == "judged" and row["dataset"] == "pooled"}


def model_bytes(results: Path) -> dict[str, bytes]:
    kinds = ("inference.onnx", "inference.pdmodel", "inference.pdiparams", "inference.yml")
    return {str(p.relative_to(results)): p.read_bytes() for p in results.rglob("inference.*") if p.name in kinds}


def paddlex_value(model: str, folder: Path, threads: int) -> float:
    """The metric of what PaddleX itself predicts with the FP32 model on the pictures of a run's report."""
    from paddlex import create_model

    options = Options(folder.parent, threads, lambda what, done, total: None)
    job = start(load_recipe(model), options)
    metric = make_metric(job.recipe.metric)
    fp32 = folder / "fp32"
    fp32.mkdir()
    shutil.copy(job.files.model, fp32 / "inference.pdmodel")
    shutil.copy(job.files.params, fp32 / "inference.pdiparams")
    (fp32 / "inference.yml").write_text(yaml.safe_dump(job.files.inference_yml, allow_unicode=True), encoding="utf-8")
    threaded = {"cpu_threads": threads}  # by default ten, which fight over two cores
    predictor = create_model(model, model_dir=str(fp32), device="cpu", engine="paddle_static", engine_config=threaded)
    counts = []
    for sample in job.selection.report:
        result = next(iter(predictor.predict(str(sample.image), batch_size=1)))
        if model == REC:
            prediction: Prediction = TextPrediction(result["rec_text"], result["rec_score"])
        else:
            prediction = BoxPrediction([np.asarray(polygon) for polygon in result["dt_polys"]], result["dt_scores"])
        counts.append(metric.score(prediction, sample.label))
    return metric.value(np.array(counts))


@needs_real_data
@pytest.mark.parametrize("model", [DET, REC])
def test_passes_on_real_pictures_on_every_target(model: str, tmp_path: Path) -> None:
    done = quant("run", model, "--json", "--quiet", "--out", tmp_path, QUANT_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = pooled(done.stdout)
    assert sorted(rows) == TARGETS
    for target, row in rows.items():
        assert row["gate"]["passed"] and row["gate"]["evidence"] == "real", row
        assert row["samples"] >= LEAST_SAMPLES[model]
        assert row["coverage"] >= LEAST_COVERAGE[target]
        if row["format"] == "onnx":
            assert row["int8_bytes"] <= LARGEST_ONNX * row["fp32_bytes"]
    expected = paddlex_value(model, tmp_path, threads=2)
    for row in rows.values():
        assert row["fp32"] == pytest.approx(expected, abs=ROUNDING_POINTS)


@pytest.mark.parametrize("model", [DET, REC])
def test_bare_command(model: str, tmp_path: Path) -> None:
    """Without any data: generated pictures, a verdict that says so, equal bytes, no work the second time.

    Where real pictures are at hand the artifact that never saw one has to pass on them, too.
    """
    bare = {"QUANT_DATA_HOME": "", "QUANT_CACHE": str(tmp_path / "cache")}
    done = quant("run", model, "--json", "--quiet", "--out", tmp_path / "one", **bare)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = pooled(done.stdout)
    assert sorted(rows) == TARGETS
    assert {row["gate"]["evidence"] for row in rows.values()} == {"generated"}
    again = quant("run", model, "--quiet", "--out", tmp_path / "one", **bare)
    assert "unchanged, nothing to do" in again.stdout
    if os.environ.get("QUANT_DATA_HOME"):
        judged = quant("eval", model, "--target", "onnxruntime", "--json", "--quiet", "--out", tmp_path / "one")
        assert judged.returncode == 0, judged.stdout + judged.stderr[-2000:]
        row = pooled(judged.stdout)["onnxruntime"]
        assert row["gate"]["evidence"] == "real" and row["samples"] >= LEAST_SAMPLES[model]


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    """Two runs that share nothing, on all targets, write the same model files."""
    small = [
        "calibration.samples=16",
        "ladder.search_samples=12",
        "ladder.damage_samples=2",
        "ladder.error_samples=2",
        "latency.runs=2",
    ]
    settings = [*small, "paddleslim.samples=8", "data.generated.samples=120"]
    overrides = [part for setting in settings for part in ("--set", setting)]
    for place in ("one", "two"):
        cache = {"QUANT_DATA_HOME": "", "QUANT_CACHE": str(tmp_path / f"cache-{place}")}
        done = quant("run", REC, *overrides, "--quiet", "--out", tmp_path / place, **cache)
        assert done.returncode in (0, 1), done.stderr[-2000:]  # 16 pictures need not make an accurate model
    first, second = model_bytes(tmp_path / "one"), model_bytes(tmp_path / "two")
    assert len(first) == 9
    assert first == second
