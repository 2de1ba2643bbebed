"""Whole runs of a tiny model as a user starts them, killed at random moments and started again."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from test_pipeline import LINES, NAME, OWN, RECIPE, SETS, colour_reader, write_lines, write_model

from quant.child import child_environment
from quant.manifest import CARD
from quant.verification import verify

_QUANT = [sys.executable, "-c", "from quant.cli import main; main()"]
MOST_STEPS = 3
"""That end between a start and the kill."""

_SECONDS = 900
_TIMED_LINES = ("* Speed at ", "INT8 is NOT faster here")  # of a card


@dataclass(frozen=True)
class TinyJob:
    """A tiny model, its recipe and its sets below a folder."""

    root: Path

    def environment(self, cache: Path) -> dict[str, str]:
        own = {"QUANT_CACHE": str(cache), "QUANT_DATA_HOME": str(self.root / "data"), "QUANT_MODEL_HOME": ""}
        return child_environment(**own, HOME=str(self.root / "home"), OMP_NUM_THREADS="1")

    def started(self, cache: Path, results: Path, *more: str) -> subprocess.Popen[str]:
        """`quant run` on one target."""
        asked = ["run", str(self.root / "recipe.yaml"), "--model-dir", str(self.root / "model"), "--threads", "1"]
        command = [*_QUANT, *asked, "--target", "onnxruntime", "--out", str(results), "--quiet", "--json", *more]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment(cache), stdout=pipe, stderr=pipe, text=True)

    def run(self, cache: Path, results: Path) -> tuple[int, str]:
        """Exit code, and what was said on standard error."""
        process = self.started(cache, results)
        _, said = process.communicate(timeout=_SECONDS)
        return process.returncode, said

    def disturbed(self, cache: Path, results: Path, steps: int, how: Callable[[], object]) -> tuple[int, str]:
        """A run in the middle of which something is done, when so many steps have ended and another has begun."""
        process = self.started(cache, results)
        stages = cache / "stages"
        while process.poll() is None and not (len(_complete(stages)) >= steps and list(stages.glob(".*.part"))):
            time.sleep(0.01)
        how()
        _, said = process.communicate(timeout=_SECONDS)
        return process.returncode, said


def make_models(root: Path, names: Sequence[str]) -> list[Path]:
    """The tiny model under several names, in `models`, and a recipe for each; their sets in `data`."""
    recipes = []
    for seed, (name, letters) in enumerate(SETS.items()):
        write_lines(root / "data" / name, LINES, letters, seed)
    for index, name in enumerate(names):
        folder = root / "models" / name
        folder.mkdir(parents=True)
        described = write_model(folder, colour_reader(sharpness=6.0 + index)) / "inference.yml"
        described.write_text(described.read_text(encoding="utf-8").replace(NAME, name), encoding="utf-8")
        recipes.append(root / f"{name}.yaml")
        recipes[-1].write_text(yaml.safe_dump({**RECIPE, "name": name}), encoding="utf-8")
    return recipes


def make_job(root: Path) -> TinyJob:
    for seed, (name, letters) in enumerate(SETS.items()):
        write_lines(root / "data" / name, LINES, letters, seed)
    write_model(root / "model", colour_reader())
    (root / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return TinyJob(root)


def run_folder(results: Path, name: str = NAME) -> Path:
    (folder,) = (path for path in (results / name).iterdir() if path.is_dir() and path.name[0] != ".")
    return folder


def content(results: Path, name: str = NAME) -> dict[str, Any]:
    """All that a run left, without what a clock said."""
    files = [path for path in run_folder(results, name).rglob("*") if path.is_file()]
    readers = {"manifest.json": _manifest, "metrics.json": _metrics, CARD: _card}
    return {path.relative_to(results).as_posix(): readers.get(path.name, Path.read_bytes)(path) for path in files}


def _manifest(file: Path) -> dict[str, Any]:
    """Without when the run was made and asked for, how long training took, and the hash of the times."""
    document = json.loads(file.read_text(encoding="utf-8"))
    for key in ("created", "asked"):
        del document[key]
    del document["files"]["metrics.json"]
    for rung in (rung for rungs in document["ladder"].values() for rung in rungs):
        del rung["seconds"]
    return document


def _metrics(file: Path) -> list[dict[str, Any]]:
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return [{key: value for key, value in row.items() if key not in OWN} for row in rows]


def _card(file: Path) -> list[str]:
    """Without the lines that say how fast the artifact is."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if not any(said in line for said in _TIMED_LINES)]


