"""The ladder: everything in INT8 first, then the operators that hurt most go back to FP32.

It decides on the search split. Those operators go back whose squared damages have the largest sum, since errors of
operators add up in squares, within limits for work, for weights, and for how many interrupt the flow of integers: most
of the damage sits in few cheap convolutions, so much accuracy costs little INT8.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from quant.errors import InputError
from quant.plan import Operator, QuantPlan
from quant.recipe import Gate, Ladder

_REASON = "it is among those that do most damage on the search split for what they cost in FP32"

FAINT = (0.2, 0.6, 0.01)
"""Shares of the largest damage below which an operator stays in INT8. What goes back costs size and interrupts the flow
of integers, and errors may also cancel one another; so choices of more and of fewer operators are compared."""

_REVERTS = 250
"""Most reverted operators for all of the coverage: one for each 0.4 % that is given up."""

_ROUNDING = 1e-12
"""Of sums of shares."""

CLOCK = "clock"
"""Folder beside `ladder.json` with what was measured in seconds; files in it are no part of any hash."""

TRAINED = {"recon", "qat"}
"""Rungs that change weights."""

TRAINING_FILES = ("recon.json", "qat.json")
"""Beside `ladder.json`: the error of each reconstructed part before and after, and the learning curve of QAT."""


@dataclass(frozen=True)
class SearchScore:
    """Result of a plan on the search split.

    Attributes:
        drop: in points of the metric.
        relative_drop, discordance: in percent.
        samples: how many pictures the metric was measured on.
    """

    drop: float
    relative_drop: float
    discordance: float
    samples: int


@dataclass(frozen=True)
class Rung:
    """One step of the ladder and what it gave.

    Attributes:
        error: mean relative L1 error of the outputs, 0 = none.
        score: None where the error alone ruled the step out.
        seconds: that training took, in a run's manifest alone.
    """

    name: str
    coverage: float
    reverted: int
    error: float
    score: SearchScore | None
    passed: bool
    seconds: float | None = None

    def document(self) -> dict[str, Any]:
        return asdict(self)


def load_rung(document: dict[str, Any]) -> Rung:
    """The inverse of `Rung.document`."""
    score = document["score"]
    return Rung(**{**document, "score": None if score is None else SearchScore(**score)})


@dataclass(frozen=True)
class _Margins:
    """The fields of a recipe's ladder that are limits."""

    max_error: float
    max_discordance: float
    margin: float


@dataclass(frozen=True)
class _Judging:
    """The fields of a recipe that hold limits; the others may differ between versions of this program."""

    ladder: _Margins
    gate: Gate


@dataclass(frozen=True)
class Limits:
    """What a step has to keep on the search split, counted as in `Rung` and `SearchScore`."""

    error: float
    drop: float
    relative_drop: float
    discordance: float

    @classmethod
    def of(cls, ladder: Ladder | _Margins, gate: Gate) -> Limits:
        drop, relative_drop = gate.max_drop - ladder.margin, gate.max_relative_drop - ladder.margin
        return cls(ladder.max_error, drop, relative_drop, ladder.max_discordance)

    @classmethod
    def of_recipe(cls, recipe: Mapping[str, Any]) -> Limits:
        """Those of a recipe as a manifest holds it.

        Raises:
            InputError: it holds none.
        """
        try:
            found = TypeAdapter(_Judging).validate_python(recipe)
        except ValidationError as error:
            line = " ".join(str(error).split())[:200]
            raise InputError(f"the run's recipe has no limits of its ladder ({line}); run `quant run` again") from error
        return cls.of(found.ladder, found.gate)

    def missed(self, error: float, score: SearchScore | None) -> list[str]:
        """Those that a step does not keep, in words; the error alone where it left no score."""
        measured = [("error", 100 * error, 100 * self.error, " %")]
        if score:
            measured += [
                ("drop", score.drop, self.drop, ""),
                ("relative drop", score.relative_drop, self.relative_drop, " %"),
                ("discordance", score.discordance, self.discordance, " %"),
            ]
        return [f"{name} above {limit:.4g}{unit}" for name, value, limit, unit in measured if value > limit]


def result_text(rung: Rung, limits: Limits) -> str:
    """Whether a step passed, and which limits it missed."""
    if rung.passed:
        return "passed"
    missed = ", ".join(limits.missed(rung.error, rung.score))
    return f"failed: {missed}" if missed else "failed"


RUNG_HEADINGS = ["Target", "Rung", "Coverage", "Error", "Drop", "Relative drop", "Discordance", "Seconds", "Result"]


def rung_rows(target: str, rungs: Sequence[Rung], limits: Limits) -> list[list[str]]:
    """The ladder of a target as cells under `RUNG_HEADINGS`."""
    rows = []
    for rung in rungs:
        score = ["", "", ""]
        if rung.score:
            score = [f"{rung.score.drop:.2f}", f"{rung.score.relative_drop:.2f} %", f"{rung.score.discordance:.1f} %"]
        seconds = "" if rung.seconds is None else f"{rung.seconds:.0f}"
        shares = [f"{rung.coverage:.3f}", f"{100 * rung.error:.2f} %"]
        rows.append([target, rung.name, *shares, *score, seconds, result_text(rung, limits)])
    return rows


