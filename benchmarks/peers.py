"""This project beside other quantizers: same FP32 model, same calibration pictures, same processors, same judge.

    .venv/bin/pip install -c constraints.txt -e '.[peers]'
    .venv/bin/pip install --no-deps neural-compressor==2.6
    .venv/bin/python benchmarks/peers.py PP-OCRv4_mobile_rec [--peers ours,nncf] [--report 200]

Writes results/peers-MODEL.md and a JSON beside it. Every quantizer, and every judgement of its result, runs in a
process of its own; what is not installed, fails, or takes too long or too much memory becomes a row with the reason.
Then one process for each runtime times FP32 as shipped, FP32 prepared and all results in turn. Native tools are told
the number of threads, and processes are kept to as many processors.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from main_job import POLL_SECONDS, resident_gigabytes
from peer_quantizers import PEERS
from peer_table import markdown
from peer_worker import Task

from quant.arrays import write_arrays
from quant.job import Options, calibration_feeds, prepared_stage, start
from quant.manifest import processor, versions
from quant.recipe import load_recipe
from quant.source import without_places
from quant.target import TargetName

WORKER = Path(__file__).with_name("peer_worker.py")
PACKAGES = ("nncf", "neural-compressor")
PLACES = ("--out", "--work", "--model-dir")
RESULTS = Path(__file__).parents[1] / "results"
Limits = tuple[float, float]
"""Seconds and GB of a process and its children."""


def main() -> None:
    arguments = _arguments()
    overrides = arguments.overrides
    samples = arguments.samples or load_recipe(arguments.model, overrides).calibration.samples
    overrides = [*overrides, *(f"{key}.samples={samples}" for key in ("calibration", "paddleslim"))]
    with tempfile.TemporaryDirectory(prefix="peers-") as temporary:
        work = Path(arguments.work or temporary).absolute()
        report = compared(arguments, overrides, work)
    out = arguments.out or RESULTS / f"peers-{arguments.model}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    out.write_text(markdown(report), encoding="utf-8")
    print(f"written: {out}, {out.with_suffix('.json')}")


def compared(arguments: argparse.Namespace, overrides: list[str], work: Path) -> dict[str, Any]:
    """The whole comparison as the JSON that is written."""
    task = first_step(arguments.model, overrides, arguments.threads, work, arguments.model_dir)
    task = replace(task, report=arguments.report, seconds=arguments.seconds)
    limits = (60 * arguments.minutes, arguments.gigabytes)
    fold = measured(replace(task, kind="fold", folder=str(work / "folded")), work / "fold.json", *limits)
    rows = []
    for row in judged_rows(arguments.peers, task, work, limits):
        rows.append(row if not PEERS[row["peer"]].folded else {**row, "folding_seconds": fold.get("seconds")})
        told = row.get("reason") or f"drop {row['drop']:.2f} ({row['drop_upper95']:.2f}), {row['seconds']:.1f} s"
        print(f"{row['label']} on {row['target']}: {row['status']}, {told}", flush=True)
    add_times(rows, task, work, limits)
    return {
        "schema": 1,
        "model": arguments.model,
        "command": _command(sys.argv[1:]),
        "processor": processor(),
        "versions": {**versions(), **{name: package_version(name) for name in PACKAGES}},
        "threads": arguments.threads,
        "calibration": task.inputs().count,
        "latency_shape": load_recipe(arguments.model, overrides).latency.shape,
        "rows": rows,
    }


def first_step(model: str, overrides: list[str], threads: int, work: Path, model_dir: Path | None = None) -> Task:
    """What every quantizer starts from: the model as shipped, and in `work` the pre-processed calibration pictures."""
    job = start(load_recipe(model, overrides), Options(work, threads, lambda *_: None, model_dir))
    feeds = work / "feeds"
    feeds.mkdir(parents=True)
    for count, feed in enumerate(calibration_feeds(job, "calibration pictures"), start=1):
        write_arrays(feeds / f"{count:06d}.npz", **feed)
    return Task(
        kind="quantize",
        peer="",
        target="onnxruntime",
        folder="",
        model=model,
        overrides=overrides,
        threads=threads,
        model_dir=str(model_dir.absolute()) if model_dir else None,
        shipped=str(prepared_stage(job) / "shipped"),
        feeds=str(feeds),
    )


def judged_rows(peers: Sequence[str], task: Task, work: Path, limits: Limits) -> Iterator[dict[str, Any]]:
    """A row for every quantizer and runtime."""
    for name in peers:
        peer = PEERS[name]
        made: dict[str, Any] = {}
        for target in peer.targets:
            folder = artifact_folder(work, name, target)
            step = replace(task, peer=name, target=target, folder=str(folder))
            if peer.each or not made:
                made = measured(step, folder.parent / "quantize.json", *limits)
            row = {"peer": name, "label": peer.label, "target": target, **made}
            if made["status"] == "done":
                judged = measured(replace(step, kind="judge"), folder.parent / f"judge-{target}.json", *limits)
                known = judged.get("coverage", made["coverage"])
                row |= {**judged, "peak_mb": made["peak_mb"], "coverage": made["coverage"] if known is None else known}
                row["status"] = "judged" if judged["status"] == "done" else judged["status"]
            if "reason" in row:
                row["reason"] = placeless(row["reason"], work)
            yield row


def add_times(rows: list[dict[str, Any]], task: Task, work: Path, limits: Limits) -> None:
    """Give every judged row its cells, from one process for each runtime."""
    judged = [row for row in rows if row["status"] == "judged"]
    for target in dict.fromkeys(row["target"] for row in judged):
        here = [row for row in judged if row["target"] == target]
        artifacts = {row["peer"]: str(artifact_folder(work, row["peer"], target)) for row in here}
        step = replace(task, kind="time", target=target, artifacts=artifacts)
        found = measured(step, work / f"time-{target}.json", *limits)
        for row in here:
            row["cells"] = found["cells"][row["peer"]] if found["status"] == "done" else []
            row["not_timed"] = placeless(found.get("reason", ""), work)
        print(f"times on {target}: {found.get('reason', 'done')}, peak {found['peak_mb']:.0f} MB", flush=True)


def artifact_folder(work: Path, name: str, target: TargetName) -> Path:
    """Where a quantizer leaves its result for a target."""
    return work / (f"{name}-{target}" if PEERS[name].each else name) / "artifact"


def measured(task: Task, file: Path, seconds: float, gigabytes: float) -> dict[str, Any]:
    """Run a task in a process of its own.

    Returns:
        What it wrote, `status` (done, failed or skipped), and `peak_mb` of its processes together.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    task.save(file)
    threads = {name: str(task.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    environment = {**os.environ, **threads, "FLAGS_enable_pir_api": "0", "GLOG_minloglevel": "2"}
    with file.with_suffix(".log").open("wb") as log:
        # Some quantizers leave files in the working folder.
        command = [sys.executable, str(WORKER), str(file)]
        child = psutil.Popen(command, stdout=log, stderr=log, env=environment, cwd=file.parent)
        peak, reason = _watched(child, seconds, gigabytes)
    result = file.with_suffix(".result.json")
    if not reason and not result.is_file():
        reason = f"the process ended with {child.returncode}"
    found = {"status": "failed", "reason": reason} if reason else json.loads(result.read_text(encoding="utf-8"))
    return {"status": "done", **found, "peak_mb": 1000 * peak}


def _watched(child: psutil.Popen, seconds: float, gigabytes: float) -> tuple[float, str]:
    """Peak GB of a process and its children, and why they were stopped."""
    peak, end, reason = 0.0, time.monotonic() + seconds, ""
    while child.poll() is None:
        peak = max(peak, resident_gigabytes(child))
        if peak > gigabytes:
            reason = f"stopped: it took more than {gigabytes:g} GB"
        elif time.monotonic() > end:
            reason = f"stopped: not done in {seconds / 60:g} minutes"
        if reason:
            for process in [*child.children(recursive=True), child]:
                process.kill()
            child.wait()
        time.sleep(POLL_SECONDS)
    return peak, reason


def _command(words: list[str]) -> str:
    """What was called, without places of this machine."""
    kept, rest = ["python", "benchmarks/peers.py"], iter(words)
    for word in rest:
        if word in PLACES:
            next(rest)
        elif not word.startswith(tuple(f"{option}=" for option in PLACES)):
            kept.append(word)
    return shlex.join(kept)


def placeless(reason: str, work: Path) -> str:
    """A reason without places of this machine."""
    return without_places(reason.replace(str(work), "WORK"))


def package_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, help="calibration pictures; the recipe's number by default")
    parser.add_argument("--report", type=int, help="pictures of the report split; all by default")
    parser.add_argument("--peers", type=_peers, default=list(PEERS), help=f"some of {','.join(PEERS)}")
    parser.add_argument("--out", type=Path, help="Markdown file; results/peers-MODEL.md by default")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model-dir", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--minutes", type=float, default=60, help="limit of a process")
    parser.add_argument("--gigabytes", type=float, default=16, help="limit of a process")
    parser.add_argument("--seconds", type=float, default=15, help="for each input shape, all models in turn")
    parser.add_argument("--work", type=Path, help="empty folder that keeps artifacts and logs")
    return parser.parse_args()


def _peers(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"no quantizer '{unknown[0]}'; known: {', '.join(PEERS)}")
    return names


if __name__ == "__main__":
    main()
