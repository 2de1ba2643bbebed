"""Archives from public hosts: download, verify, unpack; either all of it is there afterwards or nothing."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import lzma
import os
import re
import shutil
import socket
import stat
import struct
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal
from urllib.parse import urlsplit

from quant.errors import InputError, Unavailable
from quant.storage import naming
from quant.transfer import transfer

Progress = Callable[[str, int, int | None], None]
"""Told `(what, done, total)` as a long step moves on; the step is over when done equals total."""

CONNECT_SECONDS = 3.0
READ_SECONDS = 15.0
MAX_BYTES = 8 << 30
MAX_FILES = 200_000
_CHUNK = 1 << 18
_LONGEST_LINK = 4096
_PLAIN_SECONDS = 10.0
_PLAIN_LINE = re.compile(r"(.+): ([0-9]{1,15})(?: of ([0-9]{1,15}) \([0-9]+ %\))?")
_LOCKED_SECONDS = 60.0
"""By then a process has locked the folder that it made."""

# RuntimeError: zipfile's word for a password or an unknown compression; the last three: what a name or number that
# makes no sense trips over.
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) + (
    LookupError,
    ValueError,
    struct.error,
)

_unreachable: dict[tuple[str, int], str] = {}


@contextmanager
def console_progress() -> Iterator[Progress]:
    """Progress on stderr: a bar where it is a terminal, now and then a plain line where it is not."""
    if not sys.stderr.isatty():
        yield _PlainLines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, *times, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


class _PlainLines:
    """One line when a step starts, one every ten seconds, one when it ends."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        over = done == total
        if not over and now - self._last.get(what, -_PLAIN_SECONDS) < _PLAIN_SECONDS:
            return
        self._last[what] = now
        amount = f"{done}" if total is None else f"{done} of {total} ({100 * done // max(total, 1)} %)"
        print(f"{what}: {amount}", file=sys.stderr, flush=True)


def told_progress(line: str) -> tuple[str, int, int | None] | None:
    """What a plain line of progress says; None for any other line."""
    if not (said := _PLAIN_LINE.fullmatch(line)):
        return None
    what, done, total = said.groups()
    return what, int(done), None if total is None else int(total)


def download(url: str, sha256: str | None, folder: Path, progress: Progress | None = None) -> Path:
    """Fetch a file once and verify it; a file that is there already is verified, not fetched again.

    Without a known sha256 the first download is trusted, and its digest is pinned in a JSON file
    beside it: what comes from this address later must be the same.

    Raises:
        Unavailable: the host cannot be reached, does not have the file, or the folder takes no file.
        InputError: the file is not the one that was promised or pinned.
    """
    name = archive_name(url)
    pin = _pin_of(url, folder)
    known = sha256
    try:
        known = known or _pinned(pin)
        path = _retrieve(url, known, name, folder, progress)
        if known is None:
            _write_json(pin, {"url": url, "sha256": file_sha256(path)})
    except ValueError as error:
        raise InputError(_mismatch(url, known, pin if sha256 is None else None)) from error
    except OSError as error:
        reason = f"{url} cannot be stored in {folder}: {_why(error)}"
        raise Unavailable(reason, "Free some space, or set QUANT_CACHE to a folder that can be written") from error
    return path


def install(
    url: str,
    sha256: str | None,
    folder: Path,
    downloads: Path,
    finish: Callable[[Path], None],
    progress: Progress | None = None,
) -> None:
    """Download an archive to `downloads` and unpack it to `folder`; only its pinned checksum stays behind.

    Raises:
        InputError: the archive is unsafe, damaged or not the expected one, or `finish` raised it.
        Unavailable: it cannot be had, or the folders cannot be written.
    """
    try:
        path = download(url, sha256, downloads, progress)
        try:
            unpack(path, folder, finish)
        finally:
            # Unpacked it only takes space, and a useless one would be found here again and again.
            path.unlink(missing_ok=True)
    except Unavailable:
        # Another process that does the same may have been faster, and deleted the archive.
        if not folder.is_dir():
            raise


