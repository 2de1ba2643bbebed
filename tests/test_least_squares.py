"""Reconstruction in closed form: the definition on small cases, nearer on unseen pictures, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_bias import coarse, mean_errors
from test_flow import flowing_plan, mobile_block
from test_plan import plan_of
from test_reconstruction import error
from test_rounding import correlated, layers
from tiny_models import TinyNet, simulate, simulated_model, small_detector, small_recognizer

from quant import least_squares
from quant.bias import sequential_biases
from quant.errors import NotTrainable
from quant.least_squares import Joint, PartResult, fitted_operators, refit
from quant.plan import QuantPlan
from quant.runtime import Feed, onnx_session
from quant.simulation import integer_limits

CASES = {
    "detector": (small_detector, plan_of),
    "recognizer": (small_recognizer, plan_of),
    "chain": (mobile_block, flowing_plan),
}


def corrected(net: TinyNet, plan: QuantPlan, feeds: list[Feed]) -> QuantPlan:
    return replace(plan, bias_shifts=sequential_biases(net.graph(), plan, feeds, 1))


def misread(plan: QuantPlan, share: float = 0.3) -> QuantPlan:
    """A plan that clips what layers read, so that other weights than the trained ones come nearest."""
    for quantizer in [*plan.activations.values(), *plan.outputs.values()]:
        quantizer.scale *= share
    return plan


def refitted(net: TinyNet, plan: QuantPlan, feeds: list[Feed]) -> tuple[QuantPlan, list[PartResult]]:
    return refit(net.graph(), plan, feeds, 1, seed=0)


@pytest.mark.parametrize("central", [True, False])
def test_the_error_of_a_change_is_the_mean_square_that_it_leaves(central: bool) -> None:
    rng = np.random.default_rng(0)
    pictures = [(rng.normal(5, 1, (2, 40, 3)), rng.normal(-3, 1, (2, 40, 4))) for _ in range(3)]
    pictures = [(read, missed + read @ rng.normal(0, 1, (2, 3, 4)) * 0.1) for read, missed in pictures]
    joint = Joint(*pictures[0], central=central)
    for picture in pictures:
        joint.update(*picture)
    change = rng.normal(0, 1, (2, 4, 3))
    read, missed = (np.concatenate(parts, axis=1) for parts in zip(*pictures, strict=True))
    left = missed - read @ change.transpose(0, 2, 1)
    if central:
        left = left - left.mean(axis=1, keepdims=True)
    assert joint.error(change) == pytest.approx(np.square(left).sum() / left.shape[1])


def test_without_ridge_it_is_what_least_squares_give() -> None:
    rng = np.random.default_rng(1)
    read, true = rng.normal(2, 1, (1, 400, 5)), rng.normal(0, 1, (3, 5))
    missed = read @ true.T + 7 + rng.normal(0, 0.1, (1, 400, 3))
    joint = Joint(read, missed, central=True)
    joint.update(read, missed)
    with_constant = np.concatenate([read[0], np.ones((400, 1))], axis=1)
    expected = np.linalg.lstsq(with_constant, missed[0], rcond=None)[0][:5].T
    found = np.linalg.solve(joint.squares(), joint.products()).transpose(0, 2, 1)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("name", list(layers()))
def test_a_layer_makes_up_for_what_it_misreads(name: str) -> None:
    net = layers()[name]
    plan = misread(plan_of(net))
    better, (result,) = refitted(net, plan, correlated(net.shape, 24))
    assert result.after < 0.9 * result.before
    for tensor, weight in better.integers.items():
        np.testing.assert_array_equal(weight.scale, plan.integers[tensor].scale)
        assert weight.values.shape == plan.integers[tensor].values.shape
        assert np.abs(weight.values.astype(int)).max() <= 127


@pytest.mark.parametrize("case", CASES)
def test_the_whole_ends_nearer_to_fp32_on_unseen_pictures(case: str) -> None:
    make, planned = CASES[case]
    net = make()
    feeds = [net.feed(seed) for seed in range(24)]
    plan = corrected(net, misread(planned(net)), feeds)
    found, results = refitted(net, plan, feeds)
    assert {result.aim for result in results} == {op.name for op in plan.quantized().values() if op.weight}
    assert any(result.after < 0.95 * result.before for result in results)
    assert error(net, found) < 0.95 * error(net, plan)


@pytest.mark.parametrize("case", ["detector", "chain"])
def test_no_convolution_is_wrong_on_average_afterwards(case: str) -> None:
    make, planned = CASES[case]
    net = make()
    feeds = [net.feed(seed) for seed in range(8)]
    found, _ = refitted(net, coarse(planned(net)), feeds)
    uncorrected = mean_errors(net, replace(found, bias_shifts={}), feeds)
    assert max(mean_errors(net, found, feeds).values()) < 0.2 * max(uncorrected.values())


def test_a_layer_that_comes_no_nearer_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_detector()
    plan = plan_of(net)
    monkeypatch.setattr(least_squares.Joint, "error", lambda self, change: 1.0)
    found, results = refitted(net, plan, [net.feed(seed) for seed in range(4)])
    assert results and all(result.after == result.before for result in results)
    assert all(found.integers[name] is weight for name, weight in plan.integers.items())


def test_what_is_in_fp32_is_left_alone_and_so_is_the_given_plan() -> None:
    net = small_detector()
    full = coarse(plan_of(net))
    first = full.operators[0]
    plan = full.with_only(set(full.quantized()) - {first.name}, "")
    before = {name: weight.values.copy() for name, weight in plan.integers.items()}
    done: list[int] = []
    found, results = refit(
        net.graph(), plan, [net.feed(seed) for seed in range(8)], 1, seed=0, advance=lambda: done.append(1)
    )
    assert first.name not in {result.aim for result in results} and len(done) == len(results)
    assert first.weight is not None and found.integers[first.weight] is plan.integers[first.weight]
    for name, values in before.items():
        np.testing.assert_array_equal(plan.integers[name].values, values)
    assert any((found.integers[name].values != values).any() for name, values in before.items())


def test_little_room_for_what_fp32_writes_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """More passes of the network then, of its first layers alone at first."""
    net, feeds = small_recognizer(), [small_recognizer().feed(seed) for seed in range(6)]
    plan = coarse(plan_of(net))
    found, results = refitted(net, plan, feeds)
    passes: list[list[str]] = []

    class Counted(type(net.graph())):  # type: ignore[misc]
        def ending_at(self, names: list[str]) -> object:
            passes.append(list(names))
            return super().ending_at(names)

    monkeypatch.setattr(least_squares, "_TAUGHT", 1)
    graph = net.graph()
    graph.__class__ = Counted
    again, same = refit(graph, plan, feeds, 1, seed=0)
    assert len(passes) == len(results) > 1 and all(len(names) == 1 for names in passes)
    assert [r.aim for r in same] == [r.aim for r in results]
    np.testing.assert_array_equal(
        simulate(simulated_model(net.graph(), again), feeds[0])[0],
        simulate(simulated_model(net.graph(), found), feeds[0])[0],
    )


def test_a_weight_that_two_layers_read_is_not_fitted_to_one() -> None:
    net = TinyNet((1, 4, 8, 8))
    weight = net.const(net.weights(4, 4, 1, 1))
    net.op("Conv", net.op("Conv", "x", weight), weight)
    assert fitted_operators(net.graph(), plan_of(net)) == []


def test_one_picture_is_too_few() -> None:
    net = small_detector()
    with pytest.raises(NotTrainable, match="two calibration pictures"):
        refitted(net, plan_of(net), [net.feed(0)])


def test_its_weights_are_what_is_exported() -> None:
    """The last layer's error on held-back pictures is that of the whole plan's simulation."""
    net = TinyNet((1, 6, 9, 9))
    net.conv(net.op("Relu", net.conv("x", 6, 8)), 8, 5)
    feeds = [net.feed(seed) for seed in range(8)]
    found, results = refitted(net, coarse(plan_of(net)), feeds)
    exact, model = onnx_session(net.model(), 1), simulated_model(net.graph(), found)
    held = feeds[:: least_squares.HELD_BACK]
    truth = np.concatenate([exact.run(feed)[0] for feed in held])
    left = np.concatenate([simulate(model, feed)[0] for feed in held]) - truth
    share = left.var(axis=(0, 2, 3)).sum() / truth.var(axis=(0, 2, 3)).sum()
    assert share == pytest.approx(results[-1].after, rel=0.02)


@pytest.mark.parametrize("kind", ["detector", "recognizer"])
def test_what_ideal_rounding_would_leave_is_told(kind: str) -> None:
    """With FP32's weights on what the first layer reads, and with those that were solved for, before rounding."""
    make, planned = CASES[kind]
    net = make()
    plan = misread(coarse(planned(net)), 0.8)
    feeds = [net.feed(seed) for seed in range(8)]
    _, results = refitted(net, plan, feeds)
    assert all(r.exact and r.solved and r.solved < 2 * r.exact for r in results)
    name = results[0].aim
    exact = onnx_session(net.graph().ending_at([name]).to_model(), 1)
    quantizer = plan.activations[net.graph().producers()[name].input[0]]
    low, high = integer_limits(quantizer.dtype)
    held = [feed["x"] for feed in feeds[:: least_squares.HELD_BACK]]
    rounded = [np.clip(np.rint(x / quantizer.scale) + quantizer.zero_point, low, high) for x in held]
    read = [((x - quantizer.zero_point) * quantizer.scale).astype(np.float32) for x in rounded]
    truth, left = (np.concatenate([exact.run({"x": x})[0] for x in xs]) for xs in (held, read))
    share = (left - truth).var(axis=(0, 2, 3)).sum() / truth.var(axis=(0, 2, 3)).sum()
    assert share == pytest.approx(results[0].exact, rel=0.02)
