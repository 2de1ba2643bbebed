"""Modules of this project in a process of their own: flags that act once, prints and memory of a library stay there."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def child_command(module: str, *arguments: object) -> list[str]:
    """`python -m MODULE ARGUMENTS` with the Python that runs now."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def child_environment(**variables: str) -> dict[str, str]:
    """This process's environment with the project on the path, and with the given variables."""
    package = str(Path(__file__).parents[1])
    path = os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path, **variables}


def last_line(log: Path) -> str:
    """The last line of a child's log that is not blank."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "(the log is empty)"
