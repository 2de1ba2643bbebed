"""A detector that is none of the eleven, given as a folder: another model's recipe takes it all the way to its clients."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client_code import run_clients
from main_jobs import THREADS, pooled, quant
from test_card import card_of, code_of
from test_twin_runs import read_inference

from calib_data.registry import resolve_dataset
from eval.dataset import read_dataset, read_image
from quant.archive import file_sha256
from quant.manifest import load_manifest
from quant.recipe import load_recipe
from quant.runtime import open_session
from quant.source import SHIPPED_FILES
from quant.task import BoxPrediction, make_task
from quant.verification import verify

RECIPE, SPARE, PAGES = "PP-OCRv4_mobile_det", "en_PP-OCRv3_det", "sroie_det"
TARGET = "openvino"  # onnxruntime's plan gives operators of this network back to FP32, and choosing them takes minutes
LEAST_SAMPLES, LEAST_HMEAN, LEAST_COVERAGE, PICTURES = 15, 80.0, 0.95, 4


def first_folder(variable: str) -> Path:
    return Path(os.environ.get(variable, "nowhere").split(os.pathsep)[0])


WEIGHTS = first_folder("QUANT_MODEL_HOME") / SPARE

pytestmark = [
    pytest.mark.family,
    pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"QUANT_MODEL_HOME has no folder {SPARE}"),
    pytest.mark.skipif(
        not (first_folder("QUANT_DATA_HOME") / PAGES).is_dir(), reason=f"QUANT_DATA_HOME has no folder {PAGES}"
    ),
]


def test_a_detector_without_a_recipe_passes_on_real_pages_and_loads(tmp_path: Path) -> None:
    out, own = tmp_path / "results", {"QUANT_CACHE": str(tmp_path / "cache")}
    asked = ("--model-dir", WEIGHTS, "--target", TARGET, "--out", out)
    again = (*asked, "--set", f"data.sets=[{PAGES}]", "--threads", THREADS, "--json", "--quiet")
    printed = []
    for command in ("run", "eval"):
        done = quant(command, RECIPE, *again, **own)
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]
        printed.append(pooled(done.stdout)[TARGET])
    row, evaluated = printed
    assert row["gate"]["passed"] and row["gate"]["evidence"] == "real", row
    assert row["samples"] >= LEAST_SAMPLES and row["fp32"] >= LEAST_HMEAN and row["coverage"] >= LEAST_COVERAGE
    assert (evaluated["fp32"], evaluated["int8"]) == (row["fp32"], row["int8"])
    (run,) = (metrics.parent for metrics in (out / RECIPE).glob("*/metrics.json"))
    shipped = [file_sha256(WEIGHTS / name) for name in SHIPPED_FILES["paddle"]]
    assert sorted(load_manifest(run).model_sha256.values()) == sorted(shipped), "it is this detector that was judged"

    done = quant("export", RECIPE, *asked, "--to", tmp_path / "deploy", **own)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "deploy").iterdir()
    check_clients(folder)
    assert verify(folder).good


def check_clients(folder: Path) -> None:
    """PaddleX and PaddleOCR, loaded by the code in the card, find the boxes that our path finds."""
    recipe = load_recipe(RECIPE)
    samples = read_dataset(resolve_dataset(PAGES, recipe.task)).samples[:PICTURES]
    pictures = [read_image(sample.image) for sample in samples]
    adapter = make_task(recipe.task, read_inference(folder), RECIPE)
    session = open_session("onnxruntime", folder, THREADS)  # what PaddleX runs it on
    left = run_clients(code_of(card_of(folder.parent, folder.name)), folder, pictures[-1])
    for picture in pictures:
        prepared = adapter.preprocess(picture)
        ours = adapter.postprocess(session.run(prepared.inputs), prepared.context)
        assert isinstance(ours, BoxPrediction) and len(ours.polygons)
        for names in left.values():
            assert_equal(ours, next(iter(names["model"].predict(picture, batch_size=1))))
    for names in left.values():
        assert_equal(ours, names["result"])


def assert_equal(ours: BoxPrediction, theirs: dict[str, Any]) -> None:
    np.testing.assert_array_equal(np.array(theirs["dt_polys"]), np.array(ours.polygons))
