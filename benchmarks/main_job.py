"""Time and peak memory of the whole main job, and how fast the command line answers.

    .venv/bin/python benchmarks/main_job.py [MODEL ...]

Every run starts from an empty cache of stages, so that nothing is reused; downloaded or generated
data is made beforehand and does not count. Limits: see LIMITS below (minutes, GB, seconds).
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from quant.recipe import load_recipe
from quant.selection import find_datasets
from quant.source import resolve_model

QUANT = Path(sys.executable).parent / "quant"
LIMITS = {"PP-OCRv4_mobile_rec": 5.0, "PP-OCRv4_mobile_det": 10.0}
MEMORY_GB = 3.0
ANSWER_SECONDS = 0.4
REPEATS = 15
POLL_SECONDS = 0.1


def main(models: list[str]) -> None:
    for arguments in (["--help"], ["list"]):
        print(f"quant {' '.join(arguments)}: {answer_seconds(arguments):.2f} s (limit {ANSWER_SECONDS})")
    for model in models:
        minutes, gigabytes, code = main_job(model)
        limit = LIMITS.get(model)
        used = f"{minutes:.1f} min (limit {limit}), {gigabytes:.2f} GB (limit {MEMORY_GB})"
        print(f"quant run {model}: {used}, exit {code}")


def answer_seconds(arguments: list[str]) -> float:
    """Median wall time of a short command, in seconds."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run([QUANT, *arguments], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main_job(model: str) -> tuple[float, float, int]:
    """Minutes, peak resident GB of all processes together, and exit code of a run without reused stages."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QUANT_CACHE"] = str(Path(folder) / "cache")
        recipe = load_recipe(model)
        resolve_model(recipe)
        find_datasets(recipe, (), None)
        start = time.perf_counter()
        job = psutil.Popen([QUANT, "run", model, "--quiet", "--out", folder])
        peak = 0.0
        while job.poll() is None:
            peak = max(peak, resident_gigabytes(job))
            time.sleep(POLL_SECONDS)
        return (time.perf_counter() - start) / 60, peak, job.returncode


def resident_gigabytes(job: psutil.Popen) -> float:
    """Memory of a process and all its children together; shared pages count for each."""
    total = 0
    for process in [job, *job.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 1e9


if __name__ == "__main__":
    main(sys.argv[1:] or list(LIMITS))
