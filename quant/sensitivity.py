"""Damage per operator: how far the model's outputs move when only this operator is in INT8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from quant.graph import Graph
from quant.plan import QuantPlan
from quant.runtime import Feed, Session, onnx_session
from quant.simulation import simulated_model


def measure_damages(
    graph: Graph, plan: QuantPlan, feeds: Sequence[Feed], threads: int, advance: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Damage of every operator that the plan quantizes.

    Damage is the mean over pictures of sum|int8 - fp32| / sum|fp32| over all outputs, 0 = none.

    Args:
        feeds: pictures of the search split.
        threads: operators measured at the same time.
        advance: called after each operator.
    """
    reference = onnx_session(graph.to_model(), threads)
    exact = [reference.run(feed) for feed in feeds]
    names = list(plan.quantized())

    def damage(name: str) -> float:
        alone = onnx_session(simulated_model(graph, plan.with_only({name}, "measured alone")), 1)
        return output_error(alone, feeds, exact)

    damages = {}
    with ThreadPoolExecutor(threads) as pool:
        for name, value in zip(names, pool.map(damage, names), strict=True):
            damages[name] = value
            advance()
    return damages


def output_error(session: Session, feeds: Sequence[Feed], exact: Sequence[list[np.ndarray]]) -> float:
    """Mean relative L1 distance of a session's outputs from the exact ones."""
    return float(np.mean(picture_errors(session, feeds, exact)))


def picture_errors(session: Session, feeds: Sequence[Feed], exact: Sequence[list[np.ndarray]]) -> list[float]:
    """Relative L1 distance of a session's outputs from the exact ones, for each picture."""
    return relative_errors([session.run(feed) for feed in feeds], exact)


def relative_errors(found: Sequence[list[np.ndarray]], exact: Sequence[list[np.ndarray]]) -> list[float]:
    """sum|found - exact| / sum|exact| over all outputs, for each picture."""
    errors = []
    for arrays, outputs in zip(found, exact, strict=True):
        pairs = list(zip(arrays, outputs, strict=True))
        moved = sum(float(np.abs(a.astype(np.float64) - b).sum()) for a, b in pairs)
        errors.append(moved / max(sum(float(np.abs(b).sum()) for _, b in pairs), 1e-12))
    return errors
