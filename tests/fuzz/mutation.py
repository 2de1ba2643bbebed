"""Mutators: plain functions from a file's content and a generator to another content."""

from __future__ import annotations

import io
import json
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

from numpy.random import Generator

Mutator = Callable[[bytes, Generator], bytes]

PICKLE = b"cposix\nsystem\n(S'echo > pickled'\ntR."
EXTREMES = (
    b"\x00" * 4,
    b"\xff" * 4,
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"\xff" * 8,
    b"\xff" * 7 + b"\x7f",
    b"\x80" * 9,
)
NUMBERS = (
    "0",
    "-1",
    "1e999",
    "-1e400",
    "NaN",
    "9" * 30,
    "9" * 5000,
    "2147483648",
    "0.1",
    "1:1:1:1:1",
    "0x7fffffffffffffff",
    "1e-400",
)
WORDS = (
    *("", "null", "true", "~", "[]", "{}", "<<", "*a", "&a [*a]", "../../outside", "/etc/passwd", "\\x00", "\u2028"),
    *("!!python/object/apply:os.system ['echo > called']", "!!python/name:os.system", "!!binary x", "!!timestamp x"),
    *("x" * 10_000, "\U0001f642", "[" * 3000, "{a: " * 2000, "- " * 2000, "2024-13-45", "'", '"', ":", "#", "\t"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1e308, float("inf"), float("nan"), 1 << 70, 10**400, "", "x" * 5000, "../../outside", "\0"),
    *([], {}, [[]], {"": None}, [None] * 100, "/etc/passwd", "\ud800", [1, [2, [3]]], {"a": {"b": {}}}),
)
ODD: dict[type, tuple[Any, ...]] = {
    bool: (True, False),
    str: (
        "",
        "x" * 3000,
        "../../outside",
        "/etc/passwd",
        "\0",
        "\x1b[2J",
        "<b>|`",
        "\u202e",
        "0",
        "[bold]",
        "{}",
        "%s",
    ),
    int: (0, -1, 1, (1 << 63) - 1, -(1 << 63) + 1, 1 << 31, 10**400),
    float: (0.0, -0.0, -1.0, 1e100, -1e100, 1e-320, 1e308, float("nan"), float("inf"), 5),
}
NAMES = (
    "../outside",
    "/tmp/outside",
    "a/../../outside",
    "C:outside",
    "",
    ".",
    "a\\..\\b",
    "x" * 300,
    "\0",
    "ok/file",
    "a/b",
)


def flip(data: bytes, rng: Generator) -> bytes:
    result = bytearray(data)
    for place in rng.integers(0, max(len(data), 1), int(rng.integers(1, 9))):
        if data:
            result[place] ^= 1 << int(rng.integers(8))
    return bytes(result)


def extreme(data: bytes, rng: Generator) -> bytes:
    place, value = _place(data, rng), EXTREMES[rng.integers(len(EXTREMES))]
    return data[:place] + value + data[place + len(value) :]


def cut(data: bytes, rng: Generator) -> bytes:
    return data[: _place(data, rng)]


def remove(data: bytes, rng: Generator) -> bytes:
    start = _place(data, rng)
    return data[:start] + data[start + int(rng.integers(1, 64)) :]


def double(data: bytes, rng: Generator) -> bytes:
    start = _place(data, rng)
    end = start + int(rng.integers(1, 256))
    return data[:end] + data[start:end] * int(rng.integers(1, 4)) + data[end:]


def noise(data: bytes, rng: Generator) -> bytes:
    place = _place(data, rng)
    return data[:place] + rng.bytes(int(rng.integers(1, 64))) + data[place:]


def payload(data: bytes, rng: Generator) -> bytes:
    """A pickle that would leave a file, in front of the content, in it, or in its place."""
    place = int(rng.choice([0, _place(data, rng)]))
    return data[:place] + PICKLE + (data[place:] if rng.integers(2) else b"")


def number(data: bytes, rng: Generator) -> bytes:
    return _token(rb"-?\d[\d.]*", NUMBERS, data, rng)


def word(data: bytes, rng: Generator) -> bytes:
    return _token(rb"[A-Za-z_]\w*", WORDS, data, rng)


def value_of_key(data: bytes, rng: Generator) -> bytes:
    """What stands behind a colon of YAML."""
    return _token(rb"(?<=: )[^\n]+", (*WORDS, *NUMBERS), data, rng)


def lines(data: bytes, rng: Generator) -> bytes:
    """A line taken out, said again elsewhere, or set in deeper."""
    listed = data.split(b"\n")
    here, there = rng.integers(len(listed), size=2)
    how = rng.integers(3)
    if how == 0:
        del listed[here]
    elif how == 1:
        listed.insert(there, listed[here])
    else:
        listed[here] = b"  " + listed[here]
    return b"\n".join(listed)


