"""Folding: the outputs stay what they were, whatever the chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import TinyNet, kinds, run

from quant.fold import fold
from quant.graph import Graph
from quant.runtime import Feed

AFFINE = ("Mul", "Add", "Sub", "Div")


def written(graph: Graph) -> set[str]:
    return {name for node in graph.nodes for name in node.output if name}


def assert_equal_values(before: Graph, after: Graph, feed: Feed) -> None:
    """Outputs, and every tensor whose name is in both graphs, hold the same values."""
    assert after.outputs == before.outputs
    names = [*before.outputs, *sorted((written(before) & written(after)) - set(before.outputs))]
    for name, one, other in zip(
        names, run(before.to_model(names), feed, *names), run(after.to_model(names), feed, *names), strict=True
    ):
        assert one.shape == other.shape, name
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=3e-5 * max(1.0, float(np.abs(one).max())), err_msg=name)


def folded(net: TinyNet, *outputs: str) -> Graph:
    """Fold a net; check values, and that folding twice changes nothing."""
    before = net.graph(*outputs)
    after = before.copy()
    fold(after)
    assert_equal_values(before, after, net.feed())
    again = after.copy()
    assert not any(fold(again).values())
    assert [n.SerializeToString() for n in again.nodes] == [n.SerializeToString() for n in after.nodes]
    return after


# --- what has to be folded -------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_and_affines_after_a_convolution_vanish(pad: int, group: int, bias: bool) -> None:
    net = TinyNet((2, 4, 6, 6))
    y = net.batch_norm(net.conv("x", 4, 8, pad=pad, group=group, bias=bias), 8)
    y = net.op("Mul", y, net.const([1.7]))
    y = net.op("Add", net.const(net.weights(1, 8, 1, 1)), y)
    y = net.op("Sub", y, net.const(0.25))
    net.op("Div", y, net.const(net.rng.uniform(0.5, 2, (8, 1, 1)).astype(np.float32)))
    assert kinds(folded(net)) == ["Conv"]


def test_batch_norm_after_a_transposed_convolution_vanishes() -> None:
    net = TinyNet((1, 4, 3, 3))
    net.op("Relu", net.batch_norm(net.conv_transpose("x", 4, 6), 6))
    assert kinds(folded(net)) == ["ConvTranspose", "Relu"]


def test_hard_swish_stays_whole_and_takes_the_affine_behind_it_into_the_next_convolution() -> None:
    net = TinyNet((1, 4, 6, 6))
    y = net.op("HardSwish", net.conv("x", 4, 4))
    y = net.op("Add", net.op("Mul", y, net.const([0.6])), net.const([0.3]))
    net.conv(y, 4, 5, kernel=1, pad=0)
    assert kinds(folded(net)) == ["Conv", "HardSwish", "Conv"]


def test_a_shift_before_padding_stays_and_only_its_factor_moves() -> None:
    net = TinyNet((1, 4, 6, 6))
    y = net.op("Add", net.op("Mul", "x", net.const([0.6])), net.const([0.3]))
    net.conv(y, 4, 4, pad=1)
    assert kinds(folded(net)) == ["Add", "Conv"]


@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_shift_before_a_grouped_convolution_without_padding(group: int) -> None:
    net = TinyNet((1, 4, 6, 6))
    y = net.op("Add", "x", net.const(net.weights(1, 4, 1, 1)))
    net.conv(y, 4, 8, pad=0, group=group)
    assert kinds(folded(net)) == ["Conv"]


def test_a_factor_moves_into_all_readers_or_into_none() -> None:
    net = TinyNet((1, 4, 6, 6))
    y = net.op("Mul", "x", net.const([3.0]))
    net.op("Concat", net.conv(y, 4, 4), net.conv(y, 4, 2, group=2), axis=1)
    assert kinds(folded(net)) == ["Conv", "Conv", "Concat"]

    net = TinyNet((1, 4, 6, 6))
    y = net.op("Mul", "x", net.const([3.0]))
    net.op("Add", net.conv(y, 4, 4), net.op("Relu", y))
    assert "Mul" in kinds(folded(net))


def test_a_factor_after_and_before_a_matmul_moves_into_it() -> None:
    net = TinyNet((2, 5, 4))
    y = net.op("Mul", net.matmul("x", 4, 6), net.const([0.5]))
    net.op("Softmax", net.matmul(net.op("Mul", net.op("Relu", y), net.const(2.0)), 6, 3), axis=-1)
    assert kinds(folded(net)) == ["MatMul", "Relu", "MatMul", "Softmax"]


def test_shared_weights_are_not_changed_for_the_other_reader() -> None:
    net = TinyNet((1, 4, 6, 6))
    weight = net.const(net.weights(4, 4, 3, 3))
    first = net.op("Conv", "x", weight, pads=[1] * 4)
    second = net.op("Conv", net.op("Relu", net.batch_norm(first, 4)), weight, pads=[1] * 4)
    net.op("Relu", second)
    assert kinds(folded(net)) == ["Conv", "Relu", "Conv", "Relu"]


def test_identity_and_dropout_vanish() -> None:
    """The last one, too: its name goes to what is before it, and to whoever else reads that."""
    net = TinyNet((1, 4, 6, 6))
    y = net.op("Dropout", net.op("Identity", net.conv("x", 4, 4)))
    z = net.op("Relu", y)
    net.op("Identity", z, name="out")
    after = folded(net, net.op("Sigmoid", z), "out")
    assert kinds(after) == ["Conv", "Relu", "Sigmoid"]
    assert after.nodes[1].output[0] == after.nodes[2].input[0] == "out"


@pytest.mark.parametrize("source", ["input", "output"])
def test_an_identity_stays_where_both_of_its_names_are_needed(source: str) -> None:
    net = TinyNet((1, 4, 6, 6))
    before = "x" if source == "input" else net.op("Relu", "x")
    net.op("Identity", before, name="out")
    assert kinds(folded(net, *([before] if source == "output" else []), "out")).count("Identity") == 1


def test_a_reshape_to_the_shape_at_hand_vanishes() -> None:
    net = TinyNet((1, 4, 6, 6), free=(0, 2))
    before = net.op("Relu", "x")
    halved = net.op("Mul", before, net.const(0.5))
    y = net.op("Reshape", halved, net.op("Shape", before))
    wide = net.op("Add", net.op("Relu", y), net.const(np.ones((1, 4, 6, 6))))
    assert kinds(folded(net, net.op("Reshape", wide, net.op("Shape", y)))) == [
        "Relu",
        "Mul",
        "Relu",
        "Add",
        "Shape",
        "Reshape",
    ]


# --- what must not be folded wrongly ---------------------------------------------------------------


def _output_in_the_middle(net: TinyNet) -> tuple[str, ...]:
    middle = net.conv("x", 4, 4)
    return net.op("Mul", middle, net.const([2.0])), middle


def _affine_is_an_output_and_read_on(net: TinyNet) -> tuple[str, ...]:
    y = net.op("Mul", net.op("Relu", "x"), net.const([2.0]))
    return net.conv(y, 4, 4), y


def _square(net: TinyNet) -> tuple[str, ...]:
    y = net.op("Mul", "x", net.const([2.0]))
    return (net.conv(net.op("Mul", y, y), 4, 4),)


def _two_constants(net: TinyNet) -> tuple[str, ...]:
    factor = net.op("Mul", net.const([2.0]), net.const(net.weights(1, 4, 1, 1)))
    return (net.conv(net.op("Mul", net.conv("x", 4, 4), factor), 4, 4),)


def _constant_first(net: TinyNet) -> tuple[str, ...]:
    y = net.op("Sub", net.const([1.0]), net.conv("x", 4, 4))
    return (net.conv(net.op("Div", net.const([1.0]), net.op("Exp", y)), 4, 4),)


def _data_as_weight(net: TinyNet) -> tuple[str, ...]:
    y = net.op("Mul", net.op("Slice", "x", net.const(np.array([0])), net.const(np.array([4])), net.const(np.array([2]))),
               net.const([2.0]))  # fmt: skip
    return (net.op("Add", net.op("Conv", "x", y), net.op("Conv", y, y)),)


def _rows_vector_after_matmul(net: TinyNet) -> tuple[str, ...]:
    return (net.op("Mul", net.matmul("x", 4, 4), net.const(net.weights(1, 4, 1, 1))),)


def _wrong_sized_rows_vector_after_matmul(net: TinyNet) -> tuple[str, ...]:
    return (net.op("Mul", net.matmul("x", 4, 3), net.const(net.weights(1, 4, 1, 1))),)


def _columns_vector_after_matmul(net: TinyNet) -> tuple[str, ...]:
    return (net.op("Mul", net.matmul("x", 4, 4), net.const(net.weights(4))),)


def _columns_vector_after_conv(net: TinyNet) -> tuple[str, ...]:
    return (net.op("Mul", net.conv("x", 4, 4), net.const(net.weights(4))),)


def _rows_vector_before_matmul(net: TinyNet) -> tuple[str, ...]:
    return (net.matmul(net.op("Mul", "x", net.const(net.weights(1, 4, 1, 1))), 4, 5),)


def _shift_before_matmul(net: TinyNet) -> tuple[str, ...]:
    return (net.matmul(net.op("Add", "x", net.const([0.5])), 4, 5),)


def _matmul_by_a_vector(net: TinyNet) -> tuple[str, ...]:
    return (net.op("Mul", net.op("MatMul", "x", net.const(net.weights(4))), net.const([2.0])),)


def _matmul_by_a_batch(net: TinyNet) -> tuple[str, ...]:
    return (net.op("Mul", net.op("MatMul", "x", net.const(net.weights(4, 4, 5))), net.const(net.weights(4, 1, 1))),)


def _constant_on_the_left_of_matmul(net: TinyNet) -> tuple[str, ...]:
    return (net.op("Mul", net.op("MatMul", net.const(net.weights(3, 4)), "x"), net.const([2.0])),)


def _channel_broadcast_of_one_channel(net: TinyNet) -> tuple[str, ...]:
    return (net.op("Mul", net.conv("x", 4, 1), net.const(net.weights(1, 6, 1, 1))),)


def _broadcast_shift_before_conv(net: TinyNet) -> tuple[str, ...]:
    y = net.op("Relu", net.conv("x", 4, 1))
    return (net.conv(net.op("Add", y, net.const(net.weights(1, 6, 1, 1))), 6, 4, pad=0),)


def _grouped_transposed_convolution(net: TinyNet) -> tuple[str, ...]:
    return (net.batch_norm(net.conv_transpose("x", 4, 6, group=2), 6),)


def _factor_of_zero(net: TinyNet) -> tuple[str, ...]:
    y = net.op("Add", net.op("Mul", "x", net.const([0.0])), net.const([0.5]))
    return (net.conv(y, 4, 4),)


def _constant_of_higher_rank(net: TinyNet) -> tuple[str, ...]:
    y = net.op("Mul", net.conv("x", 4, 4), net.const(np.full((1, 1, 1, 1, 1), 2, np.float32)))
    return (net.op("Relu", y),)


def _same_padding(net: TinyNet) -> tuple[str, ...]:
    y = net.op("Add", "x", net.const([0.5]))
    return (net.op("Conv", y, net.const(net.weights(4, 4, 3, 3)), auto_pad="SAME_UPPER"),)


def _dropout_with_mask(net: TinyNet) -> tuple[str, ...]:
    y = net.op("Dropout", "x", outputs=2)
    mask = net.op("Cast", net.nodes[-1].output[1], to=1)
    return (net.op("Add", net.conv(y, 4, 4), mask),)


CASES: list[Callable[[TinyNet], tuple[str, ...]]] = [
    _output_in_the_middle,
    _affine_is_an_output_and_read_on,
    _square,
    _two_constants,
    _constant_first,
    _data_as_weight,
    _rows_vector_after_matmul,
    _wrong_sized_rows_vector_after_matmul,
    _columns_vector_after_matmul,
    _columns_vector_after_conv,
    _rows_vector_before_matmul,
    _shift_before_matmul,
    _matmul_by_a_vector,
    _matmul_by_a_batch,
    _constant_on_the_left_of_matmul,
    _channel_broadcast_of_one_channel,
    _broadcast_shift_before_conv,
    _grouped_transposed_convolution,
    _factor_of_zero,
    _constant_of_higher_rank,
    _same_padding,
    _dropout_with_mask,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.strip("_"))
def test_traps(case: Callable[[TinyNet], tuple[str, ...]]) -> None:
    net = TinyNet((2, 4, 4, 4))
    folded(net, *case(net))


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (1, 4, 4)])
@pytest.mark.parametrize("constant", [(4, 1, 1), (1, 4, 1, 1), (1, 1, 1, 1), (1,), ()])
def test_affines_around_a_matmul_of_lower_rank(shape: tuple[int, ...], constant: tuple[int, ...]) -> None:
    net = TinyNet(shape)
    y = net.op("Mul", "x", net.const(net.weights(*constant)))
    y = net.op("Mul", net.matmul(y, 4, 4), net.const(net.weights(*constant)))
    net.op("Sub", net.op("Add", y, net.const(net.weights(*constant))), net.const(net.weights(*constant)))
    folded(net)


@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 5)])
def test_batch_norm_of_lower_rank(shape: tuple[int, ...]) -> None:
    net = TinyNet(shape)
    net.op("Relu", net.batch_norm(net.op("Mul", "x", net.const([2.0])), 6))
    folded(net)


def test_batch_norm_after_a_convolution_over_one_axis() -> None:
    net = TinyNet((1, 4, 7))
    y = net.op("Conv", "x", net.const(net.weights(4, 4, 3)), pads=[1, 1])
    y = net.op("Mul", net.batch_norm(y, 4), net.const(net.weights(4, 1, 1)))
    net.op("Relu", net.op("Conv", net.op("Add", y, net.const([0.5])), net.const(net.weights(2, 4, 3))))
    folded(net)


# --- faster forms ----------------------------------------------------------------------------------


def transposed(
    net: TinyNet, size: int, channels: int = 4, out: int = 1, *, data: str = "x", bias: bool = True, **changed: Any
) -> str:
    """A ConvTranspose with kernel = stride, unless attributes are changed."""
    group = changed.get("group", 1)
    inputs = [data, net.const(net.weights(channels, out // group, size, size))]
    if bias:
        inputs.append(net.const(net.weights(out)))
    attributes = {"strides": [size, size], "kernel_shape": [size, size], "pads": [0] * 4, **changed}
    return net.op("ConvTranspose", *inputs, **attributes)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*(st.integers(1, 6) for _ in range(4))),
    st.integers(2, 4),
    st.booleans(),
    st.sampled_from(["", "Sigmoid", "Relu"]),
    st.integers(0, 1000),
)
def test_a_transposed_convolution_to_one_channel_becomes_a_pointwise_one(
    shape: tuple[int, ...], size: int, bias: bool, activation: str, seed: int
) -> None:
    net = TinyNet(shape, seed, free=(0, 2, 3))
    y = transposed(net, size, shape[1], bias=bias)
    if activation:
        y = net.op(activation, y)
    net.op("Tanh", y, name="out")
    after = folded(net)
    assert kinds(after) == ["Conv", *([activation] if activation else []), "DepthToSpace", "Tanh"]
    assert after.constants[after.nodes[0].input[1]].shape == (size * size, shape[1], 1, 1)
    found, expected = (run(graph.to_model(), net.feed(seed))[0] for graph in (after, net.graph()))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_stands_around_a_transposed_convolution_to_one_channel_is_folded_into_it() -> None:
    net = TinyNet((1, 4, 3, 3))
    net.op("Add", "x", net.const(net.weights(1, 4, 1, 1)), name="shifted")
    weight = net.const(net.weights(4, 1, 2, 2))
    y = net.op("ConvTranspose", "shifted", weight, strides=[2, 2])
    net.op("Sigmoid", net.op("Mul", net.batch_norm(y, 1), net.const([0.7])), name="map")
    assert kinds(folded(net)) == ["Conv", "Sigmoid", "DepthToSpace"]


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*(st.integers(1, 5) for _ in range(4))),
    st.tuples(st.integers(2, 3), st.integers(2, 3), st.integers(2, 5)),
    st.tuples(st.booleans(), st.booleans()),
    st.sampled_from(["", "Sigmoid", "Relu"]),
    st.integers(0, 1000),
)
def test_two_upsamplings_become_one_behind_convolutions_of_the_small_map(
    shape: tuple[int, ...],
    sizes: tuple[int, int, int],
    biases: tuple[bool, bool],
    activation: str,
    seed: int,
) -> None:
    net = TinyNet(shape, seed, free=(0, 2, 3))
    first, second, middle = sizes
    y = transposed(net, first, shape[1], middle, bias=biases[0])
    if activation:
        y = net.op(activation, y)
    y = transposed(net, second, middle, data=y, bias=biases[1])
    net.op("Tanh", net.op("Sigmoid", y), name="out")
    after = folded(net)
    between = [activation] if activation else []
    assert kinds(after) == ["Conv", *between, "Conv", "Sigmoid", "DepthToSpace", "Tanh"]
    found, expected = (run(graph.to_model(), net.feed(seed))[0] for graph in (after, net.graph()))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_two_upsamplings_stay_where_something_else_reads_what_stands_between_or_the_first_is_another_kind() -> None:
    net = TinyNet((1, 4, 3, 3))
    y = transposed(net, 2, out=3)
    net.op("Tanh", transposed(net, 2, 3, data=y), name="out")
    kept = ["ConvTranspose", "Conv", "DepthToSpace"]
    assert kinds(folded(net, "out", y)) == [*kept, "Tanh"]

    net = TinyNet((1, 4, 3, 3))
    wide = net.op("Conv", transposed(net, 2, out=3), net.const(net.weights(3, 3, 3, 3)), pads=[1, 1, 1, 1])
    transposed(net, 2, 3, data=wide)
    assert kinds(folded(net)) == ["ConvTranspose", "Conv", "Conv", "DepthToSpace"]

    net = TinyNet((1, 4, 3, 3))
    y = transposed(net, 2, out=3, pads=[1, 1, 1, 1])
    transposed(net, 2, 3, data=net.op("Relu", y))
    assert kinds(folded(net)) == ["ConvTranspose", "Relu", "Conv", "DepthToSpace"]


@pytest.mark.parametrize(
    ("out", "changed"),
    [
        (3, {}),
        (4, {"group": 4}),
        (1, {"pads": [1, 1, 1, 1]}),
        (1, {"pads": [0, 0, 0, 1]}),
        (1, {"output_padding": [1, 1]}),
        (1, {"output_shape": [8, 8]}),
        (1, {"auto_pad": "SAME_UPPER", "pads": None}),
        (1, {"strides": [1, 1]}),
        (1, {"strides": [3, 3]}),
        (1, {"strides": [2, 1]}),
        (1, {"dilations": [2, 2]}),
    ],
)
def test_other_transposed_convolutions_stay(out: int, changed: dict[str, Any]) -> None:
    net = TinyNet((1, 4, 4, 4))
    net.op("Sigmoid", transposed(net, 2, out=out, **changed))
    assert kinds(folded(net)) == ["ConvTranspose", "Sigmoid"]


def test_a_transposed_convolution_that_is_not_square_or_has_computed_weights_stays() -> None:
    net = TinyNet((1, 4, 4, 4))
    net.op("ConvTranspose", "x", net.const(net.weights(4, 1, 2, 3)), strides=[2, 3])
    assert kinds(folded(net)) == ["ConvTranspose"]

    net = TinyNet((4, 1, 2, 2))
    net.op("ConvTranspose", net.op("Reshape", "x", net.const(np.array([1, 4, 2, 2]))), "x", strides=[2, 2])
    assert kinds(folded(net)) == ["Reshape", "ConvTranspose"]


def test_an_activation_stays_behind_an_upsampling_that_is_read_twice_or_an_output() -> None:
    net = TinyNet((1, 4, 3, 3))
    y = transposed(net, 2)
    net.op("Add", net.op("Relu", y), y)
    assert kinds(folded(net)) == ["Conv", "DepthToSpace", "Relu", "Add"]

    net = TinyNet((1, 4, 3, 3))
    y = transposed(net, 2)
    assert kinds(folded(net, net.op("Sigmoid", y), y)) == ["Conv", "DepthToSpace", "Sigmoid"]

    net = TinyNet((1, 4, 3, 3))
    net.op("Softmax", transposed(net, 2), axis=-1)
    assert kinds(folded(net)) == ["Conv", "DepthToSpace", "Softmax"]


def gate(net: TinyNet, data: str, channels: int) -> str:
    pooled = net.conv(net.op("GlobalAveragePool", data), channels, channels, kernel=1, pad=0)
    return net.op("HardSigmoid", pooled, alpha=1 / 6, beta=0.5)


@settings(max_examples=40, deadline=None)
@given(st.tuples(*(st.integers(1, 6) for _ in range(4))), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_a_gate_with_residual_takes_the_residual_in(
    shape: tuple[int, ...], gate_first: bool, product_first: bool, seed: int
) -> None:
    net = TinyNet(shape, seed, free=(0, 2, 3))
    data = net.op("Tanh", "x")
    factors = [data, gate(net, data, shape[1])]
    product = net.op("Mul", *(factors[::-1] if gate_first else factors))
    net.op("Add", *([product, data] if product_first else [data, product]), name="out")
    after = folded(net)
    assert kinds(after) == ["Tanh", "GlobalAveragePool", "Conv", "HardSigmoid", "Add", "Mul"]
    assert after.shape(after.nodes[-1].input[1]) == (None, shape[1], 1, 1)  # the addition is on the gate
    found, expected = (run(graph.to_model(), net.feed(seed))[0] for graph in (after, net.graph()))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def _product_read_twice(net: TinyNet) -> tuple[str, ...]:
    product = net.op("Mul", "x", gate(net, "x", 4))
    return (net.op("Mul", net.op("Add", "x", product), product),)


def _product_is_an_output(net: TinyNet) -> tuple[str, ...]:
    product = net.op("Mul", "x", gate(net, "x", 4))
    return net.op("Add", "x", product), product


def _residual_of_another_tensor(net: TinyNet) -> tuple[str, ...]:
    return (net.op("Add", net.op("Relu", "x"), net.op("Mul", "x", gate(net, "x", 4))),)


def _gate_for_every_pixel(net: TinyNet) -> tuple[str, ...]:
    return (net.op("Add", "x", net.op("Mul", "x", net.op("Sigmoid", net.conv("x", 4, 4)))),)


def _product_added_to_itself(net: TinyNet) -> tuple[str, ...]:
    product = net.op("Mul", "x", gate(net, "x", 4))
    return (net.op("Add", product, product),)


def _gate_as_residual(net: TinyNet) -> tuple[str, ...]:
    factor = gate(net, "x", 4)
    return (net.op("Add", factor, net.op("Mul", "x", factor)),)


@pytest.mark.parametrize(
    "case",
    [
        _product_read_twice,
        _product_is_an_output,
        _residual_of_another_tensor,
        _gate_for_every_pixel,
        _product_added_to_itself,
        _gate_as_residual,
    ],
    ids=lambda case: case.__name__.strip("_"),
)
def test_other_gates_stay(case: Callable[[TinyNet], tuple[str, ...]]) -> None:
    net = TinyNet((2, 4, 4, 4))
    outputs = case(net)
    assert kinds(folded(net, *outputs)) == kinds(net.graph(*outputs))


@pytest.mark.parametrize("constant_first", [True, False])
def test_constants_in_the_form_of_a_gated_residual_stay_affine(constant_first: bool) -> None:
    net = TinyNet((1, 4, 1, 1))
    pair = ["x", net.const(net.weights(1, 4, 1, 1))]
    first, second = pair[::-1] if constant_first else pair
    net.op("Tanh", net.op("Add", first, net.op("Mul", first, second)))
    assert kinds(folded(net)) == ["Mul", "Add", "Tanh"]


# --- random chains ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One random decision; what it means depends on the shape at hand."""

    kind: str
    shape: str
    number: int
    flag: bool


