"""The Makefile takes the Python that the pinned versions are for, or says in one sentence that there is none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")
ANOTHER = """#!/bin/sh
exec {python} -c 'import sys; sys.version_info = (3, 12, 1, "final", 0); exec(sys.argv[1])' "$2"
"""
"""Takes itself for a newer Python."""

pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout, and in `bin` the only programs that are found: three Pythons that are too new."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("python3.11", "python3", "python"):
        (tmp_path / "bin" / name).write_text(ANOTHER.format(python=sys.executable), encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def made(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": str(folder / "bin")}
    return subprocess.run([str(MAKE), *words], cwd=folder, env=path, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "names"),
    [((), "python3.11 python3 python"), (("PYTHON=python3",), "python3"), (("PYTHON=gone",), "gone")],
)
def test_another_python_is_one_sentence(folder: Path, words: tuple[str, ...], names: str) -> None:
    done = made(folder, "quant", "MODEL=PP-OCRv4_mobile_det", *words)
    said = [line for line in done.stderr.splitlines() if not line.startswith("make: ")]
    assert done.returncode == 2 and done.stdout == ""
    assert len(said) == 1 and said[0].startswith(f"Python 3.11 is needed and was not found as {names}: ")
    assert not (folder / ".venv").exists()


def test_the_first_that_is_it_is_taken(folder: Path) -> None:
    """Also where an older name exists and is another one, as with pyenv."""
    (folder / "bin" / "python3").unlink()
    (folder / "bin" / "python3").symlink_to(sys.executable)
    steps = made(folder, "-n", "lint").stdout
    assert "\npython3 -m venv --clear .venv\n" in steps
