"""Looks out for what no case may do, by Python's audit events: in the worker, and in every Python that a case starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOTES, INSIDE = "FUZZ_NOTES", "FUZZ_INSIDE"
"""Variables that tell a child where to write what it saw, and the folder that a case may write in."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_FORBIDDEN = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "socket.connect",
    "socket.getaddrinfo",
)
_OF_PADDLE = (
    ("/bin/sh", "-c", "ldd --version | awk '/ldd/{print $NF}'"),
    ("/bin/sh", "-c", "cat /proc/cpuinfo | grep -i avx"),
    ("which", "nvcc"),
    ("which", "ccache"),
)
_PLACES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_FROM_TO = ("os.rename", "os.link", "os.symlink")


def watch_process(inside: Path, native: bool, tell: Callable[[str], None]) -> None:
    """Tell of each forbidden event in this process, to its end.

    Args:
        inside: the one folder in which files may be written.
        native: whether a Python may be started, which is watched in turn.
    """
    sys.addaudithook(lambda event, arguments: _note(event, arguments, str(inside), native, tell))


def watch_children(inside: Path, notes: Path) -> None:
    """Let every Python that this process starts watch itself (`sitecustomize`), and note what it saw in a file."""
    os.environ |= {INSIDE: str(inside), NOTES: str(notes)}


def watch_this_child() -> None:
    """What a Python does at its start, where its parent asked for it."""
    if notes := os.environ.get(NOTES):
        watch_process(Path(os.environ[INSIDE]), True, lambda seen: _append(notes, seen))


def _append(notes: str, seen: str) -> None:
    with Path(notes).open("a", encoding="utf-8") as file:
        file.write(f"{seen} in a child\n")


def _note(event: str, arguments: tuple[Any, ...], inside: str, native: bool, tell: Callable[[str], None]) -> None:
    if event in _FORBIDDEN or (event == "subprocess.Popen" and not (native and _harmless(arguments))):
        tell(f"{event} {arguments!r:.200}")
    elif event == "open" and _writes(arguments[1], arguments[2]):
        _check(event, arguments[0], inside, tell)
    elif event in _PLACES:
        _check(event, arguments[1] if event in _FROM_TO else arguments[0], inside, tell)


def _harmless(arguments: tuple[Any, ...]) -> bool:
    """Another Python, which is watched in turn, or what Paddle asks of the system when it is imported."""
    program, words = arguments[:2]
    return os.fsdecode(program) == sys.executable or tuple(words) in _OF_PADDLE


def _writes(mode: Any, flags: Any) -> bool:
    return (isinstance(mode, str) and bool(set(mode) & set("wax+"))) or (
        isinstance(flags, int) and bool(flags & _WRITING)
    )


def _check(event: str, path: Any, inside: str, tell: Callable[[str], None]) -> None:
    if isinstance(path, int) or path in ("/dev/null", b"/dev/null"):
        return
    where = os.path.realpath(os.fsdecode(path))
    if not where.startswith(inside + os.sep):
        tell(f"{event} outside: {where}")
