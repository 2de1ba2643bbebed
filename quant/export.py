"""Exporters: they write a QuantPlan down as an artifact, a folder that clients load unmodified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import ModelProto, NodeProto, helper

from quant.errors import InputError
from quant.flow import GATE_READ_SCALE, GATE_SCALE, GATE_ZERO
from quant.graph import Graph
from quant.openvino_rules import shared_without_bias, unsafe_signed_concats, with_biases, with_unsigned
from quant.placement import place
from quant.plan import IntegerWeight, QuantPlan, corrected_graph
from quant.runtime import Feed, onnx_session, open_session, target_format
from quant.sensitivity import relative_errors
from quant.simulation import integer_bias, integer_limits, rounded_constant, simulated_session
from quant.storage import scratch
from quant.target import TARGETS, TargetName
from quant.tensorrt_rules import explicit_quantization_problems

_ROUNDING = 2e-3  # relative; different kernels may round single values to the neighbouring step
# Early values that round the other way move everything behind them: in a noisy plan two runtimes are two draws of
# the same noise, sqrt(2) of its size apart. What a runtime really gets wrong is far larger.
_NOISE_DRAWS = 2.0


class RuntimeDiffers(InputError):
    """A target's runtime computes something else than the plan says."""


def export_artifact(
    target: TargetName,
    graph: Graph,
    plan: QuantPlan,
    inference_yml: Mapping[str, Any],
    folder: Path,
    original: Path | None = None,
) -> None:
    """Write model files and PaddleX's `inference.yml` for a target into a folder.

    Args:
        original: folder of the old-IR form of the model, for operators that the Paddle target takes from there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if target_format(target) == "paddle":
        from quant.program import write_program

        write_program(corrected_graph(graph, plan), folder, plan, original)
    else:
        model = quantized_model(graph, plan, inference_yml)
        onnx.checker.check_model(model, full_check=True)
        (folder / "inference.onnx").write_bytes(model.SerializeToString(deterministic=True))
    write_inference_yml(inference_yml, folder)


def write_inference_yml(inference_yml: Mapping[str, Any], folder: Path) -> None:
    """Write PaddleX's description of pre- and post-processing beside a model."""
    text = yaml.safe_dump(dict(inference_yml), allow_unicode=True, sort_keys=False)
    (folder / "inference.yml").write_text(text, encoding="utf-8")


def quantized_model(graph: Graph, plan: QuantPlan, inference_yml: Mapping[str, Any]) -> ModelProto:
    """The prepared graph with Q/DQ pairs on activations and INT8 weights with DQ (ONNX opset 13 and later)."""
    result = place(graph, plan, QdqWriter())
    model = result.to_model()
    characters = _characters(inference_yml)
    if characters:  # RapidOCR reads the dictionary from the model's metadata
        helper.set_model_props(model, {"character": "\n".join(characters)})
    return model


def fitted(target: TargetName, graph: Graph, plan: QuantPlan, original: Path | None = None) -> QuantPlan:
    """The plan in a form that the target computes rightly; no value changes.

    Args:
        original: see `export_artifact`; what comes from there stays in FP32.
    """
    if target_format(target) == "paddle" and original is not None:
        from quant.program import part_before

        part = part_before(graph, original)
        return plan if part is graph else plan.with_only(set(part.producers()), "Paddle takes it from the original")
    rules = TARGETS[target]
    if rules.signed_behind_concat and rules.shared_without_bias:
        return plan
    exported = corrected_graph(graph, plan)
    if not rules.signed_behind_concat:
        plan = with_unsigned(plan, unsafe_signed_concats(exported, plan))
    if not rules.shared_without_bias:
        plan = with_biases(exported, plan, shared_without_bias(exported, plan))
    return plan


