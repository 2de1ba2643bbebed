"""How ranges move: values are rounded alike, gradients and averages are those of their definitions."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from pydantic import ValidationError
from test_flow import flowing_plan, mobile_block
from test_plan import plan_of
from tiny_models import small_detector, small_recognizer

from quant.kernels import tensor
from quant.program import import_paddle
from quant.quantizer import LARGEST_GROWTH, ROUNDINGS, followed, spanning_step
from quant.recipe import Quantizers, Training
from quant.student import Student, whole_student

BOUNDS = [(0.0, 255.0), (-100.0, 155.0), (-255.0, 0.0), (-127.0, 127.0)]
"""Of unsigned integers with several zero points, and of signed ones."""
STEP = 0.037


@pytest.fixture(autouse=True)
def at_once() -> None:
    """Paddle computes when it is called; other tests of this process may have left it otherwise."""
    import_paddle().disable_static()


def values_of(low: float, high: float) -> np.ndarray:
    """Inside and outside of the bounds, none on them."""
    rng = np.random.default_rng(0)
    return (STEP * rng.uniform(low - 40, high + 40, 400)).astype(np.float32)


def gradients(kind: Quantizers, values: np.ndarray, weights: np.ndarray, low: float, high: float) -> tuple[Any, float]:
    """Of values and of the step, where the loss is the weighted sum."""
    given, step = tensor(values), tensor(np.array([STEP], dtype=np.float32))
    given.stop_gradient = step.stop_gradient = False
    (ROUNDINGS[kind](given, step, low, high) * tensor(weights)).sum().backward()
    return given.grad.numpy(), float(step.grad)


@pytest.mark.parametrize(("low", "high"), BOUNDS)
@pytest.mark.parametrize("kind", get_args(Quantizers))
def test_values_are_rounded_alike(kind: Quantizers, low: float, high: float) -> None:
    values = values_of(low, high)
    found = ROUNDINGS[kind](tensor(values), tensor(np.array([STEP], dtype=np.float32)), low, high).numpy()
    expected = np.clip(np.rint(values / np.float32(STEP)), low, high) * np.float32(STEP)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert ROUNDINGS[kind](tensor(np.zeros(1, np.float32)), tensor(np.array([STEP], np.float32)), low, high) == 0


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_a_learned_bound_has_the_gradient_of_clipping(low: float, high: float) -> None:
    """Against the difference quotient of clipping in 64 bits, without any rounding."""
    values = values_of(low, high)
    weights = np.random.default_rng(1).standard_normal(values.shape).astype(np.float32)

    def clipped(step: float) -> float:
        return float((weights.astype(np.float64) * np.clip(values.astype(np.float64), low * step, high * step)).sum())

    of_values, of_step = gradients("pact", values, weights, low, high)
    assert of_step == pytest.approx((clipped(STEP + 1e-7) - clipped(STEP - 1e-7)) / 2e-7, rel=1e-3)
    inside = (values > low * STEP) & (values < high * STEP)
    np.testing.assert_allclose(of_values, np.where(inside, weights, 0), rtol=1e-6)
    assert gradients("pact", values[inside], weights[inside], low, high)[1] == 0


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_a_learned_step_has_the_gradient_of_rounding_too(low: float, high: float) -> None:
    """Section 2.1: what rounding adds inside, the bound outside."""
    values = values_of(low, high)
    weights = np.random.default_rng(1).standard_normal(values.shape).astype(np.float32)
    steps = values.astype(np.float64) / STEP
    expected = np.where((steps > low) & (steps < high), np.rint(steps) - steps, np.clip(steps, low, high))
    assert gradients("lsq", values, weights, low, high)[1] == pytest.approx(float((weights * expected).sum()), rel=1e-3)


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_the_spanning_step_is_the_least_that_clips_nothing(low: float, high: float) -> None:
    values = values_of(low, high)
    values = values[(values > 0) if low == 0 else (values < 0) if high == 0 else np.isfinite(values)]
    step = spanning_step(tensor(values), low, high)
    np.testing.assert_allclose(np.clip(values, low * step, high * step), values, rtol=1e-6)
    assert np.abs(np.clip(values, 0.99 * low * step, 0.99 * high * step) - values).max() > 0.005 * np.abs(values).max()
    assert spanning_step(tensor(np.zeros(3, dtype=np.float32)), low, high) == 0


def test_the_moving_average_by_hand() -> None:
    assert followed(1.0, 1.5, 0.9) == pytest.approx(1.05)
    assert followed(1.0, 0.0, 0.9) == 1.0, "nothing was seen"
    assert followed(1.0, 1e6, 0.9) == followed(1.0, LARGEST_GROWTH, 0.9) == pytest.approx(1.1), "an outlier"


def trained(student: Student, seed: int, net: Any) -> None:
    student.run(net.feed(seed), student.traced.outputs)
    student.follow(0.8)


def test_ranges_follow_what_training_shows_them() -> None:
    net = small_detector()
    plan = plan_of(net)
    quantizer = plan.activations["x"]
    student, step = whole_student(net.graph(), plan, {"ranges"}, "moving_average"), quantizer.scale
    for seed in range(20, 26):
        trained(student, seed, net)
        pixels = net.feed(seed)["x"]
        spanned = max(pixels.max() / (255 - quantizer.zero_point), pixels.min() / -quantizer.zero_point)
        step = 0.8 * step + 0.2 * min(spanned, 2 * step)
    found = student.refined(plan).activations["x"]
    assert found.scale == pytest.approx(step, rel=1e-5) and found.scale != quantizer.scale
    assert found.zero_point == quantizer.zero_point


def test_ranges_follow_nothing_that_is_looked_at() -> None:
    """Pictures of an evaluation, between two steps, are forgotten."""
    net, states = small_detector(), []
    for looks in (0, 1):
        student = whole_student(net.graph(), plan_of(net), {"ranges"}, "moving_average")
        trained(student, 20, net)
        for _ in range(looks):
            student.run(net.feed(9, scale=1e4), student.traced.outputs)
        trained(student, 21, net)
        states.append(student.state())
    assert all((states[0][name] == states[1][name]).all() for name in states[0])


@pytest.mark.parametrize("case", ["detector", "recognizer", "chain"])
@pytest.mark.parametrize("kind", get_args(Quantizers))
def test_gradients_reach_the_ranges_that_learn_by_them(kind: Quantizers, case: str) -> None:
    net = {"detector": small_detector, "recognizer": small_recognizer, "chain": mobile_block}[case]()
    plan = (flowing_plan if case == "chain" else plan_of)(net)
    student = whole_student(net.graph(), plan, {"weights", "ranges"}, kind)
    outputs = student.run(net.feed(9, scale=3), student.traced.outputs)  # what is clipped learns
    sum((value * value).sum() for value in outputs.values()).backward()
    moved = {key[0] for key, value in student.parameters.items() if value.grad is not None and value.grad.any()}
    assert moved == ({"weights"} if kind == "moving_average" else {"weights", "ranges"})


def test_what_moves_ranges_wants_ranges() -> None:
    with pytest.raises(ValidationError, match="quantizers: pact moves ranges; add ranges to learned"):
        Training.model_validate({"quantizers": "pact"})
    assert Training.model_validate({"quantizers": "pact", "learned": ["ranges"]}).quantizers == "pact"
