"""Settings that must stand before Paddle or PaddleX is imported, and a cache of its own for every test that asks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from main_jobs import MainJobs
from official_host import OfficialHost
from tried import pytest_terminal_summary

if TYPE_CHECKING:
    from tiny_run import TinyRun

__all__ = ["pytest_terminal_summary"]  # a hook: pytest looks for it here

LONGEST = ("test_main_job.py", "test_twin_runs.py")

os.environ["FLAGS_enable_pir_api"] = "0"
os.environ["PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK"] = "True"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first: at the end no worker waits long for another (`--no-loadscope-reorder`)."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no search paths: the test sees nothing that this machine happens to have."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("QUANT_CACHE", str(folder))
    monkeypatch.delenv("QUANT_MODEL_HOME", raising=False)
    monkeypatch.delenv("QUANT_DATA_HOME", raising=False)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with two MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def main_jobs(tmp_path_factory: pytest.TempPathFactory) -> MainJobs:
    return MainJobs(tmp_path_factory.mktemp("main-jobs"))


@pytest.fixture
def host() -> Iterator[OfficialHost]:
    server = OfficialHost()
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_run_once(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    from tiny_run import tiny_run

    return tiny_run(tmp_path_factory.mktemp("tiny-run"))


@pytest.fixture
def tiny(tiny_run_once: TinyRun, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    """The finished run of a tiny network, with its cache and data; nothing else on this machine is seen."""
    for name, value in tiny_run_once.environment.items():
        monkeypatch.setenv(name, value)
    return tiny_run_once
