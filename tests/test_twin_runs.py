"""Twins trained anew go all the way of the models that they stand in for: recipe, plan, artifacts, gate, clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from client_code import run_clients, run_code
from test_card import card_of, code_of

from calib_data.registry import resolve_dataset
from eval.dataset import read_dataset, read_image
from quant.recipe import load_recipe
from quant.runtime import open_session, target_format
from quant.target import TargetName
from quant.task import (
    BoxPrediction,
    ClassPrediction,
    FormulaPrediction,
    LayoutPrediction,
    TablePrediction,
    TextPrediction,
    make_task,
)
from quant.twins import twin_names

pytestmark = pytest.mark.family

QUANT = Path(sys.executable).parent / "quant"
LEAST = {
    "PP-LCNet_x1_0_doc_ori": ("top1", 95),
    "PP-OCRv4_server_det": ("hmean", 80),
    "PP-OCRv4_server_rec": ("line_accuracy", 80),
    "PP-DocLayout-S": ("map50", 50),
    "PP-DocLayout-L": ("map50", 50),
    "SLANet_plus": ("teds_struct", 80),
    "PP-FormulaNet-S": ("exact_match", 60),
    "PP-FormulaNet-L": ("exact_match", 60),
}
"""What FP32 reaches at least on the twin's own world, in percent, by one of its task's measures."""

SLOW_TOO = ("PP-LCNet_x1_0_doc_ori", "SLANet_plus")
"""Continuous integration takes the smallest and one with a loop; the others are for `make families` alone."""

TARGETS: list[TargetName] = ["onnxruntime", "openvino", "paddle"]
LEAST_COVERAGE = 0.8
PICTURES = 6
SHOWN = 0.5
"""The least score of a region that PaddleX shows."""


def quant(*arguments: object, **environment: str) -> list[dict[str, Any]]:
    """The rows that a command prints; it must end well."""
    command = [str(QUANT), *map(str, arguments), "--json", "--quiet"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


def plain(prediction: Any) -> Any:
    """What a client reports as well."""
    match prediction:
        case TextPrediction():
            return prediction.text
        case ClassPrediction():
            return prediction.index
        case BoxPrediction():
            return [polygon.tolist() for polygon in prediction.polygons]
        case LayoutPrediction():
            shown = prediction.scores > SHOWN
            return list(zip(prediction.classes[shown].tolist(), prediction.boxes[shown].round(2).tolist(), strict=True))
        case TablePrediction():
            return prediction.html
        case FormulaPrediction():
            return prediction.latex


def reported(result: Any) -> Any:
    """The same of PaddleX's results."""
    if "rec_text" in result:
        return result["rec_text"]
    if "class_ids" in result:
        return int(result["class_ids"][0])
    if "dt_polys" in result:
        return [np.asarray(polygon).tolist() for polygon in result["dt_polys"]]
    if "boxes" in result:
        return [(box["cls_id"], np.asarray(box["coordinate"], float).round(2).tolist()) for box in result["boxes"]]
    return "".join(result["structure"]) if "structure" in result else result["rec_formula"]


def test_every_twin_is_tried() -> None:
    assert sorted(LEAST) == twin_names()


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=pytest.mark.slow if model in SLOW_TOO else ()) for model in LEAST]
)
def test_a_twin_passes_on_every_runtime_and_loads_in_its_clients(model: str, tmp_path: Path) -> None:
    measure, least = LEAST[model]
    cache = {"QUANT_CACHE": str(tmp_path / "cache")}
    targets = [part for target in TARGETS for part in ("--target", target)]
    printed = quant("run", "--twins", model, *targets, "--out", tmp_path, **cache)
    rows = [row for row in printed if row["status"] == "judged"]
    assert {row["target"] for row in rows} == set(TARGETS)
    for row in rows:
        assert row["twin"] and row["gate"]["passed"] and row["gate"]["evidence"] == "generated", row
        assert row["details"]["fp32"][measure] >= least
        assert row["coverage"] >= LEAST_COVERAGE
    again = quant("eval", "--twins", model, *targets, "--out", tmp_path, **cache)
    judged = [row for row in again if row["status"] == "judged"]
    assert [(row["target"], row["int8"]) for row in judged] == [(row["target"], row["int8"]) for row in rows]
    (folder,) = (tmp_path / "twins" / model).iterdir()
    for target in TARGETS:
        check_clients(model, folder, target, next((tmp_path / "cache" / "data").iterdir()))


def check_clients(model: str, run: Path, target: TargetName, world: Path) -> None:
    """The code in the card runs; PaddleX and PaddleOCR, loaded by it, find what our path finds in the same file."""
    recipe = load_recipe(model)
    upright = recipe.data.rotations.of if recipe.data.rotations else None
    samples = read_dataset(resolve_dataset(world, recipe.task, upright=upright)).samples[:PICTURES]
    pictures = [read_image(sample.image) for sample in samples]
    code = code_of(card_of(run, target))
    runtimes = {"onnx": ("onnxruntime", "OpenVINO"), "paddle": ("Paddle Inference",)}[target_format(target)]
    for runtime in runtimes:
        run_code(code[runtime], run / target)
    left = run_clients(code, run / target, pictures[-1])
    adapter = make_task(recipe.task, read_inference(run / target), model)
    engine: TargetName = "paddle" if target_format(target) == "paddle" else "onnxruntime"  # what PaddleX runs it on
    session = open_session(engine, run / target, threads=2)
    for picture in pictures:
        prepared = adapter.preprocess(picture)
        ours = plain(adapter.postprocess(session.run(prepared.inputs), prepared.context))
        for names in left.values():
            assert reported(next(iter(names["model"].predict(picture, batch_size=1)))) == ours
    assert [reported(names["result"]) for names in left.values()] == [ours] * 2


def read_inference(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((folder / "inference.yml").read_text(encoding="utf-8"))
    return document
