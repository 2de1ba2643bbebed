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
from quant.graph import Graph
from quant.plan import ActivationQuantizer, QuantPlan, corrected_graph
from quant.recipe import TargetName
from quant.runtime import Feed, onnx_session, open_session, target_format
from quant.sensitivity import picture_errors
from quant.simulation import simulated_model

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
    result = corrected_graph(graph, plan)
    operators = plan.quantized()
    rewired: dict[str, str] = {}
    for node in list(result.nodes):
        operator = operators.get(node.output[0]) if node.output else None
        if operator is None:
            continue
        for index, name in enumerate(node.input):
            if name in operator.activations:
                if name not in rewired:
                    rewired[name] = _insert_quantizer(result, node, plan.activations[name])
                node.input[index] = rewired[name]
            elif name == operator.weight:
                if name not in rewired:
                    rewired[name] = _insert_weight(result, node, name, plan)
                node.input[index] = rewired[name]
    result.prune()
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


def _insert_quantizer(graph: Graph, before: NodeProto, quantizer: ActivationQuantizer) -> str:
    name = quantizer.tensor
    scale = graph.add_constant(f"{name}_scale", np.asarray(quantizer.scale, dtype=np.float32))
    zero = graph.add_constant(f"{name}_zero_point", np.asarray(quantizer.zero_point, dtype=quantizer.dtype))
    quantized, real = graph.fresh_name(f"{name}_quantized"), graph.fresh_name(f"{name}_dequantized")
    for kind, source, result in (
        ("QuantizeLinear", name, quantized),
        ("DequantizeLinear", quantized, real),
    ):
        graph.insert_before(before, helper.make_node(kind, [source, scale, zero], [result], name=result))
    return real


def _insert_weight(graph: Graph, before: NodeProto, name: str, plan: QuantPlan) -> str:
    weight = plan.integers[name]
    values = graph.add_constant(f"{name}_int8", weight.values)
    scale = graph.add_constant(f"{name}_scale", weight.scale)
    zero = graph.add_constant(f"{name}_zero_point", np.zeros(weight.scale.shape, dtype=np.int8))
    real = graph.fresh_name(f"{name}_dequantized")
    node = helper.make_node("DequantizeLinear", [values, scale, zero], [real], name=real, axis=plan.weights[name].axis)
    graph.insert_before(before, node)
    return real


def _characters(inference_yml: Mapping[str, Any]) -> list[str]:
    characters = inference_yml.get("PostProcess", {}).get("character_dict", [])
    return [str(character) for character in characters] if isinstance(characters, list) else []
