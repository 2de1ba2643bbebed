"""The main job as a user starts it, once for all tests that look at its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HAS_DATA = bool(os.environ.get("QUANT_DATA_HOME"))
THREADS = 1  # two jobs run side by side
QUANT = Path(sys.executable).parent / "quant"


def quant(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(QUANT), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def together(*models: str, bare: bool = False) -> list[Any]:
    """Parameters of tests: those that look at the same main job run in one process, where it is run once."""
    apart = bare and HAS_DATA
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"{name} bare" if apart else name)) for name in models]


def pooled(output: str) -> dict[str, dict[str, Any]]:
    """The gating row of each target in what `--json` printed."""
    rows = json.loads(output)["rows"]
    return {row["target"]: row for row in rows if row["status"] == "judged" and row["dataset"] == "pooled"}


@dataclass(frozen=True)
class MainJob:
    """What `quant run MODEL` left behind."""

    results: Path
    folder: Path
    rows: dict[str, dict[str, Any]]
    environment: dict[str, str]


@dataclass(frozen=True)
class MainJobs:
    """Runs of whole models in caches of their own; each is started when the first test asks for it."""

    place: Path
    done: dict[str, MainJob] = field(default_factory=dict)

    def on_real_data(self, model: str) -> MainJob:
        """With the data that there is: without any, the bare command."""
        if not HAS_DATA:
            return self.bare(model)
        return self._finished(f"{model}-real", model, {})

    def bare(self, model: str) -> MainJob:
        return self._finished(f"{model}-bare", model, {"QUANT_DATA_HOME": ""})

    def _finished(self, name: str, model: str, settings: dict[str, str]) -> MainJob:
        if name not in self.done:
            results = self.place / name
            environment = {**settings, "QUANT_CACHE": str(self.place / f"{name}-cache")}
            command = ("run", model, "--threads", THREADS, "--json", "--quiet", "--out", results)
            finished = quant(*command, **environment)
            assert finished.returncode == 0, finished.stdout + finished.stderr[-2000:]
            (metrics,) = (results / model).glob("*/metrics.json")
            self.done[name] = MainJob(results, metrics.parent, pooled(finished.stdout), environment)
        return self.done[name]
