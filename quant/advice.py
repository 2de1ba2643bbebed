"""What follows from measured sensitivities, in sentences: which operators to keep in FP32, which kinds are harmless."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

MOST_DAMAGE = 0.8
FEW = 0.25
NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Impact:
    """What INT8 in one part of the model does, everything else in FP32.

    Attributes:
        macs_share, weights_share: of Conv, ConvTranspose and MatMul of the whole model, 0..1.
        damage, snr_db: see `quant.sensitivity.OutputError`.
        discordance: search samples whose outcome changes, in percent; None where it was not measured.
        drop: in points of the metric on the search split; None where it was not measured.
    """

    kind: str
    macs_share: float
    weights_share: float
    damage: float
    snr_db: float | None
    discordance: float | None
    drop: float | None


@dataclass(frozen=True, kw_only=True)
class OperatorImpact(Impact):
    """One operator alone.

    Attributes:
        position: among the measured operators in the order of the graph, from 1.
        channels: of its output; None for a MatMul of two activations.
    """

    name: str
    op_type: str
    position: int
    channels: int | None


@dataclass(frozen=True, kw_only=True)
class GroupImpact(Impact):
    """All operators of one kind at once; `operators` says how many."""

    operators: int


def advise(
    model: str, operators: Sequence[OperatorImpact], groups: Sequence[GroupImpact], fp32_share: float
) -> list[str]:
    """Sentences that the numbers bear out.

    Args:
        operators: the worst first.
        fp32_share: how much of the work the recipe lets go back to FP32, 0..1.
    """
    worst = most_damaging(operators)
    if not worst:
        return ["No operator alone moves the outputs: everything can be in INT8."]
    found = [_keep_advice(operators, worst, fp32_share), *_early_advice(operators, worst), *_group_advice(groups)]
    return [
        *found,
        f"`quant run {model}` decides this by itself: while the search split fails, its ladder puts operators back to "
        "FP32, those with the most damage for their work and weights first.",
    ]


def most_damaging(operators: Sequence[OperatorImpact]) -> list[OperatorImpact]:
    """The fewest operators whose squared damages make up MOST_DAMAGE of the sum; none where there is no damage."""
    total = sum(op.damage**2 for op in operators)
    chosen: list[OperatorImpact] = []
    for operator in sorted(operators, key=lambda op: -op.damage):
        if sum(op.damage**2 for op in chosen) >= MOST_DAMAGE * total:
            break
        chosen.append(operator)
    return chosen


def _keep_advice(operators: Sequence[OperatorImpact], worst: list[OperatorImpact], fp32_share: float) -> str:
    total, work = sum(op.damage**2 for op in operators), sum(op.macs_share for op in worst)
    share = sum(op.damage**2 for op in worst) / total
    sums = f"{_percent(share)} of the summed squared damage and {_percent(work)} of the work"
    if len(worst) > max(1, FEW * len(operators)):
        return f"The damage is spread: it takes {len(worst)} of {len(operators)} operators to make up {sums}."
    one = len(worst) == 1
    who = f"The worst operator ({worst[0].name}) makes" if one else f"The {len(worst)} worst ({_names(worst)}) make"
    measured = [op.discordance for op in worst if op.discordance is not None]
    if measured and not any(measured):
        return f"{who} up {sums}, but alone {'it changes' if one else 'they change'} no outcome on the search split."
    if work > fp32_share:
        return f"{who} up {sums}: more work than the {_percent(fp32_share)} that the recipe lets go back to FP32."
    return f"{who} up {sums}: keep {'it' if one else 'them'} in FP32."


def _early_advice(operators: Sequence[OperatorImpact], worst: list[OperatorImpact]) -> list[str]:
    """Says so where the worst are convolutions at the front with few channels."""
    last = max(op.position for op in worst)
    channels = [op.channels for op in worst if op.channels is not None and op.op_type == "Conv"]
    usual = median([op.channels for op in operators if op.channels is not None] or [0])
    if len(channels) < len(worst) or last > FEW * len(operators) or max(channels) >= usual:
        return []
    first, widths = f"among the first {last} of {len(operators)} operators", f"where the model's median is {usual:g}"
    if len(worst) == 1:
        return [f"It is a convolution {first}, with {channels[0]} channels {widths}."]
    return [f"They are convolutions {first}, with at most {max(channels)} channels {widths}."]


def _group_advice(groups: Sequence[GroupImpact]) -> list[str]:
    measured = [(group, group.discordance) for group in groups if group.discordance is not None]
    harmless = [f"{group.kind} ({group.operators})" for group, discordance in measured if not discordance]
    sentences = []
    if harmless:
        sentences.append(f"Harmless, no outcome changes with all of the kind in INT8 at once: {_and(harmless)}.")
    harmful = [pair for pair in measured if pair[1]]
    if harmful:
        group, discordance = max(harmful, key=lambda pair: pair[1])
        sentences.append(
            f"The kind that changes most outcomes is {group.kind} ({group.operators}): {discordance:.2f} % of them, "
            f"a drop of {group.drop:.2f} points."
        )
    return sentences


def _names(operators: Sequence[OperatorImpact]) -> str:
    more = len(operators) - NAMED
    return _and([op.name for op in operators[:NAMED]] + ([f"{more} more"] if more > 0 else []))


def _and(words: Sequence[str]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), *words[-1:]])


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
