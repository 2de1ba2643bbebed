"""What one more model, and one more sample, costs: whole runs of tiny models, side by side or on Ray.

python benchmarks/executor.py [--models 1,2,4] [--samples 40,80,160] [--jobs 2] [--executor local]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from interruptions import make_models  # noqa: E402
from test_pipeline import SETS, write_lines  # noqa: E402

from quant.executor import ModelJob, spread  # noqa: E402


def main() -> None:
    arguments = _parsed()
    with tempfile.TemporaryDirectory(prefix="executor-") as place:
        _measure("model", arguments.models, arguments, Path(place))
        _measure("sample", arguments.samples, arguments, Path(place))


def _measure(what: str, counts: list[int], arguments: argparse.Namespace, place: Path) -> None:
    seconds = []
    for count in counts:
        root = place / f"{what}s-{count}"
        names = [f"reader_{index}" for index in range(count if what == "model" else 1)]
        recipes = make_models(root, names)
        if what == "sample":
            for seed, (name, letters) in enumerate(SETS.items()):
                write_lines(root / "data" / name, count, letters, 100 + seed)
        os.environ |= {
            f"QUANT_{key}_HOME": str(root / folder) for key, folder in (("MODEL", "models"), ("DATA", "data"))
        }
        os.environ["QUANT_CACHE"] = str(root / "cache")
        more = ("--target", "onnxruntime", "--threads", "1", "--quiet")
        jobs = [ModelJob("run", name, (str(file), *more), 1) for name, file in zip(names, recipes, strict=True)]
        start = time.monotonic()
        codes = [end.code for _, end in spread(jobs, root / "results", arguments.executor, arguments.jobs, None)]
        seconds.append(time.monotonic() - start)
        assert codes == [0] * len(jobs), codes
        print(f"{count} {what}s: {seconds[-1]:.1f} s", flush=True)
    slope, start = np.polyfit(counts, seconds, 1)
    worst = max(abs(start + slope * n - s) / s for n, s in zip(counts, seconds, strict=True))
    print(
        f"{slope:.3f} s for each {what}, {start:.1f} s beside; a line misses no time by more than {100 * worst:.0f} %"
    )


def _parsed() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=numbers, default=[1, 2, 4])
    parser.add_argument("--samples", type=numbers, default=[40, 400, 800])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--executor", choices=["local", "ray"], default="local")
    return parser.parse_args()


if __name__ == "__main__":
    main()
