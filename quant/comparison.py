"""Outputs of two models side by side: which value belongs to which.

Every comparison runs one picture at a time. A matrix of several rows is therefore a list, of detections: which rows it
has and in which order hangs on scores that lie close together, and means nothing. A generated sequence may end sooner.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Arrays = Sequence[np.ndarray]


def side_by_side(found: Arrays, exact: Arrays) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of equal shape: rows of a list beside the row that is most alike, zeros where a partner is missing.

    Args:
        found, exact: outputs of two models for the same picture.
    """
    return [_filled(*_matched(one, other)) for one, other in zip(found, exact, strict=True)]


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


def _filled(found: np.ndarray, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if found.shape == exact.shape or found.ndim != exact.ndim:
        return found, exact
    shape = np.maximum(found.shape, exact.shape)
    return _extended(found, shape), _extended(exact, shape)


def _extended(values: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return np.pad(values, [(0, int(size) - old) for size, old in zip(shape, values.shape, strict=True)])
