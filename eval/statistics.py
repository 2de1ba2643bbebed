"""Paired statistics: how large is the drop, and how large may it be for all we know.

**The bound.** FP32 and INT8 judge the same samples, so whole samples are resampled and the drop is computed
anew each time (paired bootstrap). Instead of drawing samples with replacement every sample gets a random
exponential weight (Rubin 1981, "The Bayesian bootstrap"; normalised they are Dirichlet(1, .., 1)), which
gives the same spread but never loses a rare sample altogether. The bound is the 95 % percentile of the drops.

A percentile of the observed samples alone is too small when differences are rare, and zero when there are
none: what was not seen cannot be drawn. So one imagined sample is added to the resampling (not to the
estimate): `Metric.lost_sample`, a sample that INT8 loses. For line accuracy that is the bound of Gaffke (2005,
"Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative variable"), which
for k lost and no won lines is exactly the Clopper-Pearson bound, and for none the rule of three:
1 - 0.05^(1/n), about 3/n. For detection the imagined sample is a page of average counts that loses one
region; with no difference in n pages the bound says that up to about 3/n of the pages may lose one. For mean
average precision it is the middle one of the pages, which loses one hit.

**Why percentile** and not BCa or a studentized bootstrap: with the imagined sample it is exact in the case
that matters most here (few discordant lines), where the studentized one divides by zero and BCa's acceleration
rests on a handful of samples. (Gaffke's bound is conjectured, not proven, to hold for every bounded variable;
for lost lines alone it is proven.) In simulations with 80 to 124 pages it covers the true drop in 95 to 99 % of
the sets when regions are lost one by one. It is too small (80 to 86 %) where a tenth of the pages lose a
fifth of their regions at a time, and no method sees a catastrophe on one page in a hundred from 80 pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from eval.metric import Metric
from quant.errors import InputError, Unavailable

FloatArray = npt.NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
Z_95 = 1.6448536269514722  # one-sided 95 % quantile of the normal distribution
_WEIGHTS_AT_ONCE = 4_000_000  # float64 each: 32 MB


@dataclass(frozen=True)
class Drop:
    """FP32 against INT8 on the same samples.

    Args:
        samples: number of samples.
        fp32, int8: metric in percent.
        drop: fp32 - int8, in points.
        relative_drop: 100 * drop / fp32, in percent.
        discordance: share of samples whose outcome differs, in percent.
    """

    samples: int
    fp32: float
    int8: float
    drop: float
    relative_drop: float
    discordance: float


@dataclass(frozen=True)
class DropEstimate(Drop):
    """A drop with its uncertainty.

    Args:
        drop_upper95, relative_drop_upper95: one-sided 95 % upper bounds.
        drop_error, relative_drop_error: standard errors (standard deviation of the resamples).
    """

    drop_upper95: float
    relative_drop_upper95: float
    drop_error: float
    relative_drop_error: float


def compare_counts(metric: Metric, fp32: FloatArray, int8: FloatArray) -> Drop:
    """FP32 against INT8 sample by sample, without bounds.

    Args:
        metric: what the counts mean.
        fp32, int8: counts [samples, counts]; row i of both is the same sample.

    Raises:
        Unavailable: no samples, or FP32 gets nothing right, so that there is nothing to lose.
    """
    if fp32.shape != int8.shape or fp32.ndim != 2:
        raise InputError(f"counts must be two equal matrices, not {fp32.shape} and {int8.shape}")
    if not len(fp32):
        raise Unavailable("there are no samples to compare FP32 and INT8 on", "Give a data set with more samples")
    before, after = metric.value(fp32), metric.value(int8)
    if before <= 0:
        raise Unavailable(
            f"FP32 has a {metric.name} of 0 on {len(fp32)} samples, so that nothing can be lost",
            "Check that the labels belong to the pictures",
        )
    return Drop(
        samples=len(fp32),
        fp32=before,
        int8=after,
        drop=before - after,
        relative_drop=100 * (before - after) / before,
        discordance=100 * float(metric.outcome_differs(fp32, int8).mean()),
    )


def estimate_drop(
    metric: Metric,
    fp32: FloatArray,
    int8: FloatArray,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    pictures: Sequence[str] | None = None,
) -> DropEstimate:
    """`compare_counts` with the bounds of a paired bootstrap. Same arguments, same result.

    Args:
        pictures: what each sample is made from; samples of one picture (its rotations) are drawn together.

    Raises:
        Unavailable: as `compare_counts`.
    """
    found = compare_counts(metric, fp32, int8)
    groups = np.unique(range(len(fp32)) if pictures is None else pictures, return_inverse=True)[1]
    drops, relative = _resampled_drops(metric, fp32, int8, groups, seed, resamples)
    return DropEstimate(
        **asdict(found),
        drop_upper95=float(np.quantile(drops, CONFIDENCE)),
        relative_drop_upper95=float(np.quantile(relative, CONFIDENCE)),
        drop_error=float(drops.std(ddof=1)),
        relative_drop_error=float(relative.std(ddof=1)),
    )


def samples_needed(estimate: DropEstimate, max_drop: float, max_relative_drop: float) -> int | None:
    """How many samples would certify the gate if drop and discordance stayed as they are.

    Normal approximation: the bound is drop + z * error(n), and error(n) = error * sqrt(samples / n). So
    n = samples * (z * error / (limit - drop))^2, for both limits, and the larger of the two. For line accuracy
    error^2 is (discordance - drop^2) / samples (as fractions), which shows how the discordance decides.
    At least one sample more than there are where the bound itself does not certify yet.

    Returns:
        None when no number would do: a drop is at its limit or above.
    """
    room, relative_room = max_drop - estimate.drop, max_relative_drop - estimate.relative_drop
    if room <= 0 or relative_room <= 0:
        return None
    ratio = Z_95 * max(estimate.drop_error / room, estimate.relative_drop_error / relative_room)
    needed = math.ceil(estimate.samples * ratio**2)
    certified = estimate.drop_upper95 <= max_drop and estimate.relative_drop_upper95 <= max_relative_drop
    return max(1, needed) if certified else max(needed, estimate.samples + 1)


def _resampled_drops(
    metric: Metric, fp32: FloatArray, int8: FloatArray, groups: npt.NDArray[np.intp], seed: int, resamples: int
) -> tuple[FloatArray, FloatArray]:
    """Drops in points and relative drops in percent, each [resamples].

    Args:
        groups: number of the picture that each sample is made from, from 0: samples of one picture weigh alike.
    """
    lost_fp32, lost_int8 = metric.lost_sample(fp32)
    pairs = np.vstack([fp32, lost_fp32]), np.vstack([int8, lost_int8])
    drawn = int(groups.max()) + 2
    of_sample = np.append(groups, drawn - 1)
    random = np.random.default_rng(seed)
    chunk = max(1, _WEIGHTS_AT_ONCE // len(of_sample))
    found: list[list[FloatArray]] = []
    for start in range(0, resamples, chunk):
        weights = random.standard_exponential((min(chunk, resamples - start), drawn))[:, of_sample]
        found.append([metric.values(counts, weights) for counts in pairs])
    before, after = (np.concatenate(values) for values in zip(*found, strict=True))
    drops = before - after
    return drops, 100 * drops / before
