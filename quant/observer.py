"""What calibration remembers of a tensor, and the ways to choose a range from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

HALF_BINS = 8192
MOMENTUM = 0.9


@dataclass
class MovingRange:
    """Exponential moving average of the extremes of one picture after the other.

    The first picture is taken as it is; of every later one a share of 1 - momentum is mixed in. So the last pictures
    count most: the result depends on the order of the samples (which is fixed for a selection of pictures).
    """

    momentum: float = MOMENTUM
    low: float = np.nan
    high: float = np.nan

    def update(self, low: float, high: float) -> None:
        """Take in the minimum and maximum of one picture."""
        keep = self.momentum
        self.low = low if np.isnan(self.low) else keep * self.low + (1 - keep) * low
        self.high = high if np.isnan(self.high) else keep * self.high + (1 - keep) * high


@dataclass
class Histogram:
    """Streaming histogram of fixed size over [-limit, limit), exact in minimum and maximum.

    `limit` is a power of two and doubles when a larger value arrives (pairs of bins merge), so the
    result does not depend on the order of the samples and memory does not grow with their number.
    `average` alone depends on the order.
    """

    limit: float = 2.0**-20
    counts: np.ndarray = field(default_factory=lambda: np.zeros(2 * HALF_BINS, dtype=np.int64))
    minimum: float = np.inf
    maximum: float = -np.inf
    average: MovingRange = field(default_factory=MovingRange)

    def update(self, values: np.ndarray, extremes: tuple[float, float] | None = None) -> None:
        """Count values of one picture, a float array of any shape; raises ValueError on NaN or infinity.

        Args:
            extremes: the least and the largest value of the picture, where `values` are only a part of it.
        """
        low, high = extremes or (float(values.min()), float(values.max()))
        if not np.isfinite([low, high, values.sum(dtype=np.float64)]).all():  # a maximum may pass over NaN
            raise ValueError("the tensor holds NaN or infinity")
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.average.update(low, high)
        merge = bool(self.counts.any())
        while high >= self.limit or -low > self.limit:  # bins are open at their upper end
            self._double(merge)
        # Scaling by a power of two is exact, so every index lies inside; clipping would cost most of the time.
        index = np.multiply(values.ravel(), np.float32(HALF_BINS / self.limit), dtype=np.float32)
        np.floor(index, out=index)
        index += HALF_BINS
        self.counts += np.bincount(index.astype(np.intp), minlength=2 * HALF_BINS)

    def centers(self) -> np.ndarray:
        """Bin centers, float64[2 * HALF_BINS]."""
        width = self.limit / HALF_BINS
        return (np.arange(-HALF_BINS, HALF_BINS) + 0.5) * width

    def _double(self, merge: bool) -> None:
        self.limit *= 2
        if not merge:
            return
        merged = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros_like(self.counts)
        self.counts[HALF_BINS // 2 : HALF_BINS // 2 + HALF_BINS] = merged


class RangeMethod(Protocol):
    """Chooses the range [low, high] that a quantizer covers."""

    def choose(self, histogram: Histogram, *, symmetric: bool) -> tuple[float, float]: ...


@dataclass(frozen=True)
class MinMax:
    """The full observed range, as Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, take it for weights, and "max" of Wu et al. (see `Percentile`)."""

    def choose(self, histogram: Histogram, *, symmetric: bool) -> tuple[float, float]:
        return histogram.minimum, histogram.maximum


@dataclass(frozen=True)
class Percentile:
    """Cut the tails so that `percent` of the values lie inside, half of the rest on either side.

    McKinstry et al., "Discovering Low-Precision Networks Close to Full-Precision Networks for Efficient Embedded
    Inference", 2018; Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical
    Evaluation", 2020, compare it, taken of magnitudes, with other methods.
    """

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


@dataclass(frozen=True)
class MovingAverage:
    """The moving average of the extremes of the pictures (Jacob et al., 2018, section 3.1), see `MovingRange`."""

    def choose(self, histogram: Histogram, *, symmetric: bool) -> tuple[float, float]:
        return histogram.average.low, histogram.average.high


@dataclass(frozen=True)
class Entropy:
    """The range that loses least information: least KL divergence of the values from their quantized distribution.

    Migacz, "8-bit Inference with TensorRT", GTC 2017: the reference distribution counts clipped values in its
    outermost bins; the quantized one spreads what falls into a level evenly over the level's bins that are not empty.
    There the range is symmetric; here low and high are searched together for asymmetric quantizers. Zeros are left
    out, since every quantizer represents them exactly: their bin counts no more than its fuller neighbour.

    Attributes:
        bins: at most; the histogram's bins are merged to that many.
        windows: ranges that are compared, about.
    """

    bins: int = 2048
    windows: int = 1024

    def choose(self, histogram: Histogram, *, symmetric: bool) -> tuple[float, float]:
        counts, zero, width = self._merged(histogram, symmetric)
        levels = 128 if symmetric else 256
        starts, ends = self._windows(len(counts), zero, levels)
        if not starts.size:
            return histogram.minimum, histogram.maximum
        best = int(np.argmin(divergences(counts, starts, ends, levels)))
        low, high = (starts[best] - zero) * width, (ends[best] - zero) * width
        return max(float(-high if symmetric else low), histogram.minimum), min(float(high), histogram.maximum)

    def _merged(self, histogram: Histogram, folded: bool) -> tuple[np.ndarray, int, float]:
        """Fewer bins over the used part of a histogram (of magnitudes if folded), the edge at 0, the bins' width."""
        counts = histogram.counts.astype(np.float64)
        counts[HALF_BINS] = min(counts[HALF_BINS], max(counts[HALF_BINS - 1], counts[HALF_BINS + 1]))
        below, above = counts[HALF_BINS - 1 :: -1], counts[HALF_BINS:]  # both outwards from 0
        if folded:
            below, above = np.zeros(0), below + above
        sides = [side[: int(np.flatnonzero(side)[-1]) + 1] if side.any() else side[:0] for side in (below, above)]
        factor = max(-(-sum(map(len, sides)) // (self.bins - 1)), 1)  # a side's last bin may be a part of one
        merged = [np.add.reduceat(side, np.arange(0, len(side), factor)) if len(side) else side for side in sides]
        return np.concatenate([merged[0][::-1], merged[1]]), len(merged[0]), factor * histogram.limit / HALF_BINS

    def _windows(self, bins: int, zero: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
        """First and last bin (exclusive) of ranges around 0 with a bin for every level at least, the widest first."""
        number = int(np.sqrt(self.windows)) if 0 < zero < bins else self.windows
        lows = np.unique(np.linspace(0, zero, number).astype(np.int64))
        highs = np.unique(np.linspace(zero, bins, number).astype(np.int64))[::-1]
        starts, ends = (grid.ravel() for grid in np.meshgrid(lows, highs, indexing="ij"))
        wide = ends - starts >= levels
        return starts[wide], ends[wide]


def divergences(counts: np.ndarray, starts: np.ndarray, ends: np.ndarray, levels: int) -> np.ndarray:
    """KL divergence of a histogram, clipped to each window of bins, from what `levels` levels leave of it.

    Args:
        counts: float64[bins], of values by bin.
        starts, ends: int64[windows]; a window is `counts[start:end]`, at least `levels` bins wide.

    Returns:
        float64[windows] in nats.
    """
    sums, filled, own = (_running(part) for part in (counts, counts > 0, _entropic(counts)))
    below, above = sums[starts], sums[-1] - sums[ends]
    first, last = counts[starts], counts[ends - 1]
    edges = starts[:, None] + (ends - starts)[:, None] * np.arange(levels + 1) // levels
    mass, used = np.diff(sums[edges], axis=1), np.diff(filled[edges], axis=1)
    used[:, 0] += (first == 0) & (below > 0)
    used[:, -1] += (last == 0) & (above > 0)
    clipped = mass.copy()
    clipped[:, 0] += below
    clipped[:, -1] += above
    # A level that holds nothing but clipped values would make the divergence infinite: it counts as if it held one.
    held = np.where(clipped > 0, np.maximum(mass, 1), 0)
    cross = (clipped * np.log(np.maximum(held, 1) / np.maximum(used, 1))).sum(axis=1)
    entropy = own[ends] - own[starts] - _entropic(first) - _entropic(last)
    entropy += _entropic(first + below) + _entropic(last + above)
    return (entropy - cross) / sums[-1] + np.log(held.sum(axis=1) / sums[-1])


def _running(values: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, 2, ... values."""
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _entropic(counts: np.ndarray) -> np.ndarray:
    return counts * np.log(np.maximum(counts, 1))


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


def candidate_methods(percentile: float) -> list[RangeMethod]:
    """What `per_tensor` chooses from, the recipe's percentile first: it stays where nothing is better."""
    percents = dict.fromkeys([percentile, 99.9, 99.99, 99.999])
    return [*map(Percentile, percents), MinMax(), MeanSquaredError(), Entropy()]


def make_range_method(name: str, percentile: float) -> RangeMethod:
    """The range method that a recipe names; for `per_tensor` its first candidate (see `quant.ranges`)."""
    methods: dict[str, RangeMethod] = {
        "minmax": MinMax(),
        "percentile": Percentile(percentile),
        "mse": MeanSquaredError(),
        "entropy": Entropy(),
        "moving_average": MovingAverage(),
        "per_tensor": candidate_methods(percentile)[0],
    }
    return methods[name]
