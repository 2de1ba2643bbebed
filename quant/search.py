"""The search: from the plan that the ladder chose to a faster one that passes too, by measured latency and metric.

Every point is a plan, its score on the search split and its latency on the target, as a share of FP32 prepared on the
same runtime in the same minute. Points that no other beats in both are the front. The neighbours of the fastest
passing plan are tried, the most promising first, until the time is up. Then those of the front that pass are timed
once more, side by side: of many noisy figures the least is a lucky one, and says little about its plan. The one to be
taken has to pass on the target's own runtime as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quant.ladder import Judge, Limits, Rung, SearchScore, badness, try_plan
from quant.plan import QuantPlan
from quant.recipe import Gate, Ladder

TIE = 0.02
"""Latencies nearer than this share cannot be told apart on a shared machine; then the better score decides."""

FINALISTS = 4
"""Most points beside the ladder's that are timed once more."""

FINAL_SHARE = 0.3
"""Of the time, kept for what follows once no further point is tried."""


@dataclass(frozen=True, eq=False)
class Point:
    """One plan of the search.

    Attributes:
        latency: INT8 / FP32 prepared on the target, below 1 where INT8 is faster; of finalists the second figure.
        finalist: whether it was timed once more, so that it may be taken.
        measured: its score on the target's own runtime; the one of its rung is that of its simulation.
    """

    plan: QuantPlan
    rung: Rung
    latency: float
    finalist: bool = False
    measured: SearchScore | None = None

    def document(self) -> dict[str, Any]:
        measured = asdict(self.measured) if self.measured else None
        return {**asdict(self.rung), "latency": self.latency, "finalist": self.finalist, "measured": measured}

    def passes(self, limits: Limits) -> bool:
        """Whether it passes on the target, where it was measured there."""
        return self.measured is not None and not limits.missed(self.rung.error, self.measured)


def explore(
    start: Point,
    gains: Mapping[str, float],
    limits: tuple[Ladder, Gate],
    judge: Judge,
    measure: Callable[[QuantPlan], float],
    refine: Callable[[QuantPlan], QuantPlan],
    allowed: Callable[[QuantPlan], bool],
    in_time: Callable[[], bool],
) -> list[Point]:
    """All points tried, the start first.

    Args:
        gains: milliseconds that INT8 saves on each operator, by the runtime's own profile.
        measure: latency of a plan, see `Point`.
        refine: fits a candidate to the operators that are in INT8.
        allowed: whether a plan keeps the least coverage and weights.
        in_time: whether another point may be tried.
    """
    points, seen = [start], {_signature(start.plan)}
    ladder, gate = limits
    improved = True
    while improved:
        improved = False
        best = chosen(points)
        for name, neighbour in neighbours(best.plan, gains):
            if not in_time():
                return points
            if _signature(neighbour) in seen or not allowed(neighbour):
                continue
            seen.add(_signature(neighbour))
            plan = refine(neighbour)
            reverted = start.rung.reverted + len(start.plan.quantized()) - len(plan.quantized())
            point = Point(plan, try_plan(name, plan, reverted, ladder, gate, judge), measure(plan))
            points.append(point)
            if chosen(points) is point:
                improved = True
                break
    return points


def neighbours(plan: QuantPlan, gains: Mapping[str, float]) -> Iterator[tuple[str, QuantPlan]]:
    """Plans that may be faster: without what INT8 slows down, with inputs alone quantized, with one operator more."""
    slower = {name for name in plan.quantized() if gains.get(name, 0.0) < 0}
    if slower:
        yield (
            "slower in INT8 left out",
            plan.with_only(set(plan.quantized()) - slower, "INT8 is slower by the profile"),
        )
    if plan.outputs:
        yield "inputs alone", replace(plan, outputs={})
    reverted = [op for op in plan.operators if not op.quantized and op.damage is not None]
    for op in sorted(reverted, key=lambda op: (-gains.get(op.name, 0.0) / ((op.damage or 0.0) + 1e-6), op.name)):
        if gains.get(op.name, 0.0) > 0:
            yield f"with {op.name}", plan.with_also(op.name)


def chosen(points: Sequence[Point]) -> Point:
    """The fastest that passes, of equally fast ones the best; where none passes, the best."""
    passing = [point for point in points if point.rung.passed]
    if not passing:
        return min(points, key=lambda point: badness(point.rung))
    fastest = min(point.latency for point in passing)
    return min((p for p in passing if p.latency <= fastest * (1 + TIE)), key=lambda point: badness(point.rung))


def timed_again(points: Sequence[Point], measure: Callable[[Sequence[QuantPlan]], list[float]]) -> list[Point]:
    """The points, of which those that may be taken have a latency that was not picked for being low.

    They are the fastest of the front that pass, and the ladder's, the first; where none passes, the best alone.

    Args:
        measure: latencies of plans in turn with one another, see `Point`.
    """
    passing = front([point for point in points if point.rung.passed])[:FINALISTS]
    last = [point for point in points if point in passing or point is points[0]] if passing else [chosen(points)]
    latencies = dict(zip(map(id, last), measure([point.plan for point in last]), strict=True))
    return [
        replace(point, latency=latencies[id(point)], finalist=True) if id(point) in latencies else point
        for point in points
    ]


def confirmed(points: Sequence[Point], limits: Limits, score: Callable[[QuantPlan], SearchScore]) -> list[Point]:
    """The points, finalists with their score on the target, in the order of `chosen` until one passes there."""
    points = list(points)
    while left := [point for point in points if point.finalist and point.measured is None]:
        best = chosen(left)
        found = replace(best, measured=score(best.plan))
        points[points.index(best)] = found
        if found.passes(limits):
            break
    return points


def taken(points: Sequence[Point], limits: Limits) -> Point:
    """The finalist that passes on the target; where none does, the best by what was measured there."""
    scored = [point for point in points if point.measured]
    passing = [point for point in scored if point.passes(limits)]
    return passing[0] if passing else min(scored, key=lambda point: badness(replace(point.rung, score=point.measured)))


def front(points: Sequence[Point]) -> list[Point]:
    """Scored points that no other beats in latency and in score, the fastest first."""
    scored = sorted((p for p in points if p.rung.score), key=lambda point: (point.latency, badness(point.rung)))
    kept: list[Point] = []
    for point in scored:
        if not kept or badness(point.rung)[:2] < badness(kept[-1].rung)[:2]:
            kept.append(point)
    return kept


def draw_front(points: Sequence[Point], best: Point, title: str, file: Path) -> None:
    """A plot of all scored points as SVG, the front joined, the chosen one marked; the same bytes every time."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    def place(point: Point) -> tuple[float, float]:
        return point.latency, badness(point.rung)[1]

    figure = Figure(figsize=(6, 4), layout="tight")
    axes = figure.subplots()
    scored = [place(point) for point in points if point.rung.score]
    joined = [place(point) for point in front(points)]
    axes.plot([x for x, _ in joined], [y for _, y in joined], color="tab:blue", label="front")
    axes.scatter([x for x, _ in scored], [y for _, y in scored], color="tab:gray", label="tried")
    if best.rung.score:
        axes.scatter(*place(best), color="tab:red", label="chosen")
    axes.set(xlabel="latency, INT8 / FP32 prepared", ylabel="drop + discordance / 2 on the search split", title=title)
    axes.legend()
    with mpl.rc_context({"svg.hashsalt": title}):
        figure.savefig(file, format="svg", metadata={"Date": None})


def _signature(plan: QuantPlan) -> tuple[frozenset[str], bool]:
    return frozenset(plan.quantized()), bool(plan.outputs)