def json_node(data: bytes, rng: Generator) -> bytes:
    """A node of a JSON document replaced, taken out, or said twice; bytes flipped where it is no document."""
    try:
        document, places = _parsed(data)
    except (ValueError, RecursionError):
        return flip(data, rng)
    if not places:
        return json.dumps(VALUES[rng.integers(len(VALUES))]).encode()
    place, key = places[rng.integers(len(places))]
    how = rng.integers(4)
    if how == 0:
        del place[key]
    elif how == 1 and isinstance(place, list):
        place.append(place[key])
    elif how == 2:
        other, name = places[rng.integers(len(places))]
        place[key] = json.loads(json.dumps(other[name])) if name in _keys(other) else None
    else:
        place[key] = VALUES[rng.integers(len(VALUES))]
    return json.dumps(document).encode("utf-8", "replace")


def json_leaf(data: bytes, rng: Generator) -> bytes:
    """A number or text of a JSON document replaced by an odd one of its kind."""
    try:
        document, places = _parsed(data)
    except (ValueError, RecursionError):
        return flip(data, rng)
    leaves = [(place, key) for place, key in places if isinstance(place[key], str | int | float)]
    if not leaves:
        return data
    place, key = leaves[rng.integers(len(leaves))]
    odd = next(values for kind, values in ODD.items() if isinstance(place[key], kind))
    place[key] = odd[rng.integers(len(odd))]
    return json.dumps(document).encode()


def json_line(data: bytes, rng: Generator) -> bytes:
    """`json_node` on the JSON of one line, behind a tab or alone."""
    listed = data.split(b"\n")
    place = int(rng.integers(len(listed)))
    name, tab, text = listed[place].rpartition(b"\t")
    listed[place] = name + tab + json_node(text, rng)
    return b"\n".join(listed)


def deep(data: bytes, rng: Generator) -> bytes:
    place = _place(data, rng)
    return data[:place] + (b"[", b'{"a":', b"(")[rng.integers(3)] * int(rng.choice([100, 5000, 100_000])) + data[place:]


def archive_entries(data: bytes, rng: Generator) -> bytes:
    """The same archive with an entry that leads out, links, lies about its size, or is no file."""
    return _zip(data, rng) if data[:2] == b"PK" else _tar(data, rng)


BYTES: Sequence[Mutator] = (flip, extreme, cut, remove, double, noise, payload)
YAML: Sequence[Mutator] = (number, word, value_of_key, value_of_key, lines, flip, cut, deep)
JSON: Sequence[Mutator] = (json_node, json_node, json_node, number, flip, cut, deep, word)
RECORDS: Sequence[Mutator] = (*[json_leaf] * len(JSON), *JSON)
NODES: Sequence[Mutator] = (json_node, json_leaf)
LINES: Sequence[Mutator] = (json_line, json_line, lines, number, word, flip, cut, deep)
ARCHIVE: Sequence[Mutator] = (archive_entries, archive_entries, *BYTES)


def mutated(data: bytes, mutators: Sequence[Mutator], rng: Generator) -> bytes:
    """One to three mutations, one after the other."""
    for index in rng.integers(len(mutators), size=int(rng.integers(1, 4))):
        data = mutators[index](data, rng)
    return data


def _place(data: bytes, rng: Generator) -> int:
    return int(rng.integers(len(data) + 1))


def _token(pattern: bytes, others: Sequence[str], data: bytes, rng: Generator) -> bytes:
    found = list(re.finditer(pattern, data))
    if not found:
        return noise(data, rng)
    chosen = found[rng.integers(len(found))]
    return data[: chosen.start()] + others[rng.integers(len(others))].encode() + data[chosen.end() :]


def _parsed(data: bytes) -> tuple[Any, list[tuple[Any, Any]]]:
    """A JSON document, and every place in it: the container and its key or index."""
    document = json.loads(data)
    return document, [(place, key) for place in _containers(document) for key in _keys(place)]


def _containers(value: Any) -> list[Any]:
    found, waiting = [], [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (dict, list)):
            found.append(item)
            waiting += item.values() if isinstance(item, dict) else item
    return found


def _keys(container: Any) -> list[Any]:
    return list(container) if isinstance(container, dict) else list(range(len(container)))


def _tar(data: bytes, rng: Generator) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=("w", "w:gz")[rng.integers(2)]) as tar:
        for name in ("model/a.txt", str(NAMES[rng.integers(len(NAMES))]).replace("\0", "0"), "model/b.txt"):
            entry = tarfile.TarInfo(name)
            entry.type = (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)[
                rng.choice(5, p=[0.5, 0.2, 0.1, 0.1, 0.1])
            ]
            entry.linkname = NAMES[rng.integers(len(NAMES))].replace("\0", "0")
            content = data[:100]
            entry.size = len(content) if entry.isreg() else 0
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _zip(data: bytes, rng: Generator) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in ("model/a.txt", str(NAMES[rng.integers(len(NAMES))]).replace("\0", "0") or "x", "model/b.txt"):
            info = zipfile.ZipInfo(name)
            kind = (stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO)[rng.choice(3, p=[0.6, 0.3, 0.1])]
            info.external_attr = (kind | 0o644) << 16
            content = str(NAMES[rng.integers(len(NAMES))]).encode() if kind == stat.S_IFLNK else data[:100]
            file.writestr(info, content)
    return buffer.getvalue()
