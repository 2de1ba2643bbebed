"""Arrays as files, made in memory: on a full disk `np.save` and `np.savez` say neither reason nor place."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quant.storage import write_bytes

Array = npt.NDArray[Any]


def arrays_bytes(*arrays: Array, **named: Array) -> bytes:
    """Arrays as the content of an npz file; those without a name are `arr_0` and so on."""
    content = io.BytesIO()
    np.savez(content, *arrays, **named)
    return content.getvalue()


def write_array(file: Path, array: Array) -> None:
    """Write an npy file.

    Raises:
        OSError: it cannot be written; names it.
    """
    content = io.BytesIO()
    np.save(content, array)
    write_bytes(file, content.getvalue())


def write_arrays(file: Path, *arrays: Array, **named: Array) -> None:
    """Write an npz file; `np.savez` itself would also print a traceback where there is no room.

    Raises:
        OSError: it cannot be written; names it.
    """
    write_bytes(file, arrays_bytes(*arrays, **named))
