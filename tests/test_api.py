"""The Python API: its examples run, its types are there, and asking for it costs nothing until it is used."""

from __future__ import annotations

import doctest
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_pipeline import NAME, write_lines
from tiny_run import TinyRun

import quant
from quant import api, evaluate, load_recipe, quantize
from quant.errors import InputError, Unavailable
from quant.recipe import load_recipe as recipe_loader

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.DOTALL | re.M)


@pytest.fixture
def home(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    """One stands in a folder with a recipe, the model, the finished run, and a few lines of one's own."""
    root = tiny.place.root
    shutil.copy(root / "recipe.yaml", tmp_path)
    for source, copy in (("model", "model"), ("model", f"models/{NAME}"), ("results", "results")):
        shutil.copytree(root / source, tmp_path / copy)
    write_lines(tmp_path / "my_lines", 6, 2, 91)
    monkeypatch.setenv("QUANT_MODEL_HOME", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    return tiny


@pytest.mark.parametrize("function", [quantize, evaluate, load_recipe])
def test_examples_in_docstrings(home: TinyRun, function: object) -> None:
    (test,) = doctest.DocTestFinder(recurse=False).find(function, "example", globs=vars(api))
    assert test.examples
    outcome = doctest.DocTestRunner().run(test)
    assert outcome.failed == 0 and outcome.attempted == len(test.examples)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_examples_of_the_manual(home: TinyRun, block: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny network stands in for the model."""
    assert "PP-OCRv4_mobile_rec" in block
    exec(compile(block.replace("PP-OCRv4_mobile_rec", "recipe.yaml"), "docs/api.md", "exec"), {})
    said = capsys.readouterr().out
    assert {0: "onnxruntime 100.0 100.0", 1: "6 lines, FP32 100.0 %", 2: "no/such/folder"}[BLOCKS.index(block)] in said


def test_a_run_that_the_command_line_made_is_found(home: TinyRun) -> None:
    run = quantize("recipe.yaml", model_dir="model", threads=2)
    assert run.reused and run.folder.name == home.folder.name and run.report == home.finished.report
    assert evaluate("recipe.yaml", model_dir=Path("model"), threads=2) == run.report


def test_steps_are_told_and_errors_are_raised(home: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    quantize(
        "recipe.yaml", results=tmp_path / "elsewhere", threads=2, progress=lambda what, done, total: said.append(what)
    )
    assert set(said) == {f"{NAME}: writing the run"}, "every stage is stored already"
    with pytest.raises(InputError, match="no target 'tensor'"):
        quantize("recipe.yaml", targets="tensor")
    for function in (quantize, evaluate):
        with pytest.raises(InputError, match="threads=-1: must be at least 1"):
            function("recipe.yaml", threads=-1)
    monkeypatch.delenv("QUANT_MODEL_HOME")
    with pytest.raises(Unavailable) as error:
        quantize("recipe.yaml")
    assert error.value.reason and error.value.fix
    with pytest.raises(InputError, match="no recipe for model 'unknown'"):
        evaluate("unknown")


def test_asking_for_the_package_loads_nothing_heavy() -> None:
    code = "import sys, quant; print(sorted({'numpy', 'onnx', 'pydantic', 'quant.api'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
    assert quant.load_recipe is recipe_loader and {"quantize", "evaluate"} <= set(quant.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = quant.nothing


@pytest.mark.parametrize("package", ["quant", "eval", "calib_data"])
def test_types_are_shipped(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
