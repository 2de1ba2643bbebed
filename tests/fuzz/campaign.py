"""A fuzz campaign: mutated inputs, one after the other in a worker process that is watched from outside.

Every case has to end in success or in an error of the package's own. What else it ends in is a finding: another
exception, a hang, a crash, memory or a file where none belongs, a pickle or command that was run. A case is known by
its kind, the campaign's seed and its number, so that it can be made again.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from sentinel import watch_children, watch_process

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CASE_SECONDS, NATIVE_SECONDS = 10, 200
_SLOWEST = 1.5 * NATIVE_SECONDS
_LOOKS = 2.0
"""Seconds between two looks at a worker."""
MOST_MEMORY = 2 << 30
_WORKER_MEMORY = 8 << 30
_CLEAR_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Finding:
    """A case that ended in what it must not."""

    kind: str
    seed: int
    case: int
    what: str


@dataclass(frozen=True)
class Tried:
    """How the cases of a kind ended."""

    kind: str
    cases: int
    read: int
    refused: int
    seconds: float
    findings: list[Finding]

    def document(self) -> dict[str, Any]:
        return asdict(self)


def run(kind: str, seed: int, count: int, seconds: float, place: Path, first: int = 0) -> Tried:
    """Try cases `first` to `first + count` of a kind, or as many as there is time for."""
    start, outcomes, findings = time.monotonic(), Counter[str](), list[Finding]()
    number, last = first, first + count
    while number < last and (left := seconds - (time.monotonic() - start)) > 0:
        ended = _worker(kind, seed, number, last, left, place)
        for case, outcome, what in ended.cases:
            outcomes[outcome] += 1
            if outcome == "finding":
                findings.append(Finding(kind, seed, case, what))
        number = ended.next
        if ended.died:
            outcomes["finding"] += 1
            findings.append(Finding(kind, seed, number, ended.died))
            number += 1
    return Tried(
        kind, sum(outcomes.values()), outcomes["read"], outcomes["refused"], time.monotonic() - start, findings
    )


def case_files(kind: str, seed: int, case: int) -> dict[str, bytes]:
    """The files of a case: a seed with one of its files mutated; negative numbers are the seeds themselves."""
    from mutation import mutated
    from subjects import SUBJECTS

    subject, seeds = SUBJECTS[kind], _seeds(kind)
    if case < 0:
        return seeds[case]
    rng = np.random.default_rng([zlib.crc32(kind.encode()), seed, case])
    files = dict(seeds[rng.integers(len(seeds))])
    here = [name for name in subject.targets if name in files]
    target = here[rng.integers(len(here))]
    return {**files, target: mutated(files[target], subject.of_file.get(target, subject.mutators), rng)}


@cache
def _seeds(kind: str) -> list[dict[str, bytes]]:
    from subjects import SUBJECTS

    return SUBJECTS[kind].seeds()


@dataclass(frozen=True)
class _Ended:
    """What a worker left: its cases, the case to go on with, and how it died there."""

    cases: list[tuple[int, str, str]]
    next: int
    died: str


def _worker(kind: str, seed: int, first: int, last: int, seconds: float, place: Path) -> _Ended:
    for name in ("cwd", "tmp", "home"):
        (place / name).mkdir(parents=True, exist_ok=True)
    report = place / "report.jsonl"
    report.unlink(missing_ok=True)
    paths = os.pathsep.join(map(str, (ROOT, HERE.parent, HERE)))
    own = {"TMPDIR": str(place / "tmp"), "QUANT_CACHE": str(place / "cache"), "HOME": str(place / "home")}
    environment = {**os.environ, **own, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(HERE / "campaign.py"), kind, *map(str, (seed, first, last, seconds, place))]
    with (place / "worker.log").open("wb") as log:
        worker = subprocess.Popen(command, cwd=place / "cwd", env=environment, stdout=log, stderr=log)
        died = _watched(worker, report)
    lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()] if report.is_file() else []
    if not lines:
        raise RuntimeError(f"the worker of {kind} did not start: {(place / 'worker.log').read_text()[-2000:]}")
    cases = [(line["case"], line["outcome"], line["what"]) for line in lines if line["outcome"] != "started"]
    begun = lines[-1]["case"]
    if lines[-1]["outcome"] == "started":
        return _Ended(cases, begun, died or "the worker ended")
    return _Ended(cases, begun + 1, "")


def _watched(worker: subprocess.Popen[bytes], report: Path) -> str:
    """Wait for a worker; one that writes nothing for longer than any case may take is ended.

    Looks are counted, not seconds: while a machine stops all processes, nobody looks.
    """
    written, idle = 0, 0
    while idle * _LOOKS < _SLOWEST:
        try:
            code = worker.wait(_LOOKS)
            return (
                f"the process crashes ({signal.Signals(-code).name})" if code < 0 else f"the process ends with {code}"
            )
        except subprocess.TimeoutExpired:
            size = report.stat().st_size if report.is_file() else 0
            written, idle = size, idle + 1 if size and size == written else 0
    worker.kill()
    worker.wait()
    return "it hangs in native code"


# --- in the worker ---------------------------------------------------------------------------------


class Hang(BaseException):
    """A case took too long."""


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """Raise Hang after so many seconds of the processor's time: a busy machine is no hang. Who sleeps is seen outside."""
    signal.signal(signal.SIGPROF, _rung)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _rung(*_: object) -> None:
    raise Hang


