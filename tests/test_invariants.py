"""What every step of a loop repeats is computed once, in front of the loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from test_plan import LARGEST

from quant.bodies import inner_nodes
from quant.calibration import collect_statistics, count_work, mean_work
from quant.execution import executed_operators
from quant.export import quantized_model
from quant.graph import Graph
from quant.invariants import hoist_invariants
from quant.observer import make_range_method
from quant.plan import quantizable_operators
from quant.policy import kept
from quant.prepare import _cleaned
from quant.ptq import activation_tensors, make_plan
from quant.recipe import KeptOperators
from quant.runtime import Feed, onnx_session
from quant.sensitivity import relative_errors
from quant.simulation import simulated_session

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
WIDTH, HIDDEN = 6, 8


def attending_model() -> ModelProto:
    """A decoder in small: every step projects all features anew, looks at them, and changes its state.

    It takes as many steps as the picture `x` is high, [1, T, 6]; a list grows by one state in every step.
    """
    rng = np.random.default_rng(0)
    info = helper.make_tensor_value_info
    weights = {
        "seen_w": rng.normal(size=(WIDTH, HIDDEN)),
        "state_w": rng.normal(size=(HIDDEN, HIDDEN)) / 3,
        "turned_w": rng.normal(size=(HIDDEN, HIDDEN)) / 3,
        "state": np.zeros((1, 1, HIDDEN)),
        "list": np.zeros((1, 1, HIDDEN)),
    }
    node = helper.make_node
    body = helper.make_graph(
        [
            node("Constant", [], ["axis"], value=numpy_helper.from_array(np.array([1]))),
            node("MatMul", ["features", "seen_w"], ["seen"]),
            node("ReduceSum", ["seen", "axis"], ["whole"], keepdims=1),
            node("MatMul", ["before", "state_w"], ["asked"]),
            node("Add", ["seen", "asked"], ["both"]),
            node("Transpose", ["turned_w"], ["turned"], perm=[1, 0]),
            node("MatMul", ["both", "turned"], ["matched"]),
            node("ReduceSum", ["matched", "axis"], ["summed"], keepdims=1),
            node("Transpose", ["states"], ["keys"], perm=[0, 2, 1]),
            node("MatMul", ["before", "keys"], ["pairs"]),
            node("MatMul", ["pairs", "states"], ["mixed"]),
            node("Sum", ["summed", "whole", "mixed"], ["all"]),
            node("Tanh", ["all"], ["after"]),
            node("Concat", ["states", "after"], ["longer"], axis=1),
            node("Identity", ["go"], ["again"]),
        ],
        "step",
        [info("count", INT, []), info("go", BOOL, []), info("before", FLOAT, None), info("states", FLOAT, None)],
        [info("again", BOOL, None), info("after", FLOAT, None), info("longer", FLOAT, None)],
    )
    graph = helper.make_graph(
        [
            node("Relu", ["x"], ["features"]),
            node("Shape", ["x"], ["sizes"]),
            node("Gather", ["sizes", "one"], ["steps"], axis=0),
            node("Loop", ["steps", "", "state", "list"], ["last", "listed"], body=body),
        ],
        "decoder",
        [info("x", FLOAT, [1, "T", WIDTH])],
        [info("listed", FLOAT, [1, None, HIDDEN])],
        [
            *(numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()),
            numpy_helper.from_array(np.array(1), "one"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feeds() -> list[Feed]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(1, steps, WIDTH)).astype(np.float32)} for steps in (3, 5, 4)]


def hoisted() -> Graph:
    graph = Graph(attending_model())
    assert hoist_invariants(graph) == 3
    return _cleaned(graph)


def test_repeated_products_leave_the_loop_and_outputs_stay_equal() -> None:
    graph = hoisted()
    onnx.checker.check_model(graph.to_model(), full_check=True)
    assert [node.op_type for node in graph.nodes].count("MatMul") == 1
    inside = [node.op_type for node in inner_nodes(graph).values()]
    assert inside.count("MatMul") == 4 and "Constant" in inside
    assert inside.count("Transpose") == 1, "the one of a weight has become a constant"
    before, after = onnx_session(attending_model(), 1), onnx_session(graph.to_model(), 1)
    for feed in feeds() * 2:
        assert np.array_equal(before.run(feed)[0], after.run(feed)[0])


def test_a_body_that_only_hands_on_what_was_moved_still_loads() -> None:
    model = attending_model()
    body = model.graph.node[-1].attribute[0].g
    body.output.append(helper.make_tensor_value_info("whole", FLOAT, None))
    model.graph.node[-1].output.append("wholes")
    model.graph.output.append(helper.make_tensor_value_info("wholes", FLOAT, None))
    graph = Graph(model)
    hoist_invariants(graph)
    before, after = onnx_session(model, 1), onnx_session(graph.to_model(), 1)
    for one, other in zip(before.run(feeds()[0]), after.run(feeds()[0]), strict=True):
        assert np.array_equal(one, other)


def test_nothing_is_moved_that_a_step_changes() -> None:
    graph = hoisted()
    assert hoist_invariants(graph) == 0


def test_the_steps_of_a_loop_count_as_work() -> None:
    graph = hoisted()
    (projection,) = (node.output[0] for node in graph.nodes if node.op_type == "MatMul")
    for feed in feeds():
        steps, macs = feed["x"].shape[1], count_work(graph, feed, 1).macs
        assert macs[projection] == steps * WIDTH * HIDDEN
        assert macs["asked"] == steps * HIDDEN * HIDDEN
        assert macs["matched"] == steps * steps * HIDDEN * HIDDEN
        assert macs["pairs"] == macs["mixed"] == sum(length * HIDDEN for length in range(1, steps + 1))
    assert mean_work(graph, feeds(), 1).macs["asked"] == 4 * HIDDEN * HIDDEN


def test_a_loop_of_no_step_is_no_work() -> None:
    macs = count_work(hoisted(), {"x": np.zeros((1, 0, WIDTH), np.float32)}, 1).macs
    assert set(macs.values()) == {0}


@pytest.mark.parametrize("in_loop", [True, False])
def test_products_inside_of_a_loop_are_quantized_unless_the_policy_says_no(in_loop: bool, tmp_path: Path) -> None:
    graph = hoisted()
    policy = [] if in_loop else [KeptOperators(loops=True, reason="errors add up")]
    operators = kept(graph, quantizable_operators(graph, mean_work(graph, feeds(), 1).macs), policy)
    chosen = {op.name for op in operators if op.quantized}
    assert ({"asked", "matched"} <= chosen) == in_loop and not {"pairs", "mixed"} & chosen
    statistics = collect_statistics(graph, activation_tensors(operators), feeds(), 1)
    method = make_range_method("minmax", 99.999)
    plan = make_plan(
        graph, operators, statistics, method, model="t", dtype="uint8", prepared_sha256="", largest=LARGEST
    )
    missing = sum(op.macs for op in operators if op.in_loop and op.name not in chosen)
    assert missing and plan.coverage() == 1 - missing / sum(op.macs for op in operators)
    simulated = simulated_session(graph, plan, 1)
    exported = quantized_model(graph, plan, {})
    onnx.checker.check_model(exported, full_check=True)
    artifact, exact = onnx_session(exported, 1), onnx_session(graph.to_model(), 1)
    onnx.save(exported, tmp_path / "inference.onnx")
    executed = executed_operators("onnxruntime", tmp_path, plan) or set()
    assert ({"asked", "matched"} <= executed) == in_loop
    rounded = [node.op_type for node in inner_nodes(Graph(exported)).values()].count("QuantizeLinear")
    assert rounded == (2 if in_loop else 0)
    for feed in feeds() * 2:
        assert relative_errors([artifact.run(feed)], [simulated.run(feed)])[0] < 0.02
        assert 0 < relative_errors([simulated.run(feed)], [exact.run(feed)])[0] < 0.2
