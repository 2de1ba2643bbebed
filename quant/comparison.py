"""Outputs of two models side by side: which value belongs to which.

Every comparison runs one picture at a time. A matrix of several rows is therefore a list, of detections: which rows it
has and in which order hangs on scores that lie close together, and means nothing. A generated sequence may end sooner.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Arrays = Sequence[np.ndarray]

_LONG_LIST = 20  # rows; in a shorter one the last row is no trifle


def side_by_side(found: Arrays, exact: Arrays) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs as float64 of equal shape: rows of a list beside the row most alike, zeros where a partner is missing.

    Args:
        found, exact: outputs of two models for the same picture.
    """
    return [_comparable(*_matched(one, other)) for one, other in zip(found, exact, strict=True)]


def largest_difference(found: Arrays, expected: Arrays) -> float:
    """Largest absolute difference of the outputs for one picture; infinite where shapes differ or one is not finite.

    Of long lists the row that differs most may be another one: which detection is the last
    that gets into the list is a matter of rounding.
    """
    if any(one.shape != other.shape for one, other in zip(found, expected, strict=True)):
        return float("inf")
    worst = 0.0
    for one, other in side_by_side(found, expected):
        if one.size:
            apart = np.abs(one - other)
            if not np.isfinite(apart).all():
                return float("inf")
            is_list = one.ndim == 2 and len(one) >= _LONG_LIST
            worst = max(worst, float(np.sort(apart.max(axis=1))[-2] if is_list else apart.max()))
    return worst


def _matched(found: np.ndarray, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both lists with partners first, chosen so that their distances add up to least, columns on one scale.

    Kuhn, "The Hungarian Method for the Assignment Problem", 1955.
    """
    if not _are_lists(found, exact):
        return found, exact
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    scale = np.maximum(np.abs(exact).max(axis=0), 1e-9)
    partners, rows = linear_sum_assignment(cdist(found / scale, exact / scale, "cityblock"))
    return _first(found, partners), _first(exact, rows)


def _are_lists(found: np.ndarray, exact: np.ndarray) -> bool:
    matrices = found.ndim == exact.ndim == 2 and found.shape[1] == exact.shape[1]
    known = matrices and len(found) > 0 and len(exact) > 0 and max(len(found), len(exact)) > 1
    return known and bool(np.isfinite(found).all() and np.isfinite(exact).all())


def _first(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows before all others."""
    others = np.setdiff1d(np.arange(len(values)), rows)
    return values[np.concatenate([rows, others])]


def _comparable(found: np.ndarray, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two outputs as float64 of one shape, whose difference means something.

    What one of them lacks counts as 0. The difference of two token ids says nothing: where they are integers, each
    exact one counts 1, and the one found 1 if it is the same, else 0.
    """
    tokens = exact.ndim > 1 and np.issubdtype(exact.dtype, np.integer)
    if found.shape != exact.shape and found.ndim == exact.ndim:
        shape = tuple(map(max, found.shape, exact.shape))
        found, exact = (_extended(values, shape, -1 if tokens else 0) for values in (found, exact))
    if tokens:
        return (found == exact).astype(np.float64), np.ones(exact.shape)
    return found.astype(np.float64), exact.astype(np.float64)


def _extended(values: np.ndarray, shape: tuple[int, ...], filler: int) -> np.ndarray:
    extended = np.full(shape, filler, dtype=values.dtype)
    extended[tuple(map(slice, values.shape))] = values
    return extended
