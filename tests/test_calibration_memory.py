"""The verdict on memory while calibrating: bytes from the kernel, growth against the fewest pictures, two limits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from calibration_memory import apart, growth, peak_bytes, table  # noqa: E402

HELD = 200_000_000


def row(pictures: int, peak: float, **more: Any) -> dict[str, Any]:
    facts = {"model": "PP-OCRv4_mobile_det", "target": "openvino", "different": min(pictures, 144), "seconds": 12}
    return {**facts, "pictures": pictures, "peak_bytes": int(peak), **more}


def held_for_a_moment() -> int:
    np.ones(HELD, dtype=np.uint8)
    return peak_bytes()


def test_the_peak_is_that_of_the_process_and_outlives_what_was_held() -> None:
    peak = apart(held_for_a_moment)
    assert HELD < peak < 2e9


def test_growth_is_counted_from_the_fewest_pictures_of_the_same_model_and_target() -> None:
    rows = [row(1024, 1.1e9), row(32, 1.0e9), row(32, 0.5e9, target="onnxruntime")]
    assert growth(rows[0], rows) == pytest.approx(0.1)
    assert growth(rows[1], rows) is None and growth(rows[2], rows) is None


@pytest.mark.parametrize(
    ("few", "many", "said"), [(1.0e9, 1.09e9, "kept"), (1.0e9, 1.11e9, "EXCEEDED"), (1.19e9, 1.21e9, "EXCEEDED")]
)
def test_the_table_holds_both_limits_against_what_was_measured(few: float, many: float, said: str) -> None:
    lines = [line.strip("| ").split(" | ") for line in table([row(1024, many), row(32, few)]).splitlines()]
    first, second = lines[-2:]
    assert first[2:6] == ["32", "32", f"{few / 1e9:.2f}", "1.2"] and first[6:8] == ["-", "-"]
    assert second[2:4] == ["1,024", "144"] and second[6:8] == [f"{100 * (many / few - 1):.1f}", "10"]
    assert first[-1] == "kept" and second[-1] == said
