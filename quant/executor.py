"""Many models: each one's command in a process of its own, on this machine or, by Ray, on the nodes of a cluster.

A job is the command line that a user would give for that model alone, so nothing is done differently here. On this
machine as many jobs run as cores and memory allow, by the peaks that were measured before. On a cluster runs go to a
node and come back as a zip that is known by its hash, checked on arrival; a job whose node is lost is done again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quant.archive import staged, unpack
from quant.child import child_command, child_environment, family_memory, kill_family
from quant.document import DocumentError, parse_json
from quant.errors import INPUT_ERROR, InputError, Unavailable
from quant.manifest import make_newest, newest_run
from quant.stage import code_digest
from quant.verification import verify

Action = Literal["run", "eval"]
ExecutorName = Literal["local", "ray"]

USUAL_PEAK = 3 << 30
"""Bytes that a job is taken to need before one of its model was measured."""

RETRIES = 3
_JUDGED = (0, 1)  # codes of jobs that did their work, whether the gate let it pass or not
_PEAKS, _LIST = "peaks.json", "runs.txt"
_MEMORY_SHARE = 0.8
_WATCH_SECONDS = 0.25
_INTERNAL = 70
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class ModelJob:
    """One model's command.

    Attributes:
        model: name of the model, as in results.
        arguments: of the command, without --out and --json.
        twins: whether its twin's runs are concerned too.
    """

    action: Action
    model: str
    arguments: tuple[str, ...]
    threads: int
    twins: bool = False


@dataclass(frozen=True)
class Ended:
    """How a job ended: exit code, what it wrote, the most memory that it had, and the runs it made as a zip."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak: int
    runs: bytes = b""
    sha256: str = ""

    def rows(self) -> list[dict[str, Any]]:
        """The rows that it printed.

        Raises:
            InputError: it printed none; says what it said instead.
        """
        try:
            return list(parse_json(self.stdout)["rows"])
        except (DocumentError, KeyError, TypeError) as error:
            said = [line for line in self.stderr.splitlines() if line.strip()] or [f"it ended with code {self.code}"]
            raise InputError(said[-1].removeprefix("quant: ")) from error

    @property
    def warnings(self) -> list[str]:
        """What it said on the way."""
        return [line for line in self.stderr.splitlines() if line.startswith("quant: ")]

    @property
    def internal(self) -> bool:
        """Whether it ended by an error of ours, or crashed."""
        return self.code == _INTERNAL or self.code < 0


Finished = Iterator[tuple[ModelJob, Ended]]


def run_locally(jobs: Sequence[ModelJob], results: Path, count: int | None) -> Finished:
    """Do all jobs in processes of this machine; each is given as it ends.

    Args:
        count: most at a time; None: as many as cores and memory allow.
    """
    import psutil

    room = int(_MEMORY_SHARE * psutil.virtual_memory().available)
    cores = os.cpu_count() or 1
    peaks = {job: peak_of(job, results) for job in jobs}
    waiting, running = list(jobs), dict[Future[Ended], ModelJob]()
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, min(len(jobs), count or cores))) as pool:
        try:
            while waiting or running:
                while waiting and _fits(waiting[0], list(running.values()), count, cores, room, peaks):
                    job = waiting.pop(0)
                    running[pool.submit(_watched, job, results, stop)] = job
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job, ended = running.pop(future), future.result()
                    _note_peak(job, results, ended)
                    yield job, ended
        finally:
            stop.set()