def check_artifact(
    target: TargetName, folder: Path, graph: Graph, plan: QuantPlan, feeds: Sequence[Feed], threads: int
) -> float:
    """Load an artifact on its runtime and compare it with the plan's simulated output.

    Medians over the pictures count: what a runtime computes wrongly shows in most, a value on the verge in single ones.
    An artifact for a runtime that is not at hand is checked for its structure, and run on onnxruntime in floats.

    Returns:
        Median relative L1 distance from the simulation.

    Raises:
        RuntimeDiffers: it is further from the simulation than rounding noise explains; names the first operator at
            which they part.
        InputError: its structure breaks a rule of the target.
    """
    if not TARGETS[target].executed:
        problems = explicit_quantization_problems(onnx.load(folder / "inference.onnx"))
        if problems:
            raise InputError(f"target {target}: the artifact breaks its rules: {'; '.join(problems[:5])}")
    own_error, difference = _differences(target, folder, graph, plan, feeds, threads)
    if _apart(own_error, difference):
        operator = first_difference(target, graph, plan, feeds, threads)
        place = f"they part at operator {operator}" if operator else "no single operator shows it"
        raise RuntimeDiffers(
            f"target {target}: the exported model differs from its plan by {difference:.4f} (relative), the plan from "
            f"FP32 by {own_error:.4f}: this runtime computes something else; {place}. Keep operators in FP32 with "
            f"--set targets.{target}.fp32=[NAME, ...], or choose another target with --target"
        )
    return difference


def first_difference(
    target: TargetName, graph: Graph, plan: QuantPlan, feeds: Sequence[Feed], threads: int
) -> str | None:
    """The first quantized operator whose output on the target differs from the simulated one by more than noise.

    The graph is cut behind every operator in turn. An error that a runtime makes only when it merges an operator with
    what follows shows at the next operator.
    """
    names = plan.quantized()
    for name in (node.output[0] for node in graph.nodes if node.output and node.output[0] in names):
        if graph.shape(name) is None:
            continue
        with scratch() as place:
            opened = graph.ending_at([name])
            export_artifact(target, opened, plan, {}, place)
            own_error, difference = _differences(target, place, opened, plan, feeds, threads)
        if _apart(own_error, difference):
            return name
    return None


def misread_operators(
    target: TargetName, graph: Graph, plan: QuantPlan, feeds: Sequence[Feed], threads: int
) -> list[str]:
    """Quantized operators that the target computes wrongly even where each is the only one in INT8.

    Finds what cutting the graph does not show: an error that a runtime makes when it merges operators behind the cut.
    """
    found = []
    for name in plan.quantized():
        alone = plan.with_only({name}, "tried without it")
        with scratch() as place:
            export_artifact(target, graph, alone, {}, place)
            if _apart(*_differences(target, place, graph, alone, feeds, threads)):
                found.append(name)
    return found


def _apart(own_error: float, difference: float) -> bool:
    """Whether an artifact is further from its plan than rounding explains, NaN included."""
    return not difference <= _NOISE_DRAWS * own_error + _ROUNDING


def _differences(
    target: TargetName, folder: Path, graph: Graph, plan: QuantPlan, feeds: Sequence[Feed], threads: int
) -> tuple[float, float]:
    """Median distances of the simulation from FP32, and of the artifact from the simulation."""
    # Another runtime's integer kernels would say nothing about a target that is not here, and on x86 without VNNI their
    # sums saturate: there its nodes are computed as they stand.
    here = TARGETS[target].executed
    sessions = [
        onnx_session(graph.to_light_model(), threads),
        simulated_session(graph, plan, threads),
        open_session(target, folder, threads)
        if here
        else onnx_session(folder / "inference.onnx", threads, integers=False),
    ]
    exact, simulated, executed = ([session.run(feed) for feed in feeds] for session in sessions)
    return float(np.median(relative_errors(simulated, exact))), float(np.median(relative_errors(executed, simulated)))


