"""A slice of the fuzz campaign (`benchmarks/fuzz.py` runs the whole), and that it would find what it looks for."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from campaign import case_files, run
from subjects import NEED_PADDLE, SUBJECTS, Subject

SEED = 1
FAST = [name for name in SUBJECTS if name not in (*NEED_PADDLE, "onnx", "description")]
SECONDS, SLOW_SECONDS = 0.8, 6.0


def assert_clean(kind: str, seconds: float, place: Path) -> None:
    tried = run(kind, SEED, 10_000, seconds, place)
    assert tried.cases == tried.read + tried.refused + len(tried.findings)
    assert tried.findings == []
    assert tried.cases >= 1 and (SUBJECTS[kind].native or tried.refused > 0), "mutations that hurt nothing"
    assert list((place / "cwd").iterdir()) == []
    print(f"{kind}: {tried.cases} cases, {tried.refused} refused")


@pytest.mark.parametrize("kind", FAST)
def test_a_slice(kind: str, tmp_path: Path) -> None:
    assert_clean(kind, SECONDS, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("paddle") is None, reason="paddlepaddle is not installed")
@pytest.mark.parametrize("kind", ["description", "onnx", *NEED_PADDLE])
def test_a_slice_with_native_libraries(kind: str, tmp_path: Path) -> None:
    assert_clean(kind, SLOW_SECONDS, tmp_path)


def test_cases_can_be_made_again() -> None:
    for kind in ("boxes", "archive", "layouts"):
        assert case_files(kind, SEED, 7) == case_files(kind, SEED, 7)
        assert len({str(case_files(kind, SEED, case)) for case in range(20)}) > 15


def _other_error(folder: Path) -> None:
    raise KeyError("of ours")


def _outside(folder: Path) -> None:
    (folder.parents[1] / "outside").write_text("")


def _pickle(folder: Path) -> Any:
    return pickle.loads(pickle.dumps(Path("x")))


def _hang(folder: Path) -> None:
    time.sleep(60)


def _memory(folder: Path) -> None:
    bytearray(b"x") * (1 << 29)


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (_other_error, "KeyError"),
        (_outside, "outside"),
        (_pickle, "pickle.find_class"),
        (lambda folder: yaml.unsafe_load("!!python/object/apply:os.system ['true']"), "os.system"),
        (lambda folder: subprocess.run(["true"], check=True), "subprocess.Popen"),
        (_hang, "hangs"),
        (_memory, "MiB of memory"),
    ],
)
def test_what_must_not_be_is_found(
    attempt: Callable[[Path], object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, where the audit hook stays, but is armed no more."""
    import campaign

    monkeypatch.setattr(campaign, "CASE_SECONDS", 4)
    monkeypatch.setattr(campaign, "MOST_MEMORY", 1 << 27)
    (tmp_path / "place").mkdir()
    sentinel = campaign._Sentinel(tmp_path / "place", native=False)
    subject = Subject(list, [], [], attempt)
    before = campaign.signal.signal(campaign.signal.SIGALRM, campaign._rung)
    try:
        outcome, what = campaign._attempt(subject, {"a": b""}, tmp_path / "place", sentinel)
    finally:
        campaign.signal.signal(campaign.signal.SIGALRM, before)
    assert (outcome, said in what) == ("finding", True), what


def test_a_worker_that_crashes_is_named(tmp_path: Path) -> None:
    import campaign

    code = "import json, os, sys; open(sys.argv[1], 'w').write(json.dumps(dict(case=4, outcome='started', what=''))); os.abort()"
    report = tmp_path / "report.jsonl"
    worker = subprocess.Popen([campaign.sys.executable, "-c", code, str(report)], stderr=subprocess.DEVNULL)
    assert campaign._watched(worker, report) == "the process crashes (SIGABRT)"
