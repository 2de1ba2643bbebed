"""Files by name, and files that are written whole: where a disk is full, the error says at which place."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEAST_ROOM = 1 << 20
"""More than is left where a library stopped in the middle of a block, or took away again what it could not finish."""


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """Name a place in an error of the block that says that there is no room, and not where: writing itself does not."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM and error.filename is None:
            error.filename = str(place)
        raise


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, which vanishes when the block ends."""
    with tempfile.TemporaryDirectory(prefix="quant-") as name, naming(Path(name)):
        yield Path(name)


def check_room(folder: Path) -> None:
    """See whether there is room at all: native libraries cut files off without a word, and what reads them fails.

    Raises:
        OSError: there is not; names the folder.
    """
    with naming(folder), tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(_LEAST_ROOM))
        probe.flush()


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file.

    Raises:
        OSError: it cannot be written; names it.
    """
    with naming(file):
        file.write_bytes(content)


def is_file(path: Path) -> bool:
    """Whether a file is there; False also for a name that no file system takes, which what was read may hold."""
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise
