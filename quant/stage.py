"""Stages: a result is a folder named by the hash of everything it depends on, so it is made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quant.archive import staged


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
        if not target.is_dir():
            with staged(target) as temporary:
                temporary.mkdir()
                build(temporary)
        return target

    def place(self, name: str, inputs: dict[str, Any]) -> Path:
        """Where the result of a stage is, or will be."""
        return self.folder / f"{name}-{digest({'stage': name, 'code': code_digest(), **inputs})[:16]}"


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
    """Hex sha256 of every file directly in a folder, by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
