"""The commands of the manual are done, in their order, by a copy of the package whose models are tiny ones.

Not run here: commands that train twins, which take minutes (tests/test_twin_runs.py does), and those of make and pip,
which set up an environment of gigabytes from the network (benchmarks/newcomer.py does, and .ci/run `make test`); that
for GPUs needs one and is run nowhere. tests/test_manual.py parses all, what make would do too.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from interruptions import make_models
from test_manual import ROOT, blocks, commands
from test_pipeline import write_lines

from quant.child import child_environment

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("manual")]

MODELS = ["PP-OCRv4_mobile_rec", "PP-OCRv4_mobile_det"]
FIRST = [line for model in MODELS for line in (f"quant run {model}", f"quant export {model} --to deploy")]
"""What other commands look at."""

TRAINING = {"--twins", "twins"}
ENDS_OTHERWISE = {
    "quant run english.yaml": "the FP32 model en_PP-OCRv3_det cannot be had",
    "quant run --all --executor ray --address 10.0.0.1:6379": "Ray is not installed|no Ray cluster at",
}
"""What a command says that needs something which is not here; they end with 2."""

DRIVER = """
import contextlib, io, json, pathlib
from quant.cli import _guarded

for words in json.loads(pathlib.Path("commands.json").read_text()):
    words = [str(next(pathlib.Path(word).parent.glob("*/manifest.json")).parent)
             if word.endswith("/0123456789ab") else word for word in words]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = _guarded(words)
    with open("ended.jsonl", "a") as ended:
        ended.write(json.dumps([code, said.getvalue()[-3000:]]) + "\\n")
"""
"""Does all commands in one process, since loading the libraries takes longer than what they do for tiny models."""


def asked() -> list[str]:
    """Each command once."""
    lines = (line.replace(".venv/bin/", "") for _, line in commands())
    own = (line for line in lines if line.startswith("quant ") and not TRAINING & set(line.split()))
    return list(dict.fromkeys([*FIRST, *own]))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """How each command ended, and what it said."""
    desk = tmp_path_factory.mktemp("desk")
    for package in ("quant", "eval", "calib_data"):
        shutil.copytree(ROOT / package, desk / "site" / package, ignore=shutil.ignore_patterns("__pycache__"))
    recipes = Path(shutil.copytree(ROOT / "recipes" / "_base", desk / "site" / "quant" / "_recipes" / "_base")).parent
    for file in make_models(desk, MODELS):
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        recipe["latency"]["shapes"] = [recipe["latency"]["shape"]]
        (recipes / file.name).write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for seed, name in enumerate(("my_lines", "more_lines", "other_lines")):
        write_lines(desk / name, 60, 3, 100 + seed)
    (text,) = blocks(ROOT / "docs" / "adding-a-model.md", "yaml")
    (desk / "english.yaml").write_text(text, encoding="utf-8")
    (desk / "commands.json").write_text(json.dumps([shlex.split(line)[1:] for line in asked()]), encoding="utf-8")
    places = {"QUANT_MODEL_HOME": "models", "QUANT_DATA_HOME": "data", "QUANT_CACHE": "cache", "HOME": "home"}
    environment = child_environment(**{name: str(desk / folder) for name, folder in places.items()})
    environment |= {"PYTHONPATH": str(desk / "site"), "HTTPS_PROXY": "http://127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=desk, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (desk / "ended.jsonl").read_text(encoding="utf-8").splitlines()
    return dict(zip(asked(), map(json.loads, lines), strict=True))


def test_no_other_command_is_left_out() -> None:
    lines = {line.replace(".venv/bin/", "") for _, line in commands()} - {*asked()}
    others = [line for line in lines if not TRAINING & set(line.split())]
    assert lines and all(re.match(r"(QUANT_DATA_HOME=\S+ )?(make|pip) ", line) for line in others), others


@pytest.mark.parametrize("line", asked())
def test_a_command_of_the_manual(line: str, ended: dict[str, tuple[int, str]]) -> None:
    code, said = ended[line]
    if line in ENDS_OTHERWISE:
        assert code == 2 and re.search(ENDS_OTHERWISE[line], said), said
    else:
        assert code == 0, said