STEPS = st.builds(
    Step,
    st.sampled_from(
        ["conv", "depthwise", "grouped", "transpose", "matmul", "norm", "affine", "affine", "affine", "affine", "swish",
         "branch", "output", "square", "identity", "flatten", "upsample", "gate"]
    ),
    st.sampled_from(["scalar", "one", "full", "channel", "channel3", "columns"]),
    st.integers(0, 3),
    st.booleans(),
)  # fmt: skip


def build(steps: list[Step], seed: int) -> tuple[TinyNet, tuple[str, ...]]:
    """A net from random steps; steps that do not fit the shape at hand are left out."""
    net = TinyNet((2, 4, 6, 6), seed)
    name, shape, outputs = "x", [2, 4, 6, 6], []
    for step in steps:
        picture = len(shape) == 4
        if step.kind in ("conv", "depthwise", "grouped") and picture and shape[2] > 3 and shape[3] > 3:
            group = {"conv": 1, "depthwise": shape[1], "grouped": 2 if shape[1] % 2 == 0 else 1}[step.kind]
            out = shape[1] if step.kind == "depthwise" else 4 + 2 * step.number
            pad = step.number % 2
            name = net.conv(name, shape[1], out, pad=pad, group=group, bias=step.flag)
            shape = [shape[0], out, shape[2] - 2 + 2 * pad, shape[3] - 2 + 2 * pad]
        elif step.kind == "transpose" and picture and shape[2] < 8:
            name = net.conv_transpose(name, shape[1], 4, bias=step.flag)
            shape = [shape[0], 4, 2 * shape[2], 2 * shape[3]]
        elif step.kind == "upsample" and picture and shape[2] < 8:
            name = net.conv_transpose(name, shape[1], 1, bias=step.flag)
            name = net.op("Sigmoid", name) if step.number else name
            shape = [shape[0], 1, 2 * shape[2], 2 * shape[3]]
        elif step.kind == "gate" and picture:
            name = net.op("Add", name, net.op("Mul", name, net.op("Sigmoid", net.op("GlobalAveragePool", name))))
        elif step.kind == "matmul":
            name = net.matmul(name, shape[-1], 6)
            shape = [*shape[:-1], 6]
        elif step.kind == "norm":
            name = net.batch_norm(name, shape[1])
        elif step.kind == "affine":
            size = {"scalar": (), "one": (1,), "full": (1,) * len(shape), "channel": (1, shape[1], 1, 1),
                    "channel3": (shape[-3], 1, 1), "columns": (shape[-1],)}[step.shape]  # fmt: skip
            if len(size) > len(shape):
                continue
            value = net.rng.uniform(0.5, 2, size).astype(np.float32)
            kind = AFFINE[step.number]
            pair = [name, net.const(value * (-1 if step.flag else 1))]
            name = net.op(kind, *(pair[::-1] if step.flag and kind != "Div" else pair))
        elif step.kind == "swish":
            name = net.op("HardSwish", name)
        elif step.kind == "branch":
            name = net.op("Add", name, net.op("Relu", net.op("Mul", name, net.const([0.5]))))
        elif step.kind == "square":
            name = net.op("Tanh", net.op("Mul", name, name))
        elif step.kind == "identity":
            name = net.op("Identity", name)
        elif step.kind == "flatten" and picture:
            name = net.op("Reshape", name, net.const(np.array([shape[0], shape[1], -1])))
            shape = [shape[0], shape[1], shape[2] * shape[3]]
        elif step.kind == "output" and name != "x":
            outputs.append(name)
    last = net.op("Relu", name)
    return net, tuple(dict.fromkeys([last, *outputs]))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEPS, min_size=1, max_size=9), st.integers(0, 1000))
