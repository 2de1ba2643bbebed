"""The editable view of a graph: what goes in comes out, and names stay unique."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_invariants import WIDTH, attending_model
from tiny_models import TinyNet, kinds, run, small_detector, small_recognizer

from quant.fold import remove_identities
from quant.graph import Graph, attribute, reads
from quant.runtime import onnx_session


@pytest.mark.parametrize("net", [small_detector(), small_recognizer()], ids=["detector", "recognizer"])
def test_round_trip_gives_the_same_values_names_and_sizes(net: TinyNet) -> None:
    model = net.model()
    again = Graph(model).to_model()
    onnx.checker.check_model(again, full_check=True)
    assert again.graph.input == model.graph.input
    assert again.graph.output == model.graph.output
    assert again.opset_import == model.opset_import
    np.testing.assert_array_equal(run(again, net.feed())[0], run(model, net.feed())[0])


def test_constant_nodes_and_initializers_listed_as_inputs_are_constants() -> None:
    net = TinyNet((1, 2))
    weight = net.const([[1.0, 2.0], [3.0, 4.0]])
    one = net.op("Constant", value_float=2.0)
    many = net.op("Constant", value_ints=[1, 2])
    net.op("Reshape", net.op("Mul", net.op("MatMul", "x", weight), one), many)
    model = net.model()
    model.graph.input.append(helper.make_tensor_value_info(weight, onnx.TensorProto.FLOAT, [2, 2]))
    graph = Graph(model)
    assert graph.inputs == ["x"]
    assert kinds(graph) == ["MatMul", "Mul", "Reshape"]
    assert graph.constants[one] == np.float32(2)
    assert graph.constants[many].tolist() == [1, 2]
    np.testing.assert_array_equal(run(graph.to_model(), {"x": np.ones((1, 2), np.float32)})[0], [[8, 12]])


def test_more_outputs_can_be_asked_for_and_none_twice() -> None:
    net = small_detector()
    graph = net.graph()
    first = graph.nodes[0].output[0]
    model = graph.to_model([first, "map"])
    assert [info.name for info in model.graph.output] == ["map", first]
    assert run(model, net.feed(), first)[0].shape == (1, 8, 8, 8)


def test_fresh_names_are_in_use_nowhere_and_never_come_back() -> None:
    net = TinyNet((1, 2))
    net.op("Relu", net.op("Relu", "x", name="y_1"), name="y_3")
    net.const([1.0], "y_2")
    graph = net.graph()
    name = graph.fresh_name("y")
    assert name not in {"x", "y_1", "y_2", "y_3"}
    graph.remove(graph.nodes[0])
    assert graph.fresh_name("y") not in {name, "y_1", "y_2", "y_3"}
    assert graph.fresh_name("x") != "x"


def test_a_copy_is_independent_and_the_given_model_is_left_alone() -> None:
    net = small_detector()
    model = net.model()
    before = model.SerializeToString()
    graph = Graph(model)
    twin = graph.copy()
    graph.rename_output("map", "renamed")
    graph.remove(graph.nodes[0])
    graph.constants.clear()
    assert model.SerializeToString() == before
    assert twin.outputs == ["map"]
    np.testing.assert_array_equal(run(twin.to_model(), net.feed())[0], run(model, net.feed())[0])


def test_renaming_an_output_renames_its_readers() -> None:
    net = TinyNet((1, 2))
    first = net.op("Relu", "x")
    last = net.op("Neg", first)
    graph = net.graph(last, first)
    graph.rename_output(first, "kept")
    assert graph.outputs == [last, "kept"]
    negative, positive = run(graph.to_model(), {"x": np.array([[1, -1]], np.float32)})
    assert (negative.tolist(), positive.tolist()) == ([[-1, 0]], [[1, 0]])


def test_prune_drops_what_no_output_needs() -> None:
    net = TinyNet((1, 2))
    kept = net.op("Add", "x", net.const([1.0], "needed"))
    net.op("Mul", kept, net.const([1.0], "unneeded"))
    graph = net.graph(kept)
    graph.prune()
    assert kinds(graph) == ["Add"]
    assert list(graph.constants) == ["needed"]


def test_producers_and_consumers() -> None:
    net = TinyNet((1, 2))
    y = net.op("Relu", "x")
    net.op("Concat", net.op("Mul", y, y), y, axis=0)
    graph = net.graph()
    assert graph.producers()[y] is graph.nodes[0]
    assert graph.consumers()[y] == [graph.nodes[1], graph.nodes[2]], "each reader once"
    graph.replace_uses(y, "x")
    assert not graph.consumers()[y]


def test_shapes_are_inferred_with_open_sizes() -> None:
    net = TinyNet((1, 3, 8, 8), free=(0, 3))
    y = net.conv("x", 3, 5, pad=0)
    graph = net.graph()
    assert graph.shape("x") == (None, 3, 8, None)
    assert graph.shape(y) == (None, 5, 6, None)
    assert graph.shape("c0") == (5, 3, 3, 3)
    assert graph.shape("nothing") is None


def test_attributes_with_defaults() -> None:
    node = helper.make_node("Conv", ["x"], ["y"], group=3, auto_pad="VALID", pads=[1, 2])
    assert attribute(node, "group", 1) == 3
    assert attribute(node, "auto_pad") == "VALID"
    assert list(attribute(node, "pads")) == [1, 2]
    assert attribute(node, "dilations", [1]) == [1]


# --- loops -----------------------------------------------------------------------------------------


def looping() -> Graph:
    """x -> Identity `same` -> Relu `kept`; a loop adds `kept` and the constant `step` to x three times.

    As paddle2onnx does, the body calls what it carries by the name of an outer tensor.
    """
    add = [helper.make_node("Add", ["same", "kept"], ["more"]), helper.make_node("Add", ["more", "step"], ["next"])]
    given = [("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("same", TensorProto.FLOAT, [2])]
    body = helper.make_graph(
        [*add, helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [helper.make_tensor_value_info(*info) for info in given],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("next", 1, [2])],
    )
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Relu", ["same"], ["kept"]),
        helper.make_node("Relu", ["x"], ["unused"]),
        helper.make_node("Loop", ["count", "", "same"], ["y"], body=body),
    ]
    constants = {"step": np.ones(2, np.float32), "count": np.array(3), "lost": np.ones(2, np.float32)}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return Graph(model)


def test_a_loop_reads_what_its_body_takes_from_outside() -> None:
    graph = looping()
    assert reads(graph.nodes[-1]) == ["count", "", "same", "kept", "step"]
    assert [node.op_type for node in graph.consumers()["kept"]] == ["Loop"]
    graph.prune()
    assert [node.op_type for node in graph.nodes] == ["Identity", "Relu", "Loop"]
    assert set(graph.constants) == {"step", "count"}
    assert graph.fresh_name("next") != "next"


def test_renaming_reaches_into_bodies_but_not_what_they_call_by_the_same_name() -> None:
    graph = looping()
    feed = {"x": np.array([1.0, -2.0], dtype=np.float32)}
    expected = run(graph.to_model(), feed)[0]
    np.testing.assert_allclose(expected, [1 + 3 * 2, -2 + 3])
    assert remove_identities(graph) == 1  # the loop's input is renamed, what its body is given is not
    renamed = helper.make_node("Relu", ["x"], ["other"])
    graph.insert_before(graph.nodes[-1], renamed)
    graph.replace_uses("kept", "other")
    graph.prune()
    assert "kept" not in graph.producers()
    onnx.checker.check_model(graph.to_model())
    np.testing.assert_allclose(run(graph.to_model(), feed)[0], expected)
    np.testing.assert_allclose(run(graph.copy().to_model(), feed)[0], expected)


def test_a_part_of_a_graph_ends_at_given_tensors() -> None:
    part = looping().ending_at(["kept"])
    assert part.outputs == ["kept"] and [node.op_type for node in part.nodes] == ["Identity", "Relu"]
    feed = {"x": np.array([1.0, -2.0], dtype=np.float32)}
    np.testing.assert_array_equal(run(part.to_model(), feed)[0], [1, 0])


def test_a_light_model_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    net = TinyNet((1, 3, 8, 8))
    net.op("MatMul", net.op("Relu", net.conv("x", 3, 4)), net.const(net.weights(8, 5)))
    graph, feed = net.graph(), net.feed()
    monkeypatch.setattr("quant.graph.LARGE", 4 * 40)
    light = graph.to_light_model()
    assert sorted(weight.shape for weight in light.weights.values()) == [(4, 3, 3, 3), (8, 5)]
    assert light.model.ByteSize() < graph.to_model().ByteSize() - 4 * (108 + 40) + 200
    for found, expected in zip(onnx_session(light, 1).run(feed), run(graph.to_model(), feed), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_body_of_a_loop_reads_weights_beside_a_light_model(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph(attending_model())
    monkeypatch.setattr("quant.graph.LARGE", 1)
    feed = {"x": np.ones((1, 3, WIDTH), np.float32)}
    light = graph.to_light_model()
    assert light.weights
    for found, expected in zip(onnx_session(light, 1).run(feed), run(graph.to_model(), feed), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_copy_is_changed_alone_and_shares_weights() -> None:
    graph = small_detector().graph()
    before = [node.SerializeToString() for node in graph.nodes]
    copied = graph.copy()
    weight = copied.nodes[0].input[1]
    assert copied.constants[weight] is graph.constants[weight]
    copied.constants[weight] = copied.constants[weight] + 1
    copied.nodes[0].input[1] = copied.add_constant("other", np.zeros(1, np.float32))
    assert [node.SerializeToString() for node in graph.nodes] == before
    assert copied.constants[weight] is not graph.constants[weight] and "other" not in "".join(graph.constants)
