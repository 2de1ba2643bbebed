"""PaddleSlim's own methods that change weights, timed and judged: `quant_recon_static`, and ACT's QAT.

    .venv/bin/python benchmarks/slim_training.py [MODEL ...] [--parts recon,act] [--seconds 45] [--iterations 24]

Every part runs apart, within limits, on a few calibration pictures, and what it gives is judged by Paddle on the report
split, by the recipe's metric and by the error of the outputs, beside FP32. PaddleSlim's PTQ on the same pictures stands
beside it. Nothing is extrapolated: seconds and iterations are those that were measured. Writes
results/slim-training.json and, as a table, results/slim-training.md; parts that are not asked for stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peer_table import NOT_KNOWN, table
from peer_worker import Task
from peers import first_step, package_version, placeless

from quant.child import LimitExceeded, Limits, child_environment, ending, run_child
from quant.manifest import processor, versions
from quant.stage import code_digest

WORKER = Path(__file__).with_name("slim_training_worker.py")
RESULTS = Path(__file__).parents[1] / "results" / "slim-training.json"
MODELS = ("PP-OCRv4_mobile_rec", "PP-OCRv4_mobile_det")
_HEADINGS = ("Model", "Method", "Set-up s", "Layers", "Iterations", "s an iteration", "All s", "Peak MB")
_JUDGED = ("n", "FP32", "INT8", "Drop (≤95 %)", "Error of outputs", "Remark")
_WORDS = (
    "Set-up = seconds until the first iteration: reading the program, calibration, building what is trained. Layers = "
    "those that got an iteration, of all. Seconds of an iteration: median of the first layer and of the last one that "
    "was trained; one picture each. All = seconds of the process's work, saving included. Drop = FP32 - INT8 in "
    "points, both run by Paddle; in brackets its one-sided 95 % upper bound (paired bootstrap). Error of outputs = "
    "sum|INT8 - FP32| / sum|FP32|, mean over pictures. Peak = resident memory, sampled."
)


@dataclass(frozen=True)
class Part:
    """A row for each model.

    Attributes:
        part: what the worker does.
        options: of the worker.
        mends: what of Paddle is replaced for PaddleSlim (`slim_training_worker.MENDS`).
    """

    label: str
    part: str
    options: dict[str, Any] = field(default_factory=dict)
    mends: tuple[str, ...] = ()


MENDED = ("operators", "names")
PARTS = {
    "ptq": Part("PTQ, hist", "ptq"),
    "recon-released": Part("quant_recon_static as released", "recon", {"qdrop": False}),
    "recon-operators": Part("the same, sigmoid and floor mended", "recon", {"qdrop": False}, ("operators",)),
    "recon": Part("the same, names mended too: AdaRound", "recon", {"qdrop": False}, MENDED),
    "qdrop": Part("the same with QDrop", "recon", {"qdrop": True}, MENDED),
    "act": Part("ACT: QuantAware and Distillation", "act"),
}


def main() -> None:
    arguments = _arguments()
    rows: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.is_file() else {}
    for model in arguments.models or MODELS:
        with tempfile.TemporaryDirectory(prefix="slim-training-") as place:
            work = Path(place)
            step = first_step(model, [f"calibration.samples={arguments.pictures}"], 1, work, arguments.model_dir)
            for name in arguments.parts:
                rows[f"{model} {name}"] = row = measured(arguments, step, PARTS[name], work / name)
                print(json.dumps(row), flush=True)
    ordered = {f"{model} {name}": None for model in MODELS for name in PARTS}
    kept = {key: rows[key] for key in [*ordered, *rows] if key in rows}
    report = {
        "schema": 1,
        "processor": processor(),
        "versions": {**versions(), "paddleslim": package_version("paddleslim")},
        "rows": kept,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(page(report), encoding="utf-8")


def measured(arguments: argparse.Namespace, step: Task, part: Part, place: Path) -> dict[str, Any]:
    """A row: what the part took, how it ended, and what its program is worth."""
    place.mkdir()
    step = replace(step, target="paddle", folder=str(place / "artifact"), report=arguments.report)
    limits = Limits(60 * arguments.minutes, int(arguments.gigabytes * 2**30))
    job = {
        **part.options,
        "part": part.part,
        "mends": part.mends,
        "folder": step.folder,
        "pictures": arguments.pictures,
        "epochs": arguments.epochs,
        "train_seconds": arguments.seconds,
        "iterations": arguments.iterations,
        "task": asdict(step),
    }
    reason, peak = run(job, place / "part.json", limits)
    events = place / "part.events"
    told = events.read_text(encoding="utf-8").splitlines() if events.is_file() else []
    row = {
        "model": step.model,
        "label": part.label,
        "pictures": arguments.pictures,
        "code": code_digest(),
        "peak_mb": peak,
        **summary([json.loads(line) for line in told]),
    }
    if not reason:
        reason, _ = run({"part": "judge", "task": asdict(step)}, place / "judge.json", limits)
        if not reason:
            row |= json.loads((place / "judge.result.json").read_text(encoding="utf-8"))
    return {**row, "reason": placeless(reason, place)}


def run(job: dict[str, Any], file: Path, limits: Limits) -> tuple[str, float]:
    """Why the worker failed, '' where it did not, and the peak of its memory in MB."""
    import psutil

    file.write_text(json.dumps(job), encoding="utf-8")
    log, peak = file.with_suffix(".log"), 0

    def look() -> None:
        nonlocal peak
        family = psutil.Process().children(recursive=True)
        peak = max(peak, sum(_resident(process) for process in family))

    environment = child_environment(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", FLAGS_enable_pir_api="0")
    command = [sys.executable, str(WORKER), str(file)]
    try:
        code = run_child(command, log, environment, limits, look)
    except LimitExceeded as error:
        return f"ended: it {error}", peak / 1e6
    return (ending(code, log) if code else ""), peak / 1e6


def _resident(process: Any) -> int:
    import psutil

    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def summary(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the worker's events say; of a part that trained nothing, its seconds alone."""
    iterations = [event for event in events if event["event"] == "iteration"]
    seconds: dict[int, list[float]] = {}
    for event in iterations:
        seconds.setdefault(event["layer"], []).append(event["seconds"])
    medians = {layer: statistics.median(times) for layer, times in seconds.items()}
    layers = [event["layers"] for event in events if "layers" in event]
    return {
        "setup_seconds": iterations[0]["at"] - iterations[0]["seconds"] if iterations else None,
        "layers": layers[-1] if layers else None,
        "trained_layers": len(medians) if layers else None,
        "iterations": len(iterations),
        "first_layer_seconds": next(iter(medians.values()), None),
        "last_layer_seconds": next(reversed(medians.values()), None),
        "all_iterations_seconds": sum(event["seconds"] for event in iterations),
        "losses": [iterations[0]["loss"], iterations[-1]["loss"]] if iterations else [],
        "seconds": next((event["at"] for event in events if event["event"] == "saved"), None),
    }


