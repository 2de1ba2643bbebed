"""Seconds of quantizing without a search, from the folded model to the checked artifact, beside NNCF's and by steps.

    .venv/bin/python benchmarks/quantization_time.py [MODEL ...] [--targets onnxruntime,openvino,paddle] [--samples 128]

Ours and NNCF take turns on the same pictures and processors, each in a process of its own (see `peers.py`, whose head
says how to install NNCF). The steps come from a run of their own under a profiler, which makes it slower. Beside them
stands what one pass of the FP32 model over the same pictures takes: no calibration can take less. Most of the sets'
pictures are given to calibration here, since no accuracy is judged. Numbers go to `results/quantization-time.json` and,
as a table, to `results/quantization-time.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import pstats
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import peers
from calibration_memory import MOST_CALIBRATE
from peer_quantizers import Inputs
from peer_table import NOT_KNOWN
from peer_worker import PROFILE, Task

from quant.card import markdown_table
from quant.job import prepared_graph
from quant.manifest import processor
from quant.runtime import onnx_session
from quant.target import TargetName

RESULTS = Path(__file__).parents[1] / "results" / "quantization-time.json"
MODELS = ("PP-OCRv4_mobile_rec", "PP-OCRv4_mobile_det")
TARGETS = ("onnxruntime", "openvino")
MINUTES, GIGABYTES = 20, 16
"""Limits of a process."""

STEPS = {
    "equalizing channels": "make_equalizers",
    "histograms": "collect_statistics",
    "PaddleSlim": "slim_scales",
    "second moments": "collect_moments",
    "rounding weights": "round_by_moments",
    "ranges by the readers' error": "_with_best_ranges",
    "biases, front to back": "sequential_biases",
    "artifact: writing": "export_artifact",
    "artifact: comparing with the plan": "check_artifact",
}
"""Functions of the product by the name of the step."""


def main() -> None:
    arguments = _parsed()
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for model in arguments.models or MODELS:
        overrides = [MOST_CALIBRATE, *(f"{key}.samples={arguments.samples}" for key in ("calibration", "paddleslim"))]
        with tempfile.TemporaryDirectory(prefix="quantization-time-") as place:
            first = peers.first_step(model, overrides, os.cpu_count() or 1, Path(place))
            for target in arguments.targets:
                row = measured(replace(first, peer="ours", target=target), Path(place) / target, arguments.rounds)
                rows[f"{model} {target}"] = row
                print(json.dumps(row), flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(table(list(rows.values())), encoding="utf-8")


def measured(ours: Task, place: Path, rounds: int) -> dict[str, Any]:
    """A row: medians of several rounds in which ours and NNCF took turns, and the steps of one more of ours.

    Raises:
        SystemExit: ours failed.
    """
    nncf, known, inputs = replace(ours, peer="nncf", target="openvino"), processor(), ours.inputs()
    own, other = [], []
    for turn in range(rounds):
        own.append(_required(_run(ours, place / f"ours-{turn}")))
        other.append(_run(nncf, place / f"nncf-{turn}"))
    profiled = _required(_run(replace(ours, kind="profile"), place / "profiled"))["seconds"]
    steps = _steps(place / "profiled" / PROFILE)
    steps["the rest"] = profiled - sum(steps.values())
    reasons = [_reason(found, place) for found in other if found["status"] != "done"]
    return {
        "model": ours.model,
        "target": ours.target,
        "pictures": inputs.count,
        "processor": f"{known['name']} ({', '.join(known['features'])}), {ours.threads} threads",
        "one_pass": round(_one_pass(inputs), 1),
        "seconds": _median(own),
        "profiled_seconds": round(profiled, 1),
        "steps": {step: round(value, 1) for step, value in steps.items()},
        "nncf_seconds": None if reasons else _median(other),
        "nncf_reason": reasons[0] if reasons else "",
        "nncf": peers.package_version("nncf"),
    }


def _run(task: Task, place: Path) -> dict[str, Any]:
    return peers.measured(replace(task, folder=str(place / "artifact")), place / "task.json", 60 * MINUTES, GIGABYTES)


def _reason(found: dict[str, Any], place: Path) -> str:
    return "not installed" if found["status"] == "skipped" else peers.placeless(found["reason"], place)


def _required(found: dict[str, Any]) -> dict[str, Any]:
    if found["status"] != "done":
        raise SystemExit(f"ours did not quantize: {found['reason']}")
    return found


def _median(found: list[dict[str, Any]]) -> float:
    return round(statistics.median(one["seconds"] for one in found), 1)


def _one_pass(inputs: Inputs) -> float:
    """Seconds of the folded FP32 model on all pictures, one after the other; reading does not count."""
    session = onnx_session(prepared_graph(inputs.job()).to_model(), inputs.options.threads)
    session.run(next(inputs.read_feeds()))
    total = 0.0
    for feed in inputs.read_feeds():
        start = time.perf_counter()
        session.run(feed)
        total += time.perf_counter() - start
    return total


def _steps(file: Path) -> dict[str, float]:
    """Cumulated seconds of the product's functions that are steps and were called."""
    entries = pstats.Stats(str(file)).stats.items()  # type: ignore[attr-defined]
    ours = [(name, float(entry[3])) for (source, _, name), entry in entries if Path(source).parent.name == "quant"]
    found = {step: [seconds for name, seconds in ours if name == function] for step, function in STEPS.items()}
    if ambiguous := [STEPS[step] for step, seconds in found.items() if len(seconds) > 1]:
        raise ValueError(f"several functions are called {ambiguous[0]}")
    return {step: seconds[0] for step, seconds in found.items() if seconds}


