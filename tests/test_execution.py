"""Executed coverage: the runtimes say themselves which operators run on integer kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_plan import plan_of
from tiny_models import TinyNet, small_detector, small_recognizer

from quant.execution import executed_coverage, executed_operators, kernel_tables
from quant.export import export_artifact
from quant.plan import QuantPlan

NETS = {"detector": small_detector, "recognizer": small_recognizer}
TARGETS = ["onnxruntime", "openvino"]


def exported(net: TinyNet, plan: QuantPlan, folder: Path, target: Any = "openvino") -> Path:
    export_artifact(target, net.graph(), plan, {"Global": {"model_name": "tiny"}}, folder)
    return folder


def names(plan: QuantPlan, *kinds: str) -> set[str]:
    return {operator.name for operator in plan.operators if operator.op_type in kinds}


@pytest.mark.parametrize("net", NETS)
def test_openvino_follows_the_plan_in_convolutions_and_products_by_weights(net: str, tmp_path: Path) -> None:
    tiny = NETS[net]()
    plan = plan_of(tiny)
    weighted = {operator.name for operator in plan.operators if operator.weight}
    found = executed_operators("openvino", exported(tiny, plan, tmp_path), plan)
    assert found is not None
    assert found >= weighted


def test_openvino_computes_a_transposed_convolution_with_a_zero_point_in_floats(tmp_path: Path) -> None:
    net = small_detector()
    plan = plan_of(net)
    up = plan.operators[2]
    (tensor,) = up.activations
    for zero_point, integer in ((0, True), (7, False)):
        plan.activations[tensor] = plan.activations[tensor].model_copy(update={"zero_point": zero_point})
        found = executed_operators("openvino", exported(net, plan, tmp_path / str(zero_point)), plan)
        assert found is not None
        assert (up.name in found) == integer


def test_onnxruntime_needs_a_quantizer_directly_behind_a_convolution(tmp_path: Path) -> None:
    net = small_detector()
    plan = plan_of(net)
    _, deep, up, _ = (operator.name for operator in plan.operators)
    assert names(plan, "ConvTranspose") == {up}
    found = executed_operators("onnxruntime", exported(net, plan, tmp_path), plan)
    assert found == {deep}, (
        "HardSwish stands behind the first, Sigmoid behind the last, and ConvTranspose has no kernel"
    )


def test_onnxruntime_multiplies_matrices_in_integers(tmp_path: Path) -> None:
    net = small_recognizer()
    plan = plan_of(net)
    assert executed_operators("onnxruntime", exported(net, plan, tmp_path), plan) == names(plan, "MatMul")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("net", NETS)
def test_what_stays_in_floats_is_not_counted(net: str, target: Any, tmp_path: Path) -> None:
    tiny = NETS[net]()
    full = plan_of(tiny)
    one = next(operator.name for operator in full.operators if operator.weight)
    part = full.with_only(set(full.quantized()) - {one}, "a test")
    found = executed_operators(target, exported(tiny, part, tmp_path / "part", target), part)
    assert found and one not in found
    none = full.with_only(set(), "a test")
    folder = exported(tiny, none, tmp_path / "none", target)
    assert executed_operators(target, folder, none) == set()
    assert executed_coverage(target, folder, none) == 0.0


@pytest.mark.parametrize("target", TARGETS)
def test_names_of_nodes_do_not_matter(target: Any, tmp_path: Path) -> None:
    import onnx

    net = small_detector()
    plan = plan_of(net)
    folder = exported(net, plan, tmp_path, target)
    expected = executed_operators(target, folder, plan)
    model = onnx.load(folder / "inference.onnx")
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, folder / "inference.onnx")
    assert expected
    assert executed_operators(target, folder, plan) == expected


@pytest.mark.parametrize("target", TARGETS)
def test_coverage_is_the_share_of_multiply_accumulates(target: Any, tmp_path: Path) -> None:
    net = small_detector()
    plan = plan_of(net)
    plan.operators = [op.model_copy(update={"macs": 10**index}) for index, op in enumerate(plan.operators)]
    folder = exported(net, plan, tmp_path, target)
    found = executed_operators(target, folder, plan)
    assert found
    expected = sum(op.macs for op in plan.operators if op.name in found) / 1111
    assert executed_coverage(target, folder, plan) == pytest.approx(expected)


def test_paddle_cannot_be_asked(tmp_path: Path) -> None:
    plan = plan_of(small_detector())
    assert executed_operators("paddle", tmp_path, plan) is None
    assert executed_coverage("paddle", tmp_path, plan) is None
    with pytest.raises(ValueError, match="Paddle"):
        kernel_tables("paddle", [tmp_path], {}, 1)


@pytest.mark.parametrize(
    ("target", "integer", "floating"), [("onnxruntime", "uint8", "float"), ("openvino", "u8", "f32")]
)
def test_the_profile_names_kernels_types_and_times(target: Any, integer: str, floating: str, tmp_path: Path) -> None:
    net = small_detector()
    plan = plan_of(net)
    last = plan.operators[-1].name
    part = plan.with_only(set(plan.quantized()) - {last}, "a test")
    (table,) = kernel_tables(target, [exported(net, part, tmp_path, target)], net.feed(), 1)
    times = [kernel.milliseconds for kernel in table]
    assert times == sorted(times, reverse=True)
    assert all(0 <= time < 1000 for time in times)
    convolutions = {kernel.name.removesuffix("/WithoutBiases"): kernel for kernel in table if "Conv" in kernel.kind}
    assert convolutions[plan.operators[1].name].precision == integer
    assert floating in {kernel.precision for kernel in convolutions.values()}
