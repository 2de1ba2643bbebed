"""The tables that people read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eval.gate import EvalReport, GateVerdict, JudgedRow, SkippedRow, of_twins
from eval.report import diff_tables, print_report, read_reports, results_readme
from quant.errors import InputError


def row(**changes: Any) -> JudgedRow:
    values: dict[str, Any] = {
        "model": "PP-OCRv4_mobile_rec",
        "task": "text_recognition",
        "target": "onnxruntime",
        "format": "onnx",
        "dataset": "pooled",
        "samples": 1333,
        "metric": "line_accuracy",
        "fp32": 58.734,
        "int8": 58.529,
        "drop": 0.205,
        "relative_drop": 0.349,
        "drop_upper95": 0.781,
        "relative_drop_upper95": 1.333,
        "discordance": 3.14,
        "gate": GateVerdict(max_drop=1, max_relative_drop=1, passed=True, certified=False, evidence="real"),
        "coverage": 0.97,
        "fp32_bytes": 10_812_334,
        "int8_bytes": 2_981_321,
        "speedup": 2.4,
        "method": "ptq+revert",
        "samples_needed": 3456,
    }
    return JudgedRow(**{**values, **changes})


SKIPPED = SkippedRow(
    model="PP-OCRv4_mobile_det",
    task="text_detection",
    target="openvino",
    reason="there is no artifact [yet]",
    fix="Run `quant run PP-OCRv4_mobile_det`",
)
ROWS: list[JudgedRow | SkippedRow] = [
    row(),
    row(dataset="omnidocbench_rec", coverage=None, speedup=None, fp32_bytes=None),
    SKIPPED,
]
FACTS = ["PP-OCRv4_mobile_rec", "line_accuracy", "onnxruntime", "pooled", "omnidocbench_rec", "1,333", "58.73", "58.53"]
FACTS += ["0.20 (0.78)", "0.35 (1.33)", "3.1", "97.0", "0.28", "2.40x", "informs only"]


def rendered(width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    for table in diff_tables([r for r in ROWS if isinstance(r, JudgedRow)]):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [120, 160])
def test_the_table_shows_everything(width: int) -> None:
    text = rendered(width)
    assert max(map(len, text.splitlines())) <= width
    for fact in FACTS:
        assert fact in text
    verdict = "passed, not certified (about 3,500 samples would decide it)"
    assert all(word in text for word in verdict.split())
    assert "…" not in text


def test_a_file_gets_whole_lines_and_the_skipped_rows() -> None:
    file = io.StringIO()
    print_report(ROWS, file)
    text = file.getvalue()
    for fact in FACTS:
        assert fact in text
    assert "\x1b" not in text
    assert (
        "skipped: PP-OCRv4_mobile_det, openvino: there is no artifact [yet]. Run `quant run PP-OCRv4_mobile_det`\n"
        in text
    )
    assert "1 skipped" in text


def test_targets_that_share_a_reason_share_a_line() -> None:
    skipped = next(row for row in ROWS if isinstance(row, SkippedRow))
    others = [skipped.model_copy(update={"target": target}) for target in ("paddle", "tensorrt")]
    another = skipped.model_copy(update={"target": "onnxruntime", "reason": "another"})
    twin = skipped.model_copy(update={"twin": True})
    rows, file = [skipped, another, *others, twin], io.StringIO()
    print_report(rows, file)
    name, rest = "PP-OCRv4_mobile_det", f"{skipped.reason}. {skipped.fix}"
    lines = [f"{name}, openvino, paddle, tensorrt: {rest}", f"{name}, onnxruntime: another. {skipped.fix}"]
    lines.append(f"{name} (twin), openvino: {rest}")
    assert file.getvalue().splitlines() == [*(f"skipped: {s}" for s in lines), "5 skipped, neither passed nor failed"]
    assert "\n".join(f"* {line}" for line in lines) in results_readme([EvalReport(rows=rows)])


def test_a_failed_gate_is_plain_to_see() -> None:
    failed = GateVerdict(max_drop=1, max_relative_drop=1, passed=False, certified=False, evidence="real")
    file = io.StringIO()
    print_report([row(gate=failed)], file)
    assert "FAILED" in file.getvalue()


def write(folder: Path, report: EvalReport) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(report.to_json(), encoding="utf-8")
    return folder


def test_the_readme_comes_from_all_metrics_files(tmp_path: Path) -> None:
    runs = [
        write(tmp_path / "0123456789ab", EvalReport(rows=ROWS)),
        write(tmp_path / "fedcba987654", EvalReport(rows=[row(target="paddle")])),
    ]
    text = results_readme(read_reports(runs))
    assert text == results_readme(read_reports(runs))
    gating = text.split("## Gates")[1].split("## ")[0]
    lines = [line for line in gating.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert "0123456789ab" in lines[2] and "| paddle |" in lines[3] and "fedcba987654" in lines[3]
    assert "omnidocbench_rec" in text.split("## Single sets")[1]
    assert SKIPPED.reason in text.split("## Skipped")[1]


def test_no_results_yet() -> None:
    assert "None yet." in results_readme([])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", json.dumps({"schema": 2, "rows": []}), '{"schema": 1, "rows": [{}]}']
)
def test_a_broken_metrics_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model" / "run" / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(InputError, match="metrics.json: not a metrics.json"):
        read_reports([path.parent])


def test_twins_say_so_beside_the_name() -> None:
    """A twin's rows are a table of their own, behind that of the model."""
    rows = [row(), *of_twins([row(fp32=97.31), SKIPPED])]
    file = io.StringIO()
    print_report(rows, file)
    text = file.getvalue()
    assert "PP-OCRv4_mobile_rec (twin)" in text and f"{SKIPPED.model} (twin), openvino" in text
    assert text.index("58.73") < text.index("97.31")
    assert "| PP-OCRv4_mobile_rec (twin) |" in results_readme([EvalReport(rows=rows)])
    assert [entry.twin for entry in EvalReport.model_validate_json(EvalReport(rows=rows).to_json()).rows] == [
        False,
        True,
        True,
    ]
