"""The plan: 8-bit arithmetic by its definition, what is kept on disk, and what counts as covered."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_models import TinyNet, run, small_detector, small_recognizer

from quant import calibration
from quant.calibration import collect_statistics, count_work, load_statistics, save_statistics
from quant.equalization import Equalizer
from quant.errors import InputError
from quant.manifest import products_saturate
from quant.observer import Histogram, MinMax
from quant.plan import (
    FULL_WEIGHTS,
    REDUCED_WEIGHTS,
    Operator,
    QuantPlan,
    corrected_graph,
    dequantize_weight,
    load_plan,
    quantizable_operators,
    quantize_weight,
    round_weight,
)
from quant.ptq import activation_tensors, make_plan

LARGEST = REDUCED_WEIGHTS if products_saturate() else FULL_WEIGHTS
"""Integer of a weight, for plans that are run on a target: whether 16 bits hold two products hangs on the processor."""


def plan_of(net: TinyNet, dtype: str = "uint8", **changes: Any) -> QuantPlan:
    """A complete plan of a tiny net by min-max calibration."""
    graph = net.graph()
    feeds = [net.feed(seed) for seed in range(3)]
    operators = quantizable_operators(graph, count_work(graph, feeds[0], 1).macs)
    statistics = collect_statistics(graph, activation_tensors(operators), feeds, 1)
    plan = make_plan(
        graph, operators, statistics, MinMax(), model="tiny", dtype=dtype, prepared_sha256="0" * 64, largest=LARGEST
    )
    for name, value in changes.items():
        setattr(plan, name, value)
    return plan


def operator(
    name: str, macs: int, quantized: bool = True, damage: float | None = None, parameters: int = 0
) -> Operator:
    return Operator(
        name=name,
        op_type="Conv",
        activations=[],
        weight=None,
        macs=macs,
        parameters=parameters,
        quantized=quantized,
        damage=damage,
    )


def plan_with(*operators: Operator) -> QuantPlan:
    return QuantPlan("tiny", "onnxruntime", "ptq", "0" * 64, list(operators), {}, {}, {}, {}, [])


# --- arithmetic ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3), st.floats(1e-6, 1e6))
def test_weights_are_rounded_by_the_definition(seed: int, axis: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((3, 4, 2, 5)) * size).astype(np.float32)
    stored = quantize_weight(weight, axis)
    assert stored.values.dtype == np.int8
    assert stored.scale.dtype == np.float32
    for channel in range(weight.shape[axis]):
        values = np.take(weight, channel, axis).astype(np.float64)
        scale = float(np.float32(np.abs(values).max() / 127))
        assert math.isclose(float(stored.scale[channel]), scale, rel_tol=1e-6)
        integers = np.take(stored.values, channel, axis).astype(int)
        assert np.abs(values / scale - integers).max() <= 0.5 + 1e-4
        assert np.abs(integers).max() == 127
    error = np.abs(dequantize_weight(stored, axis) - weight)
    shape = [1] * 4
    shape[axis] = -1
    assert np.all(error <= 0.501 * stored.scale.reshape(shape))


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = np.zeros((2, 3), np.float32)
    weight[1] = [1, -2, 0.5]
    stored = quantize_weight(weight, 0)
    assert np.all(stored.scale > 0)
    np.testing.assert_array_equal(dequantize_weight(stored, 0)[0], 0)
    np.testing.assert_array_equal(stored.values[1], [64, -127, 32])


def test_given_scales_clip_at_127() -> None:
    stored = round_weight(np.array([[-3.0, 3.0, 0.02]], np.float32), np.array([0.01], np.float32), 0)
    np.testing.assert_array_equal(stored.values, [[-127, 127, 2]])


# --- which operators -------------------------------------------------------------------------------


def test_operators_are_all_convolutions_and_products_in_order() -> None:
    graph = small_recognizer().graph()
    operators = quantizable_operators(graph, {})
    wanted = [node for node in graph.nodes if node.op_type in ("Conv", "MatMul")]
    assert [op.name for op in operators] == [node.output[0] for node in wanted]
    assert all(op.quantized and not op.reason for op in operators)
    products = [op for op in operators if op.weight is None]
    assert [len(op.activations) for op in products] == [2, 2]


def test_operators_without_a_channel_axis_stay_in_fp32_and_say_why() -> None:
    net = TinyNet((1, 4, 6, 6))
    grouped = net.conv_transpose("x", 4, 4, group=2)
    batched = net.op("MatMul", grouped, net.const(net.weights(4, 12, 3)))
    vector = net.op("MatMul", batched, net.const(net.weights(3)))
    net.op("MatMul", net.const(net.weights(12, 4)), net.op("Relu", vector))
    for op in quantizable_operators(net.graph(), {}):
        assert not op.quantized
        assert op.reason


def test_work_is_counted_by_the_definition() -> None:
    net = TinyNet((2, 4, 6, 6))
    y = net.conv("x", 4, 8, pad=0, group=2)
    up = net.conv_transpose(y, 8, 3)
    wide = net.matmul(up, 8, 5)
    square = net.op("MatMul", wide, net.op("Transpose", wide, perm=[0, 1, 3, 2]))
    vector = net.op("MatMul", square, net.const(net.weights(8)))
    macs = count_work(net.graph(vector), net.feed(), 1).macs
    assert macs == {
        y: 2 * 8 * 4 * 4 * (2 * 3 * 3),
        up: 2 * 8 * 4 * 4 * (3 * 2 * 2),
        wide: 2 * 3 * 8 * 5 * 8,
        square: 2 * 3 * 8 * 8 * 5,
        vector: 2 * 3 * 8 * 8,
    }


def test_coverage_is_the_share_of_work_in_int8() -> None:
    plan = plan_with(operator("a", 10), operator("b", 30, quantized=False), operator("c", 60))
    assert plan.coverage() == 0.7
    assert plan_with().coverage() == 0.0
    assert plan_with(operator("a", 0)).coverage() == 0.0


def test_with_only_keeps_reasons_and_leaves_the_plan_alone() -> None:
    plan = plan_with(operator("a", 1), operator("b", 1), operator("c", 1, quantized=False))
    plan.operators[2].reason = "no axis"
    less = plan.with_only({"a", "c"}, "it hurts")
    assert list(less.quantized()) == ["a"], "an operator that cannot be quantized does not come back"
    assert [op.reason for op in less.operators] == ["", "it hurts", "no axis"]
    assert list(plan.quantized()) == ["a", "b"]
    less.notes.append("changed")
    assert plan.notes == []


def test_used_parts_are_those_of_quantized_operators() -> None:
    plan = plan_of(small_detector())
    first = plan.operators[0]
    alone = plan.with_only({first.name}, "")
    assert list(alone.used_activations()) == ["x"]
    assert list(alone.used_weights()) == [first.weight]
    assert len(plan.used_activations()) == len(plan.used_weights()) == 4


# --- bias shifts -----------------------------------------------------------------------------------


def test_bias_shifts_are_added_only_while_the_operator_is_quantized() -> None:
    net = TinyNet((1, 2, 4, 4))
    with_bias = net.conv("x", 2, 3)
    without = net.conv(with_bias, 3, 3, bias=False)
    graph = net.graph(without, with_bias)
    plan = plan_with(operator(with_bias, 1), operator(without, 1))
    shift = np.array([1.0, -2.0, 0.5], np.float32)
    plan.bias_shifts = {with_bias: shift, without: shift}
    feed = net.feed()
    exact_last, exact_first = run(graph.to_model(), feed)

    only_last = corrected_graph(graph, plan.with_only({without}, ""))
    last, first = run(only_last.to_model(), feed)
    np.testing.assert_array_equal(first, exact_first)
    np.testing.assert_allclose(last, exact_last + shift.reshape(1, 3, 1, 1), atol=1e-5)

    _, first = run(corrected_graph(graph, plan).to_model(), feed)
    np.testing.assert_allclose(first, exact_first + shift.reshape(1, 3, 1, 1), atol=1e-5)
    np.testing.assert_array_equal(run(graph.to_model(), feed)[1], exact_first)


# --- on disk ---------------------------------------------------------------------------------------


def saved(plan: QuantPlan, folder: Path) -> dict[str, str]:
    plan.save(folder)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_round_trip(tmp_path: Path) -> None:
    plan = plan_of(small_detector(), method="ptq+revert", target="openvino", notes=["a note"])
    first = plan.operators[0]
    plan.bias_shifts = {first.name: np.arange(8, dtype=np.float32)}
    plan.operators = [op.model_copy(update={"damage": 0.25}) for op in plan.operators]
    plan.save(tmp_path)
    read = load_plan(tmp_path)
    assert read.document() == plan.document()
    assert (read.method, read.target, read.notes) == ("ptq+revert", "openvino", ["a note"])
    assert read.operators == plan.operators
    assert read.activations == plan.activations
    for name, weight in plan.integers.items():
        np.testing.assert_array_equal(read.integers[name].values, weight.values)
        np.testing.assert_array_equal(read.integers[name].scale, weight.scale)
    np.testing.assert_array_equal(read.bias_shifts[first.name], plan.bias_shifts[first.name])
    assert read.coverage() == plan.coverage() == 1.0


def test_only_what_is_used_is_stored(tmp_path: Path) -> None:
    plan = plan_of(small_detector())
    first = plan.operators[0].name
    plan.bias_shifts = {op.name: np.zeros(1, np.float32) for op in plan.operators}
    plan.with_only({first}, "test").save(tmp_path)
    read = load_plan(tmp_path)
    assert list(read.bias_shifts) == [first]
    assert len(read.integers) == len(read.activations) == 1
    assert len(read.operators) == 4


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    first = saved(plan_of(small_recognizer()), tmp_path / "one")
    assert first == saved(plan_of(small_recognizer()), tmp_path / "two")
    shuffled = plan_of(small_recognizer())
    shuffled.integers = dict(reversed(shuffled.integers.items()))
    shuffled.activations = dict(reversed(shuffled.activations.items()))
    assert first == saved(shuffled, tmp_path / "three")


def _delete(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _write(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


def _other_weights(folder: Path) -> None:
    plan = plan_of(small_detector())
    plan.with_only(set(), "").save(folder / "other")
    (folder / "other" / "plan.safetensors").replace(folder / "plan.safetensors")


def _later_schema(folder: Path) -> None:
    document = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**document, "schema": 2}))


@pytest.mark.parametrize(
    "spoil",
    [
        _delete("plan.json"),
        _delete("plan.safetensors"),
        _write("plan.json", b"{}"),
        _write("plan.json", b"\xff\xfe"),
        _write("plan.json", b"[1,"),
        _write("plan.safetensors", b"foreign"),
        _other_weights,
        _later_schema,
    ],
)
def test_missing_and_foreign_files_are_an_input_error(tmp_path: Path, spoil: Any) -> None:
    plan_of(small_detector()).save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError, match="no readable plan.*quant run"):
        load_plan(tmp_path)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("scale", np.nan, "holds NaN or infinity"),
        ("scale", np.inf, "holds NaN or infinity"),
        ("scale", 0.0, "is not above 0 everywhere"),
        ("bias_shift", np.nan, "holds NaN or infinity"),
        ("factor", -1.0, "is not above 0 everywhere"),
        ("centre", -np.inf, "holds NaN or infinity"),
    ],
)
def test_numbers_that_no_plan_has_are_an_input_error(tmp_path: Path, kind: str, value: float, said: str) -> None:
    plan = plan_of(small_detector())
    (first, *_) = plan.quantized()
    plan.bias_shifts = {first: np.zeros(4, np.float32)}
    plan.equalizers = {first: Equalizer(np.ones(3, np.float32), np.zeros(3, np.float32))}
    plan.save(tmp_path)
    load_plan(tmp_path)
    tensors = load_file(tmp_path / "plan.safetensors")
    name = next(name for name in tensors if name.endswith(f":{kind}"))
    tensors[name][-1] = value
    save_file(tensors, tmp_path / "plan.safetensors")
    with pytest.raises(InputError, match=rf"plan\.safetensors: damaged \({re.escape(name)} {said}\); .*`quant run`"):
        load_plan(tmp_path)


@pytest.mark.parametrize("change", [lambda t: t.astype(np.float32), lambda t: t[:-1]])
def test_weights_and_their_scales_belong_together(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    plan_of(small_detector()).save(tmp_path)
    tensors = load_file(tmp_path / "plan.safetensors")
    name = min(name for name in tensors if ":" not in name and tensors[name].ndim == 4)
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, tmp_path / "plan.safetensors")
    with pytest.raises(InputError, match=rf"{re.escape(name)} is not int8 with a scale for each place of axis"):
        load_plan(tmp_path)


# --- calibration -----------------------------------------------------------------------------------


def test_statistics_hold_what_the_tensors_held_and_survive_the_disk(tmp_path: Path) -> None:
    net = small_detector()
    graph = net.graph()
    feeds = [net.feed(seed, scale) for seed, scale in enumerate((1.0, 5.0, 0.1))]
    tensors = ["x", graph.nodes[0].output[0]]
    statistics = collect_statistics(graph, tensors, iter(feeds), 1, momentum=0.75)
    for name in tensors:
        pictures = [run(graph.to_model([name]), feed, name)[0].ravel() for feed in feeds]
        arrays = np.concatenate(pictures)
        assert (statistics[name].minimum, statistics[name].maximum) == (arrays.min(), arrays.max())
        assert statistics[name].counts.sum() == arrays.size
        low, high = (0.75 * (0.75 * a + 0.25 * b) + 0.25 * c for a, b, c in zip(*map(_extremes, pictures), strict=True))
        assert (statistics[name].average.low, statistics[name].average.high) == pytest.approx((low, high))
    save_statistics(statistics, tmp_path / "statistics.npz")
    read = load_statistics(tmp_path / "statistics.npz")
    assert read.keys() == statistics.keys()
    for name, histogram in statistics.items():
        np.testing.assert_array_equal(read[name].counts, histogram.counts)
        assert (read[name].limit, read[name].minimum, read[name].maximum) == (
            histogram.limit,
            histogram.minimum,
            histogram.maximum,
        )
        assert read[name].average == histogram.average


def test_of_many_pictures_each_is_counted_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "COUNTED", 100)
    net = small_detector()
    feeds = [net.feed(seed) for seed in range(3)]
    statistics = collect_statistics(net.graph(), ["x"], iter(feeds), 1, pictures=3)["x"]
    step = 3 * feeds[0]["x"].size // 100
    counted = [feed["x"].ravel()[number % step :: step] for number, feed in enumerate(feeds, start=1)]
    whole = Histogram()
    for feed, part in zip(feeds, counted, strict=True):
        whole.update(part, _extremes(feed["x"]))
    assert step > 1
    np.testing.assert_array_equal(statistics.counts, whole.counts)
    assert (statistics.minimum, statistics.maximum) == (whole.minimum, whole.maximum)


def _extremes(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def test_a_damaged_model_is_named_with_picture_and_tensor() -> None:
    net = TinyNet((1, 2))
    y = net.op("Log", "x")
    graph = net.graph()
    good, bad = np.ones((1, 2), np.float32), np.array([[1, -1]], np.float32)
    with pytest.raises(InputError, match=f"picture 2, tensor '{y}'"):
        collect_statistics(graph, [y], [{"x": good}, {"x": bad}], 1)


def test_calibration_without_pictures_says_so() -> None:
    net = small_detector()
    with pytest.raises(InputError, match="no readable picture"):
        collect_statistics(net.graph(), ["x"], iter([]), 1)
