"""Cases that do what none may do, by name; a process of its own, as the audit hook of a campaign stays in it.

python misdeeds.py NAME PLACE: tries the case twice, and prints both ends as JSON.
"""

from __future__ import annotations

import json
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


MISDEEDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "other error": (_other_error, "KeyError"),
    "outside": (_outside, "outside"),
    "pickle": (lambda folder: pickle.loads(pickle.dumps(Path("x"))), "pickle.find_class"),
    "yaml": (lambda folder: yaml.unsafe_load("!!python/object/apply:os.system ['true']"), "os.system"),
    "process": (lambda folder: subprocess.run(["true"], check=True), "subprocess.Popen"),
    "hang": (_hang, "hangs"),
    "memory": (_memory, "MiB of memory"),
}
"""What a case does, and what is said of it."""


def main(name: str, place: Path) -> None:
    campaign.CASE_SECONDS, campaign.MOST_MEMORY = 2, 1 << 27
    sentinel = campaign._Sentinel(place, native=False)
    subject = Subject(list, [], [], MISDEEDS[name][0])
    print(json.dumps([campaign._attempt(subject, {"a": b""}, place, sentinel) for _ in range(2)]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
