"""The QuantPlan: every decision about one quantized model, as plain data.

Algorithms produce or refine a plan, exporters write it down, reports read it.
On disk: `plan.json` (schema below) and `plan.safetensors` (integer weights and their scales).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from onnx import NodeProto
from pydantic import BaseModel, ConfigDict, Field

from quant.bodies import inner_nodes
from quant.equalization import Equalizer, equalize, equalizer_tensors, read_equalizers
from quant.errors import InputError
from quant.graph import Graph, attribute
from quant.record import read_record
from quant.storage import write_bytes
from quant.target import ActivationType

QUANTIZABLE = ("Conv", "ConvTranspose", "MatMul")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ActivationQuantizer(_Part):
    """`q = clip(round(x / scale) + zero_point)`, per tensor."""

    tensor: str
    dtype: ActivationType
    scale: float = Field(gt=0)
    zero_point: int


class WeightQuantizer(_Part):
    """S8, symmetric, per channel along `axis`; values and scales stand in the weights file."""

    tensor: str
    axis: int


class Operator(_Part):
    """One Conv, ConvTranspose or MatMul, named by its output tensor."""

    name: str
    op_type: str
    activations: list[str]
    weight: str | None
    macs: int = Field(ge=0, description="multiply-accumulates at the recipe's reference shape")
    parameters: int = Field(ge=0, description="number of constant weights")
    in_loop: bool = Field(False, description="whether it stands inside of a loop; macs are then those of all steps")
    quantized: bool
    reason: str = ""
    damage: float | None = Field(default=None, description="output error when only this operator is in INT8")


@dataclass(frozen=True)
class IntegerWeight:
    """values int8, scale float32[C]; real = values * scale along the quantizer's axis."""

    values: np.ndarray
    scale: np.ndarray


class _PlanDocument(_Part):
    schema_: Literal[1] = Field(default=1, alias="schema")
    model: str
    target: str
    method: str
    prepared_sha256: str
    operators: list[Operator]
    activations: list[ActivationQuantizer]
    weights: list[WeightQuantizer]
    bias_shifts: list[str] = Field(description="operators whose bias is corrected")
    equalized: list[str] = Field(default=[], description="operators whose input channels are equalized")
    outputs: dict[str, ActivationQuantizer] = Field(default={}, description="outputs that are stored in 8 bits")
    notes: list[str] = []


