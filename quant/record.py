"""Records: JSON files that this program wrote, read again as what they were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from quant.document import MOST_JSON, DocumentError, read_bounded

Kind = TypeVar("Kind")

_LARGEST_WHOLE = (1 << 63) - 1
_LARGEST = 1e100
"""Of other numbers: far beyond float32, and what follows from several of them is finite."""


def read_record(file: Path, kind: type[Kind]) -> Kind:
    """The value of a record, checked against its type.

    All numbers in it can be computed with: whole ones have 64 bits, no other is infinite or NaN. It is text that can
    be written again, and not nested beyond measure.

    Args:
        kind: a model, a dataclass, or a collection of them.

    Raises:
        OSError: the file cannot be read.
        ValueError: its content is something else.
    """
    from pydantic import TypeAdapter
    from pydantic_core import from_json

    value = from_json(read_bounded(file, MOST_JSON), allow_inf_nan=False)
    _check_numbers(value)
    return TypeAdapter(kind).validate_python(value)


def _check_numbers(value: Any) -> None:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, int) and abs(item) > _LARGEST_WHOLE:
            raise DocumentError("it holds a whole number beyond 64 bits")
        elif isinstance(item, float) and abs(item) > _LARGEST:
            raise DocumentError(f"it holds a number beyond {_LARGEST:g}")
