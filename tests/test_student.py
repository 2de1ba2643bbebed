"""The student: equal to the plan's simulation, trained where it may be, written back as a plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_flow import block_with_dead_channels, flowing_plan, mobile_block
from test_plan import plan_of
from tiny_models import TinyNet, run, simulate, simulated_model, small_detector, small_recognizer

from quant.errors import NotTrainable
from quant.kernels import compute, tensor
from quant.plan import QuantPlan
from quant.program import import_paddle
from quant.student import KINDS, Kind, Student, student_outputs, whole_student


@pytest.fixture(autouse=True)
def _at_once() -> None:
    """Operators compute when they are called; tests of programs before these may have left Paddle in its other mode."""
    import_paddle().disable_static()


def detector() -> tuple[TinyNet, QuantPlan]:
    return small_detector(), plan_of(small_detector())


def chain() -> tuple[TinyNet, QuantPlan]:
    return mobile_block(), flowing_plan(mobile_block())


CASES = {
    "detector": detector,
    "recognizer": lambda: (small_recognizer(), plan_of(small_recognizer())),
    "symmetric": lambda: (small_recognizer(), plan_of(small_recognizer(), dtype="int8")),
    "chain": chain,
    "dead": lambda: (block_with_dead_channels(), flowing_plan(block_with_dead_channels())),
    "partly": lambda: (small_detector(), plan_of(small_detector()).with_only({"t0", "t6"}, "some")),
}
SIZES: dict[Kind, float] = {"weights": 0.6, "biases": 8.0, "scales": 0.1, "ranges": 0.1}


def simulated(net: TinyNet, plan: QuantPlan, seed: int) -> np.ndarray:
    return simulate(simulated_model(net.graph(), plan), net.feed(seed))[0]


def moved(student: Student, by: float) -> Student:
    """All that is trained, moved by chance."""
    rng = np.random.default_rng(0)
    state = {name: value + by * rng.standard_normal(value.shape) for name, value in student.state().items()}
    student.restore({name: value.astype(np.float32) for name, value in state.items()})
    return student


@pytest.mark.parametrize("case", CASES)
def test_before_the_first_step_it_is_the_simulation_of_its_plan(case: str) -> None:
    net, plan = CASES[case]()
    student = whole_student(net.graph(), plan, KINDS)
    for seed in range(3):
        found = student_outputs(student, net.feed(seed))[0]
        np.testing.assert_allclose(found, simulated(net, plan, seed), atol=2e-6)


@pytest.mark.parametrize("case", ["detector", "recognizer", "chain"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_learned_is_in_the_plan(case: str, kind: Kind) -> None:
    net, plan = CASES[case]()
    student = moved(whole_student(net.graph(), plan, {kind}), SIZES[kind])
    refined = student.refined(plan)
    found, exact = student_outputs(student, net.feed(2))[0], simulated(net, refined, 2)
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())
    assert np.abs(found - simulated(net, plan, 2)).max() > 1e-4, "and it learned something"


def test_a_student_that_did_not_move_gives_its_plan_back() -> None:
    net, plan = chain()
    refined = whole_student(net.graph(), plan, KINDS).refined(plan)
    assert refined.document() == plan.document()
    for name, weight in plan.integers.items():
        np.testing.assert_array_equal(refined.integers[name].values, weight.values)
        np.testing.assert_array_equal(refined.integers[name].scale, weight.scale)


def test_weights_start_where_the_plan_rounded_them() -> None:
    """Also those that the plan rounded away from the nearest integer."""
    net, plan = detector()
    name = next(iter(plan.integers))
    shifted = np.clip(plan.integers[name].values + 1, -127, 127).astype(np.int8)
    plan.integers[name] = replace(plan.integers[name], values=shifted)
    student = whole_student(net.graph(), plan, {"weights"})
    np.testing.assert_array_equal(np.rint(student.state()[f"weights:{name}"]), shifted)


@pytest.mark.parametrize("case", ["detector", "recognizer", "chain"])
def test_a_gradient_reaches_everything_that_is_trained(case: str) -> None:
    """The first layers as well: the straight-through estimator lets it pass every quantizer on the way."""
    net, plan = CASES[case]()
    student = whole_student(net.graph(), plan, KINDS)
    outputs = student.run(net.feed(), student.traced.outputs)
    sum((value * value).sum() for value in outputs.values()).backward()
    still = [key for key, value in student.parameters.items() if value.grad is None or not value.grad.abs().sum() > 0]
    assert [key for key in still if key[0] != "ranges"] == []
    assert len(student.parameters) > len(still)


def test_no_gradient_passes_where_values_are_clipped() -> None:
    import paddle

    net = TinyNet((1, 2, 4, 4))
    net.conv("x", 2, 3, kernel=1, pad=0)
    plan = plan_of(net)
    student = whole_student(net.graph(), plan, {"ranges"})
    quantizer = plan.activations["x"]
    top = (255 - quantizer.zero_point) * quantizer.scale
    given = paddle.to_tensor(np.array([0.5 * top, 2 * top], dtype=np.float32).reshape(1, 2, 1, 1), stop_gradient=False)
    next(iter(student.run({"x": given}, student.traced.outputs).values())).abs().sum().backward()
    inside, outside = given.grad.numpy().ravel()
    assert inside != 0 and outside == 0


def test_what_a_normalization_reads_may_lie_on_the_host() -> None:
    """As behind a cut of reconstruction."""
    net = TinyNet((1, 3, 4, 4))
    gain, bias = net.const(net.weights(4)), net.const(net.weights(4))
    net.op("LayerNormalization", "x", gain, bias, axis=-1)
    found = compute(net.nodes[0], [net.feed()["x"], *(tensor(net.constants[name]) for name in (gain, bias))])[0]
    np.testing.assert_allclose(found.numpy(), run(net.model(), net.feed())[0], atol=1e-6)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("rounding", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
@pytest.mark.parametrize("places", ["asymmetric", "half_pixel", "align_corners"])
def test_pixels_are_repeated_only_where_the_model_repeats_them(places: str, rounding: str, factor: int) -> None:
    net = TinyNet((1, 2, 3, 4))
    scales = net.const(np.array([1, 1, factor, factor], dtype=np.float32))
    modes = {"coordinate_transformation_mode": places, "nearest_mode": rounding, "mode": "nearest"}
    net.op("Resize", "x", "", scales, **modes)
    given = [tensor(net.feed()["x"]), None, net.constants[scales]]
    repeating = [("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "round_prefer_ceil")]
    if (places, rounding) in repeating:
        np.testing.assert_array_equal(compute(net.nodes[0], given)[0].numpy(), run(net.model(), net.feed())[0])
    else:
        with pytest.raises(NotTrainable, match=f"{places} and {rounding}"):
            compute(net.nodes[0], given)


@pytest.mark.parametrize("sizes", [(1, 2, 5, 8), (1, 2, 31, 6)])
def test_pixels_are_repeated_unevenly_where_the_factor_is_not_whole(sizes: tuple[int, ...]) -> None:
    net = TinyNet((1, 2, 16, 4) if sizes[2] == 31 else (1, 2, 3, 4))
    place = net.const(np.array(sizes))
    modes = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", "mode": "nearest"}
    net.op("Resize", "x", "", "", place, **modes)
    found = compute(net.nodes[0], [tensor(net.feed()["x"]), None, None, net.constants[place]])[0]
    np.testing.assert_array_equal(found.numpy(), run(net.model(), net.feed())[0])


@pytest.mark.parametrize("kind", ["Erf", "Sqrt"])
def test_functions_of_single_values(kind: str) -> None:
    net = TinyNet((1, 2, 3, 4))
    net.op(kind, "x")
    feed = {"x": np.abs(net.feed()["x"])}
    np.testing.assert_allclose(compute(net.nodes[0], [tensor(feed["x"])])[0].numpy(), run(net.model(), feed)[0], 1e-5)


def test_a_gradient_passes_what_a_mask_lets_through() -> None:
    net = TinyNet((1, 3, 2))
    mask = net.const(np.array([[[True], [False], [True]]]))
    net.op("Where", mask, "x", net.const(np.float32(-7)))
    given = tensor(net.feed()["x"])
    given.stop_gradient = False
    found = compute(net.nodes[0], [net.constants[mask], given, np.float32(-7)])[0]
    np.testing.assert_array_equal(found.numpy(), run(net.model(), net.feed())[0])
    found.sum().backward()
    np.testing.assert_array_equal(given.grad.numpy(), np.array([[[1, 1], [0, 0], [1, 1]]], dtype=np.float32))


def test_a_pool_with_holes_is_refused() -> None:
    net = TinyNet((1, 2, 6, 6))
    net.op("MaxPool", "x", kernel_shape=[2, 2], dilations=[2, 2])
    with pytest.raises(NotTrainable, match="dilations"):
        compute(net.nodes[0], [tensor(net.feed()["x"])])


def test_an_operator_without_counterpart_is_named() -> None:
    net = TinyNet((1, 3, 4, 4))
    net.op("Sin", net.conv("x", 3, 3), name="strange")
    student = whole_student(net.graph(), plan_of(net), {"biases"})
    with pytest.raises(NotTrainable, match=r"'strange' is a Sin.*--method ptq"):
        student_outputs(student, net.feed())