@dataclass(frozen=True)
class Killed:
    """How often runs were killed, how many went through to the end, and how many ended unlike the first.

    Attributes:
        early: kills before the first step had ended.
        latest: most steps that had ended before a kill.
        survivors: processes that a killed run had started, and that went on.
    """

    kills: int
    early: int
    latest: int
    runs: int
    different: int
    damaged: int
    survivors: int


@dataclass(frozen=True)
class Moment:
    """So many seconds of the processor's time after so many more steps have ended."""

    steps: int
    seconds: float


def kill_and_resume(job: TinyJob, work: Path, kills: int, seed: int) -> Killed:
    """Kill runs with SIGKILL at random moments and start them again, until there were that many kills.

    Every run that got through is compared with one that nobody disturbed; then the next one starts afresh. A moment is
    a number of steps that end first, and then a part of a step by the processor's time: by time alone nearly all kills
    would hit what every start does before its first step.
    """
    moments = random.Random(seed)
    start = _ended_children()
    code, said = job.run(work / "calm-cache", work / "calm")
    assert code == 0, said
    calm = content(work / "calm")
    each = (_ended_children() - start) / len(_complete(work / "calm-cache" / "stages"))
    steps: list[int] = []
    runs = different = damaged = survivors = 0
    while len(steps) < kills:
        cache, results = work / f"cache{runs}", work / f"results{runs}"
        while len(steps) < kills:
            moment = Moment(moments.randint(0, MOST_STEPS), moments.uniform(0, 1) * each)
            left = _survivors(job, cache, results, moment)
            if left is None:
                break
            survivors += left
            steps.append(len(_complete(cache / "stages")))
            damaged += sum(not verify(path).good for path in _complete(results / NAME))
        code, said = job.run(cache, results)
        assert code == 0, said
        runs += 1
        different += content(results) != calm
        for folder in (cache, results):
            shutil.rmtree(folder, ignore_errors=True)
    return Killed(len(steps), steps.count(0), max(steps), runs, different, damaged, survivors)


def _survivors(job: TinyJob, cache: Path, results: Path, moment: Moment) -> int | None:
    """Kill a run at a moment, and count which of its children live on; None where it had ended before."""
    stages = cache / "stages"
    wanted = len(_complete(stages)) + moment.steps
    process = job.started(cache, results)
    family = psutil.Process(process.pid)
    begun: float | None = None
    while process.poll() is None:
        children = family.children(recursive=True)
        taken = sum(map(_taken, [family, *children]))
        if begun is None and len(_complete(stages)) >= wanted:
            begun = taken
        if begun is not None and taken >= begun + moment.seconds:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            return _alive(children)
        time.sleep(0.02)
    process.communicate()
    return None


def _alive(processes: Sequence[psutil.Process]) -> int:
    end = time.monotonic() + 10
    while (count := sum(map(_lives, processes))) and time.monotonic() < end:
        time.sleep(0.05)
    return count


def _ended_children() -> float:
    """Seconds of the processor's time that all children took which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _taken(process: psutil.Process) -> float:
    """Seconds of the processor's time that a process took, and those of its children that have ended."""
    try:
        return sum(process.cpu_times()[:4])
    except psutil.NoSuchProcess:
        return 0.0


def _lives(process: psutil.Process) -> bool:
    """Whether a process still runs; what has ended may wait for somebody who asks for its exit code."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _complete(folder: Path) -> list[Path]:
    """Folders of runs or of steps under their final names."""
    return [path for path in folder.glob("*") if not path.name.startswith(".")]
