"""Peak memory and time of calibrating with few and with many pictures: memory must not grow with their number.

    .venv/bin/python benchmarks/calibration_memory.py MODEL [TARGET [PICTURES ...]]

Everything up to the plan in INT8 is run (equalizing, histograms, rounding, ranges, biases) in a process of its own.
A set with fewer pictures is gone through several times. Import, folding and making data come before and do not count.
Numbers go to `results/calibration-memory.json` and, as a table, to `results/calibration-memory.md`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from quant.job import Job

RESULTS = Path(__file__).parents[1] / "results" / "calibration-memory.json"
PICTURES = (32, 1024)
POLL_SECONDS = 0.05


def main(model: str, target: str, counts: list[int]) -> int:
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as place:
        watched(prepare, (model, place))
        for count in counts:
            gigabytes, seconds, code = watched(calibrate, (model, target, count, place))
            print(f"{model} {target}, {count} pictures: {gigabytes:.2f} GB, {seconds:.0f} s, exit {code}", flush=True)
            if code:
                return 1
            row = {"model": model, "target": target, "pictures": count}
            rows[f"{model} {target} {count}"] = {**row, "peak_gb": round(gigabytes, 2), "seconds": round(seconds)}
    RESULTS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(table(list(rows.values())), encoding="utf-8")
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Memory while calibrating",
        "",
        "Written by `benchmarks/calibration_memory.py`: peak of the process from equalizing to the plan in INT8.",
        "",
        "| Model | Target | Pictures | Peak, GB | Seconds |",
        "|---|---|---|---|---|",
    ]
    ordered = sorted(rows, key=lambda row: (row["model"], row["target"], row["pictures"]))
    keys = ("model", "target", "pictures", "peak_gb", "seconds")
    lines += [f"| {' | '.join(str(row[key]) for key in keys)} |" for row in ordered]
    return "\n".join(lines) + "\n"


def watched(work: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[float, float, int | None]:
    """Peak resident GB, seconds and exit code of a function in a process of its own."""
    worker = get_context("spawn").Process(target=work, args=arguments)
    start, peak = time.perf_counter(), 0
    worker.start()
    process = psutil.Process(worker.pid)
    while worker.is_alive():
        peak = max(peak, resident_bytes(process))
        time.sleep(POLL_SECONDS)
    return peak / 2**30, time.perf_counter() - start, worker.exitcode


def resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def prepare(model: str, place: str) -> None:
    from quant.job import prepared_stage

    prepared_stage(job_of(model, place))


def calibrate(model: str, target: str, count: int, place: str) -> None:
    from quant.planning import full_plan

    job = job_of(model, place)
    pictures = list(islice(cycle(job.selection.calibration), count))
    job = replace(job, selection=replace(job.selection, calibration=pictures))
    full_plan(job, next(choice for name, choice in job.recipe.targets.items() if name == target))


def job_of(model: str, place: str) -> Job:
    from quant.job import Options, start
    from quant.recipe import load_recipe
    from quant.stage import StageStore

    job = start(load_recipe(model), Options(Path(place), psutil.cpu_count() or 1, lambda *_: None))
    return replace(job, store=StageStore(Path(place)))


if __name__ == "__main__":
    model, target, *counts = sys.argv[1:] if len(sys.argv) > 2 else [sys.argv[1], "openvino"]
    sys.exit(main(model, target, [int(count) for count in counts] or list(PICTURES)))
