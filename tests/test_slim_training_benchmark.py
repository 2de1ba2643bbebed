"""How benchmarks/slim_training.py sums up what a part told, also of one that was ended."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from slim_training import summary


def test_a_part_that_was_ended_keeps_what_it_told() -> None:
    told = [
        {"event": "calibrated", "at": 20.0, "layers": 9},
        {"event": "iteration", "at": 31.0, "layer": 1, "seconds": 1.0, "loss": 8.0},
        {"event": "iteration", "at": 34.0, "layer": 1, "seconds": 3.0, "loss": 6.0},
        {"event": "iteration", "at": 35.0, "layer": 2, "seconds": 0.5, "loss": 4.0},
    ]
    found = summary(told)
    assert found["setup_seconds"] == 30 and found["seconds"] is None
    assert (found["trained_layers"], found["layers"], found["iterations"]) == (2, 9, 3)
    assert (found["first_layer_seconds"], found["last_layer_seconds"]) == (2, 0.5)
    assert found["losses"] == [8, 4]


def test_what_ended_before_its_first_step_has_no_seconds_of_one() -> None:
    found = summary([{"event": "calibrated", "at": 20.0, "layers": 9}])
    assert found["trained_layers"] == 0 and found["setup_seconds"] is None and found["losses"] == []
