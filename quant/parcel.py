"""What goes to other machines and comes back from them: folders as bytes that are known by their hash."""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from quant.archive import discard, staged, unpack
from quant.errors import InputError
from quant.manifest import make_newest
from quant.verification import verify

_LIST = "files.txt"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def sha256_of(data: bytes) -> str:
    """Hex sha256."""
    return hashlib.sha256(data).hexdigest()


def packed(files: Mapping[str, Path]) -> bytes:
    """Files under the names they are given, as a zip whose bytes follow from names and content alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        # A file beside the folders: an archive with one folder at its top would be unpacked without that one.
        file.writestr(zipfile.ZipInfo(_LIST, _EPOCH), "\n".join(sorted(files)))
        for name in sorted(files):
            file.writestr(zipfile.ZipInfo(name, _EPOCH), files[name].read_bytes())
    return buffer.getvalue()


def unpacked(data: bytes, folder: Path) -> Path:
    """What `packed` made, in a new folder."""
    with tempfile.NamedTemporaryFile(suffix=".zip") as file:
        file.write(data)
        file.flush()
        unpack(Path(file.name), folder)
    return folder


def packed_runs(results: Path, folders: Sequence[Path]) -> bytes:
    """Folders of runs below a results folder."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return packed({path.relative_to(results).as_posix(): path for path in files})


def run_folders(results: Path) -> list[Path]:
    """The folders of complete runs, those of twins among them."""
    found = (path.parent for pattern in ("*/*/manifest.json", "*/*/*/manifest.json") for path in results.glob(pattern))
    return sorted(folder for folder in found if not any(part.startswith(".") for part in folder.parts[-3:]))


def receive_runs(data: bytes, results: Path) -> None:
    """Put runs into the results; each appears whole, and only if it is what its manifest says.

    They are the newest then, as what is run here is, also where they had been there before.

    Raises:
        InputError: a run does not agree with its manifest.
    """
    with tempfile.TemporaryDirectory(prefix="quant-arrived-") as place:
        arrived = unpacked(data, Path(place) / "results")
        for folder in run_folders(arrived):
            if problems := verify(folder).problems:
                raise InputError(f"the run {folder.name} arrived damaged: {problems[0]}")
            target = results / folder.relative_to(arrived)
            if target.is_dir() and not _good(target):
                discard(target)
            with staged(target) as temporary:
                shutil.copytree(folder, temporary)
            make_newest(target)


def _good(folder: Path) -> bool:
    try:
        return verify(folder).good
    except InputError:
        return False
