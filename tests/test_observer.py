"""Histograms against numpy, range methods against their definitions."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import recipe
from quant.observer import (
    HALF_BINS,
    Entropy,
    Histogram,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    MovingRange,
    Percentile,
    affine_parameters,
    candidate_methods,
    make_range_method,
)

Array = np.ndarray[Any, Any]
# Numbers that float32 cannot scale without loss (subnormal) are left out.
NUMBER = st.floats(-1e4, 1e4, width=32).map(lambda value: value if abs(value) > 1e-30 else 0.0)
VALUES = st.lists(NUMBER, min_size=1, max_size=30)
# Powers of two are the edges of bins, and of whole histograms.
EDGES = st.lists(st.sampled_from([-4.0, -2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]), min_size=1)


def histogram_of(*parts: Any) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.update(np.asarray(part, dtype=np.float32))
    return histogram


def same(one: Histogram, other: Histogram) -> bool:
    facts = [(h.limit, h.minimum, h.maximum) for h in (one, other)]
    return facts[0] == facts[1] and bool(np.array_equal(one.counts, other.counts))


@settings(max_examples=100, deadline=None)
@given(VALUES | EDGES, st.randoms())
def test_the_order_of_the_samples_does_not_matter(values: list[float], random: Any) -> None:
    shuffled = random.sample(values, len(values))
    assert same(histogram_of(*([v] for v in values)), histogram_of(*([v] for v in shuffled)))
    assert same(histogram_of(*([v] for v in values)), histogram_of(values))


@settings(max_examples=100, deadline=None)
@given(VALUES | EDGES)
def test_counts_are_those_of_numpy_and_extremes_are_exact(values: list[float]) -> None:
    data = np.array(values, dtype=np.float32)
    histogram = histogram_of(data)
    edges = np.linspace(-histogram.limit, histogram.limit, 2 * HALF_BINS + 1)
    np.testing.assert_array_equal(histogram.counts, np.histogram(data, edges)[0])
    assert (histogram.minimum, histogram.maximum) == (data.min(), data.max())
    np.testing.assert_allclose(histogram.centers(), (edges[:-1] + edges[1:]) / 2)


def test_growth_loses_no_value_and_takes_no_memory() -> None:
    histogram = histogram_of(np.linspace(-1e-6, 1e-6, 100))
    size = histogram.counts.nbytes
    for exponent in range(-5, 30):
        histogram.update(np.full(10, 10.0**exponent, dtype=np.float32))
    assert histogram.counts.nbytes == size
    assert histogram.counts.sum() == 100 + 35 * 10
    assert histogram.maximum == np.float32(1e29) <= histogram.limit


def test_a_part_of_the_values_is_counted_beside_the_extremes_of_all() -> None:
    values = np.arange(1, 100, dtype=np.float32)
    histogram = Histogram()
    histogram.update(values[2::7], (1.0, 99.0))
    assert histogram.counts.sum() == len(values[2::7])
    assert (histogram.minimum, histogram.maximum) == (1, 99)
    np.testing.assert_array_equal(histogram.counts, histogram_of(values[2::7]).counts)


def test_any_shape_is_counted_and_a_sum_of_zeros_too() -> None:
    histogram = histogram_of(np.zeros((2, 3, 4)))
    assert histogram.counts.sum() == 24
    assert (histogram.minimum, histogram.maximum) == (0, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        histogram_of([1.0, bad])


def samples(kind: str) -> Array:
    rng = np.random.default_rng(0)
    drawn = {
        "normal": rng.standard_normal(20_000),
        "skewed": rng.exponential(1.0, 20_000) - 0.3,
        "positive": rng.uniform(2, 3, 20_000),
        "negative": -rng.exponential(2.0, 20_000) - 1,
        "outlier": np.append(rng.standard_normal(20_000), 60.0),
        "zeros": np.append(np.zeros(10_000), rng.exponential(1.0, 10_000)),
    }
    return drawn[kind].astype(np.float32)


KINDS = ["normal", "skewed", "positive", "negative", "outlier", "zeros"]


@pytest.mark.parametrize("kind", KINDS)
def test_minmax_is_the_range_of_the_data(kind: str) -> None:
    data = samples(kind)
    assert MinMax().choose(histogram_of(data), symmetric=False) == (data.min(), data.max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9, 100.0])
def test_percentile_is_the_quantile_of_numpy(kind: str, percent: float) -> None:
    data = samples(kind)
    histogram = histogram_of(data)
    low, high = Percentile(percent).choose(histogram, symmetric=False)
    tail = (1 - percent / 100) / 2
    width = 2 * histogram.limit / HALF_BINS
    assert abs(low - np.quantile(data, tail, method="inverted_cdf")) <= width
    assert abs(high - np.quantile(data, 1 - tail, method="inverted_cdf")) <= width
    inside = np.mean((data >= low) & (data <= high))
    assert inside >= percent / 100 - 1e-9
    assert data.min() <= low <= high <= data.max()


def quantized(values: Array, low: float, high: float, symmetric: bool) -> Array:
    """An 8-bit quantizer in its own words."""
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        scale = max(-low, high) / 127
        return np.clip(np.round(values / scale), -127, 127) * scale
    scale = (high - low) / 255
    zero = round(-low / scale)
    return (np.clip(np.round(values / scale) + zero, 0, 255) - zero) * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_as_good_as_brute_force(kind: str, symmetric: bool) -> None:
    data = samples(kind).astype(np.float64)
    method = MeanSquaredError()
    low, high = method.choose(histogram_of(data), symmetric=symmetric)

    def error(shrink: float) -> float:
        low, high = data.min() * shrink, data.max() * shrink
        return float(np.mean((data - quantized(data, low, high, symmetric)) ** 2))

    best = min(error(shrink) for shrink in np.linspace(method.smallest, 1, method.steps))
    chosen = float(np.mean((data - quantized(data, low, high, symmetric)) ** 2))
    assert chosen <= best * 1.02
    assert chosen <= error(1.0)


def test_mse_cuts_a_lone_outlier_when_there_is_much_to_win() -> None:
    data = np.append(np.random.default_rng(0).standard_normal(200_000), 20.0)
    _, high = MeanSquaredError().choose(histogram_of(data), symmetric=True)
    assert high < 15


# --- entropy ---------------------------------------------------------------------------------------


def divergence(values: Array, low: float, high: float, width: float, levels: int) -> float:
    """KL divergence of clipped values from what a quantizer leaves of them, bin by bin from raw values."""
    inside = values[(values >= low) & (values < high)]
    bins = round((high - low) / width)
    edges = low + width * np.arange(bins + 1)
    reference = np.histogram(inside, edges)[0].astype(float)
    spread = reference.copy()
    reference[0] += np.sum(values < low)
    reference[-1] += np.sum(values >= high)
    for level in range(levels):
        part = slice(level * bins // levels, (level + 1) * bins // levels)
        filled = reference[part] > 0
        spread[part] = np.where(filled, max(spread[part].sum(), 1) / max(filled.sum(), 1), 0)
    p, q = reference / reference.sum(), spread / spread.sum()
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))


def dense(kind: str) -> Array:
    """Values with outliers and none very near 0, where the histogram may be changed."""
    rng = np.random.default_rng(0)
    drawn = {
        "one-sided": np.append(rng.exponential(1.0, 30_000), [24.0, 31.0]),
        "negative": -np.append(np.abs(rng.standard_normal(30_000)), 14.99),
        "two-sided": np.append(rng.standard_normal(30_000), 30.0),
        "uneven": np.append(rng.exponential(1.0, 30_000) - 0.4, [-6.0, 25.0]),
    }
    values = drawn[kind].astype(np.float32)
    return values[np.abs(values) > 0.01]


@pytest.mark.parametrize("kind", ["one-sided", "negative", "two-sided", "uneven"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_finds_the_least_divergence(kind: str, symmetric: bool) -> None:
    data, method = dense(kind), Entropy(bins=1024, windows=64)
    histogram = histogram_of(data)
    low, high = method.choose(histogram, symmetric=symmetric)
    values = np.abs(data) if symmetric else data
    levels = 128 if symmetric else 256
    step = histogram.limit / HALF_BINS
    below, above = int(np.ceil(max(-values.min(), 0) / step)), int(max(values.max() + step, 0) / step)
    merged = -(-(below + above) // 1023)
    width, below, above = merged * step, -(-below // merged), -(-above // merged)

    def error(start: int, end: int) -> float:
        return divergence(values, -start * width, end * width, width, levels)

    number = 64 if 0 in (below, above) else 8
    starts = {below - int(start) for start in np.linspace(0, below, number)}
    ends = {int(end) for end in np.linspace(0, above, number)}
    tried = {(s, e): error(s, e) for s in starts for e in ends if s + e >= levels}
    best = min(tried, key=lambda window: tried[window])
    assert min(tried.values()) < 0.9 * error(below, above), "there is something to win"
    expected_low, expected_high = (-best[1] if symmetric else -best[0]) * width, best[1] * width
    assert low == pytest.approx(max(expected_low, data.min()))
    assert high == pytest.approx(min(expected_high, data.max()))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_entropy_stays_inside_the_data(kind: str, symmetric: bool) -> None:
    histogram = histogram_of(samples(kind))
    low, high = Entropy().choose(histogram, symmetric=symmetric)
    assert histogram.minimum <= low < high <= histogram.maximum


def test_entropy_minds_no_zeros() -> None:
    values = np.random.default_rng(0).exponential(1.0, 50_000)
    ranges = [
        Entropy().choose(histogram_of(np.append(values, np.zeros(zeros))), symmetric=False) for zeros in (0, 1_000_000)
    ]
    assert ranges[0][1] == pytest.approx(ranges[1][1], rel=0.02)
    assert ranges[0][1] < 0.95 * values.max(), "the tail is cut, so there is something to disturb"


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0], [-2.0, 5.0], [1e-9, 2e-9]])
@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_of_a_few_values_is_their_range(values: list[float], symmetric: bool) -> None:
    histogram = histogram_of(values)
    low, high = Entropy().choose(histogram, symmetric=symmetric)
    assert min(low, 0) >= min(histogram.minimum, 0)
    assert max(-low, high) == pytest.approx(max(map(abs, np.float32(values))))


# --- moving average --------------------------------------------------------------------------------


def test_the_moving_average_by_hand() -> None:
    histogram = Histogram(average=MovingRange(momentum=0.75))
    for part in ([-1.0, 2.0], [-3.0, 0.5, 6.0], [0.0, 1.0]):
        histogram.update(np.asarray(part, dtype=np.float32))
    low = 0.75 * (0.75 * -1 + 0.25 * -3) + 0.25 * 0
    high = 0.75 * (0.75 * 2 + 0.25 * 6) + 0.25 * 1
    assert MovingAverage().choose(histogram, symmetric=False) == pytest.approx((low, high))


def test_the_moving_average_depends_on_the_order_and_on_nothing_else() -> None:
    parts = [[-1.0, 2.0], [-3.0, 6.0]]
    one, same_again, other = (histogram_of(*p) for p in (parts, parts, parts[::-1]))
    choose = MovingAverage().choose
    assert choose(one, symmetric=False) == choose(same_again, symmetric=False) != choose(other, symmetric=False)


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.booleans())
def test_affine_parameters(low: float, width: float, symmetric: bool) -> None:
    high = low + width
    scale, zero_point, smallest, largest = affine_parameters(low, high, symmetric=symmetric)
    assert scale > 0
    assert scale == np.float32(scale), "exporters store float32"
    assert smallest <= zero_point <= largest, "so zero is represented exactly"
    if symmetric:
        assert (zero_point, smallest, largest) == (0, -127, 127)
    # The range is covered, but for the half step by which the zero point was rounded.
    assert (smallest - zero_point) * scale <= min(low, 0) + 0.51 * scale
    assert (largest - zero_point) * scale >= max(high, 0) - 0.51 * scale


def test_methods_by_name() -> None:
    assert make_range_method("minmax", 1) == MinMax()
    assert make_range_method("percentile", 99.5) == Percentile(99.5)
    assert make_range_method("mse", 1) == MeanSquaredError()
    assert make_range_method("entropy", 1) == Entropy()
    assert make_range_method("moving_average", 1) == MovingAverage()
    assert make_range_method("per_tensor", 99.5) == Percentile(99.5)


def test_every_method_of_the_recipes_is_known() -> None:
    for name in get_args(recipe.RangeMethod):
        make_range_method(name, 99.0)


def test_the_candidates_are_distinct_and_the_recipes_percentile_is_the_first() -> None:
    for percent in (99.999, 98.0):
        candidates = candidate_methods(percent)
        assert candidates[0] == Percentile(percent)
        assert len(set(candidates)) == len(candidates) == (6 if percent == 99.999 else 7)