def table(rows: list[dict[str, Any]]) -> str:
    ordered = sorted(rows, key=lambda row: (row["model"], row["target"]))
    names = [step for step in (*STEPS, "the rest") if any(step in row["steps"] for row in ordered)]
    columns = [
        [
            f"{row['model']}, {row['target']}",
            row["pictures"],
            f"**{row['seconds']}**",
            row["nncf_seconds"] or row["nncf_reason"],
            f"{row['seconds'] / row['nncf_seconds']:.2f}" if row["nncf_seconds"] else NOT_KNOWN,
            row["one_pass"],
            *(row["steps"].get(name, NOT_KNOWN) for name in names),
            row["profiled_seconds"],
        ]
        for row in ordered
    ]
    heads = ("Seconds", "pictures", "**ours, whole**", "NNCF, whole", "ours / NNCF", "one pass of FP32")
    lines = zip((*heads, *(f"profiled: {name}" for name in (*names, "whole"))), *columns, strict=True)
    headings, *cells = ([str(cell) for cell in line] for line in lines)
    return "\n".join(
        [
            "# Time of quantizing",
            "",
            "Written by `benchmarks/quantization_time.py`: seconds without a search, reading of sets and start-up left "
            "out. Ours goes from the folded model to the checked artifact, NNCF from the imported model to its file; "
            "they took turns on the same pictures, each in a process of its own. The steps are those of a run of ours "
            f"under a profiler, which slows it down. {'; '.join(sorted({row['processor'] for row in ordered}))}; NNCF "
            f"{', '.join(sorted({row['nncf'] for row in ordered}))}.",
            "",
            markdown_table(headings, cells, [False, *[True] * len(columns)]),
            "",
        ]
    )


def _targets(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in get_args(TargetName)]:
        raise argparse.ArgumentTypeError(f"no target '{unknown[0]}'; there are {', '.join(get_args(TargetName))}")
    return names


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--targets", type=_targets, default=TARGETS, help=f"default: {','.join(TARGETS)}")
    parser.add_argument("--samples", type=int, default=128, help="pictures, fewer where the sets have fewer")
    parser.add_argument("--rounds", type=int, default=1, help="turns of ours and NNCF, of which the median is taken")
    return parser.parse_args()


if __name__ == "__main__":
    main()
