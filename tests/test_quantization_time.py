"""The table of seconds beside NNCF's: what is divided, and what a machine without NNCF shows."""

from __future__ import annotations

import cProfile
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from quantization_time import _steps, table  # noqa: E402

from quant.observer import affine_parameters  # noqa: E402

ROW: dict[str, Any] = {
    "model": "some_model",
    "target": "onnxruntime",
    "pictures": 128,
    "processor": "a processor (avx2), 2 threads",
    "one_pass": 2.5,
    "seconds": 30.0,
    "profiled_seconds": 36.5,
    "steps": {"histograms": 7.5, "the rest": 1.25},
    "nncf_seconds": 20.0,
    "nncf_reason": "",
    "nncf": "3.4.0",
}


def cells(text: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def test_ours_is_divided_by_nncf_of_the_same_run() -> None:
    bare = ROW | {"target": "openvino", "nncf_seconds": None, "nncf_reason": "not installed", "steps": {}}
    text = table([bare, ROW])
    found = cells(text)
    assert found["Seconds"] == ["some_model, onnxruntime", "some_model, openvino"]
    assert found["**ours, whole**"] == ["**30.0**", "**30.0**"]
    assert found["NNCF, whole"] == ["20.0", "not installed"]
    assert found["ours / NNCF"] == ["1.50", "-"]
    assert found["profiled: histograms"] == ["7.5", "-"] and found["profiled: whole"] == ["36.5", "36.5"]
    assert "NNCF 3.4.0" in text


def test_steps_are_those_that_were_called(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("quantization_time.STEPS", {"parameters": "affine_parameters", "histograms": "never_called"})
    with cProfile.Profile() as profile:
        affine_parameters(-1, 1, symmetric=True)
    profile.dump_stats(tmp_path / "p.pstats")
    assert list(_steps(tmp_path / "p.pstats")) == ["parameters"]
