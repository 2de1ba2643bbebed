"""What calibration remembers of a tensor, and the ways to choose a range from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

HALF_BINS = 8192


@dataclass
class Histogram:
    """Streaming histogram of fixed size over [-limit, limit), exact in minimum and maximum.

    `limit` is a power of two and doubles when a larger value arrives (pairs of bins merge), so the
    result does not depend on the order of the samples and memory does not grow with their number.
    """

    limit: float = 2.0**-20
    counts: np.ndarray = field(default_factory=lambda: np.zeros(2 * HALF_BINS, dtype=np.int64))
    minimum: float = np.inf
    maximum: float = -np.inf

    def update(self, values: np.ndarray) -> None:
        """Count the values of a float array of any shape; raises ValueError on NaN or infinity."""
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low) or not np.isfinite(high):
            raise ValueError("the tensor holds NaN or infinity")
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        while high >= self.limit or -low > self.limit:  # bins are open at their upper end
            self._double()
        index = np.multiply(values, np.float32(HALF_BINS / self.limit), dtype=np.float32).ravel()
        index = np.clip(np.floor(index, out=index), -HALF_BINS, HALF_BINS - 1, out=index).astype(np.int32)
        self.counts += np.bincount(index + HALF_BINS, minlength=2 * HALF_BINS)

    def centers(self) -> np.ndarray:
        """Bin centers, float64[2 * HALF_BINS]."""
        width = self.limit / HALF_BINS
        return (np.arange(-HALF_BINS, HALF_BINS) + 0.5) * width

    def _double(self) -> None:
        merged = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros_like(self.counts)
        self.counts[HALF_BINS // 2 : HALF_BINS // 2 + HALF_BINS] = merged
        self.limit *= 2


class RangeMethod(Protocol):
    """Chooses the range [low, high] that a quantizer covers."""

    def choose(self, histogram: Histogram, *, symmetric: bool) -> tuple[float, float]: ...


@dataclass(frozen=True)
class MinMax:
    """The full observed range."""

    def choose(self, histogram: Histogram, *, symmetric: bool) -> tuple[float, float]:
        return histogram.minimum, histogram.maximum


@dataclass(frozen=True)
class Percentile:
    """Cut the tails so that `percent` of the values lie inside, half of the rest on either side."""

    percent: float

    def choose(self, histogram: Histogram, *, symmetric: bool) -> tuple[float, float]:
        share = np.cumsum(histogram.counts) / histogram.counts.sum()
        tail = (1 - self.percent / 100) / 2
        edges = np.arange(-HALF_BINS, HALF_BINS + 1) * (histogram.limit / HALF_BINS)
        low = edges[int(np.searchsorted(share, tail, side="right"))]
        high = edges[min(int(np.searchsorted(share, 1 - tail)) + 1, 2 * HALF_BINS)]
        return max(float(low), histogram.minimum), min(float(high), histogram.maximum)


@dataclass(frozen=True)
class MeanSquaredError:
    """The range of least squared quantization error, searched over shrunken full ranges.

    Sung, Shin and Hwang, "Resiliency of Deep Neural Networks under Quantization", 2015, use the
    same criterion; the error is evaluated on the histogram.
    """

    steps: int = 64
    smallest: float = 0.2

    def choose(self, histogram: Histogram, *, symmetric: bool) -> tuple[float, float]:
        used = histogram.counts > 0
        values, counts = histogram.centers()[used], histogram.counts[used]
        best = (np.inf, histogram.minimum, histogram.maximum)
        for shrink in np.linspace(self.smallest, 1.0, self.steps):
            low, high = histogram.minimum * shrink, histogram.maximum * shrink
            error = float(counts @ np.square(values - _round_trip(values, low, high, symmetric)))
            if error < best[0]:
                best = (error, low, high)
        return best[1], best[2]


def _round_trip(values: np.ndarray, low: float, high: float, symmetric: bool) -> np.ndarray:
    scale, zero_point, smallest, largest = affine_parameters(low, high, symmetric=symmetric)
    return (np.clip(np.rint(values / scale) + zero_point, smallest, largest) - zero_point) * scale


def affine_parameters(low: float, high: float, *, symmetric: bool) -> tuple[float, int, int, int]:
    """Scale and zero point of the 8-bit quantizer that covers [low, high] and represents 0 exactly.

    Args:
        low, high: the range in real units.
        symmetric: signed with zero point 0 and values -127..127, else unsigned 0..255.

    Returns:
        scale (> 0, a float32 value), zero point, smallest and largest integer value.
        Jacob et al., "Quantization and Training of Neural Networks ...", 2018, equation 1.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        scale = np.float32(max(-low, high, 1e-12) / 127)
        return float(scale), 0, -127, 127
    scale = np.float32(max(high - low, 1e-12) / 255)
    return float(scale), int(np.clip(round(-low / float(scale)), 0, 255)), 0, 255


def make_range_method(name: str, percentile: float) -> RangeMethod:
    """The range method that a recipe names."""
    methods: dict[str, RangeMethod] = {
        "minmax": MinMax(),
        "percentile": Percentile(percentile),
        "mse": MeanSquaredError(),
    }
    return methods[name]
