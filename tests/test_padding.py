"""Named paddings as numbers: values stay, whatever the window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_program import predictor
from tiny_models import TinyNet, run

from quant.graph import attribute
from quant.padding import write_paddings
from quant.program import write_program

SAME = ("SAME_UPPER", "SAME_LOWER")


def window(net: TinyNet, kind: str, kernel: int, given: bool = True, **attributes: Any) -> str:
    if given or kind != "Conv":
        attributes["kernel_shape"] = [kernel, kernel]
    return net.op(kind, "x", *([net.const(net.weights(4, 4, kernel, kernel))] if kind == "Conv" else []), **attributes)


@pytest.mark.parametrize("kind", ["Conv", "MaxPool", "AveragePool"])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("auto_pad", [*SAME, "VALID"])
def test_values_stay(kind: str, kernel: int, auto_pad: str) -> None:
    net = TinyNet((1, 4, 9, 7))
    window(net, kind, kernel, auto_pad=auto_pad, strides=[1, 1])
    graph = net.graph()
    assert write_paddings(graph) == 1
    (node,) = graph.nodes
    assert attribute(node, "auto_pad") is None and len(attribute(node, "pads")) == 4
    np.testing.assert_array_equal(run(graph.to_model(), net.feed())[0], run(net.model(), net.feed())[0])
    assert not write_paddings(graph)


def test_the_odd_row_is_where_the_name_says() -> None:
    for auto_pad, pads in zip(SAME, ([0, 0, 1, 1], [1, 1, 0, 0]), strict=True):
        net = TinyNet((1, 4, 9, 7))
        window(net, "Conv", 2, given=False, auto_pad=auto_pad)
        graph = net.graph()
        write_paddings(graph)
        assert attribute(graph.nodes[0], "pads") == pads


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_valid_window_with_steps_is_cut_off_at_the_border(size: int, dilation: int) -> None:
    net = TinyNet((1, 4, size, size))
    window(net, "Conv", 2, auto_pad="VALID", strides=[2, 2], dilations=[dilation, dilation])
    graph = net.graph()
    assert write_paddings(graph) == 1
    np.testing.assert_array_equal(run(graph.to_model(), net.feed())[0], run(net.model(), net.feed())[0])


@pytest.mark.parametrize("steps", [{"strides": [2, 2]}, {"dilations": [2, 2]}])
def test_what_has_no_numbers_of_its_own_stays(steps: dict[str, list[int]]) -> None:
    net = TinyNet((1, 4, 9, 7))
    window(net, "Conv", 3, auto_pad="SAME_UPPER", **steps)
    assert not write_paddings(net.graph())


def test_computed_weights_of_unnamed_size_stay() -> None:
    net = TinyNet((4, 4, 2, 2))
    net.op("Conv", "x", "x", auto_pad="SAME_UPPER")
    assert not write_paddings(net.graph())


def test_the_stem_of_pp_hgnet_becomes_a_paddle_program(tmp_path: Path) -> None:
    """Convolution and maximum of 2x2 with SAME and stride 1; Paddle's exporter adds `ceil_mode`."""
    net = TinyNet((1, 4, 8, 6))
    same = {"auto_pad": "SAME_UPPER", "strides": [1, 1], "kernel_shape": [2, 2]}
    convolved = net.op("Conv", "x", net.const(net.weights(4, 4, 2, 2)), **same)
    net.op("Concat", convolved, net.op("MaxPool", "x", ceil_mode=1, **same), axis=1)
    graph = net.graph()
    assert write_paddings(graph) == 2
    write_program(graph, tmp_path)
    found = predictor(tmp_path)(net.feed())[0]
    np.testing.assert_allclose(found, run(net.model(), net.feed())[0], atol=1e-5)
