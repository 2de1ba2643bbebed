"""Stages: a result is a folder named by the hash of everything it depends on, so it is made once.

A result is sealed with the hashes of its files. One that a disk, or whatever clears old files away, has damaged since
is made again; nothing is ever computed from it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quant.archive import discard, file_sha256, staged
from quant.document import parse_json

log = logging.getLogger(__name__)

SEAL = ".seal.json"
"""File of a stage's folder that names all others with their hashes; it is no part of the result."""

MADE_AGAIN = "%s is not as it was written; it is made again"
"""What is said of a damaged folder."""

State = dict[str, tuple[int, int]]
"""Size and time of writing of each file, by name."""

_ELSEWHERE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES)
"""Errors of reading that say nothing about what would be read."""


@dataclass(frozen=True)
class StageStore:
    """Finished stage results below a folder."""

    folder: Path

    def result(self, name: str, inputs: dict[str, Any], build: Callable[[Path], None]) -> Path:
        """The folder of a stage's result; `build` fills it when it does not exist yet.

        Args:
            name: of the stage.
            inputs: JSON values that determine the result, hashes for files.
            build: writes into an empty folder; it appears under its final name only when complete.
        """
        target = self.place(name, inputs)
        if not holds(target):
            with sealed(target) as temporary:
                build(temporary)
        return target

    def place(self, name: str, inputs: dict[str, Any]) -> Path:
        """Where the result of a stage is, or will be."""
        return self.folder / f"{name}-{digest({'stage': name, 'code': code_digest(), **inputs})[:16]}"


_CHECKED: dict[Path, State] = {}
"""What this process has found as it was written."""


def holds(target: Path) -> bool:
    """Whether a sealed folder is there, as it was written; a damaged one is removed.

    Files are read once, and again when they have changed since.
    """
    while target.is_dir():
        with suppress(FileNotFoundError):  # another process found it damaged, and has just removed it
            state = _state(target)
            if _checked(target, state):
                return True
            if _state(target) == state:  # else another process has made it again meanwhile
                log.warning(MADE_AGAIN, target)
                discard(target)
    return False


def whole(target: Path) -> bool:
    """Whether a sealed folder is there, as it was written; nothing is done to a damaged one."""
    with suppress(FileNotFoundError):  # another process has just removed it
        return target.is_dir() and _checked(target, _state(target))
    return False


def _checked(target: Path, state: State) -> bool:
    if _CHECKED.get(target) != state and not _as_sealed(target):
        return False
    _CHECKED[target] = state
    return True


@contextmanager
def sealed(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which gets its name and its seal when the block ends well, else vanishes."""
    with staged(target) as temporary:
        temporary.mkdir()
        yield temporary
        (temporary / SEAL).write_text(json.dumps(_contents(temporary), sort_keys=True), encoding="utf-8")


def _as_sealed(folder: Path) -> bool:
    """Whether all files are there and hold what they held when they were written; raises OSError that says neither."""
    try:
        return bool(parse_json((folder / SEAL).read_bytes()) == _contents(folder))
    except OSError as error:
        if error.errno in _ELSEWHERE:
            raise
        return False
    except ValueError:
        return False


def _contents(folder: Path) -> dict[str, str]:
    """Hex sha256 of every file in a folder and below, by name."""
    return {name: file_sha256(folder / name) for name in _state(folder) if name != SEAL}


def _state(folder: Path) -> State:
    files = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in files.items()}


def digest(value: Any) -> str:
    """Hex sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@cache
def code_digest() -> str:
    """Hex sha256 of this package's and the judging package's source: new code, new results."""
    root = Path(__file__).parents[1]
    files = sorted(path for package in ("quant", "eval") for path in (root / package).glob("*.py"))
    content = hashlib.sha256()
    for path in files:
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    return content.hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """Hex sha256 of every file directly in a folder, by name; a stage's seal is none of them."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SEAL)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
