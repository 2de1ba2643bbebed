"""The wheel: built, installed into an environment of its own, and used far from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from tiny_run import TinyRun

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SNIPPET = """
import json, quant
from quant import load_recipe, quantize

run = quantize(load_recipe("recipe.yaml"), targets=["onnxruntime"], model_dir="model", results="out", threads=2)
rows = [row for row in run.report.rows if row.status == "judged" and row.gates]
print(json.dumps([quant.__file__, str(run.folder), [row.gate.passed for row in rows]]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel, and sees what it depends on where this one has it."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, env=without_paths())
    seen = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    seen |= dict.fromkeys(path for path in sys.path if path.endswith("-packages"))
    (packages,) = (folder / "lib").glob("*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(seen) + "\n", encoding="utf-8")
    return folder


def without_paths() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def test_what_it_holds(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"quant/_recipes/{path.relative_to(ROOT / 'recipes')}" for path in (ROOT / "recipes").rglob("*.yaml")}
    sets = {f"calib_data/{path.name}" for path in (ROOT / "calib_data").glob("*.yaml")}
    assert recipes | sets | {"quant/py.typed", "eval/py.typed", "quant/templates/report.html"} <= names
    assert not [name for name in names if name.startswith(("tests/", "results/"))]


def test_it_works_outside_the_checkout(environment: Path, tiny: TinyRun, tmp_path: Path) -> None:
    def called(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=without_paths(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    for name in ("recipe.yaml", "model"):
        (tmp_path / name).symlink_to(tiny.place.root / name)
    program = environment / "bin" / "quant"
    assert "PP-OCRv4_mobile_det" in called(program, "list")
    described = json.loads(called(program, "describe", "PP-OCRv4_mobile_det", "--json"))
    assert described["task"] == "text_detection"
    place, folder, passed = json.loads(called(environment / "bin" / "python", "-c", SNIPPET).splitlines()[-1])
    assert Path(place).is_relative_to(environment)
    assert Path(folder).is_relative_to(tmp_path / "out") and passed == [True]
    assert "report.html" in called(program, "report", "--out", "out")
    assert (tmp_path / "out" / "report" / "report.html").stat().st_size > 10_000