class Judge(Protocol):
    """Measures plans on the search split: `error` in a second, `score` on every picture."""

    def error(self, plan: QuantPlan) -> float: ...
    def score(self, plan: QuantPlan) -> SearchScore: ...


def climb(
    plan: QuantPlan,
    ladder: Ladder,
    gate: Gate,
    min_coverage: float,
    judge: Judge,
    damaged: Callable[[QuantPlan], QuantPlan] = lambda plan: plan,
    refine: Callable[[QuantPlan], QuantPlan] = lambda candidate: candidate,
    fit: Callable[[QuantPlan], QuantPlan] | None = None,
) -> tuple[QuantPlan, list[Rung]]:
    """The first plan that passes on the search split, or the best one.

    Args:
        plan: with everything in INT8, its biases corrected.
        judge: runs a plan's simulation on the search split.
        damaged: notes the damage of each quantized operator; asked where the plan as it is does not pass.
        refine: fits a candidate's biases to the operators that are left in INT8.
        fit: fits its weights too; tried where a step fails without.

    Returns:
        The chosen plan and all rungs tried, in order.
    """
    tried: list[tuple[QuantPlan, Rung]] = []
    ranked = False
    for limit in (1.0, *(step for step in ladder.coverage_steps if min_coverage < step < 1), min_coverage):
        if limit < 1 and not ranked:
            plan, ranked = damaged(plan), True
        choices = _choices(plan, limit, ladder, [before for before, _ in tried])
        if not choices:
            continue
        refined = [refine(less) for less in choices] if tried else choices
        # The nearest is scored first; where its score fails, by a few samples perhaps, another one may pass.
        nearest = by_error(refined, judge)
        for error, candidate in nearest:
            reverted = len(plan.quantized()) - len(candidate.quantized())
            candidate.method = f"{plan.method}+revert" if reverted else plan.method
            name = f"revert {reverted}" if reverted else "ptq"
            rung = rung_at(name, candidate, reverted, error, ladder, gate, judge)
            tried.append((candidate, rung))
            if rung.passed or rung.score is None:  # the others err more
                break
        if fit and not tried[-1][1].passed:
            candidate = fit(nearest[0][1])
            candidate.method += "+fit"
            reverted = len(plan.quantized()) - len(candidate.quantized())
            name = f"revert {reverted}, fit" if reverted else "ptq, fit"
            tried.append((candidate, try_plan(name, candidate, reverted, ladder, gate, judge)))
        if tried[-1][1].passed:
            break
    best = best_rung([rung for _, rung in tried])
    return next(candidate for candidate, rung in tried if rung is best), [rung for _, rung in tried]


def best_rung(rungs: Sequence[Rung]) -> Rung:
    """The last one where it passed, since the ladder stops there, else the best."""
    return rungs[-1] if rungs[-1].passed else min(rungs, key=badness)


def reverts(ladder: Ladder) -> bool:
    """Whether operators may go back to FP32; a method that is asked for by name starts with everything in INT8."""
    return ladder.method in ("auto", "ptq")


def fits(ladder: Ladder) -> bool:
    """Whether weights are fitted on the way down; a method that is asked for by name shows what it gives alone."""
    return ladder.fit_samples > 0 and ladder.method in ("auto", "ptq")


def trains(ladder: Ladder, best: Rung) -> bool:
    """Whether weights are trained after the best rung without training."""
    return ladder.method in ("recon", "qat") or (ladder.method == "auto" and not best.passed)


def by_error(candidates: Sequence[QuantPlan], judge: Judge) -> list[tuple[float, QuantPlan]]:
    """Plans with the error of their outputs, the nearest first; each is measured once, equal ones keep their order."""
    different = {id(candidate): candidate for candidate in candidates}.values()
    return sorted(((judge.error(candidate), candidate) for candidate in different), key=lambda pair: pair[0])


def try_plan(name: str, candidate: QuantPlan, reverted: int, ladder: Ladder, gate: Gate, judge: Judge) -> Rung:
    """Measure a plan on the search split; one whose error is too large gets no score."""
    return rung_at(name, candidate, reverted, judge.error(candidate), ladder, gate, judge)


def rung_at(
    name: str, candidate: QuantPlan, reverted: int, error: float, ladder: Ladder, gate: Gate, judge: Judge
) -> Rung:
    """The rung of a plan whose error is known."""
    limits = Limits.of(ladder, gate)
    score = judge.score(candidate) if error <= limits.error else None
    passed = score is not None and not limits.missed(error, score)
    return Rung(name, candidate.coverage(), reverted, error, score, passed)


