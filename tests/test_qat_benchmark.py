"""How benchmarks/qat.py tells whether errors fell."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from qat import changes


def test_a_picture_counts_as_much_as_any_other_however_large_its_error_is() -> None:
    rng = np.random.default_rng(0)
    before = np.append(rng.uniform(0.02, 0.05, 99), 5.0)
    after = np.append(before[:99] * rng.uniform(0.7, 0.9, 99), 5.5)
    found = changes(before, after, seed=0)
    assert found["mean"]["change"] == pytest.approx(after.mean() / before.mean() - 1)
    assert found["mean"]["low"] < 0 < found["mean"]["high"], "one picture outweighs the others"
    assert found["picture"]["change"] == pytest.approx(np.prod(after / before) ** 0.01 - 1)
    assert -0.24 < found["picture"]["low"] < found["picture"]["high"] < -0.16
    assert found["nearer"] == 0.99


def test_what_differs_by_chance_is_not_called_certain() -> None:
    before, after = np.random.default_rng(1).uniform(0.02, 0.05, (2, 100))
    found = changes(before, after, seed=0)
    assert all(found[kind]["low"] < 0 < found[kind]["high"] for kind in ("mean", "picture"))
