"""Modules of this project in a process of their own: flags that act once, prints and memory of a library stay there.

What others made is parsed there too, within limits: a crash inside a native library, a hang or memory without end ends
the child, and one sentence is left of it. Results travel as files, errors as sentences; never as pickles.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import INPUT_ERROR, InputError, NotTrainable, Unavailable
from quant.storage import check_room, naming

_GIB = 1 << 30
_WATCH_SECONDS = 0.1
_DYING_SECONDS = 5.0
_SHARE_OF_MACHINE = 0.9
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_ERROR_FILE = "error.json"
_PARENT = "QUANT_PARENT"
"""Variable that tells a child who started it."""


class LimitExceeded(Exception):
    """A child was ended; the message says which limit it had exceeded, as the end of a sentence."""


@dataclass(frozen=True)
class Limits:
    """What a child may take.

    Attributes:
        seconds: from its start to its end.
        memory: resident bytes, its own children's counted.
    """

    seconds: float
    memory: int


def model_limits(files: Sequence[Path], seconds: float) -> Limits:
    """For work on a model: memory by its size, and QUANT_CHILD_GIB where that is set; never all of the machine's.

    The largest models take 12 times their size, and 3 GiB for pictures.
    """
    import psutil

    machine = int(_SHARE_OF_MACHINE * psutil.virtual_memory().total)
    chosen = os.environ.get("QUANT_CHILD_GIB", "")
    try:
        memory = int(float(chosen) * _GIB) if chosen else 6 * _GIB + 20 * sum(file.stat().st_size for file in files)
        if memory <= 0:
            raise ValueError("a child needs memory")
    except (ValueError, OverflowError) as error:
        raise InputError(f"QUANT_CHILD_GIB={chosen}: must be a number of GiB above 0, like 8") from error
    return Limits(seconds, min(memory, machine))


def child_command(module: str, *arguments: object) -> list[str]:
    """`python -m MODULE ARGUMENTS` with the Python that runs now."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def child_environment(**variables: str) -> dict[str, str]:
    """This process's environment with the project on the path, this process as parent, and the given variables."""
    package = str(Path(__file__).parents[1])
    path = os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path, _PARENT: str(os.getpid()), **variables}


def run_child(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    limits: Limits,
    meanwhile: Callable[[], object] = lambda: None,
) -> int:
    """Run a command to its end, and give its exit code; negative where a signal ended it.

    Args:
        log: receives what it prints.
        meanwhile: called now and then as long as it runs, and once when it has ended.

    Raises:
        LimitExceeded: it was ended, with all its children.
    """
    with log.open("wb") as stream:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=dict(environment))
    try:
        return _watched(child, limits, meanwhile)
    except BaseException:
        kill_family(child.pid)
        child.wait()
        raise


def ask(module: str, job: Mapping[str, Any], folder: Path, limits: Limits, subject: str, **variables: str) -> None:
    """Have a module do a job: `python -m MODULE FOLDER/job.json`, whose main calls `answer_job`.

    Args:
        folder: receives `job.json`, `child.log` and the results.
        subject: what is worked on, for the message.
        variables: of the environment.

    Raises:
        InputError: the child raised it, crashed, or exceeded a limit.
        OSError: the child could not write.
    """
    file, log = folder / "job.json", folder / "child.log"
    file.write_text(json.dumps(job), encoding="utf-8")
    try:
        code = run_child(child_command(module, file), log, child_environment(**variables), limits)
    except LimitExceeded as error:
        raise InputError(f"{subject}: working on it {error}; it is damaged, or larger than expected") from error
    if code:
        raise_answer(folder, code)
        raise InputError(f"{subject}: {ending(code, log)}. It is damaged, or of a kind that is not known here")
    for path in (file, log):
        path.unlink()


def raise_answer(folder: Path, code: int) -> None:
    """Raise what a child that ended with `code` said to be wrong (see `answer`), or that its folder's disk is full."""
    file = folder / _ERROR_FILE
    if code != os.EX_IOERR and not file.is_file():
        if code:
            check_room(folder)
        return
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # there was no room for the sentence either, or its folder was cleared away
        number = errno.ENOSPC if folder.is_dir() else errno.ENOENT
        raise OSError(number, os.strerror(number), str(folder)) from error
    raise _said(said)


