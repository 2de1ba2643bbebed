"""Every figure that is asked for beside what was measured: `python benchmarks/goals.py [--results FOLDER]`.

Nothing is measured here. Runs are read from the folder of results (`metrics.json` and `manifest.json` of each model's
newest one), and what the other benchmarks wrote from `results/`: quantization-time.json, calibration-memory.json,
profile-*.json and peers-*.json. What is missing there is "not measured". Writes `results/goals.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peer_table import NOT_KNOWN, table
from scipy.stats import beta

from quant.manifest import newest_run

RESULTS = Path(__file__).parents[1] / "results"
REC, DET = "PP-OCRv4_mobile_rec", "PP-OCRv4_mobile_det"
TARGETS = ("onnxruntime", "openvino")

SPEEDS = {
    (REC, "onnxruntime"): {"fp32": 1.8, "fp32_prepared": 1.3},
    (DET, "onnxruntime"): {"fp32": 1.8, "fp32_prepared": 1.3},
    (REC, "openvino"): {"fp32": 3.0},
    (DET, "openvino"): {"fp32": 2.8},
}
"""How many times as fast as FP32 INT8 has to be."""

DROP, PADDLE_DROP = 0.5, 1.0
"""Points."""
DISCORDANCE = {REC: 3.0}
"""Percent of lines."""
COVERAGE, EXECUTED, PADDLE_COVERAGE = 0.95, 0.9, 0.9
SIZE = {REC: 0.29, DET: 0.30}
"""Bytes of the artifact / bytes of FP32."""
MEMORY_GB, MEMORY_GROWTH = {REC: 1.0, DET: 1.2}, 10.0
"""Peak while calibrating, 10^9 bytes, and how much more the largest number of pictures may take, percent."""
NNCF_RATIO = 1.0
"""Seconds of quantizing / those of NNCF; speed beside NNCF's."""
RIVAL = DET
"""The model whose speed NNCF is the peer to beat in."""

CONFIDENCE = 0.95
NAMES = {"fp32": "FP32 as shipped", "fp32_prepared": "FP32 prepared"}
WORDS = (
    "In brackets the one-sided 95 % bounds, lower and upper: of a drop by the paired bootstrap (the lower one by "
    "symmetry), of a discordance by the binomial distribution. *Within noise*: the goal lies between them, so that "
    "other pictures might say the opposite. Drop in points, discordance in percent of the samples, speed of INT8 "
    "against FP32 in turn."
)


@dataclass(frozen=True)
class Measured:
    """A figure, its 95 % bounds where there are any, and the page that shows more."""

    value: float
    source: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """A goal for a model on a target.

    Attributes:
        sense: whether the figure has to be at most or at least the goal.
        goal: None where the figure is only reported.
        layout: how figures are written.
    """

    model: str
    target: str
    what: str
    sense: Literal["≤", "≥"]
    goal: float | None
    measured: Measured | None
    layout: str = "{:.2f}"

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        if self.goal is None:
            return "reported"
        found = self.measured
        reached = found.value <= self.goal if self.sense == "≤" else found.value >= self.goal
        noise = found.low is not None and found.high is not None and found.low < self.goal < found.high
        return f"{'reached' if reached else '**missed**'}{', within noise' if noise else ''}"


@dataclass(frozen=True)
class Run:
    """A run as its machine-written files have it; rows are those of the pooled sets, by target."""

    manifest: dict[str, Any]
    rows: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Evidence:
    """What was measured: by model, or by model and target."""

    runs: dict[str, Run] = field(default_factory=dict)
    times: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    memory: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    profiles: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the runs")
    evidence = read_evidence(parser.parse_args().results, RESULTS)
    file = RESULTS / "goals.md"
    file.write_text(markdown(evidence), encoding="utf-8")
    print(f"written: {file}")


