"""A slice of the fuzz campaign (`benchmarks/fuzz.py` runs the whole), and that it would find what it looks for."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import campaign
import pytest
from campaign import case_files, run
from misdeeds import MISDEEDS
from subjects import NEED_PADDLE, SUBJECTS
from tried import RecordProperty, tried

SEED = 1
FAST = [name for name in SUBJECTS if name not in (*NEED_PADDLE, "onnx", "description")]
SECONDS, SLOW_SECONDS = 0.8, 6.0
_TELLING = 10


def assert_clean(kind: str, seconds: float, place: Path, record_property: RecordProperty) -> None:
    found = run(kind, SEED, 10_000, seconds, place)
    tried(record_property, "fuzz cases", kind, found.cases)
    assert found.cases == found.read + found.refused + len(found.findings)
    assert found.findings == []
    few = SUBJECTS[kind].native or found.cases < _TELLING  # on a busy machine the first ones may all be harmless
    assert found.cases >= 1 and (few or found.refused > 0), "mutations that hurt nothing"


@pytest.mark.parametrize("kind", FAST)
def test_a_slice(kind: str, tmp_path: Path, record_property: RecordProperty) -> None:
    assert_clean(kind, SECONDS, tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("paddle") is None, reason="paddlepaddle is not installed")
@pytest.mark.parametrize("kind", ["description", "onnx", *NEED_PADDLE])
def test_a_slice_with_native_libraries(kind: str, tmp_path: Path, record_property: RecordProperty) -> None:
    assert_clean(kind, SLOW_SECONDS, tmp_path, record_property)


def test_cases_can_be_made_again() -> None:
    for kind in ("boxes", "archive", "layouts"):
        assert case_files(kind, SEED, 7) == case_files(kind, SEED, 7)
        assert len({str(case_files(kind, SEED, case)) for case in range(20)}) > 15


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_what_must_not_be_is_found(misdeed: str, tmp_path: Path) -> None:
    """Each time: what one case took of the memory hides no later one."""
    (tmp_path / "place").mkdir()
    paths = os.pathsep.join(map(str, (campaign.ROOT, campaign.HERE.parent, campaign.HERE)))
    ended = subprocess.run(
        [sys.executable, str(campaign.HERE / "misdeeds.py"), misdeed, str(tmp_path / "place")],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    for outcome, what in json.loads(ended.stdout):
        assert (outcome, MISDEEDS[misdeed][1] in what) == ("finding", True), what


def whole_campaign() -> Any:
    """The module `benchmarks/fuzz.py`."""
    spec = importlib.util.spec_from_file_location("whole_campaign", campaign.ROOT / "benchmarks" / "fuzz.py")
    assert spec and spec.loader
    spec.loader.exec_module(whole := importlib.util.module_from_spec(spec))
    return whole


@pytest.mark.parametrize(("done", "code"), [(1.0, 0), (0.5, 1)])
def test_seconds_follow_the_shares_and_missing_cases_are_told(
    done: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = whole_campaign()
    allowed: dict[str, float] = {}

    def run_at_once(kind: str, seed: int, count: int, seconds: float, place: Path) -> campaign.Tried:
        allowed[kind] = seconds
        return campaign.Tried(kind, int(done * count), 0, int(done * count), 0.0, [])

    monkeypatch.setattr(whole, "run", run_at_once)
    kinds, out = "onnx,recipe,archive", str(tmp_path / "fuzz.json")
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--kinds", kinds, "--cases", "1110", "--seconds", "111", "--out", out])
    assert whole.main() == code
    assert list(allowed) == ["archive", "recipe", "onnx"]
    assert allowed["archive"] == pytest.approx(100, rel=0.01), "shares are 1, 0.1 and 0.01"
    assert allowed["onnx"] == pytest.approx(111, rel=0.01), "what others leave"
    said = capsys.readouterr().out
    told = re.search(r"fell short: no time for 50\d of archive, 5\d of recipe, \d of onnx; give more --seconds", said)
    assert bool(told) == bool(code), said


def test_the_whole_campaign_was_run_and_found_nothing() -> None:
    """What `benchmarks/fuzz.py` wrote last: of every kind, 20,000 cases in all."""
    results = campaign.ROOT / "results" / "fuzz.json"
    document = json.loads(results.read_text(encoding="utf-8"))
    assert sorted(document["kinds"]) == sorted(SUBJECTS)
    assert document["cases"] == sum(tried["cases"] for tried in document["kinds"].values()) >= 20_000
    assert [tried["findings"] for tried in document["kinds"].values()] == [[]] * len(SUBJECTS)
    assert results.with_suffix(".md").read_text(encoding="utf-8") == whole_campaign().page(document)


def test_a_worker_that_crashes_is_named(tmp_path: Path) -> None:
    code = "import json, os, sys; open(sys.argv[1], 'w').write(json.dumps(dict(case=4, outcome='started', what=''))); os.abort()"
    report = tmp_path / "report.jsonl"
    worker = subprocess.Popen([sys.executable, "-c", code, str(report)], stderr=subprocess.DEVNULL)
    assert campaign._watched(worker, report) == "the process crashes (SIGABRT)"
