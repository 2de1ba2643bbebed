"""Where the time of quantizing goes, step by step, from the folded model to the checked artifact, without a search.

    .venv/bin/python benchmarks/quantization_time.py [MODEL ...] [--targets onnxruntime,openvino]

Beside the steps stands what one pass of the FP32 model over the same pictures takes: no calibration can take less.
Numbers go to `results/quantization-time.json` and, as a table, to `results/quantization-time.md`. Other quantizers on
the same pictures: `peers.py`.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import tempfile
import time
from pathlib import Path
from typing import Any, cast, get_args

from peer_quantizers import Inputs, prepare_ours, quantize_ours

from quant.job import Job, Options, calibration_feeds, prepared_graph
from quant.manifest import processor
from quant.runtime import onnx_session
from quant.target import TargetName

RESULTS = Path(__file__).parents[1] / "results" / "quantization-time.json"
MODELS = ("PP-OCRv4_mobile_rec", "PP-OCRv4_mobile_det")
STEPS = {
    "equalizing channels": ("make_equalizers",),
    "histograms": ("collect_statistics",),
    "second moments": ("collect_moments",),
    "rounding weights": ("round_by_moments",),
    "ranges by the readers' error": ("_with_best_ranges",),
    "biases, front to back": ("sequential_biases",),
    "artifact: writing, comparing with the plan": ("export_artifact", "check_artifact"),
}
"""Functions of the product by the name of the step."""


def main() -> None:
    arguments = _parsed()
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for model in arguments.models or MODELS:
        for target in arguments.targets.split(","):
            if target not in get_args(TargetName):
                raise SystemExit(f"no target '{target}'; there are {', '.join(get_args(TargetName))}")
            with tempfile.TemporaryDirectory() as place:
                row = measured(model, cast(TargetName, target), Path(place))
            rows[f"{model} {target}"] = row
            print(json.dumps(row), flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(table(list(rows.values())), encoding="utf-8")


def measured(model: str, target: TargetName, place: Path) -> dict[str, Any]:
    threads, known = os.cpu_count() or 1, processor()
    inputs = Inputs(model, [], Options(place, threads, lambda *_: None), place, place, target)
    job = prepare_ours(inputs, search=False)
    one_pass = _one_pass(job)
    profile = cProfile.Profile()
    start = time.perf_counter()
    profile.runcall(quantize_ours, inputs, job, place / "made" / "artifact", False)
    seconds = time.perf_counter() - start
    steps = {step: sum(_seconds(profile, name) for name in names) for step, names in STEPS.items()}
    steps["the rest"] = seconds - sum(steps.values())
    return {
        "model": model,
        "target": target,
        "pictures": len(job.selection.calibration),
        "processor": f"{known['name']} ({', '.join(known['features'])}), {threads} threads",
        "one_pass": round(one_pass, 1),
        "seconds": round(seconds, 1),
        "steps": {step: round(value, 1) for step, value in steps.items()},
    }


def _one_pass(job: Job) -> float:
    feeds = list(calibration_feeds(job, "reading"))
    session = onnx_session(prepared_graph(job).to_model(), job.options.threads)
    session.run(feeds[0])
    start = time.perf_counter()
    for feed in feeds:
        session.run(feed)
    return time.perf_counter() - start


def _seconds(profile: cProfile.Profile, function: str) -> float:
    """Cumulated seconds of a function of the product."""
    entries = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    ours = [entry for (file, _, name), entry in entries if name == function and Path(file).parent.name == "quant"]
    found = [float(entry[3]) for entry in ours]
    if len(found) > 1:
        raise ValueError(f"several functions are called {function}")
    return found[0] if found else 0.0


def table(rows: list[dict[str, Any]]) -> str:
    ordered = sorted(rows, key=lambda row: (row["model"], row["target"]))
    names = list(dict.fromkeys(step for row in ordered for step in row["steps"]))
    heads = [f"{row['model']}, {row['target']}" for row in ordered]
    lines = [
        "# Time of quantizing",
        "",
        "Written by `benchmarks/quantization_time.py`: seconds from the folded model to the checked artifact, without "
        f"a search. {'; '.join(sorted({row['processor'] for row in ordered}))}.",
        "",
        f"| Step | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
        f"| pictures | {' | '.join(str(row['pictures']) for row in ordered)} |",
        f"| one pass of FP32 | {' | '.join(str(row['one_pass']) for row in ordered)} |",
        *(f"| {name} | {' | '.join(str(row['steps'].get(name, '')) for row in ordered)} |" for name in names),
        f"| **all** | {' | '.join(str(row['seconds']) for row in ordered)} |",
    ]
    return "\n".join(lines) + "\n"


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--targets", default="onnxruntime,openvino")
    return parser.parse_args()


if __name__ == "__main__":
    main()