@dataclass
class QuantPlan:
    """Which tensors are quantized and how, which operators stay in FP32 and why.

    Attributes:
        operators: every Conv, ConvTranspose and MatMul of the prepared graph, in its order.
        activations, weights: quantizers by tensor name.
        integers: integer weights by tensor name.
        bias_shifts: float32[C] by operator name, added to the bias while the operator is quantized.
        notes: remarks for people.
        equalizers: by operator name, of its input channels while the operator is quantized.
        outputs: quantizers of outputs that are stored in 8 bits, by the operator's name, or by that of an inner
            tensor of a chain (see `quant.flow`). `tensor` says what was calibrated: the output itself, or
            `<name>_scaled`, the output times the reader's equalization.
    """

    model: str
    target: str
    method: str
    prepared_sha256: str
    operators: list[Operator]
    activations: dict[str, ActivationQuantizer]
    weights: dict[str, WeightQuantizer]
    integers: dict[str, IntegerWeight]
    bias_shifts: dict[str, np.ndarray]
    notes: list[str]
    equalizers: dict[str, Equalizer] = field(default_factory=dict)
    outputs: dict[str, ActivationQuantizer] = field(default_factory=dict)

    def coverage(self) -> float:
        """Share of multiply-accumulates in INT8, 0..1."""
        total = sum(op.macs for op in self.operators)
        return sum(op.macs for op in self.operators if op.quantized) / total if total else 0.0

    def weight_share(self) -> float:
        """Share of constant weights in INT8, 0..1."""
        total = sum(op.parameters for op in self.operators)
        return sum(op.parameters for op in self.operators if op.quantized) / total if total else 0.0

    def quantized(self) -> dict[str, Operator]:
        """Quantized operators by name."""
        return {op.name: op for op in self.operators if op.quantized}

    def used_activations(self) -> dict[str, ActivationQuantizer]:
        """Quantizers that some quantized operator reads; all where outputs are stored: what writes keeps them."""
        if self.outputs:
            return dict(self.activations)
        names = {name for op in self.operators if op.quantized for name in op.activations}
        return {name: q for name, q in self.activations.items() if name in names}

    def used_weights(self) -> dict[str, WeightQuantizer]:
        names = {op.weight for op in self.operators if op.quantized}
        return {name: q for name, q in self.weights.items() if name in names}

    def used_equalizers(self) -> dict[str, Equalizer]:
        """Those of quantized operators; all where outputs are stored: a writer minds its reader's factors."""
        names = set(self.equalizers) if self.outputs else set(self.quantized())
        return {name: equalizer for name, equalizer in self.equalizers.items() if name in names}

    def with_only(self, names: set[str], reason: str) -> QuantPlan:
        """A copy in which exactly the operators of `names` are quantized; `reason` marks the others."""
        operators = []
        for op in self.operators:
            keep = op.quantized and op.name in names
            change = {} if keep or not op.quantized else {"reason": reason}
            operators.append(op.model_copy(update={"quantized": keep, **change}))
        return replace(self, operators=operators, notes=list(self.notes))

    def with_also(self, name: str) -> QuantPlan:
        """A copy in which one more operator is quantized."""
        change = {"quantized": True, "reason": ""}
        operators = [op.model_copy(update=change) if op.name == name else op for op in self.operators]
        return replace(self, operators=operators, notes=list(self.notes))

    def document(self) -> dict[str, object]:
        """The JSON form."""
        used, used_weights = self.used_activations(), self.used_weights()
        document = _PlanDocument(
            schema=1,
            model=self.model,
            target=self.target,
            method=self.method,
            prepared_sha256=self.prepared_sha256,
            operators=self.operators,
            activations=[used[name] for name in sorted(used)],
            weights=[used_weights[name] for name in sorted(used_weights)],
            bias_shifts=sorted(set(self.bias_shifts) & set(self.quantized())),
            equalized=sorted(self.used_equalizers()),
            outputs={name: self.outputs[name] for name in sorted(self.outputs)},
            notes=self.notes,
        )
        return document.model_dump(mode="json", by_alias=True)

    def save(self, folder: Path) -> None:
        """Write plan.json and plan.safetensors."""
        from safetensors.numpy import save

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name in sorted(self.used_weights()):
            tensors[name] = np.ascontiguousarray(self.integers[name].values)
            tensors[f"{name}:scale"] = np.ascontiguousarray(self.integers[name].scale)
        for name in sorted(set(self.bias_shifts) & set(self.quantized())):
            tensors[f"{name}:bias_shift"] = np.ascontiguousarray(self.bias_shifts[name])
        tensors |= equalizer_tensors(self.used_equalizers())
        write_bytes(folder / "plan.safetensors", save(tensors))
        text = json.dumps(self.document(), indent=1, sort_keys=True)
        (folder / "plan.json").write_text(text + "\n", encoding="utf-8")


