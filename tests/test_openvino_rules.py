"""OpenVINO's wrong answers: minimal models that show them, and that the rules avoid them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_plan import plan_of
from tiny_models import TinyNet, session_values

from quant.export import export_artifact
from quant.openvino_rules import unsafe_signed_concats, unsigned, with_unsigned
from quant.plan import ActivationQuantizer, QuantPlan, corrected_graph
from quant.runtime import open_session
from quant.simulation import integer_limits


def joined(between: str = "", kernel: int = 3, group: int = 1) -> TinyNet:
    """Two parts of the input side by side, an operator of one input perhaps, and a convolution."""
    net = TinyNet((1, 8, 6, 6), seed=7)
    halves = [net.op("MaxPool", "x", kernel_shape=[1, 1]), net.op("HardSwish", "x")]
    tensor = net.op("Concat", *halves, axis=1)
    if between:
        tensor = net.op(between, tensor, *([net.const(0.5)] if between in ("Add", "Mul") else []))
    net.conv(tensor, 16, 16, kernel=kernel, pad=kernel // 2, group=group)
    return net


def distance(net: TinyNet, plan: QuantPlan, folder: Path) -> float:
    """Relative L1 distance of OpenVINO's output from onnxruntime's without any optimization."""
    export_artifact("openvino", net.graph(), plan, {"Global": {"model_name": "tiny"}}, folder)
    expected = session_values(folder / "inference.onnx", net.feed(), optimized=False)[0]
    found = open_session("openvino", folder, 1).run(net.feed())[0]
    return float(np.abs(found - expected).mean() / np.abs(expected).mean())


def rounded(values: np.ndarray, quantizer: ActivationQuantizer) -> np.ndarray:
    """Quantized and read back."""
    steps = np.clip(np.rint(values / quantizer.scale) + quantizer.zero_point, *integer_limits(quantizer.dtype))
    return np.asarray((steps - quantizer.zero_point) * quantizer.scale)


def unsafe(net: TinyNet, plan: QuantPlan) -> list[str]:
    return unsafe_signed_concats(corrected_graph(net.graph(), plan), plan)


def test_openvino_still_destroys_signed_activations_behind_a_concat(tmp_path: Path) -> None:
    net = joined()
    assert distance(net, plan_of(net, "int8"), tmp_path) > 0.1, (
        "this OpenVINO reads S8 activations behind a Concat rightly: unsafe_signed_concats may be dropped, "
        "with docs/openvino-s8.md and these tests"
    )


@pytest.mark.parametrize("between", ["", "Relu", "Add", "Mul", "Identity", "HardSwish", "Sigmoid", "GlobalAveragePool"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_with_the_rule_it_agrees_with_onnxruntime(between: str, kernel: int, tmp_path: Path) -> None:
    net = joined(between, kernel)
    plan = plan_of(net, "int8")
    assert distance(net, with_unsigned(plan, unsafe(net, plan)), tmp_path) < 0.01


@pytest.mark.parametrize("between", ["", "Relu", "Add", "Mul", "Identity"])
def test_what_openvino_gets_wrong_is_named(between: str, tmp_path: Path) -> None:
    net = joined(between)
    plan = plan_of(net, "int8")
    assert distance(net, plan, tmp_path) > 0.1
    (operator,) = plan.operators
    assert unsafe(net, plan) == operator.activations


def test_what_is_right_is_left_alone(tmp_path: Path) -> None:
    deep = joined(group=16)
    assert unsafe(deep, plan_of(deep, "int8")) == []
    assert distance(deep, plan_of(deep, "int8"), tmp_path / "deep") < 0.01

    net = joined()
    assert unsafe(net, plan_of(net, "uint8")) == []
    assert distance(net, plan_of(net, "uint8"), tmp_path / "unsigned") < 0.01
    assert unsafe(net, plan_of(net, "int8").with_only(set(), "a test")) == []

    plain = TinyNet((1, 8, 6, 6))
    plain.conv(plain.op("Relu", plain.op("Concat", "x", axis=1)), 8, 8)
    assert unsafe(plain, plan_of(plain, "int8")) == []
    assert distance(plain, plan_of(plain, "int8"), tmp_path / "plain") < 0.01


def test_the_search_stops_at_the_operator_before() -> None:
    net = TinyNet((1, 8, 6, 6))
    first = net.conv(net.op("Concat", "x", "x", axis=1), 16, 8)
    net.conv(net.op("Relu", first), 8, 8)
    plan = plan_of(net, "int8")
    assert unsafe(net, plan) == plan.operators[0].activations


@pytest.mark.parametrize("zero_point", [-128, -3, 0, 127])
def test_the_unsigned_quantizer_has_the_same_values(zero_point: int) -> None:
    signed = ActivationQuantizer(tensor="x", dtype="int8", scale=0.03, zero_point=zero_point)
    values = np.linspace(-9, 9, 1001, dtype=np.float32)
    np.testing.assert_array_equal(rounded(values, signed), rounded(values, unsigned(signed)))
    assert unsigned(unsigned(signed)) == unsigned(signed)