def answer(folder: Path, work: Callable[[], object]) -> None:
    """What the main of a child that was asked does: the work; what is wrong with the input is said and exits 2.

    Where that cannot be written, it exits with `os.EX_IOERR`.
    """
    follow_parent()
    try:
        with naming(folder):
            work()
    except NotTrainable as error:
        _say(folder, {"kind": "not trainable", "message": str(error)})
    except Unavailable as error:
        _say(folder, {"kind": "unavailable", "reason": error.reason, "fix": error.fix})
    except InputError as error:
        _say(folder, {"kind": "input", "message": str(error)})
    except OSError as error:
        if error.errno is None:
            raise
        place = error.filename2 or error.filename
        _say(folder, {"kind": "storage", "errno": error.errno, "file": place if isinstance(place, str) else ""})
    else:
        return
    sys.exit(INPUT_ERROR)


def answer_job(work: Callable[[dict[str, Any]], object]) -> None:
    """The main of a module whose first argument is its job, a JSON file that names the `folder` to answer in."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answer(Path(job["folder"]), lambda: work(job))


def follow_parent() -> None:
    """Let this child end when its parent is killed, and leave no core file behind when it crashes (Linux).

    What was started by hand follows nobody.
    """
    import ctypes
    import resource

    parent = os.environ.pop(_PARENT, None)  # not for what it starts itself, whose parent is another one
    if parent is None or sys.platform != "linux":
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    if parent != str(os.getppid()):  # it was killed before it could be followed
        sys.exit(f"the process {parent} that started this one has ended")


def ending(code: int, log: Path) -> str:
    """How a child ended, in words: the signal, or the last line that it printed."""
    return f"it crashes ({signal_name(-code)})" if code < 0 else last_line(log)[:300]


def signal_name(number: int) -> str:
    """Of a signal, as SIGSEGV; most real-time signals have none but their number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def last_line(log: Path) -> str:
    """The last line of a child's log that is not blank."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "(the log is empty)"


def family_memory(pid: int) -> int:
    """Resident bytes of a process and all its children; 0 where it has ended."""
    import psutil

    total = 0
    for process in _family(pid):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def kill_family(pid: int) -> None:
    """End a process and all its children at once; its children are gone then, but for what the system keeps."""
    import psutil

    family, end = _family(pid), time.monotonic() + _DYING_SECONDS
    for process in reversed(family):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    while any(map(_lives, family[1:])) and time.monotonic() < end:
        time.sleep(0.01)


def _lives(process: Any) -> bool:
    """Whether a process still holds memory: one that has ended may be listed until its parent looks."""
    import psutil

    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _watched(child: subprocess.Popen[bytes], limits: Limits, meanwhile: Callable[[], object]) -> int:
    end = time.monotonic() + limits.seconds
    while True:
        try:
            code = child.wait(_WATCH_SECONDS)
        except subprocess.TimeoutExpired:
            if time.monotonic() > end:
                raise LimitExceeded(f"took more than {_words(limits.seconds)}") from None
        else:
            meanwhile()
            return code
        meanwhile()
        if family_memory(child.pid) > limits.memory:
            raise LimitExceeded(f"took more than {limits.memory / _GIB:.1f} GiB of memory (see QUANT_CHILD_GIB)")


def _words(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:g} s"


def _family(pid: int) -> list[Any]:
    """A process and all its children; empty where it has ended."""
    import psutil

    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _say(folder: Path, error: Mapping[str, Any]) -> None:
    try:
        (folder / _ERROR_FILE).write_text(json.dumps(error), encoding="utf-8")
    except OSError:
        sys.exit(os.EX_IOERR)


def _said(error: Mapping[str, Any]) -> Exception:
    if error["kind"] == "unavailable":
        return Unavailable(error["reason"], error["fix"])
    if error["kind"] == "not trainable":
        return NotTrainable(error["message"])
    if error["kind"] == "storage":
        return OSError(error["errno"], os.strerror(error["errno"]), error["file"] or None)
    return InputError(error["message"])
