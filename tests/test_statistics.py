"""The bound of the drop against definitions, exact bounds and simulations."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from scipy import stats

from eval.metric import Hmean, LineAccuracy
from eval.statistics import DropEstimate, estimate_drop, samples_needed
from quant.errors import InputError, Unavailable

Counts = np.ndarray[Any, Any]


def lines(right: Counts) -> Counts:
    ones = np.ones(len(right))
    return np.stack([right.astype(float), right.astype(float), ones], axis=1)


def pair_of_lines(samples: int, lost: int, won: int, right: float = 0.6) -> tuple[Counts, Counts]:
    """FP32 and INT8 counts with `lost` lines that only FP32 reads and `won` that only INT8 reads."""
    fp32 = np.arange(samples) < right * samples
    int8 = fp32.copy()
    int8[:lost] = False
    int8[samples - won :] = True
    return lines(fp32), lines(int8)


def test_point_estimates_are_the_definitions() -> None:
    fp32, int8 = pair_of_lines(1000, 30, 20)
    estimate = estimate_drop(LineAccuracy(), fp32, int8)
    assert estimate.samples == 1000
    assert [estimate.fp32, estimate.int8] == pytest.approx([60, 59])
    assert estimate.drop == pytest.approx(1)
    assert estimate.relative_drop == pytest.approx(100 / 60)
    assert estimate.discordance == pytest.approx(5)


def test_many_discordant_lines_give_the_normal_bound() -> None:
    fp32, int8 = pair_of_lines(4000, 160, 120)
    estimate = estimate_drop(LineAccuracy(), fp32, int8)
    error = 100 * np.sqrt((0.07 - 0.01**2) / 4000)
    assert estimate.drop_error == pytest.approx(error, rel=0.03)
    assert estimate.drop_upper95 == pytest.approx(1 + 1.645 * error, abs=0.05)


def test_the_bound_is_that_of_resampling_with_replacement() -> None:
    """Where differences are frequent, the weights and the imagined sample make no difference."""
    random = np.random.default_rng(3)
    fp32, int8 = pages(random, 400, lost=0.05, won=0.03)
    rows = random.integers(0, 400, (4000, 400))
    metric = Hmean()
    drops = metric.aggregates(fp32[rows].sum(1)) - metric.aggregates(int8[rows].sum(1))
    estimate = estimate_drop(metric, fp32, int8)
    assert estimate.drop_upper95 == pytest.approx(np.quantile(drops, 0.95), abs=0.06)
    assert estimate.drop_error == pytest.approx(drops.std(), rel=0.06)


@pytest.mark.parametrize("lost", [0, 1, 3, 8])
def test_lost_lines_alone_give_the_exact_binomial_bound(lost: int) -> None:
    fp32, int8 = pair_of_lines(500, lost, 0)
    exact = 100 * stats.beta.ppf(0.95, lost + 1, 500 - lost)
    assert estimate_drop(LineAccuracy(), fp32, int8).drop_upper95 == pytest.approx(exact, rel=0.03)


def test_no_difference_on_n_pages_is_not_proof_of_none() -> None:
    """Up to about 3 in n pages may lose a region; a page has 20."""
    counts = np.tile([15.0, 18.0, 20.0], (60, 1))
    estimate = estimate_drop(Hmean(), counts, counts)
    assert estimate.drop == estimate.discordance == 0
    share = 1 - 0.05 ** (1 / 60)
    assert estimate.drop_upper95 == pytest.approx(100 * share * 2 / 38, rel=0.05)


def test_same_seed_same_result() -> None:
    fp32, int8 = pair_of_lines(300, 9, 4)
    assert estimate_drop(LineAccuracy(), fp32, int8) == estimate_drop(LineAccuracy(), fp32, int8)
    other = estimate_drop(LineAccuracy(), fp32, int8, seed=1)
    assert other.drop_upper95 != estimate_drop(LineAccuracy(), fp32, int8).drop_upper95


def test_memory_stays_bounded() -> None:
    fp32, int8 = pair_of_lines(11_000, 200, 150)
    tracemalloc.start()
    estimate_drop(LineAccuracy(), fp32, int8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def pages(random: np.random.Generator, number: int, lost: float, won: float) -> tuple[Counts, Counts]:
    """Pages of 1 to 40 regions of which INT8 loses and wins some, one by one."""
    labelled = random.integers(1, 41, number)
    matched = random.binomial(labelled, 0.75)
    false = random.poisson(0.2 * labelled)
    change = random.binomial(labelled - matched, won) - random.binomial(matched, lost)
    fp32 = np.stack([matched, matched + false, labelled], axis=1).astype(float)
    int8 = np.stack([matched + change, matched + false, labelled], axis=1).astype(float)
    return fp32, int8


@pytest.mark.parametrize("rates", [(0.004, 0.002), (0.03, 0.02), (0.003, 0.0)])
def test_the_bound_covers_the_true_drop_of_lines(rates: tuple[float, float]) -> None:
    random = np.random.default_rng(5)
    lost, won = rates
    covered = 0
    for _ in range(300):
        kind = random.choice(4, size=600, p=[0.6 - lost, lost, won, 0.4 - won])
        fp32, int8 = lines(kind <= 1), lines((kind == 0) | (kind == 2))
        covered += estimate_drop(LineAccuracy(), fp32, int8, resamples=1000).drop_upper95 >= 100 * (lost - won)
    assert covered >= 0.93 * 300


@pytest.mark.parametrize("rates", [(0.003, 0.002), (0.02, 0.02), (0.03, 0.0)])
def test_the_bound_covers_the_true_drop_of_pages(rates: tuple[float, float]) -> None:
    random = np.random.default_rng(7)
    metric = Hmean()
    everything = [counts.sum(axis=0) for counts in pages(random, 200_000, *rates)]
    true = metric.aggregate(everything[0]) - metric.aggregate(everything[1])
    covered = sum(
        estimate_drop(metric, *pages(random, 100, *rates), resamples=1000).drop_upper95 >= true for _ in range(300)
    )
    assert covered >= 0.93 * 300


def estimate_with(**changes: float) -> DropEstimate:
    values: dict[str, Any] = {
        "samples": 1000,
        "fp32": 60.0,
        "int8": 59.8,
        "drop": 0.2,
        "relative_drop": 0.33,
        "drop_upper95": 1.1,
        "relative_drop_upper95": 1.8,
        "drop_error": 0.5,
        "relative_drop_error": 0.5 / 0.6,
        "discordance": 2.5,
    }
    return DropEstimate(**{**values, **changes})


def test_samples_needed_is_the_stated_formula() -> None:
    needed = samples_needed(estimate_with(), 1.0, 1.0)
    assert needed == pytest.approx(1000 * (1.6449 * 0.8333 / 0.67) ** 2, rel=0.001)


def test_samples_needed_really_certify() -> None:
    fp32, int8 = pair_of_lines(1000, 20, 18)
    needed = samples_needed(estimate_drop(LineAccuracy(), fp32, int8), 1.0, 1.0)
    assert needed is not None
    times = needed / 1000
    larger = estimate_drop(LineAccuracy(), *pair_of_lines(needed, round(20 * times), round(18 * times)))
    assert larger.relative_drop_upper95 == pytest.approx(1.0, abs=0.06)


def test_no_number_of_samples_mends_a_drop_above_the_limit() -> None:
    assert samples_needed(estimate_with(drop=1.0), 1.0, 1.0) is None
    assert samples_needed(estimate_with(relative_drop=1.2), 1.0, 1.0) is None


def test_more_samples_than_there_are_while_not_certified() -> None:
    assert samples_needed(estimate_with(drop_error=0.01, relative_drop_error=0.01), 1.0, 1.0) == 1001


def test_nothing_to_compare_is_said_so() -> None:
    with pytest.raises(Unavailable, match="no samples"):
        estimate_drop(LineAccuracy(), np.zeros((0, 3)), np.zeros((0, 3)))
    wrong = lines(np.zeros(4))
    with pytest.raises(Unavailable, match="labels belong to the pictures"):
        estimate_drop(LineAccuracy(), wrong, wrong)
    with pytest.raises(InputError, match="two equal matrices"):
        estimate_drop(LineAccuracy(), wrong, wrong[:2])
