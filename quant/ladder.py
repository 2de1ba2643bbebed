"""The ladder: everything in INT8 first, then the operators that hurt most go back to FP32.

It decides on the search split. Operators go back in the order of damage per cost (work and
weights): most of the damage sits in cheap early convolutions, so much accuracy costs little INT8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from quant.plan import Operator, QuantPlan
from quant.recipe import Gate, Ladder

_FREE_SHARE = 1e-4  # keeps the ratio finite for operators that cost nothing


@dataclass(frozen=True)
class SearchScore:
    """Result of a plan on the search split.

    Attributes:
        drop: in points of the metric.
        relative_drop, discordance: in percent.
        error: mean relative L1 error of the outputs, 0 = none.
        samples: how many pictures the metric was measured on.
    """

    drop: float
    relative_drop: float
    discordance: float
    error: float
    samples: int


@dataclass(frozen=True)
class Rung:
    """One step of the ladder and what it gave."""

    name: str
    coverage: float
    reverted: int
    score: SearchScore
    passed: bool

    def document(self) -> dict[str, object]:
        return asdict(self)


def climb(
    plan: QuantPlan, ladder: Ladder, gate: Gate, min_coverage: float, evaluate: Callable[[QuantPlan], SearchScore]
) -> tuple[QuantPlan, list[Rung]]:
    """The first plan that passes on the search split, or the best one.

    Args:
        plan: with the damage of each quantized operator noted.
        evaluate: runs a plan's simulation on the search split.

    Returns:
        The chosen plan and all rungs tried, in order.
    """
    tried: list[tuple[QuantPlan, Rung]] = []
    for limit in (1.0, *(step for step in ladder.coverage_steps if step > min_coverage), min_coverage):
        candidate = revert_to(plan, limit, ladder.min_weights)
        if tried and candidate.quantized().keys() == tried[-1][0].quantized().keys():
            continue
        score = evaluate(candidate)
        reverted = len(plan.quantized()) - len(candidate.quantized())
        passed = _passes(score, ladder, gate)
        name = "ptq" if not reverted else f"revert {reverted}"
        tried.append((candidate, Rung(name, candidate.coverage(), reverted, score, passed)))
        if passed:
            break
    chosen, rung = tried[-1] if tried[-1][1].passed else min(tried, key=lambda pair: _badness(pair[1].score))
    chosen.method = plan.method if not rung.reverted else f"{plan.method}+revert"
    return chosen, [rung for _, rung in tried]


def revert_to(plan: QuantPlan, min_coverage: float, min_weights: float) -> QuantPlan:
    """Revert operators, most damage per cost first, while enough work and enough weights stay in INT8.

    The cost is what INT8 saves on the operator: its shares of all multiply-accumulates and of all weights.
    """
    total = sum(op.macs for op in plan.operators) or 1
    weights = sum(op.parameters for op in plan.operators) or 1

    def rank(op: Operator) -> tuple[float, str]:
        cost = op.macs / total + op.parameters / weights + _FREE_SHARE
        return -(op.damage or 0) / cost, op.name

    kept = set(plan.quantized())
    work = sum(op.macs for op in plan.quantized().values())
    size = sum(op.parameters for op in plan.quantized().values())
    for op in sorted(plan.quantized().values(), key=rank) if min_coverage < 1 else []:
        if work - op.macs >= min_coverage * total and size - op.parameters >= min_weights * weights:
            kept.discard(op.name)
            work, size = work - op.macs, size - op.parameters
    return plan.with_only(kept, "its damage per cost was among the highest on the search split")


def _passes(score: SearchScore, ladder: Ladder, gate: Gate) -> bool:
    absolute, relative = gate.max_drop - ladder.margin, gate.max_relative_drop - ladder.margin
    keeps = score.drop <= absolute and score.relative_drop <= relative
    return keeps and score.discordance <= ladder.max_discordance and score.error <= ladder.max_error


def _badness(score: SearchScore) -> float:
    """Lower is better: the drop, and half of the discordance, which varies less between samples."""
    return max(score.drop, 0.0) + score.discordance / 2
