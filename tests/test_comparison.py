"""Outputs side by side: lists of detections have no order, sequences may end sooner."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.comparison import largest_difference, side_by_side
from quant.sensitivity import compare_outputs, relative_errors


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_the_order_of_detections_does_not_count(rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    exact = rng.uniform(0, 640, (rows, 6)).astype(np.float32)
    ((found, other),) = side_by_side([exact[rng.permutation(rows)]], [exact])
    np.testing.assert_array_equal(found, other)


def test_a_row_without_partner_stands_beside_zeros() -> None:
    exact = np.array([[1.0, 0.9, 10, 10, 20, 20], [2.0, 0.8, 30, 30, 40, 40]])
    ((found, other),) = side_by_side([exact[1:]], [exact])
    np.testing.assert_array_equal(other, exact[::-1])
    np.testing.assert_array_equal(found, [exact[1], np.zeros(6)])
    assert relative_errors([[exact[1:]]], [[exact]]) == [exact[0].sum() / exact.sum()]


def test_other_outputs_stay_in_their_order() -> None:
    scores, values = np.array([[0.1, 0.9]]), np.arange(24.0).reshape(1, 2, 3, 4)
    pairs = side_by_side([scores[:, ::-1], values[:, ::-1]], [scores, values])
    np.testing.assert_array_equal(pairs[0][0], scores[:, ::-1])
    np.testing.assert_array_equal(pairs[1][0], values[:, ::-1])


def test_a_sequence_that_ends_sooner_is_filled_with_zeros() -> None:
    long, short = np.ones((1, 4, 5)), np.ones((1, 2, 5))
    ((found, exact),) = side_by_side([short], [long])
    assert found.shape == exact.shape == (1, 4, 5) and found.sum() == 10
    assert relative_errors([[short]], [[long]]) == [0.5]
    assert side_by_side([np.zeros((0, 6))], [np.ones((2, 6))])[0][0].shape == (2, 6)


def test_one_row_of_a_long_list_may_be_another_but_must_be_finite() -> None:
    boxes = np.arange(120, dtype=np.float32).reshape(30, 4)
    other = boxes.copy()
    other[-1] += 50
    assert largest_difference([other], [boxes]) < 1e-9
    assert largest_difference([other[-5:]], [boxes[-5:]]) > 1
    other[-1] = np.nan
    assert largest_difference([other], [boxes]) == np.inf


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_no_numbers_are_far_off_and_can_be_written(value: float) -> None:
    error = compare_outputs([[np.array([[value, 1.0]])]], [[np.ones((1, 2))]])
    assert (error.damage, error.snr_db) == (1e9, None)
