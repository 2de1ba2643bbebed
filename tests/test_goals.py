"""The page of goals says of each figure what the files say, and "not measured" where they say nothing."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binom

from quant.manifest import Manifest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from goals import DET, REC, Evidence, Measured, Row, markdown, read_evidence, rows, share_bounds

PROCESSOR = {"name": "P", "features": ["avx_vnni"], "cores": 2}
RUNG = {"name": "revert 4", "coverage": 0.98, "error": 0.0183, "passed": True, "reverted": 4, "seconds": None}
SCORE = {"drop": 0.75, "relative_drop": 1.2, "discordance": 2.25, "samples": 400}


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def results(folder: Path, **row: Any) -> Path:
    """A run of the recognizer on onnxruntime."""
    open_parts = ("recipe", "model_sha256", "data", "unavailable", "proof", "artifacts", "versions")
    manifest = Manifest(
        **{part: {} for part in open_parts},
        **{part: [] for part in ("calibration_ids", "search_ids", "report_ids")},
        **dict.fromkeys(("recipe_sha256", "source", "code_sha256"), ""),
        model=REC,
        run="r1",
        created="2026-01-01T00:00:00",
        ladder={"onnxruntime": [{**RUNG, "score": SCORE}]},
        seed=0,
        threads=2,
        processor=PROCESSOR,
    )
    place = folder / REC / "r1"
    place.mkdir(parents=True)
    manifest.save(place)
    one_set = {"target": "onnxruntime", "gates": False, "drop": 9.0}
    write(place / "metrics.json", {"rows": [one_set, {"target": "onnxruntime", "gates": True, **row}]})
    return folder


def verdicts(evidence: Evidence, model: str, target: str) -> dict[str, str]:
    return {row.what: row.verdict for row in rows(evidence) if (row.model, row.target) == (model, target)}


def test_nothing_is_measured_where_there_are_no_files(tmp_path: Path) -> None:
    evidence = read_evidence(tmp_path, tmp_path)
    assert {row.verdict for row in rows(evidence)} == {"not measured"}
    page = markdown(evidence)
    assert "* Runs: not measured" in page and "**missed**" not in page


def test_a_run_says_what_was_reached(tmp_path: Path) -> None:
    row = {"samples": 1000, "drop": 0.75, "drop_upper95": 0.9, "discordance": 3.2, "coverage": 0.98}
    times = {"fp32_ms": 20.0, "fp32_prepared_ms": 12.0, "int8_ms": 10.0, "fp32_bytes": 100, "int8_bytes": 28}
    found = verdicts(read_evidence(results(tmp_path, **row, **times), tmp_path), REC, "onnxruntime")
    assert found["drop"] == "**missed**"
    assert found["discordance, %"] == "**missed**, within noise"
    assert found["coverage, planned"] == "reached"
    assert found["speed against FP32 as shipped"] == "reached"
    assert found["speed against FP32 prepared"] == "**missed**"
    assert found["size / that of FP32"] == "reached"


def test_other_benchmarks_are_read_whether_they_have_the_newest_keys_or_not(tmp_path: Path) -> None:
    facts = {"model": REC, "target": "openvino"}
    time = {**facts, "pictures": 128, "processor": "P, 2 threads", "seconds": 20.0}
    write(tmp_path / "quantization-time.json", {"a": {**time, "nncf_seconds": 10.0}, "b": {**time, "model": DET}})
    peaks = [
        {**facts, "pictures": 32, "peak_bytes": 900_000_000},
        {**facts, "pictures": 1024, "peak_bytes": 1_010_000_000},
    ]
    older = [{**facts, "model": DET, "pictures": count, "peak_gb": 1.0} for count in (32, 1024)]
    write(tmp_path / "calibration-memory.json", dict(enumerate([*peaks, *older])))
    evidence = read_evidence(tmp_path, tmp_path)
    found, other = (verdicts(evidence, model, "openvino") for model in (REC, DET))
    assert found["seconds of quantizing / those of NNCF"] == "**missed**"
    assert other["seconds of quantizing / those of NNCF"] == "not measured"
    assert [found[f"peak, {count} pictures, GB"] for count in ("32", "1,024")] == ["reached", "**missed**"]
    assert found["peaks differ by, %"] == "**missed**"
    assert [other[name] for name in ("peak, 32 pictures, GB", "peaks differ by, %")] == ["reached", "reached"]


def test_a_profile_and_other_quantizers_are_quoted(tmp_path: Path) -> None:
    clock = {"fp32": 60.0, "fp32_prepared": 50.0, "int8": 20.0}
    facts = {"model": DET, "target": "openvino", "processor": PROCESSOR, "threads": 1}
    write(tmp_path / f"profile-{DET}-openvino.json", {**facts, "clock": clock})
    peers = [
        {
            "peer": name,
            "target": "openvino",
            "seconds": 8.0,
            "cells": [{"shape": [1], "ms": {"fp32": fp32, "int8": 10.0}}],
        }
        for name, fp32 in (("ours", 24.0), ("nncf", 20.0))
    ]
    report = {**facts, "calibration": 32, "latency_shape": [1], "rows": peers}
    write(tmp_path / f"peers-{DET}.json", report)
    page = markdown(read_evidence(tmp_path, tmp_path))
    speed = "| PP-OCRv4_mobile_det | openvino | speed against FP32 as shipped | ≥ 2.80x | 3.00x | reached | "
    assert f"{speed}1 thread, [profile](profile-{DET}-openvino.md) |" in page
    assert "| speed / that of NNCF | ≥ 1.00 | 1.20 | reached | 2.40x / 2.00x, " in page
    assert "8.0 s / 8.0 s, 32 pictures" in page
    assert "* Profiles: P (avx_vnni), 1 thread" in page


def test_the_steps_of_the_ladder_are_shown(tmp_path: Path) -> None:
    page = markdown(read_evidence(results(tmp_path), tmp_path))
    assert "| onnxruntime | revert 4 | 0.980 | 0.0183 | 0.75 | 2.25 | 400 | yes |" in page
    assert f"* Runs: {REC} r1: P (avx_vnni), 2 threads" in page


def test_bounds_of_a_share_are_those_where_chance_has_five_percent() -> None:
    low, high = share_bounds(0.03, 1000)
    assert binom.sf(29, 1000, low) == pytest.approx(0.05)
    assert binom.cdf(30, 1000, high) == pytest.approx(0.05)
    assert share_bounds(0.0, 100)[0] == 0.0 and share_bounds(1.0, 100)[1] == 1.0


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (0.1, 0.0, 0.2, "reached"),
        (0.4, 0.2, 0.6, "reached, within noise"),
        (0.6, 0.4, 0.8, "**missed**, within noise"),
        (0.9, 0.7, 1.1, "**missed**"),
    ],
)
def test_what_lies_between_the_bounds_is_within_noise(value: float, low: float, high: float, verdict: str) -> None:
    assert Row(REC, "openvino", "drop", "≤", 0.5, Measured(value, "", low, high)).verdict == verdict


def test_the_page_in_results_leads_to_pages_that_are_there() -> None:
    folder = Path(__file__).parents[1] / "results"
    links = re.findall(r"\]\(([^)#]+)\)", (folder / "goals.md").read_text(encoding="utf-8"))
    assert links and [link for link in links if not (folder / link).is_file()] == []