def read_evidence(runs: Path, pages: Path) -> Evidence:
    """Everything there is.

    Args:
        runs: folder with the runs of each model.
        pages: folder of what the other benchmarks wrote.
    """
    memory: dict[tuple[str, str], dict[int, float]] = {}
    for row in _rows(pages / "calibration-memory.json"):
        memory.setdefault((row["model"], row["target"]), {})[row["pictures"]] = _gigabytes(row)
    profiles = [_document(file) for file in sorted(pages.glob("profile-*.json"))]
    peers = [_document(file) for file in sorted(pages.glob("peers-*.json"))]
    return Evidence(
        runs={model: run for model in (REC, DET) if (run := _run(runs, model))},
        times={(row["model"], row["target"]): row for row in _rows(pages / "quantization-time.json")},
        memory=memory,
        profiles={(report["model"], report["target"]): report for report in profiles},
        peers={report["model"]: report for report in peers},
    )


def _document(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _rows(file: Path) -> list[dict[str, Any]]:
    return list(_document(file).values())


def _gigabytes(row: Mapping[str, Any]) -> float:
    """10^9 bytes; `peak_gb` counts 2^30."""
    return float(row.get("peak_bytes", row.get("peak_gb", 0) * 2**30)) / 1e9


def _run(results: Path, model: str) -> Run | None:
    folder = newest_run(results, model)
    if folder is None:
        return None
    rows = _document(folder / "metrics.json").get("rows", [])
    return Run(_document(folder / "manifest.json"), {row["target"]: row for row in rows if row.get("gates")})


def rows(evidence: Evidence) -> Iterator[Row]:
    """Every goal, model after model."""
    for model in (REC, DET):
        for target in TARGETS:
            yield from _of_run(evidence, model, target)
            yield from _speeds(evidence, model, target)
            yield _seconds(evidence, model, target)
            yield from _memory(evidence, model, target)
        yield from _paddle(evidence, model)
    yield _rival(evidence)


def _of_run(evidence: Evidence, model: str, target: str) -> Iterator[Row]:
    yield Row(model, target, "drop", "≤", DROP, _drop(evidence, model, target))
    if model in DISCORDANCE:
        found = _discordance(evidence, model, target)
        yield Row(model, target, "discordance, %", "≤", DISCORDANCE[model], found, "{:.1f}")
    planned = _figure(evidence, model, target, "coverage")
    yield Row(model, target, "coverage, planned", "≥", COVERAGE, planned, "{:.3f}")
    if target == "openvino":
        executed = _figure(evidence, model, target, "executed_coverage")
        yield Row(model, target, "coverage, executed", "≥", EXECUTED, executed, "{:.3f}")
    size = _ratio(evidence, model, target, "int8_bytes", "fp32_bytes")
    yield Row(model, target, "size / that of FP32", "≤", SIZE[model], size, "{:.3f}")


def _speeds(evidence: Evidence, model: str, target: str) -> Iterator[Row]:
    """By the profile's clock and by the run's: they may differ in threads."""
    profile = evidence.profiles.get((model, target))
    for against, factor in SPEEDS[model, target].items():
        clocks: list[Measured | None] = [None]
        if profile:
            link = f"{_threads(profile['threads'])}, [profile](profile-{model}-{target}.md)"
            clocks = [Measured(profile["clock"][against] / profile["clock"]["int8"], link)]
        if found := _ratio(evidence, model, target, f"{against}_ms", "int8_ms"):
            clocks.append(found)
        for clock in clocks:
            yield Row(model, target, f"speed against {NAMES[against]}", "≥", factor, clock, "{:.2f}x")


def _seconds(evidence: Evidence, model: str, target: str) -> Row:
    what = "seconds of quantizing / those of NNCF"
    return Row(model, target, what, "≤", NNCF_RATIO, _time_ratio(evidence, model, target))


def _time_ratio(evidence: Evidence, model: str, target: str) -> Measured | None:
    """By the benchmark of time where it timed NNCF too, else by the comparison with other quantizers."""
    row = evidence.times.get((model, target), {})
    if row.get("nncf_seconds"):
        ours, theirs, pictures, page = row["seconds"], row["nncf_seconds"], row["pictures"], "quantization-time"
    else:
        ours, theirs = (_peer(evidence, model, peer, target).get("seconds") for peer in ("ours", "nncf"))
        pictures, page = evidence.peers.get(model, {}).get("calibration"), f"peers-{model}"
    if not ours or not theirs:
        return None
    note = f"{ours:.1f} s / {theirs:.1f} s, {pictures} pictures, [page]({page}.md)"
    return Measured(ours / theirs, note)


def _memory(evidence: Evidence, model: str, target: str) -> Iterator[Row]:
    peaks = evidence.memory.get((model, target), {})
    page = "[page](calibration-memory.md)"
    for pictures in (32, 1024):
        found = Measured(peaks[pictures], page) if peaks.get(pictures) else None
        yield Row(model, target, f"peak, {pictures:,} pictures, GB", "≤", MEMORY_GB[model], found)
    both = [peaks[pictures] for pictures in (32, 1024) if peaks.get(pictures)]
    growth = Measured(100 * (max(both) / min(both) - 1), page) if len(both) == 2 else None
    yield Row(model, target, "peaks differ by, %", "≤", MEMORY_GROWTH, growth, "{:.1f}")


def _paddle(evidence: Evidence, model: str) -> Iterator[Row]:
    planned = _figure(evidence, model, "paddle", "coverage")
    speed = _ratio(evidence, model, "paddle", "fp32_ms", "int8_ms")
    yield Row(model, "paddle", "drop", "≤", PADDLE_DROP, _drop(evidence, model, "paddle"))
    yield Row(model, "paddle", "coverage, planned", "≥", PADDLE_COVERAGE, planned, "{:.3f}")
    yield Row(model, "paddle", f"speed against {NAMES['fp32']}", "≥", None, speed, "{:.2f}x")


def _rival(evidence: Evidence) -> Row:
    ours, theirs = (_peer_speed(evidence, RIVAL, peer) for peer in ("ours", "nncf"))
    found = None
    if ours and theirs:
        found = Measured(ours / theirs, f"{ours:.2f}x / {theirs:.2f}x, [page](peers-{RIVAL}.md)")
    return Row(RIVAL, "openvino", "speed / that of NNCF", "≥", NNCF_RATIO, found)


def _peer_speed(evidence: Evidence, model: str, peer: str) -> float | None:
    """Against FP32 as shipped, each in its own turns, at the report's shape."""
    row, report = _peer(evidence, model, peer, "openvino"), evidence.peers.get(model, {})
    cells = [cell for cell in row.get("cells", []) if cell["shape"] == report["latency_shape"] and cell.get("ms")]
    return cells[0]["ms"]["fp32"] / cells[0]["ms"]["int8"] if cells else None


def _peer(evidence: Evidence, model: str, peer: str, target: str) -> dict[str, Any]:
    found = evidence.peers.get(model, {}).get("rows", [])
    return next((row for row in found if row["peer"] == peer and row["target"] == target), {})


def _drop(evidence: Evidence, model: str, target: str) -> Measured | None:
    row = _judged(evidence, model, target)
    if row.get("drop") is None:
        return None
    drop, upper = row["drop"], row.get("drop_upper95")
    low = None if upper is None else 2 * drop - upper
    return Measured(drop, f"{row['samples']:,} samples, [gates](measured.md)", low, upper)


def _discordance(evidence: Evidence, model: str, target: str) -> Measured | None:
    row = _judged(evidence, model, target)
    if row.get("discordance") is None:
        return None
    low, high = share_bounds(row["discordance"] / 100, row["samples"])
    note = f"{row['samples']:,} samples, [gates](measured.md), [steps of the ladder](#steps-of-the-ladder)"
    return Measured(row["discordance"], note, 100 * low, 100 * high)


def share_bounds(share: float, samples: int) -> tuple[float, float]:
    """One-sided 95 % bounds, lower and upper, of a share of samples (Clopper and Pearson 1934)."""
    hits = round(share * samples)
    low = float(beta.ppf(1 - CONFIDENCE, hits, samples - hits + 1)) if hits else 0.0
    high = float(beta.ppf(CONFIDENCE, hits + 1, samples - hits)) if hits < samples else 1.0
    return low, high


def _figure(evidence: Evidence, model: str, target: str, name: str) -> Measured | None:
    value = _judged(evidence, model, target).get(name)
    return None if value is None else Measured(value, "[gates](measured.md)")


def _ratio(evidence: Evidence, model: str, target: str, over: str, under: str) -> Measured | None:
    row = _judged(evidence, model, target)
    if not row.get(over) or not row.get(under):
        return None
    threads = f"{_threads(evidence.runs[model].manifest['threads'])}, " if under.endswith("_ms") else ""
    return Measured(row[over] / row[under], f"{threads}[gates](measured.md)")


def _judged(evidence: Evidence, model: str, target: str) -> dict[str, Any]:
    run = evidence.runs.get(model)
    return run.rows.get(target, {}) if run else {}


def markdown(evidence: Evidence) -> str:
    """The generated page."""
    lines = [_line(row) for row in rows(evidence)]
    parts = [
        "# Goals",
        "Generated by `benchmarks/goals.py` from what the runs and the other benchmarks wrote; do not edit.",
        *_machines(evidence),
        WORDS,
        table(["Model", "Target", "Figure", "Goal", "Measured", "Verdict", "From"], lines),
        "## Steps of the ladder",
        "What the search split says of each plan that was tried, until one keeps all limits. The error is that of the "
        "outputs, relative to FP32; where it is too large nothing else is measured.",
        *(_ladder(model, run) for model, run in evidence.runs.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _machines(evidence: Evidence) -> Iterator[str]:
    """What every kind of figure was measured on."""
    runs = {
        f"{model} {run.manifest['run']}: {machine(run.manifest['processor'], run.manifest['threads'])}"
        for model, run in evidence.runs.items()
    }
    profiles = {machine(report["processor"], report["threads"]) for report in evidence.profiles.values()}
    peers = {machine(report["processor"], report["threads"]) for report in evidence.peers.values()}
    times = {row["processor"] for row in evidence.times.values() if "processor" in row}
    kinds = {"Runs": runs, "Profiles": profiles, "Time of quantizing": times, "Other quantizers": peers}
    yield "\n".join(f"* {kind}: {'; '.join(sorted(found)) or 'not measured'}" for kind, found in kinds.items())


def machine(processor: Mapping[str, Any], threads: int) -> str:
    return f"{processor['name']} ({', '.join(processor['features']) or 'no features'}), {_threads(threads)}"


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _line(row: Row) -> list[str]:
    goal = NOT_KNOWN if row.goal is None else f"{row.sense} {row.layout.format(row.goal)}"
    found, source = NOT_KNOWN, NOT_KNOWN
    if row.measured is not None:
        found, source = row.layout.format(row.measured.value), row.measured.source
        if row.measured.low is not None and row.measured.high is not None:
            low, high = (row.layout.format(bound) for bound in (row.measured.low, row.measured.high))
            found += f" ({low} to {high})"
    return [row.model, row.target, row.what, goal, found, row.verdict, source]


def _ladder(model: str, run: Run) -> str:
    limits = run.manifest.get("recipe", {}).get("ladder", {})
    texts = [f"{name} {limits[name]}" for name in ("max_error", "max_discordance", "margin") if name in limits]
    steps = [[target, *_step(rung)] for target in TARGETS for rung in run.manifest.get("ladder", {}).get(target, [])]
    headings = ["Target", "Step", "Coverage", "Error", "Drop", "Discordance, %", "Samples", "Passed"]
    return f"### {model}\n\nLimits: {', '.join(texts) or 'none'}.\n\n{table(headings, steps)}"


def _step(rung: Mapping[str, Any]) -> Sequence[str]:
    score = rung.get("score") or {}
    figures = [f"{score[name]:.2f}" if name in score else NOT_KNOWN for name in ("drop", "discordance")]
    return [
        rung["name"],
        f"{rung['coverage']:.3f}",
        f"{rung['error']:.4f}",
        *figures,
        str(score.get("samples", NOT_KNOWN)),
        "yes" if rung["passed"] else "no",
    ]


if __name__ == "__main__":
    main()