def install_files(
    addresses: Mapping[str, tuple[str, str | None]],
    folder: Path,
    downloads: Path,
    finish: Callable[[Path], None],
    progress: Progress | None = None,
) -> None:
    """Download single files to `downloads` and put them into `folder`, which appears complete or not at all.

    Args:
        addresses: file name -> address and sha256, None where it is trusted on first use.

    Raises:
        InputError: a file is not the expected one, or `finish` raised it.
        Unavailable: one cannot be had, or the folders cannot be written.
    """
    paths: dict[str, Path] = {}
    try:
        for name, (url, sha256) in addresses.items():
            paths[name] = download(url, sha256, downloads, progress)
        with staged(folder) as temporary:
            temporary.mkdir()
            for name, path in paths.items():
                shutil.copyfile(path, temporary / name)
            finish(temporary)
    except OSError as error:
        reason = f"{folder} cannot be written: {_why(error)}"
        raise Unavailable(reason, "Free some space, or set QUANT_CACHE to a folder that can be written") from error
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)


def archive_name(url: str) -> str:
    """The name under which the file of an address is kept: unique to the address.

    Raises:
        InputError: the address has no host or no file name.
    """
    import pooch.utils

    _endpoint(url)
    if not PurePosixPath(urlsplit(url).path).name:
        raise InputError(f"'{url}' names no file; expected an address like https://host/folder/name.tar")
    return str(pooch.utils.unique_file_name(url))


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's content."""
    import hashlib

    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _retrieve(url: str, known: str | None, name: str, folder: Path, progress: Progress | None) -> Path:
    import logging

    import pooch
    import requests

    pooch.get_logger().setLevel(logging.ERROR)

    what = f"downloading {PurePosixPath(urlsplit(url).path).name}"
    report = (lambda done, total: progress(what, done, total)) if progress else (lambda done, total: None)

    def fetch(url: str, output_file: str, _: Any) -> None:
        _probe(url)
        transfer(url, Path(output_file), folder / f"{name}.part", (CONNECT_SECONDS, READ_SECONDS), report)

    known_hash = f"sha256:{known}" if known else None
    try:
        return Path(pooch.retrieve(url, known_hash, fname=name, path=folder, downloader=fetch))
    except requests.HTTPError as error:
        answer = str(error).partition(" for url")[0]
        raise Unavailable(f"{url} cannot be downloaded ({answer})", _try_again()) from error
    except requests.RequestException as error:
        if isinstance(error, (requests.ConnectionError, requests.Timeout)):
            _unreachable[_endpoint(url)] = "the connection failed before"
        raise Unavailable(f"the download of {url} broke off ({_cause(error)})", _try_again()) from error