def test_random_chains_keep_their_values(steps: list[Step], seed: int) -> None:
    net, outputs = build(steps, seed)
    before = net.graph(*outputs)
    after = folded(net, *outputs)
    assert kinds(after).count("HardSwish") == kinds(before).count("HardSwish")
    for node in after.nodes:  # all that is left has more than one output channel
        assert node.op_type != "ConvTranspose" or after.constants[node.input[1]].shape[1] > 1
    producers, readers = after.producers(), after.consumers()
    for node in after.nodes:
        source = producers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        alone = source is not None and len(readers[node.input[0]]) == 1 and node.input[0] not in after.outputs
        assert not (alone and source is not None and source.op_type in ("Conv", "ConvTranspose"))


# --- channels of one reach -------------------------------------------------------------------------


def _pair(net: TinyNet, gains: np.ndarray, bias: bool = True) -> str:
    """A Conv whose channels have very different sizes, and a depthwise Conv behind it; the tensor between them."""
    weight = net.weights(6, 3, 3, 3) * gains.reshape(-1, 1, 1, 1)
    between = net.op(
        "Conv", "x", net.const(weight), *([net.const(net.weights(6) * gains)] if bias else []), pads=[1] * 4
    )
    net.op("Conv", between, net.const(net.weights(6, 1, 3, 3)), net.const(net.weights(6)), pads=[1] * 4, group=6)
    return between


