"""One file over HTTP, which goes on where it broke off.

What has come is kept beside the goal, with what identifies the content on the server: its ETag or its date. The next
attempt asks for the rest under that condition (RFC 9110, sections 13.1.5 and 14.2), so parts of two versions never
meet. Where a server names neither, nothing is kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHUNK = 1 << 18
_LOCKS = ".locks"

Report = Callable[[int, int | None], None]
"""Told the bytes that are there and the bytes in all, None where the server does not say."""


def transfer(url: str, file: Path, part: Path, timeout: tuple[float, float], report: Report) -> None:
    """Download to `file`; what came before a failure stays in `part` for the next attempt.

    Args:
        part: of this address alone; a second process waits for the first.
        timeout: seconds to connect, and between two chunks.

    Raises:
        requests.RequestException: the server refuses, or the connection failed.
        OSError: no space.
    """
    from filelock import FileLock

    lock = part.parent / _LOCKS / part.name
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        try:
            _receive(url, part, timeout, report)
            shutil.move(part, file)
        except BaseException:
            if not _kept(part)[1]:
                part.unlink(missing_ok=True)
                _mark_file(part).unlink(missing_ok=True)
            raise
        _mark_file(part).unlink()


def _receive(url: str, part: Path, timeout: tuple[float, float], report: Report) -> None:
    import requests

    done, mark = _kept(part)
    headers = {"Accept-Encoding": "identity"}  # compressed on the way, bytes would not be those of the file
    if done and mark:
        headers |= {"Range": f"bytes={done}-", "If-Range": mark}
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:  # all bytes are there already
            report(done, done)
            return
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            done = 0
        elif _mark_of(response) != mark or not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            part.unlink()  # a server that does not keep to the condition: from the start, without one
            return _receive(url, part, timeout, report)
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        with part.open("ab" if done else "wb") as out:
            _mark_file(part).write_text(json.dumps({"url": url, "mark": _mark_of(response)}), encoding="utf-8")
            for chunk in response.iter_content(_CHUNK):
                out.write(chunk)
                done += len(chunk)
                report(done, total)
        if total is None:
            report(done, done)


def _kept(part: Path) -> tuple[int, str | None]:
    """How many bytes are there, and what identifies their content."""
    try:
        mark = json.loads(_mark_file(part).read_text(encoding="utf-8"))["mark"]
        return part.stat().st_size, str(mark) if mark else None
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None


def _mark_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _mark_of(response: Any) -> str | None:
    """What identifies the content byte by byte; a weak ETag does not."""
    tag = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")
