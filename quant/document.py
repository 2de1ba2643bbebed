"""JSON and YAML that others wrote: plain values of a bounded size, or one kind of error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

MOST_JSON = 256 << 20
MOST_YAML = 16 << 20
_MOST_VALUES = 2_000_000
_LONGEST_NUMBER = 400
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MERGE = "tag:yaml.org,2002:merge"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_NOT_PLAIN = {_TIMESTAMP, *(f"tag:yaml.org,2002:{name}" for name in ("binary", "omap", "pairs", "set"))}
# What PyYAML's constructors trip over, beside its own errors.
_TRIPS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


class DocumentError(ValueError):
    """Why a text is no document that can be read here."""


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a file, which is looked at only where it is no larger than `most` bytes.

    Raises:
        OSError: it cannot be read.
        DocumentError: it is too large.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise DocumentError(f"it has more than {most >> 20} MiB")
        return file.read()


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; raises DocumentError where it is none, or too large or too deep."""
    if len(text) > MOST_JSON:
        raise DocumentError(f"it has more than {MOST_JSON >> 20} MiB")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DocumentError("it is nested too deep") from error
    except ValueError as error:
        raise DocumentError(str(error)) from error


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, of plain types only.

    Dates stay text. Anchors may name a value again, but not so that it grows beyond measure, or holds itself; `<<` is
    not known.

    Raises:
        DocumentError: it is no such text, or too large or too deep.
    """
    if len(text) > MOST_YAML:
        raise DocumentError(f"it has more than {MOST_YAML >> 20} MiB")
    try:
        value = yaml.load(text, _PlainLoader)
        size = _size(value, {})
    except RecursionError as error:
        raise DocumentError("it is nested too deep, or holds itself") from error
    except (yaml.YAMLError, *_TRIPS) as error:
        raise DocumentError(" ".join(str(error).split()) or error.__class__.__name__) from error
    if size > _MOST_VALUES:
        raise DocumentError(f"its anchors make more than {_MOST_VALUES} values of it")
    return value


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without types of YAML alone, and without what takes time or memory out of proportion."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == _MERGE for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merging with << is not known here", node.start_mark)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
            raise yaml.constructor.ConstructorError(None, None, "a number is too long", node.start_mark)
        return super().construct_scalar(node)


_PlainLoader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag not in _NOT_PLAIN
}
_PlainLoader.yaml_implicit_resolvers = {
    sign: [(tag, pattern) for tag, pattern in known if tag != _TIMESTAMP]
    for sign, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _size(value: Any, known: dict[int, int]) -> int:
    """How many values a document holds, those that are named again counted again."""
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) not in known:
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(item, known) for item in items)
    return known[id(value)]
