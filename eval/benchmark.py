"""Latency: sessions take turns on the same input, so that a noisy machine disturbs them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

from quant.runtime import Feed, Session

WARM_UP = 3


def interleaved_latency(sessions: Mapping[str, Session], feed: Feed, runs: int) -> dict[str, float]:
    """Median milliseconds of each session over `runs` turns after warm-up, wall clock."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(WARM_UP + runs):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(feed)
            if turn >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}
