"""Declared policy: operators that a recipe keeps in FP32 by what they are, with the reason that reports show."""

from __future__ import annotations

from collections.abc import Sequence

from onnx.defs import has

from quant.errors import InputError
from quant.graph import Graph, reads
from quant.plan import Operator
from quant.recipe import KeptOperators

_BESIDE = "its input is no picture: numbers about the picture are never rounded"
_RECIPE = "the recipe keeps it in FP32"


def kept(graph: Graph, operators: list[Operator], policy: Sequence[KeptOperators]) -> list[Operator]:
    """Operators with those in FP32 that a recipe's policy names, and those that read numbers instead of a picture.

    Raises:
        InputError: the policy names an input that the model does not have, or a kind that ONNX does not have.
    """
    for number, entry in enumerate(policy):
        if unknown := sorted(set(entry.inputs) - set(graph.inputs)):
            raise InputError(
                f"policy.{number}.inputs: '{unknown[0]}' is no input; the model has {', '.join(graph.inputs)}"
            )
        # Not those that this graph lacks: a model without loops or NMS is no wrong recipe.
        if strange := [kind for kind in entry.after if not has(kind)]:
            raise InputError(
                f"policy.{number}.after: ONNX knows no operator '{strange[0]}'; its kinds are like TopK, Gather"
            )
    numbers = {name for name in graph.inputs if len(graph.shape(name) or ()) != 4}
    reasons = {op.name: _BESIDE for op in operators if numbers.intersection(op.activations)}
    for entry in policy:
        behind = _behind(graph, entry.after) if entry.after else None
        for op in operators:
            if _matches(op, entry) and (behind is None or op.name in behind):
                reasons.setdefault(op.name, f"{_RECIPE}: {entry.reason}")
    return [_in_fp32(op, reasons[op.name]) if op.quantized and op.name in reasons else op for op in operators]


def _in_fp32(operator: Operator, reason: str) -> Operator:
    return operator.model_copy(update={"quantized": False, "reason": reason})


def _matches(operator: Operator, entry: KeptOperators) -> bool:
    kinds = not entry.kinds or operator.op_type in entry.kinds
    weights = entry.weights is None or entry.weights == (operator.weight is not None)
    loops = entry.loops is None or entry.loops == operator.in_loop
    inputs = not entry.inputs or bool(set(entry.inputs).intersection(operator.activations))
    return kinds and weights and loops and inputs and (not entry.names or operator.name.startswith(tuple(entry.names)))


def _behind(graph: Graph, kinds: Sequence[str]) -> set[str]:
    """Tensors that depend on what an operator of these kinds writes."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.op_type in kinds or found.intersection(reads(node)):
            found.update(node.output)
    return found