def _endpoint(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme not in ("http", "https"):
        raise InputError(f"'{url}' is no address; expected one like https://host/folder/name.tar")
    return host, port or (443 if parts.scheme == "https" else 80)


def _probe(url: str) -> None:
    """Find out within `CONNECT_SECONDS` whether a host answers, and remember it when it does not.

    Name look-ups know no timeout, hence the thread.
    """
    host, port = endpoint = _endpoint(url)
    if endpoint not in _unreachable:
        outcome = ["no answer"]
        thread = threading.Thread(target=_connect, args=(_peer(url), outcome), daemon=True)
        thread.start()
        thread.join(CONNECT_SECONDS)
        if outcome[-1] == "":
            return
        _unreachable[endpoint] = outcome[-1]
    raise Unavailable(f"{host}:{port} cannot be reached ({_unreachable[endpoint]})", _try_again())


def _connect(peer: tuple[str, int], outcome: list[str]) -> None:
    try:
        # Half of the time, so that a second address of the host has a chance.
        socket.create_connection(peer, timeout=CONNECT_SECONDS / 2).close()
        outcome.append("")
    except (OSError, UnicodeError) as error:
        outcome.append(_why(error))


def _peer(url: str) -> tuple[str, int]:
    """Whom a request talks to first: the proxy of the environment, else the host itself."""
    from requests.utils import get_environ_proxies, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    if not proxy:
        return _endpoint(url)
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return parts.hostname or "", parts.port or 80


def _pin_of(url: str, folder: Path) -> Path:
    return folder / f"{archive_name(url)}.pin.json"


def _pinned(pin: Path) -> str | None:
    try:
        return str(json.loads(pin.read_text(encoding="utf-8"))["sha256"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{pin} cannot be read as a pinned checksum; delete it to trust the next download") from error


def _mismatch(url: str, known: str | None, pin: Path | None) -> str:
    if pin is None:
        return f"{url} has a wrong checksum: its sha256 is not {known} as the recipe says; the download was deleted"
    return (
        f"{url} has a wrong checksum: it changed since its first download (sha256 {known}); "
        f"if the new file is to be trusted, delete {pin} and try again"
    )


def _try_again() -> str:
    return "Check the network and the proxy settings (HTTPS_PROXY), then try again"


def _cause(error: BaseException) -> str:
    """The innermost reason of a wrapped network error, in one line."""
    reason: Any = error
    while isinstance(nested := getattr(reason, "reason", None) or (reason.args or [None])[0], BaseException):
        reason = nested
    return " ".join(str(reason).split()) or type(reason).__name__


def _why(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _write_json(path: Path, content: dict[str, str]) -> None:
    with staged(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that gets its name when the block ends well, else vanishes.

    The block creates a file or a folder there. A target folder that another process finished
    meanwhile is left as it is.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent, target.name)
    with (
        tempfile.TemporaryDirectory(prefix=f".{target.name}-", suffix=".part", dir=target.parent) as folder,
        _locked(Path(folder)),
    ):
        temporary = Path(folder) / target.name
        with naming(target):
            yield temporary
        try:
            os.replace(temporary, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock, which ends with the process that holds it; False where another one does."""
    descriptor, free = os.open(folder, os.O_RDONLY), True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held by another process, or a file system without locks
            free = False
        yield free
    finally:
        os.close(descriptor)


def sweep(parent: Path, name: str | None = None) -> None:
    """Remove what processes left that were killed while they worked on targets in a folder.

    Args:
        parent: where it may hold files of others, a name has to be given.
        name: of the target; None: all of them.
    """
    for folder in parent.glob(f".{'' if name is None else glob.escape(name) + '-'}*.part"):
        try:
            # A young one is not even touched: its process, about to lock it, would find it locked.
            if time.time() - folder.stat().st_mtime < _LOCKED_SECONDS:
                continue
            with _locked(folder) as free:
                if free:
                    shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # another process was faster, or it is not ours


def discard(folder: Path) -> None:
    """Remove a folder so that nobody finds half of it; what a killed process leaves of it is swept up."""
    with (
        tempfile.TemporaryDirectory(prefix=f".{folder.name}-", suffix=".part", dir=folder.parent) as place,
        suppress(FileNotFoundError),  # another process was faster
    ):
        os.replace(folder, Path(place) / folder.name)


def unpack(
    archive: Path,
    folder: Path,
    finish: Callable[[Path], None] | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    max_files: int = MAX_FILES,
) -> None:
    """Unpack a tar, tar.gz or zip so that `folder` appears complete or not at all.

    A single folder at the top of the archive is left out. Links inside the archive become copies.

    Args:
        archive: the file.
        folder: what to create; left alone when it exists.
        finish: called with the unpacked content before it gets its name; may check and add files.
        max_bytes: most bytes that may come out.
        max_files: most entries that may come out.

    Raises:
        InputError: broken, or it holds what must not be unpacked, or `finish` raised it.
        Unavailable: the folder cannot be written.
    """
    try:
        with staged(folder) as temporary:
            content = temporary.parent / "content"
            content.mkdir()
            _extract(archive, content, max_bytes, max_files)
            top = _top(content)
            if finish:
                finish(top)
            top.rename(temporary)
    except OSError as error:
        reason = f"{archive} cannot be unpacked to {folder}: {_why(error)}"
        raise Unavailable(reason, "Free some space, or set QUANT_CACHE to a folder that can be written") from error


@dataclass(frozen=True)
class _Entry:
    """One thing in an archive, of either kind of archive."""

    name: str
    kind: Literal["file", "folder", "link", "other"]
    size: int
    link: str
    open: Callable[[], IO[bytes] | None]


def _extract(archive: Path, content: Path, max_bytes: int, max_files: int) -> None:
    try:
        _extract_all(archive, content, max_bytes, max_files)
    except _DAMAGED as error:
        raise InputError(f"{archive} cannot be unpacked: it is cut off or damaged ({error}); fetch it again") from error


def _extract_all(archive: Path, content: Path, max_bytes: int, max_files: int) -> None:
    links: list[tuple[Path, Path]] = []
    left = max_bytes
    for count, entry in enumerate(_entries(archive), start=1):
        if count > max_files or entry.size > left:
            limit = f"more than {max_files} entries" if count > max_files else f"more than {max_bytes} bytes"
            raise _refusal(archive, entry.name, f"the archive holds {limit}")
        target = content / _inside(archive, entry.name, entry.name)
        if entry.kind == "folder":
            target.mkdir(parents=True, exist_ok=True)
        elif entry.kind == "link":
            links.append((content / _inside(archive, entry.name, entry.link), target))
        elif entry.kind == "file":
            left -= _write(entry, target)
        else:
            raise _refusal(archive, entry.name, "it is neither a file nor a folder")
    for source, target in links:
        if not source.is_file() or source.stat().st_size > left:
            raise _refusal(archive, str(target.relative_to(content)), "it links to no file of the archive")
        target.parent.mkdir(parents=True, exist_ok=True)
        left -= source.stat().st_size
        shutil.copyfile(source, target)


def _write(entry: _Entry, target: Path) -> int:
    target.parent.mkdir(parents=True, exist_ok=True)
    source = entry.open()
    if source is None:
        raise tarfile.ReadError(f"{entry.name} has no content")
    with source, target.open("wb") as file:
        shutil.copyfileobj(source, file, _CHUNK)
        return file.tell()


def _inside(archive: Path, entry: str, name: str) -> Path:
    """A name of an archive as a path below the folder it is unpacked to."""
    parts = PurePosixPath(name).parts
    if not parts and entry == name:
        return Path()
    if not parts or parts[0] == "/" or "\\" in name or "\0" in name or ":" in parts[0]:
        raise _refusal(archive, entry, f"'{name}' is not a relative path")
    if ".." in parts:
        raise _refusal(archive, entry, "it leads out of the folder")
    return Path(*parts)


def _refusal(archive: Path, entry: str, why: str) -> InputError:
    return InputError(f"{archive.name} is not safe to unpack: entry '{entry}': {why}; get the archive from its maker")


def _entries(archive: Path) -> Iterator[_Entry]:
    if zipfile.is_zipfile(archive):
        yield from _zip_entries(archive)
    else:
        yield from _tar_entries(archive)


def _tar_entries(archive: Path) -> Iterator[_Entry]:
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            link = member.linkname
            if member.issym():
                link = _sibling(member.name, link)
            kind: Literal["file", "folder", "link", "other"] = "other"
            if member.isreg():
                kind = "file"
            elif member.isdir():
                kind = "folder"
            elif member.issym() or member.islnk():
                kind = "link"
            size = member.size if kind == "file" else 0
            yield _Entry(member.name, kind, size, link, lambda member=member: tar.extractfile(member))  # type: ignore[misc]


def _zip_entries(archive: Path) -> Iterator[_Entry]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            mode = info.external_attr >> 16
            kind: Literal["file", "folder", "link", "other"] = "folder" if info.is_dir() else "file"
            link = ""
            if stat.S_ISLNK(mode) and info.file_size <= _LONGEST_LINK:
                kind, link = "link", _sibling(info.filename, file.read(info).decode("utf-8", "replace"))
            elif stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                kind = "other"
            size = info.file_size if kind == "file" else 0
            yield _Entry(info.filename, kind, size, link, lambda info=info: file.open(info))  # type: ignore[misc]


def _sibling(name: str, link: str) -> str:
    """The target of a symbolic link, seen from the top of the archive."""
    if link.startswith("/"):
        return link
    return os.path.normpath(str(PurePosixPath(name).parent / link))


def _top(content: Path) -> Path:
    entries = [path for path in content.iterdir() if not path.name.startswith(("._", "__MACOSX"))]
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else content
