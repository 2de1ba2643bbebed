"""Children with limits: a crash, a hang, hunger for memory and errors become one sentence; nothing is left running."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from quant import child
from quant.child import (
    LimitExceeded,
    Limits,
    answer,
    ask,
    child_command,
    child_environment,
    model_limits,
    raise_answer,
    run_child,
)
from quant.errors import InputError, NotTrainable, Unavailable
from quant.prepare import prepare_apart
from quant.source import ModelFiles

GIB = 1 << 30
ROOMY = Limits(60, 2 * GIB)
TRAINED = ("detection", "recognition")  # twins; all others begin alike


def python(code: str, folder: Path, limits: Limits = ROOMY) -> int:
    return run_child([sys.executable, "-c", code], folder / "log", child_environment(), limits)


def test_exit_codes_and_signals(tmp_path: Path) -> None:
    assert python("print('said'); raise SystemExit(3)", tmp_path) == 3
    assert child.ending(3, tmp_path / "log") == "said"
    code = python("import os; os.kill(os.getpid(), 11)", tmp_path)
    assert child.ending(code, tmp_path / "log") == "it crashes (SIGSEGV)"
    code = python("import os; os.kill(os.getpid(), 40)", tmp_path)
    assert child.ending(code, tmp_path / "log") == "it crashes (signal 40)", "Python has no name for it"


@pytest.mark.parametrize(
    ("code", "limits", "said"),
    [
        ("import time; time.sleep(60)", Limits(0.2, GIB), "more than 0.2 s"),
        ("import time; held = b'x' * (1 << 29); time.sleep(60)", Limits(60, GIB // 4), "more than 0.2 GiB of memory"),
        (
            "import subprocess, sys; subprocess.run([sys.executable, '-c', 'h = bytearray(b\"x\" * (1 << 29)); input()'],"
            " stdin=subprocess.PIPE)",
            Limits(60, GIB // 4),
            "GiB of memory",
        ),
    ],
)
def test_a_child_beyond_its_limits_is_ended_with_its_own(tmp_path: Path, code: str, limits: Limits, said: str) -> None:
    start, before = time.monotonic(), psutil.Process().children(recursive=True)  # Python's own tracker, perhaps
    with pytest.raises(LimitExceeded, match=said):
        python(code, tmp_path, limits)
    assert time.monotonic() - start < 20
    assert [process for process in psutil.Process().children(recursive=True) if process not in before] == []


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    orphan = f"""
import os, subprocess, sys, time
from pathlib import Path
from quant.child import child_environment
code = "from quant.child import follow_parent; import os, time; follow_parent(); "
code += "open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(120)"
subprocess.Popen([sys.executable, "-c", code], env=child_environment())
while not (Path({str(tmp_path)!r}) / "pid").exists() or not (Path({str(tmp_path)!r}) / "pid").read_text():
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", orphan], env=child_environment(), check=False, timeout=30)
    pid = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "it lives on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "module", ["bridge", "cli", "conversion", "prepare", "shares", "slim", *(f"twins.{name}" for name in TRAINED)]
)
def test_a_child_whose_parent_was_killed_before_does_nothing(module: str, tmp_path: Path) -> None:
    """Not even look at its arguments: what asks for a job is missing here."""
    (tmp_path / "job.json").write_text(json.dumps({"folder": str(tmp_path)}), encoding="utf-8")
    environment = child_environment(QUANT_PARENT="1" if os.getpid() != 1 else "2")
    command = child_command(f"quant.{module}", tmp_path / "job.json", 0, 0)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.splitlines()[-1][-26:]) == (1, "started this one has ended")


def test_what_is_started_by_hand_follows_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANT_PARENT", raising=False)
    code = "import ctypes; from quant.child import follow_parent; follow_parent(); signal = ctypes.c_int();"
    code += "ctypes.CDLL(None).prctl(2, ctypes.byref(signal)); print(signal.value)"
    for environment, signal in ((dict(os.environ), "0"), (child_environment(), "9")):
        assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == signal


