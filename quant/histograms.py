"""What calibration saw of each tensor, small enough to draw, with the range that its quantizer covers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from quant.calibration import Statistics
from quant.errors import InputError
from quant.observer import HALF_BINS, Histogram
from quant.plan import ActivationQuantizer, QuantPlan
from quant.record import read_record

RANGES = "ranges.json"
BINS = 64

_STEPS = {"uint8": (0, 255), "int8": (-127, 127)}


@dataclass(frozen=True)
class RangeChart:
    """One tensor.

    Attributes:
        minimum, maximum: of the values seen; the bins are evenly spread between them.
        counts: values in each bin.
        low, high: the range that the quantizer covers; what lies outside is clipped.
        clipped: share of the values that lie outside.
    """

    tensor: str
    minimum: float
    maximum: float
    counts: list[Annotated[int, Field(ge=0)]]
    low: float
    high: float
    clipped: float


def range_charts(statistics: Statistics, plan: QuantPlan) -> list[RangeChart]:
    """A chart for each quantized tensor that calibration counted, the most clipped first."""
    used = {**plan.used_activations(), **{q.tensor: q for q in plan.outputs.values()}}
    charts = [_chart(statistics[name], quantizer) for name, quantizer in used.items() if name in statistics]
    return sorted(charts, key=lambda chart: (-chart.clipped, chart.tensor))


def save_ranges(charts: Sequence[RangeChart], file: Path) -> None:
    """Write charts as JSON."""
    file.write_text(json.dumps([asdict(chart) for chart in charts]) + "\n", encoding="utf-8")


def load_ranges(file: Path) -> list[RangeChart]:
    """Read what `save_ranges` wrote.

    Raises:
        InputError: missing or not readable.
    """
    try:
        return read_record(file, list[RangeChart])
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: missing or damaged; delete the run's folder and run again") from error


def _chart(histogram: Histogram, quantizer: ActivationQuantizer) -> RangeChart:
    low, high = ((step - quantizer.zero_point) * quantizer.scale for step in _STEPS[quantizer.dtype])
    centers, used = histogram.centers(), histogram.counts > 0
    values, counts = centers[used], histogram.counts[used]
    edges = np.linspace(histogram.minimum, np.nextafter(histogram.maximum, np.inf), BINS + 1)
    inside = np.clip(values, edges[0], edges[-1])  # the center of an outermost bin may lie beyond the extremes
    merged, _ = np.histogram(inside, edges, weights=counts)
    margin = histogram.limit / HALF_BINS / 2 + quantizer.scale / 2  # a bin that touches the range is not clipped
    outside = counts[(values < low - margin) | (values > high + margin)].sum()
    return RangeChart(
        tensor=quantizer.tensor,
        minimum=histogram.minimum,
        maximum=histogram.maximum,
        counts=[int(count) for count in merged],
        low=low,
        high=high,
        clipped=float(outside / counts.sum()),
    )
