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
from quant.placement import place
from quant.plan import IntegerWeight, QuantPlan, corrected_graph
from quant.recipe import TargetName
from quant.runtime import Feed, onnx_session, open_session, target_format
from quant.sensitivity import picture_errors
from quant.simulation import rounded_constant, simulated_model

_ROUNDING = 2e-3  # relative; different kernels may round single values to the neighbouring step
# Early values that round the other way move everything behind them: in a noisy plan two runtimes are two draws of
# the same noise, sqrt(2) of its size apart. What a runtime really gets wrong is far larger.
_NOISE_DRAWS = 2.0


def export_artifact(
    target: TargetName, graph: Graph, plan: QuantPlan, inference_yml: Mapping[str, Any], folder: Path
) -> None:
    """Write model files and PaddleX's `inference.yml` for a target into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if target_format(target) == "paddle":
        from quant.program import write_program

        write_program(corrected_graph(graph, plan), folder, plan)
    else:
        model = quantized_model(graph, plan, inference_yml)
        onnx.checker.check_model(model, full_check=True)
        (folder / "inference.onnx").write_bytes(model.SerializeToString(deterministic=True))
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


def check_artifact(
    target: TargetName, folder: Path, graph: Graph, plan: QuantPlan, feeds: Sequence[Feed], threads: int
) -> float:
    """Load an artifact on its runtime and compare it with the plan's simulated output.

    Medians over the pictures count: what a runtime computes wrongly shows in most, a value on the verge in single ones.

    Returns:
        Median relative L1 distance from the simulation.

    Raises:
        InputError: it is further from the simulation than rounding noise explains.
    """
    exact_session = onnx_session(graph.to_model(), threads)
    simulated_session = onnx_session(simulated_model(graph, plan), threads)
    exact = [exact_session.run(feed) for feed in feeds]
    simulated = [simulated_session.run(feed) for feed in feeds]
    own_error = float(np.median(picture_errors(simulated_session, feeds, exact)))
    difference = float(np.median(picture_errors(open_session(target, folder, threads), feeds, simulated)))
    if not difference <= _NOISE_DRAWS * own_error + _ROUNDING:
        raise InputError(
            f"target {target}: the exported model differs from its plan by {difference:.4f} (relative), the plan from "
            f"FP32 by {own_error:.4f}: this runtime computes something else. Choose another target with --target"
        )
    return difference


class QdqWriter:
    """Quantization as Q/DQ nodes (see `quant.placement.Writer`)."""

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
        limits = np.iinfo(np.int32)
        integers = np.clip(np.rint(graph.constants[name] / scale.astype(np.float64)), limits.min, limits.max)
        stored = graph.add_constant(f"{name}_int32", integers.astype(np.int32))
        return self._read(graph, before, stored, scale, np.zeros(scale.shape, dtype=np.int32), 0)

    def _quantize(self, graph: Graph, before: NodeProto, tensor: str, scale: float, zero_point: int, dtype: str) -> str:
        numbers = [
            graph.add_constant(f"{tensor}_scale", np.asarray(scale, dtype=np.float32)),
            graph.add_constant(f"{tensor}_zero_point", np.asarray(zero_point, dtype=dtype)),
        ]
        name = graph.fresh_name(f"{tensor}_quantized")
        graph.insert_before(before, helper.make_node("QuantizeLinear", [tensor, *numbers], [name], name=name))
        return name

    def _read(
        self, graph: Graph, before: NodeProto, stored: str, scale: np.ndarray, zero_point: np.ndarray, axis: int
    ) -> str:
        numbers = [
            graph.add_constant(f"{stored}_scale", scale.astype(np.float32)),
            graph.add_constant(f"{stored}_zero_point", zero_point),
        ]
        name = graph.fresh_name(f"{stored}_dequantized")
        node = helper.make_node("DequantizeLinear", [stored, *numbers], [name], name=name)
        if scale.ndim:
            node.attribute.append(helper.make_attribute("axis", axis))
        graph.insert_before(before, node)
        return name


def _characters(inference_yml: Mapping[str, Any]) -> list[str]:
    characters = inference_yml.get("PostProcess", {}).get("character_dict", [])
    return [str(character) for character in characters] if isinstance(characters, list) else []
