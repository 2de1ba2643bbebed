"""Cases that do what none may do, by name; a process of its own, as the audit hook of a campaign stays in it.

python misdeeds.py NAME PLACE: tries the case twice, and prints both ends as JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import campaign
import yaml
from subjects import Subject


def _other_error(folder: Path) -> None:
    raise KeyError("of ours")


def _outside(folder: Path) -> None:
    (folder.parents[1] / "outside").write_text("")


def _hang(folder: Path) -> None:
    while True:
        pass


def _memory(folder: Path) -> None:
    bytearray(b"x") * (1 << 29)


def _in_child(code: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-c", f"import os, subprocess, sys\n{code}", *map(str, arguments)], check=True)


MISDEEDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "other error": (_other_error, "KeyError"),
    "outside": (_outside, "outside"),
    "pickle": (lambda folder: pickle.loads(pickle.dumps(Path("x"))), "pickle.find_class"),
    "yaml": (lambda folder: yaml.unsafe_load("!!python/object/apply:os.system ['true']"), "os.system"),
    "process": (lambda folder: subprocess.run(["true"], check=True), "subprocess.Popen"),
    "hang": (_hang, "hangs"),
    "memory": (_memory, "MiB of memory"),
    "beside": (lambda folder: Path("beside").write_text(""), "left in the working folder: beside"),
    "child": (lambda folder: _in_child("open(sys.argv[1], 'w')", folder.parents[1] / "outside"), "outside in a child"),
    "child's command": (lambda folder: _in_child("os.system('true')"), "os.system"),
    "child's process": (lambda folder: _in_child("subprocess.run(['true'])"), "subprocess.Popen"),
    "grandchild": (
        lambda folder: _in_child("subprocess.run([sys.executable, '-c', sys.argv[1]])", "import os; os.system('true')"),
        "os.system",
    ),
}
"""What a case does, and what is said of it."""

STARTING = ("child", "child's command", "child's process", "grandchild")
"""Those that may start a Python, as cases do that are parsed in a child."""


def main(name: str, place: Path) -> None:
    campaign.CASE_SECONDS, campaign.MOST_MEMORY = 2, 1 << 27
    (place / "cwd").mkdir()
    os.chdir(place / "cwd")
    watch = campaign.Watch(place, native=name in STARTING)
    subject = Subject(list, [], [], MISDEEDS[name][0])
    print(json.dumps([campaign._attempt(subject, {"a": b""}, watch) for _ in range(2)]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
