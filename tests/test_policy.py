"""Operators that a recipe keeps in FP32 by what they are."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from quant.errors import InputError
from quant.graph import Graph
from quant.plan import quantizable_operators
from quant.policy import kept
from quant.recipe import KeptOperators, load_recipe


def two_stages() -> Graph:
    """picture -> Conv -> TopK -> MatMul by weights, MatMul of activations; numbers -> MatMul by weights."""
    rng = np.random.default_rng(0)
    weights = {"w1": (4, 3, 1, 1), "w2": (5, 6), "w3": (2, 2)}
    constants = [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n) for n, s in weights.items()]
    constants.append(numpy_helper.from_array(np.array([5], dtype=np.int64), "k"))
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["seen"]),
        helper.make_node("TopK", ["seen", "k"], ["best", "places"]),
        helper.make_node("MatMul", ["best", "w2"], ["queries"]),
        helper.make_node("MatMul", ["best", "turned"], ["pairs"]),
        helper.make_node("Transpose", ["best"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["sizes", "w3"], ["scaled"]),
    ]
    nodes = [nodes[0], nodes[1], nodes[2], nodes[4], nodes[3], nodes[5]]
    inputs = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8]),
        helper.make_tensor_value_info("sizes", TensorProto.FLOAT, [1, 2]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("queries", "pairs", "scaled")]
    model = helper.make_model(
        helper.make_graph(nodes, "net", inputs, outputs, constants), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    return Graph(model)


def fp32(policy: list[KeptOperators]) -> dict[str, str]:
    graph = two_stages()
    return {op.name: op.reason for op in kept(graph, quantizable_operators(graph, {}), policy) if not op.quantized}


def test_numbers_about_the_picture_are_never_rounded() -> None:
    assert fp32([]) == {"scaled": "its input is no picture: numbers about the picture are never rounded"}


def test_operators_behind_a_kind_are_kept() -> None:
    found = fp32([KeptOperators(after=["TopK"], reason="queries change their order")])
    assert found["queries"] == found["pairs"] == "the recipe keeps it in FP32: queries change their order"
    assert set(found) == {"queries", "pairs", "scaled"}


def test_conditions_of_an_entry_hold_together() -> None:
    assert set(fp32([KeptOperators(kinds=["Conv"], reason="x")])) == {"seen", "scaled"}
    assert set(fp32([KeptOperators(kinds=["MatMul"], weights=False, reason="x")])) == {"pairs", "scaled"}
    assert set(fp32([KeptOperators(names=["se", "pa"], after=["TopK"], reason="x")])) == {"pairs", "scaled"}


def test_readers_of_a_named_input_are_kept() -> None:
    assert set(fp32([KeptOperators(inputs=["image"], reason="x")])) == {"seen", "scaled"}
    with pytest.raises(InputError, match=r"policy\.1\.inputs: 'size' is no input; the model has image, sizes"):
        fp32([KeptOperators(kinds=["Conv"], reason="x"), KeptOperators(inputs=["sizes", "size"], reason="y")])


def test_a_misspelt_kind_is_not_passed_over() -> None:
    with pytest.raises(InputError, match=r"policy\.1\.after: ONNX knows no operator 'Topk'"):
        fp32([KeptOperators(after=["TopK"], reason="x"), KeptOperators(after=["TopK", "Topk"], reason="y")])
    assert set(fp32([KeptOperators(after=["NonMaxSuppression"], reason="x")])) == {"scaled"}, (
        "ONNX has it, this graph not"
    )


def test_a_recipe_says_by_itself_what_stays_in_fp32() -> None:
    """Of the models whose graphs are hard: numbers beside the picture, NMS, and queries picked by top-k."""
    small, large = (load_recipe(f"PP-DocLayout-{size}").policy for size in "SL")
    assert [name for entry in small for name in entry.inputs] == ["scale_factor"]
    assert [name for entry in large for name in entry.inputs] == ["im_shape", "scale_factor"]
    assert [kind for entry in small for kind in entry.after] == ["NonMaxSuppression"]
    assert [kind for entry in large for kind in entry.after] == ["TopK", "GridSample"]


def test_an_entry_names_something_and_says_why() -> None:
    with pytest.raises(ValidationError, match="names no operator"):
        KeptOperators(reason="because")
    with pytest.raises(ValidationError, match="reason"):
        KeptOperators(kinds=["Conv"], reason="")
