"""The whole fuzz campaign: prints how many mutated inputs of each kind were tried, and writes what was found.

python benchmarks/fuzz.py [--cases 20000] [--seed 1] [--seconds 1500] [--kinds recipe,archive] [--out results/fuzz.json]

Kinds whose models are parsed in a child take seconds a case, and get a hundredth of the others' share. With the same
seed and number the cases are the same. The seconds are shared out as the cases are; what a kind leaves goes to those
after it, the slow ones last. Ends with 1 where anything was found, or the time did not suffice for all cases.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "fuzz")]

from campaign import Tried, run  # noqa: E402
from subjects import SUBJECTS  # noqa: E402


def main() -> int:
    arguments = _parsed()
    kinds = arguments.kinds.split(",") if arguments.kinds else list(SUBJECTS)
    found, short = list[Tried](), dict[str, int]()
    for asked, tried in _campaign(kinds, arguments.cases, arguments.seconds, arguments.seed):
        found.append(tried)
        if tried.cases < asked:
            short[tried.kind] = asked - tried.cases
        print(
            f"{tried.kind:12} {tried.cases:6} cases: {tried.read} read, {tried.refused} refused, "
            f"{len(tried.findings)} findings, {tried.seconds:.0f} s",
            flush=True,
        )
    cases, findings = sum(tried.cases for tried in found), sum(len(tried.findings) for tried in found)
    print(f"{cases} cases with seed {arguments.seed}, {findings} findings")
    _write(arguments.out, arguments.seed, found)
    if short:
        missing = ", ".join(f"{count} of {kind}" for kind, count in short.items())
        print(f"fell short: no time for {missing}; give more --seconds")
    return int(bool(findings or short))


def _campaign(kinds: Sequence[str], cases: int, seconds: float, seed: int) -> Iterator[tuple[int, Tried]]:
    """Each kind with the number of cases that were asked for."""
    end, rest = time.monotonic() + seconds, sum(SUBJECTS[kind].share for kind in kinds)
    each = cases / rest
    for kind in sorted(kinds, key=lambda kind: -SUBJECTS[kind].share):
        share = SUBJECTS[kind].share
        count, allowed = math.ceil(each * share), (end - time.monotonic()) * share / rest
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            yield count, run(kind, seed, count, allowed, Path(place))
        rest -= share


def _write(file: Path, seed: int, found: list[Tried]) -> None:
    """Beside what other kinds were found with this seed before: the campaign can be run in parts."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kinds = known["kinds"] if known.get("seed") == seed else {}
    kinds |= {tried.kind: tried.document() for tried in found}
    cases = sum(tried["cases"] for tried in kinds.values())
    document = {"schema": 1, "seed": seed, "cases": cases, "kinds": dict(sorted(kinds.items()))}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--kinds", default="", help="by default all")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "fuzz.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
