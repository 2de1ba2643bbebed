"""The gate: rows of results, the verdict on each, and the exit code of them all.

`JudgedRow`, `SkippedRow` and `EvalReport` are the JSON of `quant eval --json` and `metrics.json`.
All numbers are kept unrounded; only tables round.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, computed_field, model_serializer

from quant.recipe import Gate

POOLED = "pooled"
_NOISE = 1e-9  # points; a drop of 60.0 - 59.0 must not fail a limit of 1.0 by a rounding of floats

Evidence = Literal["real", "generated"]


class _Result(BaseModel):
    # Unknown keys are let pass: a file of a later version stays readable.
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=(), populate_by_name=True)


class GateVerdict(_Result):
    """Limits, and whether point estimates (passed) and 95 % bounds (certified) keep them."""

    max_drop: float
    max_relative_drop: float
    passed: bool
    certified: bool
    evidence: Evidence


class _ModelRow(_Result):
    """What rows of all kinds begin with."""

    model: str
    task: str
    target: str
    twin: bool = Field(
        default=False, description="a small stand-in, trained on generated data, was judged; written where it is true"
    )

    @model_serializer(mode="wrap")
    def _twin_where_true(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = serialize(self)
        if not self.twin:
            document.pop("twin", None)
        return document

    @property
    def title(self) -> str:
        """The model's name in tables."""
        return f"{self.model} (twin)" if self.twin else self.model


class JudgedRow(_ModelRow):
    """One model on one target and one data set (`pooled`: all of them together)."""

    format: str = Field(description="format of the artifact: onnx, paddle, openvino")
    status: Literal["judged"] = "judged"
    dataset: str = Field(description="name of the set, or 'pooled'")
    samples: int
    metric: str
    fp32: float = Field(description="percent")
    int8: float = Field(description="percent")
    drop: float = Field(description="points")
    relative_drop: float = Field(description="percent of fp32")
    drop_upper95: float
    relative_drop_upper95: float
    discordance: float = Field(description="percent of the samples")
    gate: GateVerdict
    coverage: float | None = Field(default=None, description="0..1")
    executed_coverage: float | None = Field(default=None, description="0..1")
    fp32_bytes: int | None = None
    int8_bytes: int | None = None
    latency_shape: list[int] | None = None
    fp32_ms: float | None = None
    fp32_prepared_ms: float | None = None
    int8_ms: float | None = None
    speedup: float | None = None
    method: str | None = None
    samples_needed: int | None = Field(default=None, description="samples that would certify; None: no number would")
    details: dict[str, dict[str, float]] | None = Field(
        default=None, description="'fp32' and 'int8': metric -> percent"
    )
    run: str | None = Field(default=None, description="first 12 digits of the run's hash")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def gates(self) -> bool:
        """Only pooled rows decide; rows of single sets inform."""
        return self.dataset == POOLED


class SkippedRow(_ModelRow):
    """A model and target that could not be judged: neither passed nor hidden."""

    status: Literal["skipped"] = "skipped"
    reason: str
    fix: str


Row = Annotated[JudgedRow | SkippedRow, Field(discriminator="status")]


def of_twins(rows: Iterable[JudgedRow | SkippedRow]) -> list[JudgedRow | SkippedRow]:
    """The rows, marked as those of twins."""
    return [row.model_copy(update={"twin": True}) for row in rows]


class EvalReport(_Result):
    """All rows of an evaluation."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    rows: list[Row]

    def to_document(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.model_dump(mode="json", by_alias=True)

    def to_json(self) -> str:
        """The same as text, indented, with a newline at the end; NaN and infinity are errors."""
        return json.dumps(self.to_document(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def judge(
    drop: float,
    relative_drop: float,
    drop_upper95: float,
    relative_drop_upper95: float,
    gate: Gate,
    evidence: Evidence,
) -> GateVerdict:
    """Hold unrounded estimates and bounds against the limits; both limits must be kept."""
    passed = _keeps(gate, drop, relative_drop)
    return GateVerdict(
        max_drop=gate.max_drop,
        max_relative_drop=gate.max_relative_drop,
        passed=passed,
        certified=passed and _keeps(gate, drop_upper95, relative_drop_upper95),
        evidence=evidence,
    )


def verdict_text(row: JudgedRow) -> str:
    """The verdict in words."""
    if not row.gates:
        return "informs only"
    if not row.gate.passed:
        return "FAILED" if _fails_for_sure(row) else f"FAILED, within the noise of {row.samples:,} samples"
    if row.gate.evidence == "generated":
        return "passed on generated data, not evidence"
    if row.gate.certified:
        return "passed, certified"
    if row.samples_needed is None:
        return "passed, not certified (no number of samples would decide it)"
    return f"passed, not certified (about {_rounded(row.samples_needed):,} samples would decide it)"


def _fails_for_sure(row: JudgedRow) -> bool:
    """Whether a limit is below the lower bound of its drop, which lies as far below the drop as the upper one above."""
    low = 2 * row.drop - row.drop_upper95, 2 * row.relative_drop - row.relative_drop_upper95
    return low[0] > row.gate.max_drop or low[1] > row.gate.max_relative_drop


def speed_advice(row: JudgedRow) -> str | None:
    """What to take instead where INT8 is not the fastest, in words; None where it is, or was not timed."""
    rivals = {"FP32 as shipped": row.fp32_ms, "FP32 prepared (`quant export --fp32`)": row.fp32_prepared_ms}
    times = {name: ms for name, ms in rivals.items() if ms}
    if not row.gates or not row.int8_ms or not times:
        return None
    name, ms = min(times.items(), key=lambda pair: pair[1])
    if row.int8_ms < ms:
        return None
    factor = ms / row.int8_ms
    return f"{row.title}, {row.target}: INT8 is NOT faster here ({factor:.2f}x of the best FP32); for speed take {name}"


def exit_code(rows: Iterable[JudgedRow | SkippedRow]) -> Literal[0, 1, 2]:
    """0: every judged gate passed; 1: one failed; 2: nothing was judged."""
    verdicts = [row.gate.passed for row in rows if isinstance(row, JudgedRow) and row.gates]
    if not verdicts:
        return 2
    return 0 if all(verdicts) else 1


def _keeps(gate: Gate, drop: float, relative_drop: float) -> bool:
    return drop <= gate.max_drop + _NOISE and relative_drop <= gate.max_relative_drop + _NOISE


def _rounded(number: int) -> int:
    """Two significant digits, upwards: more would be pretence."""
    step: int = 10 ** max(0, len(str(number)) - 2)
    return -(-number // step) * step