def load_plan(folder: Path) -> QuantPlan:
    """Read a saved plan.

    Raises:
        InputError: a file is missing or foreign, or holds numbers that no plan has.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        document = read_record(folder / "plan.json", _PlanDocument)
        tensors = load_file(folder / "plan.safetensors")
        integers = {w.tensor: IntegerWeight(tensors[w.tensor], tensors[f"{w.tensor}:scale"]) for w in document.weights}
        bias_shifts = {name: tensors[f"{name}:bias_shift"] for name in document.bias_shifts}
        equalizers = read_equalizers(tensors, document.equalized)
    except (OSError, ValueError, SafetensorError, KeyError) as error:
        raise InputError(f"{folder}: no readable plan ({error.__class__.__name__}); run `quant run` again") from error
    if wrong := _impossible(tensors, document.weights):
        hint = "delete the folder and run `quant run` again"
        raise InputError(f"{folder / 'plan.safetensors'}: damaged ({wrong}); {hint}")
    return QuantPlan(
        document.model,
        document.target,
        document.method,
        document.prepared_sha256,
        document.operators,
        {q.tensor: q for q in document.activations},
        {q.tensor: q for q in document.weights},
        integers,
        bias_shifts,
        document.notes,
        equalizers,
        document.outputs,
    )


def _impossible(tensors: Mapping[str, np.ndarray], weights: Sequence[WeightQuantizer]) -> str:
    """What in a weights file cannot be computed with; empty where everything can."""
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            return f"{name} holds NaN or infinity"
        if name.endswith((":scale", ":factor")) and not (values > 0).all():
            return f"{name} is not above 0 everywhere"
    for weight in weights:
        values, scale = tensors[weight.tensor], tensors[f"{weight.tensor}:scale"]
        if values.dtype != np.int8 or scale.shape != values.shape[weight.axis : weight.axis + 1]:
            return f"{weight.tensor} is not int8 with a scale for each place of axis {weight.axis}"
    return ""


def weight_axis(op_type: str) -> int:
    """Axis of output channels in the weight of an ONNX operator (ConvTranspose without groups)."""
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}[op_type]


def quantizable_operators(graph: Graph, macs: dict[str, int]) -> list[Operator]:
    """All Conv, ConvTranspose and MatMul of a prepared graph and of its loops, marked as quantized.

    A ConvTranspose with groups stays in FP32: its output channels have no axis of their own.
    """
    operators = []
    inner = inner_nodes(graph)
    for node in [*graph.nodes, *inner.values()]:
        if node.op_type not in QUANTIZABLE:
            continue
        constant, in_loop = graph.is_constant(node.input[1]), node.output[0] in inner
        reason = _unfit_in_loop(graph, node) if in_loop else _unfit(graph, node)
        operators.append(
            Operator(
                name=node.output[0],
                op_type=node.op_type,
                activations=[node.input[0]] if constant else list(dict.fromkeys(node.input[:2])),
                weight=node.input[1] if constant else None,
                macs=macs.get(node.output[0], 0),
                parameters=int(graph.constants[node.input[1]].size) if constant else 0,
                in_loop=in_loop,
                quantized=not reason,
                reason=reason,
            )
        )
    return operators


def _unfit(graph: Graph, node: NodeProto) -> str:
    """Why an operator cannot be in INT8; empty where it can."""
    constant = graph.is_constant(node.input[1])
    grouped = node.op_type == "ConvTranspose" and attribute(node, "group", 1) != 1
    flat = not constant or node.op_type != "MatMul" or graph.constants[node.input[1]].ndim == 2
    fits = flat and not grouped and not graph.is_constant(node.input[0])
    return "" if fits else "weight layout has no per-channel axis"


def _unfit_in_loop(graph: Graph, node: NodeProto) -> str:
    if node.op_type != "MatMul" or not graph.is_constant(node.input[1]):
        return "inside a loop, where products by weights alone are quantized: caches grow from step to step"
    return _unfit(graph, node)


def corrected_graph(graph: Graph, plan: QuantPlan) -> Graph:
    """A copy of the prepared graph in which what the plan quantizes is equalized, and its biases are corrected."""
    quantized = plan.quantized()
    shifted = equalize(graph, plan.equalizers, quantized)
    for node in shifted.nodes:
        operator = quantized.get(node.output[0]) if node.output else None
        if operator and not {*operator.activations, operator.weight or node.input[1]} <= set(node.input):
            raise ValueError(f"operator {operator.name} does not read the tensors that its plan names")
        shift = plan.bias_shifts.get(node.output[0]) if node.output and node.output[0] in quantized else None
        if shift is None:
            continue
        bias = shifted.constants[node.input[2]] if len(node.input) > 2 else np.zeros_like(shift)
        name = shifted.add_constant(f"{node.output[0]}_bias", (bias + shift).astype(np.float32))
        node.input[:] = [node.input[0], node.input[1], name]
    shifted.prune()
    return shifted


FULL_WEIGHTS, REDUCED_WEIGHTS = 127, 63
"""Largest integer of a weight. Before VNNI, x86 adds two products of U8 and S8 in 16 bits: 2 * 255 * 63 < 2**15."""


def quantize_weight(weight: np.ndarray, axis: int, largest: int = FULL_WEIGHTS) -> IntegerWeight:
    """Round a float weight to S8 per channel: scale = max|w| / largest."""
    moved = np.moveaxis(weight.astype(np.float64), axis, 0).reshape(weight.shape[axis], -1)
    scale = np.maximum(np.abs(moved).max(axis=1), 1e-12) / largest
    return round_weight(weight, scale.astype(np.float32), axis)


def round_weight(weight: np.ndarray, scale: np.ndarray, axis: int) -> IntegerWeight:
    """Round a float weight to S8 with given per-channel scales."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    values = np.clip(np.rint(weight / scale.reshape(shape).astype(np.float64)), -127, 127)
    return IntegerWeight(values.astype(np.int8), scale.astype(np.float32))


def dequantize_weight(weight: IntegerWeight, axis: int) -> np.ndarray:
    """The float32 values that an integer weight stands for."""
    shape = [1] * weight.values.ndim
    shape[axis] = -1
    return (weight.values.astype(np.float32) * weight.scale.reshape(shape)).astype(np.float32)