GAINS = np.float32([1, 30, 0.1, 4, 0.5, 9])


@pytest.mark.parametrize("bias", [True, False])
def test_channels_before_a_depthwise_convolution_get_one_reach(bias: bool) -> None:
    net = TinyNet((2, 3, 8, 8))
    _pair(net, GAINS, bias)
    graph = folded(net)
    writer = graph.nodes[0]
    parts = [graph.constants[name].reshape(6, -1) for name in writer.input[1:]]
    reach = np.abs(np.concatenate(parts, axis=1)).sum(axis=1)
    np.testing.assert_allclose(reach, reach[0], rtol=1e-4)
    assert [node.op_type for node in graph.nodes] == ["Conv", "Conv"]


def test_a_channel_that_is_nearly_still_stays_as_it_is() -> None:
    """Else the weights that read it become so small that an integer bias cannot hold that convolution's bias."""
    net = TinyNet((1, 3, 8, 8))
    _pair(net, GAINS * np.float32([1, 1, 1, 1, 1e-8, 1]))
    reader = net.constants[net.nodes[-1].input[1]]
    graph = folded(net)
    evened = graph.constants[graph.nodes[-1].input[1]]
    np.testing.assert_array_equal(evened[4], reader[4])
    assert (evened[0] != reader[0]).any()


@pytest.mark.parametrize("gains", [GAINS * np.float32([1, 0, 1, 1, 1, 1]), 0 * GAINS])
def test_channels_that_are_always_zero_stay_so(gains: np.ndarray) -> None:
    net = TinyNet((1, 3, 8, 8))
    between = _pair(net, gains)
    assert (between in written(folded(net))) == (not gains.any())


@pytest.mark.parametrize("kind", ["dense", "read twice", "output"])
def test_only_a_depthwise_convolution_that_reads_alone_is_evened_out(kind: str) -> None:
    net = TinyNet((1, 3, 8, 8))
    if kind == "dense":
        between = net.op("Conv", "x", net.const(net.weights(6, 3, 1, 1) * GAINS.reshape(-1, 1, 1, 1)))
        last = net.op("Conv", between, net.const(net.weights(6, 6, 1, 1)))
    else:
        between = _pair(net, GAINS)
        last = net.nodes[-1].output[0]
    if kind == "read twice":
        last = net.op("Add", last, net.op("Relu", between))
    graph = folded(net, last, between) if kind == "output" else folded(net, last)
    assert between in written(graph)