def run_on_ray(jobs: Sequence[ModelJob], results: Path, address: str | None) -> Finished:
    """Do all jobs on the nodes of a Ray cluster; each is given as its runs have arrived.

    Models and data have to be found on every node as they are here: by the same paths, or in its own cache. A node that
    is lost, cannot do a job, or sends something else than it should, fails that job alone.

    Args:
        address: of the cluster; None: RAY_ADDRESS, else a new one on this machine.

    Raises:
        Unavailable: Ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise Unavailable("Ray is not installed", "Install paddle-quant with the extra 'ray'") from error
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, runtime_env=_nodes_environment())
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise Unavailable(
            f"no Ray cluster at {address or 'RAY_ADDRESS'} ({why})", "Start one, or correct --address"
        ) from error
    remote = ray.remote(max_retries=RETRIES)(perform)
    waiting = {}
    for job in jobs:
        known = _packed_runs(job, results) if job.action == "eval" else b""
        needs = {"num_cpus": job.threads, "memory": peak_of(job, results)}
        waiting[remote.options(**needs).remote(job, known, code_digest())] = job
    while waiting:
        (reference,), _ = ray.wait(list(waiting), num_returns=1)
        job = waiting.pop(reference)
        try:
            ended: Ended = ray.get(reference)
            receive(ended, results)
        except ray.exceptions.RayTaskError as error:
            ended = _failed(f"{job.model}: a node cannot do it ({error.cause})")
        except ray.exceptions.RayError as error:
            ended = _failed(f"{job.model}: its node was lost, and {RETRIES} times another one ({type(error).__name__})")
        except InputError as error:
            ended = _failed(f"{job.model}: {error}")
        _note_peak(job, results, ended)
        yield job, ended


def spread(
    jobs: Sequence[ModelJob], results: Path, executor: ExecutorName, count: int | None, address: str | None
) -> Finished:
    """Do jobs where it was asked for: see `run_locally` and `run_on_ray`."""
    return run_on_ray(jobs, results, address) if executor == "ray" else run_locally(jobs, results, count)


def perform(job: ModelJob, known: bytes, code: str) -> Ended:
    """What a node does: the command, in a results folder of its own, and the runs that came of it.

    Args:
        known: zip of the runs that an evaluation looks at.
        code: digest of the program that asks.
    """
    if code != code_digest():
        raise RuntimeError("it has another version of paddle-quant; install the same one on all nodes")
    with tempfile.TemporaryDirectory(prefix="quant-node-") as place:
        results = Path(place) / "results"
        if known:
            _unzip(known, results)
        results.mkdir(exist_ok=True)
        ended = _watched(job, results, threading.Event())
        packed = _packed(results, _run_folders(results)) if job.action == "run" else b""
    digest = hashlib.sha256(packed).hexdigest()
    return Ended(ended.code, ended.stdout, ended.stderr, ended.seconds, ended.peak, packed, digest)


def receive(ended: Ended, results: Path) -> None:
    """Put the runs of a node into the results; each appears whole, and only if it is what its manifest says.

    They are the newest then, as what is run here is, also where they had been there before.

    Raises:
        InputError: the bytes are not those that the node sent, or a run does not agree with its manifest.
    """
    if not ended.runs:
        return
    if hashlib.sha256(ended.runs).hexdigest() != ended.sha256:
        raise InputError("what arrived from a node is not what it sent; start the command again")
    with tempfile.TemporaryDirectory(prefix="quant-arrived-") as place:
        arrived = Path(place) / "results"
        _unzip(ended.runs, arrived)
        for folder in _run_folders(arrived):
            if problems := verify(folder).problems:
                raise InputError(f"the run {folder.name} arrived damaged: {problems[0]}")
            target = results / folder.relative_to(arrived)
            if target.is_dir() and not _good(target):
                shutil.rmtree(target)
            with staged(target) as temporary:
                shutil.copytree(folder, temporary)
            make_newest(target)


def _good(folder: Path) -> bool:
    try:
        return verify(folder).good
    except InputError:
        return False


def _failed(sentence: str) -> Ended:
    """How a job ended that no node did, said as the job itself would have."""
    return Ended(INPUT_ERROR, "", f"quant: {' '.join(sentence.split())}\n", 0.0, 0)


def peak_of(job: ModelJob, results: Path) -> int:
    """The most bytes that a job of this kind took here, or `USUAL_PEAK`."""
    return _known_peaks(job, results).get(_kind(job), USUAL_PEAK)


def _fits(
    job: ModelJob,
    running: Sequence[ModelJob],
    count: int | None,
    cores: int,
    room: int,
    peaks: dict[ModelJob, int],
) -> bool:
    """Whether a job can be started beside those that run; the first one always can."""
    if not running:
        return True
    if count is not None and len(running) >= count:
        return False
    if count is None and sum(other.threads for other in running) + job.threads > cores:
        return False
    return sum(peaks[other] for other in running) + peaks[job] <= room


def _watched(job: ModelJob, results: Path, stop: threading.Event) -> Ended:
    """Run a job's command; its most memory is measured meanwhile, and it is ended when `stop` is set."""
    command = child_command("quant.cli", job.action, *job.arguments, "--out", results, "--json")
    start, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=said, env=child_environment())
        try:
            while child.poll() is None and not stop.wait(_WATCH_SECONDS):
                peak = max(peak, family_memory(child.pid))
        finally:
            if child.poll() is None:
                kill_family(child.pid)
            child.wait()
        out.seek(0)
        said.seek(0)
        texts = [stream.read().decode("utf-8", "replace") for stream in (out, said)]
    return Ended(child.returncode, texts[0], texts[1], time.monotonic() - start, peak)


