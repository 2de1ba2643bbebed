"""QAT with the FP32 network as teacher: it starts as its plan, learns, stops on time, goes on after a kill."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from onnx import TensorProto
from test_flow import flowing_plan, mobile_block
from test_plan import plan_of
from test_reconstruction import coarse, error
from tiny_models import TinyNet, run, small_detector, small_recognizer

from quant.bias import corrected_operators, sequential_biases
from quant.distillation import Aim, Teacher, aims, loss
from quant.errors import InputError, NotTrainable
from quant.kernels import tensor
from quant.placement import place as placed
from quant.plan import QuantPlan
from quant.program import import_paddle
from quant.qat import Evaluation, _spread, _trainable, check_trainable, distil
from quant.recipe import Quantizers, Training
from quant.runtime import Feed, onnx_session
from quant.simulation import FloatWriter
from quant.student import KINDS, student_outputs, trace, whole_student
from quant.training import Averaged, Schedule, batches, shuffled

FEW = {"iterations": 40, "batch": 2, "warm_up": 4, "learning_rate": 5e-2, "evaluate_every": 10, "patience": 9}


@pytest.fixture(autouse=True)
def at_once() -> None:
    """Paddle computes when it is called; other tests of this process may have left it otherwise."""
    import_paddle().disable_static()


class Killed(Exception):
    """What a test stops a training with."""


def settings(**changes: Any) -> Training:
    return Training.model_validate({**FEW, **changes})


def feeds_of(net: TinyNet) -> list[Feed]:
    return [net.feed(seed) for seed in range(6)]


def judged(net: TinyNet) -> Callable[[QuantPlan], float]:
    return lambda plan: error(net, plan)


def taught(
    net: TinyNet, plan: QuantPlan, file: Path | None = None, **changes: Any
) -> tuple[QuantPlan, list[Evaluation]]:
    chosen = settings(**changes)
    return distil(net.graph(), plan, feeds_of(net), chosen, judged(net), seed=0, threads=1, checkpoint=file)


def same(one: QuantPlan, other: QuantPlan) -> bool:
    weights = all((one.integers[name].values == other.integers[name].values).all() for name in one.integers)
    shifts = all((one.bias_shifts[name] == other.bias_shifts[name]).all() for name in one.bias_shifts)
    return weights and shifts and one.document() == other.document()


@pytest.mark.parametrize("make", [small_detector, small_recognizer])
def test_it_ends_nearer_to_fp32_than_its_plan(make: Callable[[], TinyNet]) -> None:
    net = make()
    plan = coarse(plan_of(net))
    refined, curve = taught(net, plan)
    assert curve[0] == Evaluation(0, None, error(net, plan))
    assert error(net, refined) == pytest.approx(min(point.error for point in curve))
    assert error(net, refined) < 0.8 * error(net, plan)


@pytest.mark.parametrize(("make", "planned"), [(small_detector, plan_of), (mobile_block, flowing_plan)])
def test_biases_that_do_not_learn_are_corrected_for_the_weights_that_do(
    make: Callable[[], TinyNet], planned: Callable[[TinyNet], QuantPlan]
) -> None:
    net, looks = make(), list[QuantPlan]()
    plan = coarse(planned(net))

    def evaluate(seen: QuantPlan) -> float:
        looks.append(seen)
        return error(net, seen)

    found, curve = distil(net.graph(), plan, feeds_of(net), settings(), evaluate, seed=0, threads=1, bias_pictures=6)
    assert min(point.error for point in curve) < curve[0].error and looks[0] is plan
    for seen in (found, *looks[1:]):
        for name, shift in sequential_biases(net.graph(), seen, feeds_of(net), 1).items():
            np.testing.assert_array_equal(seen.bias_shifts[name], shift)


def cut_detector() -> tuple[TinyNet, list[str]]:
    """Three convolutions, of which an operator without counterpart cuts off the last, and their names."""
    net = TinyNet((1, 3, 8, 8), free=(0, 2, 3))
    first = net.conv("x", 3, 6)
    second = net.conv(net.op("Relu", first), 6, 6)
    border = net.op("Clip", second, "", net.const(np.float32(3)), name="border")  # an input is left out
    last = net.conv(net.op("Sin", border, name="strange"), 6, 2)
    return net, [first, second, last]


def test_what_comes_before_an_operator_without_counterpart_is_trained_and_the_rest_keeps_its_plan() -> None:
    net, (first, second, last) = cut_detector()
    plan = coarse(plan_of(net), 0.05)
    macs = {op.name: op.macs for op in plan.operators}
    said = check_trainable(net.graph(), plan, settings(), net.feed())
    share = 1 - macs[last] / sum(macs.values())
    assert said == (
        f"{share:.0%} of the multiply-accumulates in INT8 are trained; "
        "operator 'strange' is a Sin, which cannot be trained here"
    )
    refined, curve = taught(net, plan)
    assert error(net, refined) == pytest.approx(min(point.error for point in curve))
    assert error(net, refined) < 0.9 * error(net, plan)
    weights = {op.name: str(op.weight) for op in plan.operators}
    moved = {
        name: bool((plan.integers[weight].values != refined.integers[weight].values).any())
        for name, weight in weights.items()
    }
    assert moved == {first: True, second: True, last: False} and refined.notes[-1] == f"QAT: {said}"


def test_before_the_first_step_the_cut_student_is_the_simulation() -> None:
    net, _ = cut_detector()
    graph, plan = net.graph(), coarse(plan_of(net), 0.05)
    trainable = _trainable(graph, plan, settings(), net.feed())
    assert [aim.tensor for aim in trainable.sought] == ["border"]
    assert {name for _, name in trainable.student.parameters} == {str(op.weight) for op in plan.operators[:2]}
    model = placed(graph, plan, FloatWriter()).to_model(["border"])
    simulated = onnx_session(model, 1, integers=False).run(net.feed(), ["border"])[0]
    found = trainable.student.run(net.feed(), ["border"])["border"]
    np.testing.assert_allclose(np.asarray(found), simulated, rtol=1e-4, atol=1e-5)


def test_training_ends_where_values_turn_into_integers() -> None:
    net = TinyNet((1, 3, 8, 8), free=(0, 2, 3))
    before = net.op("Relu", net.conv("x", 3, 6))
    places = net.op("TopK", before, net.const(np.array([2])), outputs=2)
    whole = net.op("Cast", net.op("Cast", before, to=TensorProto.INT64), to=TensorProto.FLOAT)
    net.conv(net.op("Concat", places, net.op("Sin", whole), axis=-1), 6, 2)
    trainable = _trainable(net.graph(), plan_of(net), settings(), net.feed())
    assert [aim.tensor for aim in trainable.sought] == [before]
    assert "is a TopK, which cannot be trained here" in trainable.left_out


def test_a_node_behind_what_can_be_trained_is_refused() -> None:
    net, (*_, last) = cut_detector()
    with pytest.raises(NotTrainable, match=rf"qat.nodes: '{last}' comes behind what can be trained; .*'strange'"):
        check_trainable(net.graph(), plan_of(net), settings(nodes=[last]), net.feed())


def test_a_student_writes_the_means_that_it_is_given() -> None:
    net = mobile_block()
    graph, plan = net.graph(), coarse(flowing_plan(net), 0.05)
    convs = corrected_operators(plan)
    student = whole_student(graph, plan, ["weights"])
    answer, means = Teacher(graph, aims(graph), 1, convs).answer(net.feed())
    exact = dict(zip(convs, run(graph.to_model(convs), net.feed(), *convs), strict=True))
    found = student.run(net.feed(), convs, means)
    assert student.traced.factors, "some of them write other than natural values"
    for name in convs:
        np.testing.assert_allclose(means[name], exact[name].mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-6)
        factor = student.traced.factors.get(name, np.ones(1))
        written = np.asarray(found[name]).mean(axis=(0, 2, 3))
        np.testing.assert_allclose(written, means[name] * factor, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(answer[0], run(net.model(), net.feed())[0], rtol=1e-5, atol=1e-6)


def test_what_goes_to_and_fro_cancels_in_the_average() -> None:
    averaged = Averaged({"w": np.zeros(1)}, 0.9)
    for step in range(200):
        averaged.update({"w": np.array([1.0 + (-1) ** step])})
    assert averaged.state["w"][0] == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize(("every", "expected"), [(0, []), (1, ["first", "deep", "last"]), (2, ["deep"])])
def test_inner_tensors_are_spread_over_the_network(every: int, expected: list[str]) -> None:
    net = mobile_block()
    names = [op.name for op in plan_of(net).operators]
    student = whole_student(net.graph(), plan_of(net), ["weights"])
    assert names == ["first", "deep", "last"] and _spread(student, settings(every=every)) == expected
    flowing = whole_student(net.graph(), flowing_plan(net), ["weights"])
    assert not set(_spread(flowing, settings(every=1))) & set(flowing.traced.factors)


def test_inner_tensors_count_as_much_as_an_output_together() -> None:
    graph = small_detector().graph()
    assert [aim.weight for aim in aims(graph, ["t1", "t2"], nodes_weight=0.5)] == [1.0, 0.25, 0.25]


def test_a_plan_that_cannot_be_bettered_is_kept() -> None:
    net = small_detector()
    plan = plan_of(net)
    looks = iter([0.1, 0.2, 0.3, 0.4])
    refined, curve = distil(
        net.graph(), plan, feeds_of(net), settings(patience=2), lambda _: next(looks), seed=0, threads=1
    )
    assert refined is plan
    assert [point.iteration for point in curve] == [0, 10, 20], "two looks without a better one are enough"


def test_the_same_seed_gives_the_same_plan() -> None:
    """Whatever else is drawn by chance in the process."""
    net = mobile_block()
    plan = coarse(flowing_plan(net))
    once = taught(net, plan)[0]
    np.random.seed(7)
    import_paddle().seed(7)
    assert same(taught(net, plan)[0], once)
    other = distil(net.graph(), plan, feeds_of(net), settings(), judged(net), seed=5, threads=1)[0]
    assert not same(once, other)


@pytest.mark.parametrize("quantizers", ["lsq", "moving_average"])
def test_a_killed_training_goes_on_from_its_checkpoint(quantizers: Quantizers, tmp_path: Path) -> None:
    net = small_detector()
    plan, file = coarse(plan_of(net)), tmp_path / "last"
    changes = {"quantizers": quantizers, "learned": [*KINDS]}
    done = 0

    def kill() -> None:
        nonlocal done
        done += 1
        if done == 25:
            raise Killed

    with pytest.raises(Killed):
        distil(net.graph(), plan, feeds_of(net), settings(**changes), judged(net), seed=0, threads=1, checkpoint=file,
               advance=kill)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    resumed, curve = taught(net, plan, file, **changes)
    whole, expected = taught(net, plan, **changes)
    assert [point.iteration for point in curve] == [0, 10, 20, 30, 40]
    assert curve == expected, "the same steps, as if nothing had happened"
    assert same(resumed, whole)


def test_a_training_that_had_stopped_does_not_go_on(tmp_path: Path) -> None:
    """Killed between its last checkpoint and the end of its stage."""
    net = small_detector()
    plan, file = plan_of(net), tmp_path / "last"
    steps = 0

    def advance() -> None:
        nonlocal steps
        steps += 1

    def again() -> list[Evaluation]:
        looks = itertools.count(0.1, 0.1)
        return distil(net.graph(), plan, feeds_of(net), settings(patience=2), lambda _: next(looks), seed=0, threads=1,
                      checkpoint=file, advance=advance)[1]  # fmt: skip

    curve = again()
    assert [point.iteration for point in curve] == [0, 10, 20] and steps == 20
    assert again() == curve and steps == 20


def test_a_damaged_checkpoint_is_left_aside(tmp_path: Path) -> None:
    net = small_detector()
    plan, file = coarse(plan_of(net)), tmp_path / "last"
    file.write_bytes(b"cut off")
    assert same(taught(net, plan, file)[0], taught(net, plan)[0])


# --- what is known to go wrong ----------------------------------------------------------------------


def test_a_loss_does_not_hang_on_batch_and_size() -> None:
    """Pictures twice as many, or twice as wide, are no reason for steps twice as large."""
    net = small_detector()
    graph, student = net.graph(), whole_student(net.graph(), coarse(plan_of(net), 0.05), KINDS)
    sought = aims(graph)
    teacher, once = Teacher(graph, sought, 1), net.feed()

    def found(feed: Feed) -> float:
        return float(loss(sought, student.run(feed, [aim.tensor for aim in sought]), teacher.answer(feed)[0]))

    twice = {"x": np.concatenate([once["x"], once["x"]])}
    assert found(twice) == pytest.approx(found(once), rel=1e-3)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "plain"])
@pytest.mark.parametrize("axis", [0, 2, 3])
def test_a_loss_and_its_gradient_are_means_over_places(kind: Any, axis: int) -> None:
    rng = np.random.default_rng(0)
    mine, exact = (rng.standard_normal((2, 5, 3, 4)).astype(np.float32) for _ in range(2))

    def found(times: int) -> tuple[float, float]:
        given = tensor(np.concatenate([mine] * times, axis))
        given.stop_gradient = False
        value = loss([Aim("t", kind, axis=1)], {"t": given}, [np.concatenate([exact] * times, axis)])
        value.backward()
        return float(value), float(np.abs(given.grad.numpy()).sum())

    assert found(3) == pytest.approx(found(1), rel=1e-4)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "plain"])
def test_a_loss_is_nothing_where_student_and_teacher_agree(kind: Any) -> None:
    values = 3 * np.random.default_rng(0).standard_normal((2, 5, 7)).astype(np.float32)
    aim = [Aim("t", kind)]
    assert float(loss(aim, {"t": tensor(values)}, [values])) == pytest.approx(0, abs=1e-5)
    assert float(loss(aim, {"t": tensor(values + values**2)}, [values])) > 0.05


def test_aims_are_found_before_softmax_and_sigmoid() -> None:
    detector, recognizer = small_detector(), small_recognizer()
    (one,), (other,) = aims(detector.graph()), aims(recognizer.graph())
    assert (one.kind, other.kind, other.axis) == ("sigmoid", "softmax", -1)
    assert detector.nodes[-1].input[0] == one.tensor and recognizer.nodes[-1].input[0] == other.tensor
    assert aims(detector.graph(), ["t1"])[1] == Aim("t1", "plain")
    with pytest.raises(InputError, match=r"qat.nodes: 'nowhere'"):
        aims(detector.graph(), ["nowhere"])


def test_outputs_are_compared_as_the_recipe_says() -> None:
    graph = small_recognizer().graph()
    (soft,), (before,) = aims(graph), aims(graph, outputs="logits")
    assert (before.kind, before.tensor) == ("plain", soft.tensor)
    assert aims(graph, outputs="probabilities") == [Aim("characters", "plain")]
    headless = TinyNet((1, 3, 4, 4))
    headless.conv("x", 3, 2)
    assert aims(headless.graph(), outputs="logits") == aims(headless.graph(), outputs="probabilities")


def test_an_inner_tensor_counts_by_its_weight() -> None:
    rng = np.random.default_rng(0)
    mine, exact = (rng.standard_normal((1, 3, 2, 2)).astype(np.float32) for _ in range(2))
    (alone,) = aims(small_detector().graph(), ["t1"])[1:]
    (doubled,) = aims(small_detector().graph(), ["t1"], nodes_weight=2)[1:]
    values = [float(loss([aim], {"t1": tensor(mine)}, [exact])) for aim in (alone, doubled)]
    expected = np.square(mine - exact).mean() / exact.var()
    assert values == pytest.approx([expected, 2 * expected], rel=1e-5)


def test_names_of_the_model_stay_whatever_is_quantized() -> None:
    """Nodes that a recipe names are found in students of every placement."""
    net = mobile_block()
    names = {name for node in net.graph().nodes for name in node.output}
    for plan in (plan_of(net), flowing_plan(net), flowing_plan(net).with_only({"deep"}, "some")):
        kept = {name for node in trace(net.graph(), plan).nodes for name in node.output}
        assert {"first", "deep", "last"} <= kept & names


def test_a_place_from_the_end_is_the_same_tensor_whatever_it_is_called() -> None:
    """Other settings of an export give other names."""
    graph, renamed = small_detector().graph(), small_detector().graph()
    for node in renamed.nodes:
        node.input[:] = [f"p2o.{name}" if name.startswith("t") else name for name in node.input]
        node.output[:] = [f"p2o.{name}" if name.startswith("t") else name for name in node.output]
    for place, name in ((-3, "t1"), (-2, "t3"), (-1, "t4")):
        assert aims(graph, [place])[1:] == [Aim(name, "plain")]
        assert aims(renamed, [place])[1:] == [Aim(f"p2o.{name}", "plain")]
    with pytest.raises(InputError, match=r"qat.nodes: -5 is before the first of 4 operators"):
        aims(graph, [-5])
    with pytest.raises(InputError, match=r"qat.nodes: 'x' is no tensor"):
        aims(graph, [-4])


def test_a_node_inside_of_integer_flow_is_refused() -> None:
    """What stands there is scaled, or not computed at all."""
    net = mobile_block()
    plan = flowing_plan(net)
    for name in ("first", "t1"):
        with pytest.raises(InputError, match=f"'{name}' flows in integers"):
            taught(net, plan, nodes=[name])


def test_looking_at_pictures_moves_nothing() -> None:
    """There are no observers: whatever is evaluated, ranges and weights stay."""
    net = small_detector()
    plan = plan_of(net)
    student = whole_student(net.graph(), plan, KINDS)
    before, exact = student.state(), student_outputs(student, net.feed())[0]
    student_outputs(student, net.feed(9, scale=1e4))
    assert all((before[name] == value).all() for name, value in student.state().items())
    np.testing.assert_array_equal(student_outputs(student, net.feed())[0], exact)


@pytest.mark.parametrize("quantizers", get_args(Quantizers))
def test_an_outlier_does_not_blank_a_range(quantizers: Quantizers) -> None:
    net = small_detector()
    plan = plan_of(net)
    feeds = [*feeds_of(net), net.feed(9, scale=1e4)]
    always_better = itertools.count(0, -1)
    chosen = settings(learned=["ranges"], quantizers=quantizers, batch=1)
    refined, _ = distil(net.graph(), plan, feeds, chosen, lambda _: next(always_better), seed=0, threads=1)
    assert refined is not plan
    for name, quantizer in refined.activations.items():
        assert 0.7 < quantizer.scale / plan.activations[name].scale < 1.4
        assert quantizer.zero_point == plan.activations[name].zero_point


# --- steps ------------------------------------------------------------------------------------------


def test_the_rate_warms_up_and_falls() -> None:
    rates = [Schedule(1.0, 4, 20).at(step) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.05 <= rates[-1] < 0.1


def test_batches_hold_pictures_of_one_size() -> None:
    sizes = [(1, 3, 8, 8), (1, 3, 8, 16), (1, 3, 8, 8), (1, 3, 8, 8)]
    graph = small_detector().graph()
    found = batches(graph, [{"x": np.zeros(size, dtype=np.float32)} for size in sizes], 2)
    assert [feed["x"].shape for feed in found] == [(2, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 16)]
    pair = {"x": np.zeros((1, 3, 8, 8)), "scale": np.zeros((1, 2))}
    assert len(batches(graph, [pair, pair], 2)) == 2, "what belongs to one picture stays with it"
    one = {"x": np.zeros((1, 4, 12, 16), dtype=np.float32)}
    assert len(batches(mobile_block().graph(), [one, one], 2)) == 2, "a model of one picture at a time"


def test_every_batch_is_taken_before_one_comes_again() -> None:
    order = list(shuffled(5, 12, seed=3))
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert order[:5] != order[5:10]
    assert order == list(shuffled(5, 12, seed=3)) != list(shuffled(5, 12, seed=4))


def test_the_teacher_answers_like_the_model() -> None:
    net = small_recognizer()
    (answer,), _ = Teacher(net.graph(), [Aim("characters", "plain")], 1).answer(net.feed())
    np.testing.assert_allclose(answer, run(net.model(), net.feed())[0], atol=1e-6)
