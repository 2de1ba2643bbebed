"""Peak memory and time of calibrating with few and with many pictures: memory must not grow with their number.

    .venv/bin/python benchmarks/calibration_memory.py [MODEL ...] [--targets onnxruntime,openvino] [--pictures 32,1024]

Everything up to the plan in INT8 is run (equalizing, histograms, rounding, ranges, biases) in a process of its own,
whose peak of resident memory the kernel keeps. Import, folding and making data come before and do not count. Most of
the sets' pictures are given to calibration, since no accuracy is judged; where they are still too few, they are gone
through several times. Numbers go to `results/calibration-memory.json` and, as a table, to
`results/calibration-memory.md`. The exit code is 1 where a limit is not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant.job import Job

RESULTS = Path(__file__).parents[1] / "results" / "calibration-memory.json"
LIMITS = {"PP-OCRv4_mobile_rec": 1.0e9, "PP-OCRv4_mobile_det": 1.2e9}
"""Bytes."""
LARGEST_GROWTH = 0.10
MOST_CALIBRATE = "data.splits={calibration: 0.9, search: 0.05, report: 0.05}"


def main() -> int:
    arguments = _parsed()
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for model in arguments.models or LIMITS:
        with tempfile.TemporaryDirectory(prefix="calibration-memory-") as place:
            apart(prepare, model, place)
            for target in arguments.targets:
                for count in arguments.pictures:
                    row = {"model": model, "target": target, "pictures": count}
                    row |= apart(calibrate, model, target, count, place)
                    rows[f"{model} {target} {count}"] = row
                    print(json.dumps(row), flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(table(list(rows.values())), encoding="utf-8")
    return int(any(exceeded(row, growth(row, list(rows.values()))) for row in rows.values()))


def growth(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """By what share the peak lies above that of the fewest pictures; None for these themselves."""
    same = [other for other in rows if (other["model"], other["target"]) == (row["model"], row["target"])]
    fewest = min(same, key=lambda other: int(other["pictures"]))
    return None if row is fewest else row["peak_bytes"] / fewest["peak_bytes"] - 1


def exceeded(row: dict[str, Any], grown: float | None) -> bool:
    return row["peak_bytes"] > LIMITS.get(row["model"], float("inf")) or (grown or 0) > LARGEST_GROWTH


def table(rows: list[dict[str, Any]]) -> str:
    from quant.card import markdown_table  # not above: what is measured is what calibrating needs

    numbers = ["Pictures", "different", "Peak, GB", "limit", "Growth, %", "limit", "Seconds"]
    lines = []
    for row in sorted(rows, key=lambda row: (row["model"], row["target"], row["pictures"])):
        limit, grown = LIMITS.get(row["model"]), growth(row, rows)
        lines.append(
            [
                row["model"],
                row["target"],
                f"{row['pictures']:,}",
                f"{row['different']:,}",
                f"{row['peak_bytes'] / 1e9:.2f}",
                f"{limit / 1e9:.1f}" if limit else "-",
                "-" if grown is None else f"{100 * grown:.1f}",
                "-" if grown is None else f"{100 * LARGEST_GROWTH:.0f}",
                str(row["seconds"]),
                "EXCEEDED" if exceeded(row, grown) else "kept",
            ]
        )
    text = (
        "Written by `benchmarks/calibration_memory.py`: peak resident memory of the process from equalizing to the "
        "plan in INT8, as the kernel keeps it; GB = 10^9 bytes. Growth: against the fewest pictures. Where fewer are "
        "*different* than asked for, the sets have no more, and they were gone through several times."
    )
    headings, right = ["Model", "Target", *numbers, "Verdict"], [False, False, *[True] * len(numbers), False]
    return "\n\n".join(["# Memory while calibrating", text, markdown_table(headings, lines, right)]) + "\n"


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def prepare(model: str, place: str) -> None:
    from quant.job import prepared_stage

    prepared_stage(job_of(model, 1, place))


def calibrate(model: str, target: str, count: int, place: str) -> dict[str, Any]:
    """What calibrating takes, from a process that does nothing else."""
    from quant.planning import full_plan

    job = job_of(model, count, place)
    different = job.selection.calibration
    pictures = list(islice(cycle(different), count))
    job = replace(job, selection=replace(job.selection, calibration=pictures))
    start = time.perf_counter()
    full_plan(job, next(choice for name, choice in job.recipe.targets.items() if name == target))
    seconds = round(time.perf_counter() - start)
    return {"different": len(different), "peak_bytes": peak_bytes(), "seconds": seconds}


def peak_bytes() -> int:
    """Of this process' resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def job_of(model: str, count: int, place: str) -> Job:
    from quant.job import Options, start
    from quant.recipe import load_recipe
    from quant.stage import StageStore

    recipe = load_recipe(model, [MOST_CALIBRATE, f"calibration.samples={count}"])
    job = start(recipe, Options(Path(place), os.cpu_count() or 1, lambda *_: None))
    return replace(job, store=StageStore(Path(place)))


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {' '.join(LIMITS)}")
    parser.add_argument("--targets", type=lambda text: text.split(","), default=["onnxruntime", "openvino"])
    parser.add_argument("--pictures", type=lambda text: [int(n) for n in text.split(",")], default=[32, 1024])
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