class Watch:
    """What a case did that none may do: in this process, in its children, and where nobody had a folder for it.

    Attributes:
        place: folder of the worker; `cwd` in it is where whoever forgets to name a folder writes to.
    """

    def __init__(self, place: Path, native: bool) -> None:
        self.place = place
        self._notes, self._armed, self._seen = place / "seen", False, ""
        watch_process(place, native, self._tell)
        if native:
            watch_children(place, self._notes)

    def _tell(self, seen: str) -> None:
        if self._armed:
            self._seen = seen

    @contextmanager
    def armed(self) -> Iterator[None]:
        """While a case is tried."""
        self._notes.unlink(missing_ok=True)
        self._seen, self._armed = "", True
        try:
            yield
        finally:
            self._armed = False

    def seen(self) -> str:
        """What the last case did, nothing where all was well; what it left in `cwd` is swept out for the next one."""
        left = sorted((self.place / "cwd").iterdir())
        for path in left:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        stray = f"left in the working folder: {', '.join(path.name for path in left)}" if left else ""
        return self._seen or (self._notes.read_text(encoding="utf-8") if self._notes.exists() else stray)


def work(kind: str, seed: int, first: int, last: int, seconds: float, place: Path) -> None:
    """What a worker does: a line when a case starts and one when it ends."""
    from subjects import SUBJECTS

    subject = SUBJECTS[kind]
    if not subject.native:
        resource.setrlimit(resource.RLIMIT_DATA, (_WORKER_MEMORY, _WORKER_MEMORY))
    place = place.resolve()
    watch = Watch(place, subject.native)
    for number in range(1 if first else len(_seeds(kind))):
        outcome, what = _attempt(subject, case_files(kind, seed, -1 - number), watch)
        if outcome != "read":
            raise RuntimeError(f"a seed of {kind} is not read: {what}")
    end = time.monotonic() + seconds  # the seeds may have taken longer than all cases may
    with (place / "report.jsonl").open("w", encoding="utf-8") as report:
        for case in range(first, last):
            if time.monotonic() > end and case > first:
                break
            files = case_files(kind, seed, case)
            _line(report, case, "started", "")
            _line(report, case, *_attempt(subject, files, watch))


def _attempt(subject: Any, files: dict[str, bytes], watch: Watch) -> tuple[str, str]:
    folder = watch.place / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    before = _fresh_peak()
    try:
        with watch.armed(), _limit(NATIVE_SECONDS if subject.native else CASE_SECONDS):
            outcome, what = _outcome(subject, folder)
    except Hang:
        outcome, what = "finding", "it hangs: " + traceback.format_exc(limit=-4)
    grown, seen = _peak() - before, watch.seen()
    if seen or grown > MOST_MEMORY:
        return "finding", seen or f"it took {grown >> 20} MiB of memory"
    return outcome, what


def _fresh_peak() -> int:
    """The peak of memory, where the system allows it set back to what is in use now."""
    if _CLEAR_PEAK.exists():
        _CLEAR_PEAK.write_text("5")
    return _peak()


def _peak() -> int:
    """Bytes; `ru_maxrss` cannot be set back and serves where there is nothing better."""
    if _CLEAR_PEAK.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _outcome(subject: Any, folder: Path) -> tuple[str, str]:
    from quant.errors import InputError

    try:
        subject.attempt(folder)
    except InputError as error:
        return "refused", str(error)[:300]
    except Exception:
        return "finding", traceback.format_exc()[-3000:]
    return "read", ""


def _line(report: Any, case: int, outcome: str, what: str) -> None:
    report.write(json.dumps({"case": case, "outcome": outcome, "what": what}) + "\n")
    report.flush()


def _arguments() -> Iterator[Any]:
    kinds = (str, int, int, int, float, Path)
    yield from (kind(value) for kind, value in zip(kinds, sys.argv[1:], strict=True))


if __name__ == "__main__":
    work(*_arguments())
