"""Pages that benchmarks write say of which code they are, and can fail."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from interruptions import Killed

from quant.stage import code_digest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SIZES = [2, 4, 6, 8, 10]


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("seconds", "linear"),
    [
        ([3 + 2.0 * n for n in SIZES], True),
        ([3 + 2.0 * n + (n % 4) for n in SIZES], False),
        ([3 + 0.5 * n * n for n in SIZES], False),
        ([9.0, 9.5, 9.4, 11.0, 12.0], False),
        ([8.0, 16.4, 26.0, 33.1, 44.0], True),
    ],
)
def test_what_is_not_linear_is_told(seconds: list[float], linear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told = benchmark("executor", monkeypatch).cost_table("local", "model", SIZES, seconds)
    assert told.kept is linear
    assert ("NOT below 3." in told.lines[-2]) is not linear
    rows = [line for line in told.lines if line.startswith("| local")]
    assert [row.split("|")[4].strip() for row in rows][:2] == ["-", f"{(seconds[1] - seconds[0]) / 2:.4f}"]


def test_pages_name_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = benchmark("interruption", monkeypatch).page(Killed(4, 1, 3, 2, 0, 0, 0), 1)
    assert f"Code `{code_digest()}`." in killed
    assert f"Code `{code_digest()}`." in benchmark("executor", monkeypatch)._HEAD.format(
        shard=500, nodes=2, processor="a processor", cores=2, code=code_digest()
    )


def test_parts_of_a_fuzz_campaign_are_of_one_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz, file = benchmark("fuzz", monkeypatch), tmp_path / "fuzz.json"
    for code, kind, kinds in (("1" * 64, "onnx", 1), ("1" * 64, "pir", 2), ("2" * 64, "boxes", 1)):
        monkeypatch.setattr(fuzz, "code_digest", lambda code=code: code)
        fuzz._write(file, 1, [fuzz.Tried(kind, 3, 1, 2, 0.0, [])])
        document = json.loads(file.read_text(encoding="utf-8"))
        assert (document["code"], len(document["kinds"])) == (code, kinds)
        assert f"Code `{code}`." in file.with_suffix(".md").read_text(encoding="utf-8")
