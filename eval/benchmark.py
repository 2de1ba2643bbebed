"""Latency: sessions take turns on the same input, so that a noisy machine disturbs them alike; and what follows."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from eval.gate import SkippedRow
from quant.runtime import Feed, Precision, Session

WARM_UP = 3
FEWEST_RUNS = 3


class _Result(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=(), populate_by_name=True)


class Timing(_Result):
    """Median milliseconds of one run at one input shape, wall clock."""

    fp32: float = Field(description="model as shipped")
    fp32_prepared: float | None = Field(default=None, description="folded; None where the target takes no ONNX")
    int8: float

    @property
    def speedup(self) -> float:
        """Of INT8 against the better prepared FP32 there is."""
        return (self.fp32 if self.fp32_prepared is None else self.fp32_prepared) / self.int8


class Cell(_Result):
    """One input shape on one target."""

    shape: list[int]
    ms: Timing | None = Field(default=None, description="OpenVINO: computed in f32 where not in INT8")
    default_ms: Timing | None = Field(default=None, description="OpenVINO alone: the precision that it chooses itself")
    note: str = Field(default="", description="why there is no time")


class BenchRow(Cell):
    """A cell of one model."""

    model: str
    task: str
    target: str
    status: Literal["timed"] = "timed"
    fp32_bytes: int
    int8_bytes: int


class Advice(_Result):
    """What the cells of one target say: take INT8 or stay with FP32."""

    model: str
    target: str
    precision: Precision
    cells: int = Field(description="that were timed")
    faster: int = Field(description="cells in which INT8 is faster than FP32 prepared")
    speedup: float = Field(description="against FP32 prepared, geometric mean of the cells")
    use: Literal["int8", "fp32_prepared", "fp32"]
    text: str


class BenchReport(_Result):
    """The JSON of `quant bench --json`."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    processor: dict[str, Any]
    versions: dict[str, str]
    threads: int
    rows: list[BenchRow | SkippedRow]
    advice: list[Advice]

    def to_json(self) -> str:
        """Indented, with a newline at the end; NaN and infinity are errors."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, allow_nan=False) + "\n"


def interleaved_latency(
    sessions: Mapping[str, Session], feed: Feed, runs: int, seconds: float = math.inf
) -> dict[str, float]:
    """Median milliseconds of each session over `runs` turns after warm-up, wall clock.

    Args:
        seconds: no further turn begins after this time, unless fewer than `FEWEST_RUNS` were timed.
    """
    times: dict[str, list[float]] = {name: [] for name in sessions}
    begin = time.perf_counter()
    for turn in range(WARM_UP + runs):
        if turn >= WARM_UP + FEWEST_RUNS and time.perf_counter() - begin > seconds:
            break
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(feed)
            if turn >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def advise(rows: Iterable[BenchRow]) -> list[Advice]:
    """One advice per model, target and precision that was timed.

    INT8 is worth its loss of accuracy only where it is faster than the FP32 model that costs none: the prepared one.
    """
    found = []
    for (model, target), group in groupby(rows, key=lambda row: (row.model, row.target)):
        cells = list(group)
        for precision, timings in (("f32", [c.ms for c in cells]), ("default", [c.default_ms for c in cells])):
            if timed := [timing for timing in timings if timing is not None]:
                found.append(_advice(model, target, precision, timed))
    return found


def _advice(model: str, target: str, precision: Any, timings: list[Timing]) -> Advice:
    speedup = statistics.geometric_mean(timing.speedup for timing in timings)
    faster = sum(timing.speedup > 1 for timing in timings)
    prepared = timings[0].fp32_prepared is not None
    rival = "FP32 prepared" if prepared else "FP32 as shipped"
    counted = f"{speedup:.2f}x against {rival}, geometric mean of {len(timings)}; faster in {faster}"
    where = f"{model}, {target}" + (" in its default precision" if precision == "default" else "")
    use: Literal["int8", "fp32_prepared", "fp32"] = "int8"
    text = f"{where}: INT8 is faster ({counted})"
    if speedup <= 1:
        use = "fp32_prepared" if prepared else "fp32"
        text = f"{where}: INT8 is NOT faster ({counted}). For speed use {rival}; INT8 saves size alone"
    return Advice(
        model=model,
        target=target,
        precision=precision,
        cells=len(timings),
        faster=faster,
        speedup=speedup,
        use=use,
        text=text,
    )
