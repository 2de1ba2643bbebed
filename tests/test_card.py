"""The card of an artifact: what it says is so, its code runs, and hashes do not know it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pipeline import EXPORTED, NAME
from tiny_run import TinyRun

from quant.card import Subject, model_card, plain
from quant.clients import snippets
from quant.manifest import CARD, artifact_digests, load_manifest
from quant.pipeline import read_report, run_model
from quant.plan import load_plan
from quant.target import TargetName


def card_of(run: Path, target: str) -> str:
    return (run / target / CARD).read_text(encoding="utf-8")


def code_of(card: str) -> dict[str, str]:
    """Client -> its snippet."""
    return dict(re.findall(r"^### (.+?)\n.*?^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE))


def run_snippet(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("target", EXPORTED)
def test_it_says_what_made_the_artifact(tiny: TinyRun, target: str) -> None:
    card, manifest = card_of(tiny.folder, target), load_manifest(tiny.folder)
    plan = [manifest.files[f"plans/{target}/plan.{kind}"] for kind in ("json", "safetensors")]
    hashes = [*manifest.artifacts[target].values(), *manifest.model_sha256.values(), manifest.recipe_sha256, *plan]
    for fact in (NAME, manifest.run, *hashes, *(f"{k} {v}" for k, v in manifest.versions.items())):
        assert plain(fact) in card or fact in card
    rows = [row for row in read_report(tiny.folder).rows if row.target == target]
    if target == "tensorrt":
        assert "was not judged" in card and "Nobody has run it on TensorRT" in card
    else:
        assert [f"| {plain(row.dataset)} | {row.samples} | 100.00 | 100.00 |" in card for row in rows] == [True] * 3
    assert "not stated by the recipe" in card


@pytest.mark.parametrize("target", EXPORTED)
def test_its_code_for_runtimes_runs(tiny: TinyRun, target: str, tmp_path: Path) -> None:
    """Paddle's clients of real models are tried by tests/test_clients.py."""
    folder = Path(shutil.copytree(tiny.folder / target, tmp_path / "artifact"))
    code = code_of(card_of(tiny.folder, target))
    runtimes = [name for name in code if name in ("onnxruntime", "OpenVINO", "Paddle Inference")]
    assert (
        runtimes
        == {
            "onnxruntime": ["onnxruntime", "OpenVINO"],
            "openvino": ["OpenVINO", "onnxruntime"],
            "paddle": ["Paddle Inference"],
            "tensorrt": ["onnxruntime", "OpenVINO"],
        }[target]
    ), "the one that it was judged on, or at least run on, comes first"
    shapes = [json.loads(run_snippet(code[name], folder).replace("(", "[").replace(")", "]")) for name in runtimes]
    assert all(shape[0][0] == 1 and shape[0][2] == 5 for shape in shapes), shapes


def test_a_changed_card_is_no_damage(tiny: TinyRun, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.folder, tmp_path / NAME / tiny.folder.name))
    (folder / "openvino" / CARD).write_text("my notes", encoding="utf-8")
    (folder / "paddle" / CARD).unlink()
    assert load_manifest(folder).intact(folder)
    assert CARD not in artifact_digests(folder / "openvino")
    assert run_model(tiny.place.recipe, tiny.place.options(results=tmp_path)).reused
    assert (folder / "openvino" / CARD).read_text(encoding="utf-8") == "my notes"


def subject(run: Path, target: TargetName, **changes: Any) -> Subject:
    rows = [row for row in read_report(run).rows if row.target == target]
    plan = load_plan(run / "plans" / target)
    return replace(Subject(load_manifest(run), target, plan, rows, NAME, {"x": (1, 3, 16, 80)}, False), **changes)


def test_names_from_files_make_no_markup(tiny: TinyRun) -> None:
    hostile = "<script>alert(1)</script> | # `x`\n# heading"
    manifest = load_manifest(tiny.folder).model_copy(update={"source": hostile, "model": hostile})
    card = model_card(subject(tiny.folder, "onnxruntime", manifest=manifest))
    assert "<script" not in card and "\n# heading" not in card
    facts = {"run": hostile, "recipe_sha256": hostile, "code_sha256": hostile, "versions": {hostile: hostile}}
    facts["model_sha256"] = {hostile: hostile}
    facts["ladder"] = {"onnxruntime": [replace(rung, name=hostile) for rung in manifest.ladder["onnxruntime"]]}
    rows = [row.model_copy(update={"dataset": hostile}) for row in read_report(tiny.folder).rows]
    everywhere = model_card(subject(tiny.folder, "onnxruntime", manifest=manifest.model_copy(update=facts), rows=rows))
    assert "<script" not in everywhere and "\n# heading" not in everywhere
    assert everywhere.count(plain(hostile)) >= card.count(plain(hostile)) + 9
    assert "&lt;script>alert(1)&lt;/script> \\| # \\`x\\` # heading" in card


def test_a_twin_says_that_it_is_one(tiny: TinyRun) -> None:
    rows = [row.model_copy(update={"twin": True}) for row in read_report(tiny.folder).rows]
    card = model_card(subject(tiny.folder, "onnxruntime", rows=rows))
    assert "**twin**" in card and "Apache-2.0; this program trained them" in card
    assert "**twin**" not in card_of(tiny.folder, "onnxruntime")


@pytest.mark.parametrize(
    ("task", "name", "clients"),
    [
        ("text_detection", "PP-OCRv4_mobile_det", ["PaddleX", "PaddleOCR", "RapidOCR"]),
        ("text_recognition", "PP-OCRv4_mobile_rec", ["PaddleX", "PaddleOCR", "RapidOCR"]),
        ("image_classification", "PP-LCNet_x1_0_doc_ori", ["PaddleX", "PaddleOCR"]),
        ("image_classification", "another", ["PaddleX"]),
        ("formula_recognition", "PP-FormulaNet-S", ["PaddleX", "PaddleOCR"]),
    ],
)
def test_clients_of_each_task(task: str, name: str, clients: list[str]) -> None:
    found = snippets("onnxruntime", task, name, {"x": np.zeros((1, 3, 8, 8)).shape}, steps=False)
    assert [snippet.client for snippet in found] == ["onnxruntime", "OpenVINO", *clients]
    for snippet in found:
        compile(snippet.code, snippet.client, "exec")


@pytest.mark.parametrize("target", EXPORTED)
def test_no_picture_has_to_lie_in_what_is_verified(tiny: TinyRun, target: str) -> None:
    card = card_of(tiny.folder, target)
    read = re.findall(r'"([^"\s]*picture\.png)"', "".join(code_of(card).values()))
    assert read and f"`{read[0]}`" in card
    for path in read:
        place = (tiny.folder / target / path).resolve()
        assert not place.is_relative_to(tiny.folder.resolve()), "a run is verified with all that lies in it"


def test_a_loop_is_minded() -> None:
    inputs = {"x": (1, 1, 384, 384)}
    (openvino,) = [
        s for s in snippets("openvino", "formula_recognition", "m", inputs, steps=True) if s.client == "OpenVINO"
    ]
    assert "CPU_RUNTIME_CACHE_CAPACITY" in openvino.code and "wrongly" in openvino.note
    assert "disable_mkldnn" in snippets("paddle", "formula_recognition", "m", inputs, steps=True)[0].code
