"""Kills runs of a tiny model with SIGKILL at 50 random moments, and prints whether all that follow end the same.

python benchmarks/interruption.py [--kills 50] [--seed 1]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from interruptions import kill_and_resume, make_job  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="interruption-") as place:
        found = kill_and_resume(make_job(Path(place) / "job"), Path(place), arguments.kills, arguments.seed)
    print(
        f"{found.kills} kills with seed {arguments.seed}: {found.runs} runs went through, {found.different} of them "
        f"ended with other bytes, {found.damaged} damaged folders were seen, {found.survivors} processes lived on"
    )
    return int(bool(found.different or found.damaged or found.survivors))


if __name__ == "__main__":
    sys.exit(main())