def page(report: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = list(report["rows"].values())
    known, numbers = report["processor"], sorted({row["pictures"] for row in rows})
    codes = ", ".join(f"`{code}`" for code in dict.fromkeys(row["code"] for row in rows))
    return (
        "\n\n".join(
            [
                "# PaddleSlim's reconstruction and QAT",
                "Generated by `benchmarks/slim_training.py`; do not edit.",
                f"Processor: {known['name']} ({', '.join(known['features']) or 'no features'}), 1 thread. "
                f"Calibration pictures: {', '.join(map(str, numbers))}. Code {codes}. "
                f"Versions: {', '.join(f'{name} {version}' for name, version in report['versions'].items())}.",
                _WORDS,
                table([*_HEADINGS, *_JUDGED], [line(row) for row in rows]),
            ]
        )
        + "\n"
    )


def line(row: dict[str, Any]) -> list[str]:
    """Cells of a row."""
    layers = NOT_KNOWN if row["layers"] is None else f"{row['trained_layers']} of {row['layers']}"
    times = [_number(row[key], 2) for key in ("first_layer_seconds", "last_layer_seconds")]
    each = times[0] if times[0] == times[1] else " to ".join(times)
    cost = [_number(row["setup_seconds"], 0), layers, str(row["iterations"]), each]
    cost += [_number(row["seconds"], 0), _number(row["peak_mb"], 0)]
    judged = [NOT_KNOWN] * (len(_JUDGED) - 1)
    if "drop" in row:
        drop = f"{row['drop']:.2f} ({row['drop_upper95']:.2f})"
        judged = [str(row["samples"]), f"{row['fp32']:.2f}", f"{row['int8']:.2f}", drop, f"{row['output_error']:.4f}"]
    return [row["model"], row["label"], *cost, *judged, row["reason"]]


def _number(value: float | None, digits: int) -> str:
    return NOT_KNOWN if value is None else f"{value:.{digits}f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--pictures", type=int, default=4, help="of the calibration split")
    parser.add_argument("--epochs", type=int, default=1, help="of reconstruction, over the pictures, for each layer")
    parser.add_argument("--seconds", type=float, default=45, help="of reconstruction's iterations")
    parser.add_argument("--iterations", type=int, default=24, help="of ACT, a picture each")
    parser.add_argument("--report", type=int, default=64, help="pictures of the report split")
    parser.add_argument("--minutes", type=float, default=12, help="limit of a part")
    parser.add_argument("--gigabytes", type=float, default=6, help="limit of a part")
    parser.add_argument("--model-dir", type=Path)
    return parser.parse_args()


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part '{unknown[0]}'; known: {', '.join(PARTS)}")
    return names


if __name__ == "__main__":
    main()
