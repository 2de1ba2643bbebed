"""Verdicts, exit codes and the JSON of the rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from eval.gate import (
    EvalReport,
    Evidence,
    GateVerdict,
    JudgedRow,
    SkippedRow,
    exit_code,
    judge,
    speed_advice,
    verdict_text,
)
from quant.recipe import Gate

CONTRACT = """
{"schema": 1, "rows": [{"model": "PP-OCRv4_mobile_rec", "task": "text_recognition", "target": "onnxruntime",
  "format": "onnx", "status": "judged",
  "dataset": "pooled", "samples": 11000, "metric": "line_accuracy", "fp32": 58.73, "int8": 58.53, "drop": 0.20,
  "relative_drop": 0.34, "drop_upper95": 0.48, "relative_drop_upper95": 0.82, "discordance": 3.1,
  "gate": {"max_drop": 1.0, "max_relative_drop": 1.0, "passed": true, "certified": true, "evidence": "real"},
  "coverage": 0.97, "executed_coverage": 0.95, "fp32_bytes": 10812334, "int8_bytes": 2981321,
  "latency_shape": [1, 3, 48, 320],
  "fp32_ms": 6.1, "fp32_prepared_ms": 5.2, "int8_ms": 2.5, "speedup": 2.4, "method": "ptq+revert"},
  {"model": "PP-OCRv4_mobile_det", "task": "text_detection", "target": "openvino", "status": "skipped",
   "reason": "no artifact", "fix": "Run `quant run PP-OCRv4_mobile_det`"}]}
"""
LIMITS = Gate(max_drop=1.0, max_relative_drop=1.0)
VERDICT = GateVerdict(max_drop=1, max_relative_drop=1, passed=True, certified=True, evidence="real")


def row(**changes: Any) -> JudgedRow:
    document = json.loads(CONTRACT)["rows"][0]
    return JudgedRow.model_validate({**document, **changes})


def verdict(
    drop: float, relative: float, bound: float, relative_bound: float, evidence: Evidence = "real"
) -> GateVerdict:
    return judge(drop, relative, bound, relative_bound, LIMITS, evidence)


def test_the_documented_rows_come_back_as_they_were() -> None:
    document = json.loads(CONTRACT)
    again = json.loads(EvalReport.model_validate(document).to_json())
    assert again["schema"] == 1
    for before, after in zip(document["rows"], again["rows"], strict=True):
        assert {key: after[key] for key in before} == before
    assert set(again["rows"][0]) - set(document["rows"][0]) == {"gates", "samples_needed", "details", "run"}
    assert set(again["rows"][1]) == set(document["rows"][1])


def test_what_is_written_can_be_read() -> None:
    report = EvalReport(
        rows=[row(details={"fp32": {"recall": 1.0}, "int8": {"recall": 0.5}}), row(dataset="sroie_rec")]
    )
    assert EvalReport.model_validate_json(report.to_json()) == report
    assert [r["gates"] for r in report.to_document()["rows"]] == [True, False]


@pytest.mark.parametrize(
    ("values", "passed", "certified"),
    [
        ((0.2, 0.4, 0.5, 0.9), True, True),
        ((0.2, 0.4, 0.5, 1.1), True, False),
        ((0.2, 0.4, 1.1, 0.9), True, False),
        ((0.7, 1.2, 0.9, 1.5), False, False),
        ((1.2, 0.9, 1.5, 0.9), False, False),
        ((1.004, 0.9, 1.0, 1.0), False, False),
        ((60.0 - 59.0 + 1e-14, 0.9, 1.0, 1.0), True, True),
        ((-0.5, -0.8, 0.1, 0.2), True, True),
        ((float("nan"), 0.0, 0.0, 0.0), False, False),
    ],
)
def test_both_limits_bind_the_estimate_and_the_bound(
    values: tuple[float, float, float, float], passed: bool, certified: bool
) -> None:
    result = verdict(*values)
    assert (result.passed, result.certified) == (passed, certified)


def test_a_verdict_says_what_it_rests_on() -> None:
    undecided = verdict(0.2, 0.4, 0.9, 1.5)
    assert verdict_text(row()) == "passed, certified"
    lost = {"drop": 2.0, "drop_upper95": 2.9, "relative_drop": 2.1, "relative_drop_upper95": 3.3}
    assert verdict_text(row(gate=verdict(2, 2.1, 2.9, 3.3), **lost)) == "FAILED"
    unsure = row(gate=verdict(2, 2.1, 4, 5), **(lost | {"drop_upper95": 4.0, "relative_drop_upper95": 5.0}))
    assert verdict_text(unsure) == "FAILED, within the noise of 11,000 samples"
    assert (
        verdict_text(row(gate=undecided, samples_needed=4_812))
        == "passed, not certified (about 4,900 samples would decide it)"
    )
    assert verdict_text(row(gate=undecided)) == "passed, not certified (no number of samples would decide it)"
    generated = verdict(0.1, 0.1, 0.2, 0.2, "generated")
    assert verdict_text(row(gate=generated)) == "passed on generated data, not evidence"
    assert verdict_text(row(gate=verdict(2, 2.1, 2.9, 3.3, "generated"), **lost)) == "FAILED"
    assert verdict_text(row(dataset="sroie_rec")) == "informs only"


def test_where_int8_is_not_the_fastest_the_best_fp32_is_recommended() -> None:
    assert speed_advice(row(fp32_ms=6.0, fp32_prepared_ms=5.0, int8_ms=2.5)) is None
    said = speed_advice(row(fp32_ms=6.0, fp32_prepared_ms=5.0, int8_ms=5.5))
    assert said is not None and "NOT faster" in said and "0.91x" in said and "quant export --fp32" in said
    shipped = speed_advice(row(fp32_ms=6.0, fp32_prepared_ms=None, int8_ms=9.0, target="paddle"))
    assert shipped is not None and shipped.endswith("take FP32 as shipped")
    assert speed_advice(row(dataset="iiit5k_rec", fp32_ms=1.0, int8_ms=2.0)) is None
    assert speed_advice(row(int8_ms=None)) is None


def test_exit_code_follows_the_pooled_rows() -> None:
    failed = verdict(2, 3, 4, 5)
    skipped = SkippedRow(model="m", task="text_detection", target="openvino", reason="no artifact", fix="Run it")
    assert exit_code([row(), row(dataset="sroie_rec", gate=failed), skipped]) == 0
    assert exit_code([row(), row(target="paddle", gate=failed)]) == 1
    assert exit_code([row(gate=verdict(0.1, 0.1, 0.2, 0.2, "generated"))]) == 0
    assert exit_code([skipped]) == exit_code([]) == exit_code([row(dataset="sroie_rec")]) == 2
