"""The counts of what tests tried are told at the end, from other processes and of failing tests too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest
from tried import tried

@pytest.mark.parametrize("kind", ["archive", "recipe"])
def test_cases(kind, record_property):
    tried(record_property, "fuzz cases", kind, 200)
    assert kind == "archive"

def test_kills(record_property):
    print("said to nobody")
    tried(record_property, "kills with SIGKILL", "quant run", 4)
"""


@pytest.mark.parametrize("processes", ["0", "2"])
def test_counts_are_told(processes: str, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tried import pytest_terminal_summary\n", encoding="utf-8")
    (tmp_path / "test_some.py").write_text(TESTS, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", processes, "-p", "no:cacheprovider", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTEST_ADDOPTS": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in ended.stdout.splitlines() if line.startswith("tried: ")]
    assert said == ["tried: 400 fuzz cases of 2 kinds", "tried: 4 kills with SIGKILL of quant run"], ended.stdout
    assert ended.returncode == 1 and "2 passed" in ended.stdout, ended.stdout