def _choices(plan: QuantPlan, min_coverage: float, ladder: Ladder, tried: Sequence[QuantPlan]) -> list[QuantPlan]:
    """Different plans with at least this coverage, none of which was tried."""
    found: list[QuantPlan] = []
    for faint in FAINT:
        # No more of the weights than of the work: otherwise a step that is to cost little would cost file size.
        less = revert_to(plan, min_coverage, max(min_coverage, ladder.min_weights), faint)
        if all(less.quantized().keys() != other.quantized().keys() for other in (*tried, *found)):
            found.append(less)
    return found


def revert_to(plan: QuantPlan, min_coverage: float, min_weights: float, faint: float) -> QuantPlan:
    """Revert the operators that together do most squared damage, while enough work and enough weights stay in INT8.

    A knapsack with three limits: multiply-accumulates, weights, and the number of operators, since each one in FP32
    interrupts the flow of integers. So few operators with much damage go, not many with little.

    Args:
        faint: share of the largest damage of what may go below which an operator stays.
    """
    number = round(_REVERTS * (1 - min_coverage))
    limits = [
        _Limit.of(plan.operators, min_coverage, lambda op: op.macs),
        _Limit.of(plan.operators, min_weights, lambda op: op.parameters),
    ]
    possible = [op for op in plan.quantized().values() if op.damage and all(limit.allows(op) for limit in limits)]
    least = faint * max((op.damage or 0.0 for op in possible), default=0.0)
    damaging = [op for op in possible if (op.damage or 0.0) >= least]
    gone = _most_damaging(damaging, limits, number) if damaging and number else set()
    return plan.with_only(set(plan.quantized()) - gone, _REASON)


@dataclass(frozen=True)
class _Limit:
    """How much of what operators cost may be spent, as shares of that of all operators."""

    cost: Callable[[Operator], float]
    spare: float

    @classmethod
    def of(cls, operators: Sequence[Operator], floor: float, amount: Callable[[Operator], int]) -> _Limit:
        """With a share of the amounts of all operators that has to stay in INT8."""
        total = sum(map(amount, operators))
        if not total:
            return cls(lambda op: 0.0, 0.0)
        quantized = sum(amount(op) for op in operators if op.quantized)
        return cls(lambda op: amount(op) / total, quantized / total - floor)

    def allows(self, operator: Operator) -> bool:
        return self.cost(operator) <= self.spare + _ROUNDING


def _most_damaging(operators: Sequence[Operator], limits: Sequence[_Limit], number: int) -> set[str]:
    """At most `number` operators with the largest sum of squared damages whose costs keep every limit."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    damages = np.array([op.damage for op in operators], dtype=np.float64)
    gains = np.square(damages / damages.max())
    rows = np.array([*([limit.cost(op) for op in operators] for limit in limits), np.ones(len(operators))])
    spare = np.array([*(limit.spare for limit in limits), number])
    limited = LinearConstraint(rows, ub=spare)
    with _printing_nothing():  # HiGHS has a line that no option of it silences
        found = milp(-gains, constraints=limited, integrality=1, bounds=Bounds(0, 1), options={"mip_rel_gap": 0})
    chosen = np.flatnonzero(found.x > 0.5)
    # The solver keeps limits to a millionth; floors of coverage are kept exactly.
    while (rows[:, chosen].sum(axis=1) > spare + _ROUNDING).any():
        chosen = np.delete(chosen, np.argmin(gains[chosen]))
    return {operators[index].name for index in chosen}


@contextmanager
def _printing_nothing() -> Iterator[None]:
    """What native code of the block prints to standard output is lost; what was printed before is not."""
    native = ctypes.CDLL(None)
    native.fflush(None)
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        native.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def badness(rung: Rung) -> tuple[bool, float, float]:
    """Lower is better: the drop, and half of the discordance, which varies less between samples; then the error."""
    if rung.score is None:
        return True, rung.error, rung.error
    return False, max(rung.score.drop, 0.0) + rung.score.discordance / 2, rung.error


def save_rungs(rungs: Sequence[Rung], folder: Path) -> None:
    """Write `ladder.json`."""
    documents = [rung.document() for rung in rungs]
    (folder / "ladder.json").write_text(json.dumps(documents, sort_keys=True), encoding="utf-8")


def load_rungs(folder: Path) -> list[Rung]:
    """The inverse of `save_rungs`."""
    return [load_rung(document) for document in json.loads((folder / "ladder.json").read_text(encoding="utf-8"))]


def write_seconds(seconds: dict[str, float], folder: Path) -> None:
    """Note beside a stage's files what its methods took; where nothing was trained nothing is written."""
    if seconds:
        (folder / CLOCK).mkdir()
        (folder / CLOCK / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def read_seconds(folder: Path) -> dict[str, float]:
    """What each method of a stage took, by the name of its rung."""
    file = folder / CLOCK / "seconds.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