class QdqWriter:
    """Quantization as Q/DQ nodes (see `quant.placement.Writer`).

    Equal numbers are stored once a graph: hundreds of them and their names are a hundredth of a small model's file.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[Graph, str, tuple[int, ...], bytes], str] = {}

    def rounded(self, graph: Graph, before: NodeProto, tensor: str, scale: float, zero_point: int, dtype: str) -> str:
        quantized = self._quantize(graph, before, tensor, scale, zero_point, dtype)
        return self._read(graph, before, quantized, np.asarray(scale), np.asarray(zero_point, dtype=dtype), 1)

    def constant(self, graph: Graph, before: NodeProto, stem: str, values: np.ndarray) -> str:
        integers, scale, zero_point = rounded_constant(values)
        stored = graph.add_constant(stem, integers)
        return self._read(graph, before, stored, np.asarray(scale), np.asarray(zero_point, dtype=np.uint8), 1)

    def gate(self, graph: Graph, before: NodeProto, tensor: str) -> str:
        quantized = self._quantize(graph, before, tensor, GATE_SCALE, GATE_ZERO, "uint8")
        return self._read(graph, before, quantized, np.asarray(GATE_READ_SCALE), np.asarray(0, dtype=np.uint8), 1)

    def weight(self, graph: Graph, before: NodeProto, name: str, weight: IntegerWeight, axis: int) -> str:
        stored = graph.add_constant(f"{name}_int8", weight.values)
        return self._read(graph, before, stored, weight.scale, np.zeros(weight.scale.shape, dtype=np.int8), axis)

    def bias(self, graph: Graph, before: NodeProto, name: str, scale: np.ndarray) -> str:
        stored = graph.add_constant(f"{name}_int32", integer_bias(graph.constants[name], scale))
        return self._read(graph, before, stored, scale, np.zeros(scale.shape, dtype=np.int32), 0)

    def _quantize(self, graph: Graph, before: NodeProto, tensor: str, scale: float, zero_point: int, dtype: str) -> str:
        if _weights_are_taken(graph, tensor):
            tensor = self._bounded(graph, before, tensor, (integer_limits(dtype)[0] - zero_point) * scale)
        numbers = [
            self._number(graph, f"{tensor}_scale", np.asarray(scale, dtype=np.float32)),
            self._number(graph, f"{dtype}_zero_point", np.asarray(zero_point, dtype=dtype)),
        ]
        name = graph.fresh_name(f"{tensor}_quantized")
        graph.insert_before(before, helper.make_node("QuantizeLinear", [tensor, *numbers], [name], name=name))
        return name

    def _read(
        self, graph: Graph, before: NodeProto, stored: str, scale: np.ndarray, zero_point: np.ndarray, axis: int
    ) -> str:
        numbers = [
            self._number(graph, f"{stored}_scale", scale.astype(np.float32)),
            self._number(graph, f"{zero_point.dtype.name}_zero_point", zero_point),
        ]
        name = graph.fresh_name(f"{stored}_dequantized")
        node = helper.make_node("DequantizeLinear", [stored, *numbers], [name], name=name)
        if scale.ndim:
            node.attribute.append(helper.make_attribute("axis", axis))
        graph.insert_before(before, node)
        return name

    def _bounded(self, graph: Graph, before: NodeProto, tensor: str, low: float) -> str:
        """The tensor, not below the least value that its quantizer leaves."""
        bound = self._number(graph, f"{tensor}_low", np.asarray(low, dtype=np.float32))
        name = graph.fresh_name(f"{tensor}_bounded")
        graph.insert_before(before, helper.make_node("Max", [tensor, bound], [name], name=name))
        return name

    def _number(self, graph: Graph, stem: str, values: np.ndarray) -> str:
        key = (graph, values.dtype.name, values.shape, values.tobytes())
        if key not in self._numbers:
            self._numbers[key] = graph.add_constant(stem, values)
        return self._numbers[key]


def _weights_are_taken(graph: Graph, tensor: str) -> bool:
    """Whether onnxruntime (1.20 and later) would round the weights of the convolution in FP32 that writes a tensor.

    Where an operator reads what was dequantized and its output is quantized, behind a Relu or at once, its optimizer
    takes float weights for forgotten ones and rounds them, with one scale for all channels. Any other operator before
    the quantizer keeps it from that.
    """
    producers = graph.producers()
    node = producers.get(tensor)
    if node is not None and node.op_type == "Relu":
        node = producers.get(node.input[0])
    if node is None or node.op_type not in ("Conv", "ConvTranspose", "Gemm") or not graph.is_constant(node.input[1]):
        return False
    source = producers.get(node.input[0])
    return source is not None and source.op_type == "DequantizeLinear"


def _characters(inference_yml: Mapping[str, Any]) -> list[str]:
    characters = inference_yml.get("PostProcess", {}).get("character_dict", [])
    return [str(character) for character in characters] if isinstance(characters, list) else []
