"""Records of a run: read as they were written, and whatever else stands in them is one sentence and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_run import write_small_run

from eval.report import print_report, read_reports
from quant.cli import _guarded, _print_ladder
from quant.document import DocumentError
from quant.plan import load_plan
from quant.record import read_record

_MARK = 123456.789
HOSTILE = ["9" * 400, "-" + "9" * 400, "9" * 5000, "9223372036854775808", "1e999", "1e308", "NaN", "-Infinity"]
RECORDS = [
    *("manifest.json", "metrics.json", "plans/onnxruntime/plan.json", "plans/onnxruntime/ranges.json"),
    *("plans/onnxruntime/search.json", "exhibits/onnxruntime/exhibits.json", "../sensitivity/onnxruntime.json"),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_small_run(tmp_path / "results")


def numbers(value: Any) -> Iterator[tuple[Any, Any]]:
    """Places of a document that hold a number."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, int | float) and not isinstance(item, bool):
                yield value, key
            yield from numbers(item)


def test_the_small_run_is_good(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _guarded(["verify", str(run)]) == 0
    assert _guarded(["report", "--out", str(run.parents[1])]) == 0
    _print_ladder(run)
    said = capsys.readouterr().out
    assert "good, 8 files" in said and "qat" in said and "60" in said
    assert [operator.name for operator in load_plan(run / "plans" / "onnxruntime").operators] == ["y", "z"]
    print_report(read_reports([run])[0].rows)


@pytest.mark.parametrize("name", RECORDS)
def test_a_number_that_cannot_be_computed_with_ends_with_a_sentence(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each number of each file, the hostile ones in turn."""
    file = run / name
    document = json.loads(file.read_text(encoding="utf-8"))
    places = list(numbers(document))
    assert places
    for index, (place, key) in enumerate(places):
        kept, place[key] = place[key], _MARK
        hostile = HOSTILE[index % len(HOSTILE)]
        file.write_text(json.dumps(document).replace(str(_MARK), hostile), encoding="utf-8")
        place[key] = kept
        assert _guarded(["report", "--out", str(run.parents[1])]) == 2, (key, hostile)
        assert _guarded(["verify", str(run)]) == (0 if "sensitivity" in name else 2)
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("text", [*HOSTILE, '"\\ud800"', "[" * 100_000, "[" * 250 + "]" * 250, "", "\xff", "[1] 2"])
def test_what_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r".+"):
        read_record(tmp_path / "a.json", Any)  # type: ignore[arg-type]


def test_ordinary_numbers_are_read(tmp_path: Path) -> None:
    values = [9223372036854775807, -9223372036854775807, 3.4e38, -1e-40, 0, True]
    (tmp_path / "a.json").write_text(json.dumps(values), encoding="utf-8")
    assert read_record(tmp_path / "a.json", list[Any]) == values


def test_the_reason_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, " + "9" * 30 + "]", encoding="utf-8")
    with pytest.raises(DocumentError, match="whole number beyond 64 bits"):
        read_record(tmp_path / "a.json", list[int])


def test_a_manifest_names_known_targets_alone(run: Path, tmp_path: Path) -> None:
    """They become parts of paths when artifacts are exported."""
    file = run / "manifest.json"
    text = file.read_text(encoding="utf-8").replace('"onnxruntime": {', '"../../outside": {')
    file.write_text(text, encoding="utf-8")
    assert _guarded(["verify", str(run)]) == 2
