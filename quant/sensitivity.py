"""How far the model's outputs move when only some operators are in INT8: one alone, or all that share a kernel."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from quant.bias import Parts
from quant.bodies import find_node
from quant.comparison import side_by_side
from quant.graph import Graph, attribute
from quant.ladder import SearchScore
from quant.plan import Operator, QuantPlan, weight_axis
from quant.runtime import Feed, Session, onnx_session

MOST_SCORED = 12
PATIENCE = 3
_FARTHEST = 1e9
Outputs = Sequence[list[np.ndarray]]


@dataclass(frozen=True)
class OutputError:
    """What INT8 does to the outputs.

    Attributes:
        damage: mean over pictures of sum|int8 - fp32| / sum|fp32| over all outputs, 0 = none; for token ids the share
            of tokens that differ.
        snr_db: 10 * log10(sum fp32^2 / sum (int8 - fp32)^2), sums over all outputs of all pictures; None where the
            outputs are equal, zero, or no numbers.
    """

    damage: float
    snr_db: float | None


def measure_errors(
    graph: Graph,
    plan: QuantPlan,
    parts: Mapping[str, set[str]],
    calibration: Sequence[Feed],
    feeds: Sequence[Feed],
    threads: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, OutputError]:
    """The outputs' error for each part of the plan, everything else in FP32, biases behind it corrected.

    Args:
        parts: names of the operators that are in INT8 together, by any key.
        calibration: pictures that biases are corrected on.
        feeds: pictures of the search split.
        advance: called after each part.
    """
    reference = onnx_session(graph.to_light_model(), threads)
    exact = [reference.run(feed) for feed in feeds]
    runs, errors = Parts(graph, plan, calibration, feeds, threads), {}
    for key, names in parts.items():
        errors[key] = compare_outputs(runs.outputs(names), exact)
        advance()
    return errors


def compare_outputs(found: Outputs, exact: Outputs) -> OutputError:
    """The error of outputs, one list of arrays for each picture."""
    signal = noise = 0.0
    for arrays, outputs in zip(found, exact, strict=True):
        for array, output in side_by_side(arrays, outputs):
            signal += float(np.square(output).sum())
            noise += float(np.square(array - output).sum())
    ratio = signal / noise if noise else 0.0
    decibels = 10 * math.log10(ratio) if 0 < ratio < math.inf else None
    return OutputError(float(np.mean(relative_errors(found, exact))), decibels)


def output_error(session: Session, feeds: Sequence[Feed], exact: Outputs) -> float:
    """Mean relative L1 distance of a session's outputs from the exact ones."""
    return float(np.mean(relative_errors([session.run(feed) for feed in feeds], exact)))


def relative_errors(found: Outputs, exact: Outputs) -> list[float]:
    """sum|found - exact| / sum|exact| over all outputs, for each picture; outputs that are no numbers are far off."""
    errors = []
    for arrays, outputs in zip(found, exact, strict=True):
        pairs = side_by_side(arrays, outputs)
        moved = sum(float(np.abs(a - b).sum()) for a, b in pairs)
        error = moved / max(sum(float(np.abs(b).sum()) for _, b in pairs), 1e-12)
        errors.append(error if error < _FARTHEST else _FARTHEST)
    return errors


def save_errors(errors: Mapping[str, OutputError], file: Path) -> None:
    """Write errors as JSON, in their order."""
    file.write_text(json.dumps({key: asdict(error) for key, error in errors.items()}), encoding="utf-8")


def load_errors(file: Path) -> dict[str, OutputError]:
    """Read what `save_errors` wrote."""
    return {key: OutputError(**error) for key, error in json.loads(file.read_text(encoding="utf-8")).items()}


def kernel_kind(graph: Graph, operator: Operator) -> str:
    """Which operators share a kernel: those of the same kind, in words."""
    shape = _weight_shape(graph, operator)
    if operator.op_type == "MatMul":
        kind = "MatMul by weights" if shape else "MatMul of activations"
        return f"{kind}, in a loop" if operator.in_loop else kind
    if operator.op_type == "ConvTranspose":
        return "ConvTranspose"
    if attribute(graph.producers()[operator.name], "group", 1) > 1 and shape[1:2] == (1,):
        return "depthwise conv"
    return "1x1 conv" if set(shape[2:]) == {1} else "kxk conv"


def kernel_groups(graph: Graph, operators: Iterable[Operator]) -> dict[str, set[str]]:
    """Names of operators by kind."""
    groups: dict[str, set[str]] = {}
    for operator in operators:
        groups.setdefault(kernel_kind(graph, operator), set()).add(operator.name)
    return groups


def output_channels(graph: Graph, operator: Operator) -> int | None:
    """How many channels an operator with constant weights writes; None for one without."""
    shape = _weight_shape(graph, operator)
    return shape[weight_axis(operator.op_type)] if shape else None


def _weight_shape(graph: Graph, operator: Operator) -> tuple[int, ...]:
    """Sizes of a constant weight, else (); asked of the node, as plans name weights of the equalized graph."""
    weight = graph.constants.get(find_node(graph, operator.name).input[1])
    return () if weight is None else weight.shape


def score_worst(errors: Mapping[str, OutputError], score: Callable[[str], SearchScore]) -> dict[str, SearchScore]:
    """Scores on the search split of the operators with the largest damage, the worst first.

    A score takes a pass over many pictures, so that only MOST_SCORED operators get one, and none after
    PATIENCE in a row have changed no outcome: what damages the outputs less rarely changes more.
    """
    scores: dict[str, SearchScore] = {}
    unchanged = 0
    for name in worst_first(errors)[:MOST_SCORED]:
        if unchanged == PATIENCE:
            break
        scores[name] = score(name)
        unchanged = 0 if scores[name].discordance else unchanged + 1
    return scores


def worst_first(errors: Mapping[str, OutputError]) -> list[str]:
    """Keys in the order of damage; of equal ones the first stays first."""
    return sorted(errors, key=lambda key: -errors[key].damage)