def _note_peak(job: ModelJob, results: Path, ended: Ended) -> None:
    """Keep the most that jobs of this kind took; one that found its work done takes little, a failed one any amount."""
    known = _known_peaks(job, results)
    if ended.code not in _JUDGED or ended.peak <= known.get(_kind(job), 0):
        return
    # It only helps the next time, and is not worth an error where results cannot be written.
    with suppress(OSError), staged(results / job.model / _PEAKS) as temporary:
        temporary.write_text(json.dumps({**known, _kind(job): ended.peak}, sort_keys=True) + "\n", encoding="utf-8")


def _known_peaks(job: ModelJob, results: Path) -> dict[str, int]:
    """What was measured for a job's model, by the kind of job."""
    try:
        known = dict(parse_json((results / job.model / _PEAKS).read_bytes()))
    except (OSError, DocumentError, TypeError, ValueError):
        return {}
    return {kind: peak for kind, peak in known.items() if isinstance(peak, int)}


def _kind(job: ModelJob) -> str:
    return f"{job.action}-twin" if job.twins else job.action


def _nodes_environment() -> dict[str, Any]:
    """What a node's processes need of this one's environment."""
    environment = child_environment()
    kept = ("PYTHONPATH", "QUANT_MODEL_HOME", "QUANT_DATA_HOME", "QUANT_CACHE", "QUANT_CHILD_GIB")
    return {"env_vars": {name: environment[name] for name in kept if name in environment}}


def _packed_runs(job: ModelJob, results: Path) -> bytes:
    """The newest run of a job's model as a zip, and with twins that of the twin."""
    from quant.job import TWINS

    places = [results, results / TWINS] if job.twins else [results]
    folders = [folder for place in places if (folder := newest_run(place, job.model))]
    return _packed(results, folders) if folders else b""


def _run_folders(results: Path) -> list[Path]:
    """The folders of complete runs, those of twins among them."""
    found = (path.parent for pattern in ("*/*/manifest.json", "*/*/*/manifest.json") for path in results.glob(pattern))
    return sorted(folder for folder in found if not any(part.startswith(".") for part in folder.parts[-3:]))


def _packed(results: Path, folders: Sequence[Path]) -> bytes:
    """Folders as a zip whose bytes follow from their content alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(zipfile.ZipInfo(_LIST, _EPOCH), "\n".join(map(str, (f.relative_to(results) for f in folders))))
        for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
            file.writestr(zipfile.ZipInfo(path.relative_to(results).as_posix(), _EPOCH), path.read_bytes())
    return buffer.getvalue()


def _unzip(data: bytes, results: Path) -> None:
    """Unpack what `_packed` made; its list stands beside the models, so that no folder is alone at the top."""
    with tempfile.NamedTemporaryFile(suffix=".zip") as file:
        file.write(data)
        file.flush()
        unpack(Path(file.name), results)