def _missing() -> None:
    raise Unavailable("the package is not installed", "Install it")


def _broken() -> None:
    raise InputError("a sentence\nof two lines")


def _untrainable() -> None:
    raise NotTrainable("operator 'strange' is a Erf")


def _full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/file")


@pytest.mark.parametrize(
    ("work", "kind", "said"),
    [
        (_missing, Unavailable, "not installed. Install it"),
        (_broken, InputError, "two lines"),
        (_untrainable, NotTrainable, "'strange' is a Erf"),
        (_full, OSError, "file"),
    ],
)
def test_errors_keep_their_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[], None], kind: type[Exception], said: str
) -> None:
    """What `answer` writes, `ask` raises."""
    with pytest.raises(SystemExit) as left:
        answer(tmp_path, work)
    monkeypatch.setattr(child, "run_child", lambda *_: left.value.code)
    with pytest.raises(kind, match=said) as caught:
        ask("module", {}, tmp_path, ROOMY, "subject")
    assert type(caught.value) in (kind, type(OSError(errno.ENOSPC, "")))
    assert not isinstance(caught.value, OSError) or caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("written", [None, "", '{"kind": "sto'])
def test_a_disk_too_full_for_the_sentence_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str | None
) -> None:
    """The child cannot write what is wrong, or only its beginning."""
    folder = tmp_path / "work"
    folder.mkdir()
    code = 2
    if written is None:
        (folder / "error.json").symlink_to(tmp_path / "nowhere" / "file")
        with pytest.raises(SystemExit) as left:
            answer(folder, _full)
        code = left.value.code  # type: ignore[assignment]
        assert code == os.EX_IOERR
    else:
        (folder / "error.json").write_text(written, encoding="utf-8")
    monkeypatch.setattr(child, "run_child", lambda *_: code)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        ask("module", {}, folder, ROOMY, "subject")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(folder))


def test_a_child_whose_files_a_native_library_cut_off(small_disk: Path) -> None:
    """It fails at what it reads back, for a reason that says nothing of the disk."""
    raise_answer(small_disk, 1)
    (small_disk / "weights").write_bytes(b"x" * (1500 << 10))  # the rest is less than it wanted to write at once
    raise_answer(small_disk, 0)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        raise_answer(small_disk, 1)
    assert caught.value.filename == str(small_disk)


def test_a_folder_that_is_cleared_under_a_child_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with pytest.raises(SystemExit) as left:
        answer(folder, _full)
    assert left.value.code == os.EX_IOERR
    with pytest.raises(FileNotFoundError) as caught:
        raise_answer(folder, os.EX_IOERR)
    assert caught.value.filename == str(folder)


def test_memory_follows_the_size_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANT_CHILD_GIB", raising=False)
    (tmp_path / "model").write_bytes(b"x" * 1000)
    machine = psutil.virtual_memory().total
    assert model_limits([tmp_path / "model"], 5).memory == min(6 * GIB + 20_000, int(0.9 * machine))
    monkeypatch.setenv("QUANT_CHILD_GIB", "0.5")
    assert model_limits([], 5).memory == GIB // 2
    for wrong in ("much", "inf", "1e999", "nan", "0", "-1"):
        monkeypatch.setenv("QUANT_CHILD_GIB", wrong)
        with pytest.raises(InputError, match="QUANT_CHILD_GIB"):
            model_limits([], 5)


def test_a_model_that_needs_too_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANT_CHILD_GIB", "0.1")
    model, params = tmp_path / "inference.pdmodel", tmp_path / "inference.pdiparams"
    for file in (model, params):
        file.write_bytes(b"")
    files = ModelFiles(tmp_path, "paddle", model, params, {}, "test", {})
    with pytest.raises(InputError, match=r"inference\.pdmodel: .* more than 0\.1 GiB of memory") as caught:
        prepare_apart(files, [{"x": np.zeros((1, 3, 8, 8), np.float32)}], 1e-3, 1, tmp_path)
    assert "\n" not in str(caught.value)
