"""The comparison with other quantizers: what is counted, what a failing quantizer leaves, and the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, helper, numpy_helper
from tiny_models import TinyNet

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import peers  # noqa: E402
from peer_coverage import coverage, executed_share, ir_coverage, onnx_coverage  # noqa: E402
from peer_quantizers import PEERS  # noqa: E402
from peer_quote import BEGIN, END, README, RESULTS, quote, quoted  # noqa: E402
from peer_table import markdown  # noqa: E402
from peer_worker import Task  # noqa: E402

from quant.graph import Graph  # noqa: E402

SHAPE = [1, 3, 8, 8]
FIRST, SECOND = 3 * 6 * 9 * 64, 6 * 4 * 64  # multiply-accumulates: 3x3 convolution, then 1x1
SHARE = SECOND / (FIRST + SECOND)


def two_convolutions() -> ModelProto:
    net = TinyNet((1, 3, 8, 8))
    net.conv(net.op("Relu", net.conv("x", 3, 6)), 6, 4, kernel=1, pad=0)
    return net.model()


def second_in_8_bits(weights: bool = True) -> ModelProto:
    """The 1x1 convolution reads its input, and perhaps its weights, through Q/DQ."""
    model = two_convolutions()
    node = next(node for node in reversed(model.graph.node) if node.op_type == "Conv")
    place = list(model.graph.node).index(node)
    scale, zero = numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.int8(0), "z")
    model.graph.initializer.extend([scale, zero])
    pairs: list[NodeProto] = []
    for index in (0, 1) if weights else (0,):
        name = node.input[index]
        pairs.append(helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}_q"]))
        pairs.append(helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [f"{name}_dq"]))
        node.input[index] = f"{name}_dq"
    for pair in reversed(pairs):
        model.graph.node.insert(place, pair)
    onnx.checker.check_model(model)
    return model


def test_coverage_is_the_share_of_work_with_both_operands_in_8_bits() -> None:
    assert onnx_coverage(Graph(two_convolutions()), SHAPE, 1) == 0
    assert onnx_coverage(Graph(second_in_8_bits()), SHAPE, 1) == pytest.approx(SHARE)
    assert onnx_coverage(Graph(second_in_8_bits(weights=False)), SHAPE, 1) == 0


@pytest.mark.parametrize(("build", "expected"), [(two_convolutions, 0), (second_in_8_bits, SHARE)])
def test_an_ir_has_the_coverage_of_the_file_it_was_made_from(build: Any, expected: float, tmp_path: Path) -> None:
    import openvino

    onnx.save(build(), tmp_path / "m.onnx")
    openvino.save_model(openvino.convert_model(tmp_path / "m.onnx"), tmp_path / "inference.xml", compress_to_fp16=False)
    assert ir_coverage(tmp_path / "inference.xml", SHAPE) == pytest.approx(expected)
    assert coverage(tmp_path, SHAPE, 1) == pytest.approx(expected)
    assert executed_share("openvino", tmp_path, SHAPE, 1) is None


def test_the_coverage_of_a_paddle_program_is_not_known(tmp_path: Path) -> None:
    assert coverage(tmp_path, SHAPE, 1) is None
    assert executed_share("paddle", tmp_path, SHAPE, 1) is None


def test_executed_work_is_what_the_runtime_takes_in_integers(tmp_path: Path) -> None:
    onnx.save(second_in_8_bits(), tmp_path / "inference.onnx")
    assert executed_share("openvino", tmp_path, SHAPE, 1) == pytest.approx(SHARE)
    assert executed_share("onnxruntime", tmp_path, SHAPE, 1) == 0, "nothing quantizes what the convolution writes"


# --- processes -------------------------------------------------------------------------------------


def task(folder: Path, peer: str) -> Task:
    return Task(
        kind="quantize",
        peer=peer,
        target="onnxruntime",
        folder=str(folder / "artifact"),
        model="PP-OCRv4_mobile_rec",
        overrides=[],
        threads=1,
        model_dir=None,
        shipped=str(folder),
        feeds=str(folder / "feeds"),
        report=None,
        seconds=1,
    )


def test_a_quantizer_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "feeds").mkdir()
    found = peers.measured(task(tmp_path, "paddleslim"), tmp_path / "step.json", 300, 16)
    assert found["status"] == "failed"
    assert found["reason"] == "InputError: PaddleSlim reads old-IR programs alone, and this model is published as PIR"
    assert found["peak_mb"] > 0


def test_a_quantizer_that_is_not_installed_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "nncf.py").write_text("raise ImportError('no nncf here')\n", encoding="utf-8")
    root = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{blocked}:{root}")
    found = peers.measured(task(tmp_path, "nncf"), tmp_path / "step.json", 300, 16)
    assert found["status"] == "skipped"
    assert found["reason"].startswith("no nncf here; install it: pip install")


@pytest.mark.parametrize(("seconds", "gigabytes", "said"), [(0, 16, "not done in 0 minutes"), (300, 0.001, "0.001 GB")])
def test_a_quantizer_that_takes_too_much_is_stopped(
    seconds: float, gigabytes: float, said: str, tmp_path: Path
) -> None:
    found = peers.measured(task(tmp_path, "ort-minmax"), tmp_path / "step.json", seconds, gigabytes)
    assert found["status"] == "failed" and said in found["reason"]


def test_the_command_names_no_place_of_the_machine() -> None:
    words = ["M", "--out", "/here/a.md", "--work=/there", "--samples", "4", "--model-dir", "/x"]
    assert peers._command(words) == "python benchmarks/peers.py M --samples 4"


# --- the page --------------------------------------------------------------------------------------

CELL: dict[str, Any] = {
    "shape": [1, 3, 48, 320],
    "ms": {"fp32": 9.25, "fp32_prepared": 4.5, "int8": 1.5},
    "default_ms": {"fp32": 3.5, "fp32_prepared": 3.25, "int8": 1.25},
    "note": "",
}
FIXED = {"shape": [8, 3, 48, 320], "ms": None, "default_ms": None, "note": "the model's batch is fixed at 1"}
JUDGED = {
    "label": "NNCF",
    "target": "openvino",
    "status": "judged",
    "samples": 200,
    "fp32": 60.0,
    "int8": 59.5,
    "drop": 0.5,
    "drop_upper95": 1.75,
    "discordance": 3.25,
    "gate": {"passed": True, "certified": False, "evidence": "real"},
    "coverage": None,
    "executed_coverage": 0.875,
    "bytes": 2_500_000,
    "fp32_bytes": 10_000_000,
    "seconds": 12.34,
    "peak_mb": 567.8,
    "folding_seconds": 4.5,
    "cells": [CELL, FIXED],
    "not_timed": "",
}
FAILED = {"label": "Other", "target": "paddle", "status": "failed", "reason": "it | broke", "peak_mb": 99.0}


def page(*rows: dict[str, Any]) -> str:
    return markdown(
        {
            "model": "PP-OCRv4_mobile_rec",
            "command": "python benchmarks/peers.py",
            "processor": {"name": "a processor", "features": ["avx512_vnni"]},
            "versions": {"nncf": "3.4.0"},
            "threads": 2,
            "calibration": 128,
            "latency_shape": [1, 3, 48, 320],
            "rows": list(rows),
        }
    )


def test_the_page_has_a_row_for_all_that_was_asked() -> None:
    text = page(JUDGED, FAILED)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines[:4]}) == 1
    judged, failed = lines[2:4]
    facts = ["NNCF", "60.00", "0.50 (1.75)", "3.2", "passed", "87.5", "2.50", "0.250", "12.3 + 4.5", "568"]
    for fact in [*facts, "1.50", "6.17x", "3.00x", "1.25"]:
        assert f" {fact} " in judged
    assert " 2.80x |" in judged, "OpenVINO's default against its own FP32"
    assert "failed: it \\| broke" in failed and " 99 " in failed
    assert "avx512_vnni" in text and "nncf 3.4.0" in text and "python benchmarks/peers.py" in text


def test_every_runtime_shows_fp32_once_above_what_took_turns_with_it() -> None:
    other = JUDGED | {"label": "Other", "cells": [CELL | {"ms": CELL["ms"] | {"int8": 2.0}}, FIXED]}
    latency = page(JUDGED, other).split("## Latency, ms")[1].splitlines()
    lines = [line.strip("| ").split(" | ") for line in latency if line.startswith("|")][2:]
    fixed = "the model's batch is fixed at 1"
    assert lines[:4] == [
        ["FP32 as shipped", "openvino", "9.25", "-"],
        ["FP32 prepared", "openvino", "4.50", "-"],
        ["NNCF", "openvino", "1.50", fixed],
        ["Other", "openvino", "2.00", fixed],
    ]
    assert [line[1:3] for line in lines[4:6]] == [["openvino default", "3.50"], ["openvino default", "3.25"]]


def test_models_that_could_not_be_timed_say_why() -> None:
    text = page(JUDGED | {"cells": [], "not_timed": "stopped: not done in 4 minutes"})
    assert "| stopped: not done in 4 minutes |" in text and "Nothing was timed." in text


def test_the_page_without_any_result() -> None:
    assert "Nothing was timed." in page(FAILED)


def test_every_quantizer_has_a_name_of_its_own() -> None:
    assert len({peer.label for peer in PEERS.values()}) == len(PEERS)


def test_the_readme_quotes_what_was_measured(tmp_path: Path) -> None:
    row = {
        "label": "ours",
        "target": "onnxruntime",
        "status": "judged",
        "seconds": 61.7,
        "samples": 1300,
        "drop": -0.25,
        "drop_upper95": 0.5,
        "gate": {"passed": True},
        "cells": [{"shape": SHAPE, "ms": {"fp32": 10.0, "fp32_prepared": 9.0, "int8": 5.0}}],
    }
    failed = row | {"target": "openvino", "drop": 12, "drop_upper95": 15, "gate": {"passed": False}, "cells": []}
    report = {
        "model": "some_model",
        "processor": {"name": "a processor", "features": ["avx2"]},
        "threads": 2,
        "calibration": 128,
        "latency_shape": SHAPE,
        "rows": [row, failed, {"label": "another", "target": "paddle", "status": "failed", "reason": "it broke"}],
    }
    (tmp_path / "peers-some_model.json").write_text(json.dumps(report), encoding="utf-8")
    lines = quote(tmp_path).splitlines()
    assert lines[0].startswith(
        "some_model, 1300 samples that no quantizer saw, 128 for calibration; a processor (avx2)"
    )
    assert lines[4] == "| ours | -0.25 (0.50), 2.00x | **12.00 (15.00)**, not timed | - | 62 |"
    assert lines[5] == "| another | - | - | failed | - |"


def test_the_readme_is_not_behind_the_results() -> None:
    readme = README.read_text(encoding="utf-8")
    assert BEGIN in readme and END in readme
    assert quoted(readme) == quote(RESULTS)
