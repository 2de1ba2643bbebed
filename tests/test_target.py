"""Targets: what recipes may choose, TensorRT's rules, and which operator a wrong runtime is told by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper
from test_plan import plan_of
from tiny_models import TinyNet, small_detector, small_recognizer

from quant.errors import InputError
from quant.export import check_artifact, export_artifact, first_difference, fitted, quantized_model
from quant.plan import ActivationQuantizer
from quant.recipe import load_recipe, recipe_names
from quant.target import TARGETS, TargetName
from quant.tensorrt_rules import explicit_quantization_problems

NETS = {"detector": small_detector, "recognizer": small_recognizer}


@pytest.mark.parametrize("name", recipe_names())
def test_what_recipes_leave_open_is_what_suits_their_targets(name: str) -> None:
    """onnxruntime takes its integer kernels only where outputs are stored, too; Paddle and TensorRT know S8 alone."""
    best = {
        "onnxruntime": ("uint8", "outputs"),
        "openvino": ("uint8", "inputs"),
        "paddle": ("int8", "inputs"),
        "tensorrt": ("int8", "inputs"),
    }
    recipe = load_recipe(name)
    assert {target: (c.activations, c.placement) for target, c in recipe.targets.items()} == best
    said = load_recipe(name, ["targets.onnxruntime.placement=inputs", "targets.onnxruntime.activations=int8"])
    assert said.targets["onnxruntime"].placement == "inputs"
    assert said.targets["onnxruntime"].activations == "int8"


def test_every_target_of_the_contract_is_described() -> None:
    assert set(TARGETS) == set(get_args(TargetName))


# --- TensorRT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", list(NETS))
def test_a_symmetric_artifact_keeps_tensorrts_rules(net: str) -> None:
    built = NETS[net]()
    assert explicit_quantization_problems(quantized_model(built.graph(), plan_of(built, "int8"), {})) == []


def test_asymmetric_activations_break_them() -> None:
    net = small_detector()
    problems = explicit_quantization_problems(quantized_model(net.graph(), plan_of(net, "uint8"), {}))
    assert problems and all("symmetric" in problem for problem in problems)


def _constant(model: ModelProto, name: str) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _first(model: ModelProto, kind: str) -> Any:
    return next(node for node in model.graph.node if node.op_type == kind)


def _negative_scale(model: ModelProto) -> None:
    tensor = _constant(model, _first(model, "QuantizeLinear").input[1])
    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))


def _computed_scale(model: ModelProto) -> None:
    node = _first(model, "QuantizeLinear")
    model.graph.node.insert(0, helper.make_node("Abs", [node.input[1]], ["computed"]))
    node.input[1] = "computed"


def _zero_point(model: ModelProto) -> None:
    tensor = _constant(model, _first(model, "QuantizeLinear").input[2])
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(3, dtype=np.int8), tensor.name))


def _scale_for_each_channel(model: ModelProto) -> None:
    tensor = _constant(model, _first(model, "QuantizeLinear").input[1])
    tensor.CopyFrom(numpy_helper.from_array(np.full(3, 0.1, dtype=np.float32), tensor.name))


def _no_quantized_input(model: ModelProto) -> None:
    _first(model, "Conv").input[0] = "x"


def _weight_along_inputs(model: ModelProto) -> None:
    conv = _first(model, "Conv")
    producer = next(node for node in model.graph.node if node.output[0] == conv.input[1])
    next(attribute for attribute in producer.attribute if attribute.name == "axis").i = 1


def _dequantized_bias(model: ModelProto) -> None:
    conv = _first(model, "Conv")
    source = _first(model, "DequantizeLinear")
    node = helper.make_node("DequantizeLinear", list(source.input), ["bias_read"])
    model.graph.node.insert(list(model.graph.node).index(source) + 1, node)
    conv.input[2] = "bias_read"


def _quantizer_read_by_another(model: ModelProto) -> None:
    node = _first(model, "QuantizeLinear")
    model.graph.node.append(helper.make_node("Cast", [node.output[0]], ["cast"], to=1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_negative_scale, "not positive"),
        (_computed_scale, "no constant"),
        (_zero_point, "zero point 0"),
        (_scale_for_each_channel, "one scale for each channel"),
        (_no_quantized_input, "only one of its two operands"),
        (_weight_along_inputs, "along axis 1"),
        (_dequantized_bias, "bias is dequantized"),
        (_quantizer_read_by_another, "not by DQ alone"),
    ],
)
def test_every_rule_binds(change: Callable[[ModelProto], None], said: str) -> None:
    net = small_detector()
    model = quantized_model(net.graph(), plan_of(net, "int8"), {})
    change(model)
    assert any(said in problem for problem in explicit_quantization_problems(model))


def test_an_artifact_that_breaks_the_rules_is_refused(tmp_path: Path) -> None:
    net = small_detector()
    graph, plan = net.graph(), plan_of(net, "uint8")
    export_artifact("tensorrt", graph, plan, {}, tmp_path)
    with pytest.raises(InputError, match="target tensorrt: the artifact breaks its rules"):
        check_artifact("tensorrt", tmp_path, graph, plan, [net.feed()], 1)
    symmetric = plan_of(net, "int8")
    export_artifact("tensorrt", graph, symmetric, {}, tmp_path)
    assert check_artifact("tensorrt", tmp_path, graph, symmetric, [net.feed()], 1) < 0.1


# --- where a runtime leaves the plan -----------------------------------------------------------------


def behind_concat() -> TinyNet:
    """OpenVINO computes the convolution behind the Concat wrongly in S8 (docs/openvino-s8.md)."""
    net = TinyNet((1, 4, 6, 6), seed=4)
    stem = net.op("HardSwish", net.conv("x", 4, 4))
    both = net.op("Concat", net.op("Neg", stem), net.conv(stem, 4, 4, kernel=1, pad=0), axis=1)
    net.op("HardSwish", net.conv(both, 8, 4), name="y")
    return net


def test_the_first_operator_at_which_they_part_is_named(tmp_path: Path) -> None:
    net = behind_concat()
    graph, plan, feeds = net.graph(), plan_of(net, "int8"), [net.feed(seed) for seed in range(3)]
    wrong = [op.name for op in plan.operators][-1]
    export_artifact("openvino", graph, plan, {}, tmp_path)
    assert first_difference("openvino", graph, plan, feeds, 1) == wrong
    with pytest.raises(InputError, match=f"they part at operator {wrong}"):
        check_artifact("openvino", tmp_path, graph, plan, feeds, 1)


def test_the_targets_rule_mends_it_without_changing_a_value(tmp_path: Path) -> None:
    net = behind_concat()
    graph, feeds = net.graph(), [net.feed(seed) for seed in range(3)]
    plan = plan_of(net, "int8")
    mended = fitted("openvino", graph, plan)
    changed = [name for name, q in mended.activations.items() if q != plan.activations[name]]
    assert [mended.activations[name].dtype for name in changed] == ["uint8"]
    export_artifact("openvino", graph, mended, {}, tmp_path)
    check_artifact("openvino", tmp_path, graph, mended, feeds, 1)
    assert first_difference("openvino", graph, mended, feeds, 1) is None
    assert fitted("onnxruntime", graph, plan) is plan


def test_the_target_gives_a_bias_to_what_openvino_scales_twice(tmp_path: Path) -> None:
    net = TinyNet((1, 4, 6, 6), seed=4, free=(2, 3))
    first = net.conv("x", 4, 4, bias=False)
    net.op("Add", first, net.conv(first, 4, 4), name="y")
    graph, plan, feeds = net.graph(), plan_of(net), [net.feed(seed) for seed in range(3)]
    export_artifact("openvino", graph, plan, {}, tmp_path)
    with pytest.raises(InputError, match="this runtime computes something else"):
        check_artifact("openvino", tmp_path, graph, plan, feeds, 1)
    mended = fitted("openvino", graph, plan)
    assert list(mended.bias_shifts) == [first] and not plan.bias_shifts
    export_artifact("openvino", graph, mended, {}, tmp_path)
    check_artifact("openvino", tmp_path, graph, mended, feeds, 1)
    assert not fitted("onnxruntime", graph, plan).bias_shifts


def test_without_a_difference_no_operator_is_named() -> None:
    net = small_detector()
    plan = plan_of(net, "uint8")
    assert first_difference("onnxruntime", net.graph(), plan, [net.feed()], 1) is None
    assert isinstance(next(iter(plan.activations.values())), ActivationQuantizer)
    onnx.checker.check_model(quantized_model(net.graph(), plan, {}))
