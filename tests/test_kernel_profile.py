"""The profile of a model beside its FP32: each step once, and sums that add up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from test_plan import plan_of
from tiny_models import small_detector

from quant.execution import Kernel, kernel_tables
from quant.export import export_artifact

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from kernel_profile import SHOWN, Operators, kinds, markdown, operators, paired

KNOWN = Operators({"a": 6_000_000}, {"a": "Conv 1x1"}, {"a": ["x", "w"], "b": ["a"], "c": ["b", "a"]})


def kernel(name: str, kind: str, precision: str, milliseconds: float) -> Kernel:
    return Kernel(name, kind, precision, milliseconds)


def test_a_step_stands_beside_the_one_that_it_replaces() -> None:
    fp32 = [kernel("a_nchwc", "Conv", "float", 4.0), kernel("b", "HardSwish", "float", 1.0)]
    int8 = [kernel("a", "QLinearConv", "uint8", 1.5), kernel("a", "QuantizeLinear", "float", 0.25)]
    rows = paired(fp32, int8, KNOWN)
    assert [(row.name, row.kind, row.fp32_ms, row.int8_ms) for row in rows] == [
        ("a", "QLinearConv", 4.0, 1.5),
        ("a", "QuantizeLinear", None, 0.25),
        ("b", "HardSwish", 1.0, None),
    ]
    assert [row.group for row in rows] == ["Conv 1x1", "QuantizeLinear", "HardSwish"]
    assert [row.mmacs for row in rows] == [6.0, None, None]


def test_a_kernel_stands_for_the_product_that_it_computes_whatever_is_merged_into_it() -> None:
    int8 = [kernel("a", "QLinearConv", "uint8", 1.0)]
    named_by_the_last = Kernel("c", "Convolution (brgconv_avx2_f32)", "f32", 4.0, ("a", "b", "c"))
    for fp32 in (named_by_the_last, kernel("c_nchwc", "Conv", "float", 4.0)):
        (row,) = paired([fp32], int8, KNOWN)
        assert (row.name, row.group, row.fp32_ms, row.int8_ms) == ("a", "Conv 1x1", 4.0, 1.0)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_every_step_of_both_models_is_counted_once(target: Any, tmp_path: Path) -> None:
    net = small_detector()
    plan = plan_of(net)
    for part, used in (("fp32", plan.with_only(set(), "a test")), ("int8", plan)):
        export_artifact(target, net.graph(), used, {"Global": {"model_name": "tiny"}}, tmp_path / part)
    fp32, int8 = kernel_tables(target, [tmp_path / "fp32", tmp_path / "int8"], net.feed(), 1)
    rows = paired(fp32, int8, operators(tmp_path / "fp32", plan))
    groups = kinds(rows)
    for field, kernels in (("fp32_ms", fp32), ("int8_ms", int8)):
        everything = sum(step.milliseconds for step in kernels)
        assert everything > 0
        assert sum(getattr(row, field) or 0 for row in rows) == pytest.approx(everything)
        assert sum(group[field] for group in groups) == pytest.approx(everything)
    (first, *_), (dense, *_) = groups, [group for group in groups if group["group"] == "Conv 3x3"]
    assert first["int8_ms"] == max(group["int8_ms"] for group in groups)
    assert dense["mmacs"] > 0


def test_the_page_holds_the_largest_and_says_what_the_goal_needs() -> None:
    rows = paired([], [kernel(f"t{index}", "Add", "f32", 100.0 - index) for index in range(SHOWN + 5)], KNOWN)
    page = markdown(
        {
            "model": "M",
            "target": "openvino",
            "run": "r",
            "command": "benchmarks/kernel_profile.py M",
            "processor": {"name": "P", "features": ["avx_vnni"]},
            "versions": {"openvino": "1"},
            "threads": 1,
            "shape": [1, 3, 8, 8],
            "clock": {"fp32": 30.0, "fp32_prepared": 20.0, "int8": 12.0},
            "profiled": {"fp32": 31.0, "fp32_prepared": 21.0, "int8": 13.0},
            "goals": [{"against": "fp32", "factor": 3.0, "measured": 2.5, "needed_ms": 10.0, "reached": False}],
            "kinds": kinds(rows),
            "operators": [vars(row) for row in rows],
        }
    )
    assert "P (avx_vnni), 1 thread," in page and "1x3x8x8" in page
    assert "| FP32 as shipped | 3.0x | 2.50x | 10.00 | 12.00 | missed by 2.00 ms |" in page
    assert f"| t{SHOWN - 1} |" in page and f"| t{SHOWN} |" not in page
    assert "5 more" in page
