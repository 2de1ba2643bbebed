"""One step of the comparison in a process of its own: `python benchmarks/peer_worker.py TASK.json`.

So time and memory belong to one quantizer, and a crash in native code costs one row. The result is a JSON beside the
task: `{"seconds": ...}`, the judgement, or `{"status": "skipped" or "failed", "reason": ...}`.
"""

from __future__ import annotations

import cProfile
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import psutil
from peer_coverage import IR, coverage, executed_share
from peer_quantizers import INSTALL, PEERS, Inputs

from eval.dataset import by_shape, pick, picture_of
from eval.evaluation import compare, evidence
from eval.gate import judge
from eval.metric import make_metric
from eval.statistics import estimate_drop
from quant.job import Options, fp32_folders, prepared_stage
from quant.judging import outcomes_of
from quant.latency import SECONDS, time_turns
from quant.runtime import Precision, Session, model_bytes, open_session, openvino_session
from quant.stage import StageStore
from quant.target import TargetName

PROFILE = "profile.pstats"


@dataclass(frozen=True)
class Task:
    """A step.

    Attributes:
        kind: `fold` makes what *ours, no search* begins with; `profile` quantizes, and leaves `profile.pstats` beside
            the result; `time` times the results of all quantizers on a target in turn.
        folder: of the quantizer's result.
        report: how many pictures of the report split; None for all.
        seconds: for each input shape that is timed.
        artifacts: folders of the results to time, by quantizer.
    """

    kind: Literal["fold", "quantize", "profile", "judge", "time"]
    peer: str
    target: TargetName
    folder: str
    model: str
    overrides: list[str]
    threads: int
    model_dir: str | None
    shipped: str
    feeds: str
    report: int | None = None
    seconds: float = SECONDS
    artifacts: dict[str, str] = field(default_factory=dict)

    def inputs(self) -> Inputs:
        model_dir = Path(self.model_dir) if self.model_dir else None
        options = Options(Path(self.folder), self.threads, lambda *_: None, model_dir)
        folders = (Path(self.shipped), Path(self.feeds))
        return Inputs(self.model, self.overrides, options, *folders, self.target)

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")


def main(file: Path) -> None:
    task = Task(**json.loads(file.read_text(encoding="utf-8")))
    _limit_processors(task.threads)
    try:
        result = _STEPS[task.kind](task)
    except ImportError as error:
        install = PEERS[task.peer].install if task.peer else INSTALL
        result = {"status": "skipped", "reason": f"{error}; install it: {install}"}
    except Exception as error:  # whatever a quantizer raises is its row's reason
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        result = {"status": "failed", "reason": f"{type(error).__name__}: {lines[0][:300]}"}
    file.with_suffix(".result.json").write_text(json.dumps(result), encoding="utf-8")


def _limit_processors(threads: int) -> None:
    """Some quantizers know no number of threads; all get the same processors."""
    if hasattr(os, "sched_setaffinity"):
        process = psutil.Process()
        process.cpu_affinity(process.cpu_affinity()[:threads])


def _folded(task: Task) -> dict[str, Any]:
    job = task.inputs().job()
    fresh = replace(job, store=StageStore(Path(task.folder)))
    start = time.perf_counter()
    prepared_stage(fresh)
    return {"seconds": time.perf_counter() - start}


def _quantized(task: Task) -> dict[str, Any]:
    peer, inputs, folder = PEERS[task.peer], task.inputs(), Path(task.folder)
    folder.mkdir(parents=True)
    if peer.package:
        import_module(peer.package)
    prepared = peer.prepare(inputs)
    profile = cProfile.Profile() if task.kind == "profile" else None
    start = time.perf_counter()
    with profile or nullcontext():
        known = peer.quantize(inputs, prepared, folder)
    if profile:
        profile.dump_stats(folder.parent / PROFILE)
    return {"seconds": time.perf_counter() - start, "coverage": known}


def _judged(task: Task) -> dict[str, Any]:
    job, artifact, target = task.inputs().job(), Path(task.folder), task.target
    recipe, metric = job.recipe, make_metric(job.recipe.metric)
    fp32 = fp32_folders(job, target)
    report = job.selection.report
    samples = report if task.report is None else pick(report, task.report, recipe.seed)

    def open_pair() -> tuple[Session, Session]:
        return open_session(target, fp32["fp32"], task.threads), _open(target, artifact, task.threads)

    if (artifact / IR).is_file():
        found = compare(open_pair, by_shape(samples), job.adapter, metric)
    else:
        found = outcomes_of(job, target, artifact, samples)
    pictures = [picture_of(sample) for sample in found.ids]
    estimate = estimate_drop(metric, found.fp32, found.int8, seed=recipe.seed, pictures=pictures)
    bounds = (estimate.drop, estimate.relative_drop, estimate.drop_upper95, estimate.relative_drop_upper95)
    return {
        **asdict(estimate),
        "gate": judge(*bounds, recipe.gate, evidence(found.datasets)).model_dump(),
        "bytes": _bytes(target, artifact),
        "fp32_bytes": model_bytes(target, fp32["fp32"]),
        "coverage": coverage(artifact, recipe.latency.shape, task.threads),
        "executed_coverage": executed_share(target, artifact, recipe.latency.shape, task.threads),
    }


def _timed(task: Task) -> dict[str, Any]:
    """FP32 as shipped, FP32 prepared and all results take turns, so that noise disturbs them alike."""
    job, target = task.inputs().job(), task.target
    fp32 = fp32_folders(job, target)

    def open_all(precision: Precision) -> Mapping[str, Session]:
        folders = {**fp32, **{peer: Path(folder) for peer, folder in task.artifacts.items()}}
        return {name: _open(target, folder, task.threads, precision) for name, folder in folders.items()}

    found = time_turns(job, target, open_all, task.seconds)
    return {"cells": {peer: [turns.cell(peer).model_dump() for turns in found] for peer in task.artifacts}}


def _open(target: TargetName, folder: Path, threads: int, precision: Precision = "f32") -> Session:
    ir = folder / IR
    if ir.is_file():
        return openvino_session(ir, threads, precision)
    return open_session(target, folder, threads, precision)


def _bytes(target: TargetName, folder: Path) -> int:
    ir = [folder / IR, folder / "inference.bin"]
    return sum(path.stat().st_size for path in ir) if ir[0].is_file() else model_bytes(target, folder)


_STEPS = {"fold": _folded, "quantize": _quantized, "profile": _quantized, "judge": _judged, "time": _timed}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
