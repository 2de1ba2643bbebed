"""Equalization computes the same network, spares weak channels the rounding, and leaves the rest alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import TinyNet, kinds, run, simulate, simulated_model

from quant.calibration import collect_statistics
from quant.equalization import FLOOR, Equalizer, equalize, load_equalizers, make_equalizers, save_equalizers
from quant.graph import Graph
from quant.observer import MinMax
from quant.plan import QuantPlan, corrected_graph, load_plan, quantizable_operators
from quant.ptq import activation_tensors, make_plan
from quant.runtime import Feed


def uneven_net() -> TinyNet:
    """Depthwise, 1x1 and 3x3 convolutions that read channels of very different size, the last one nearly constant."""
    net = TinyNet((1, 6, 6, 6), seed=2, free=(0, 2, 3))
    gains = net.const(np.float32([1, 10, 0.6, 5, 0.5, 0.01]).reshape(1, 6, 1, 1))
    offsets = net.const(np.float32([0, 3, 0, -4, 0, 9]).reshape(1, 6, 1, 1))
    uneven = net.op("Add", net.op("Mul", "x", gains), offsets)
    net.op("Conv", uneven, net.const(net.weights(6, 1, 3, 3)), pads=[1] * 4, group=6, name="deep")
    net.conv(uneven, 6, 4, kernel=1, pad=0, bias=False)
    net.nodes[-1].output[0] = "point"
    net.op("Conv", uneven, net.const(net.weights(4, 6, 3, 3)), net.const(net.weights(4)), pads=[1] * 4, name="wide")
    return net


def feeds(net: TinyNet, count: int = 6) -> list[Feed]:
    return [net.feed(seed) for seed in range(count)]


def equalized_plan(net: TinyNet, graph: Graph) -> QuantPlan:
    equalizers = make_equalizers(graph, "all", feeds(net), 1)
    equalized = equalize(graph, equalizers, equalizers)
    operators = quantizable_operators(equalized, {})
    statistics = collect_statistics(equalized, activation_tensors(operators), feeds(net), 1)
    plan = make_plan(equalized, operators, statistics, MinMax(), model="m", dtype="int8", prepared_sha256="0" * 64)
    plan.equalizers = equalizers
    return plan


def built() -> tuple[TinyNet, Graph]:
    net = uneven_net()
    return net, net.graph("deep", "point", "wide")


def test_the_equalized_network_computes_the_same() -> None:
    net, graph = built()
    equalizers = make_equalizers(graph, "all", feeds(net), 1)
    assert set(equalizers) == {"deep", "point", "wide"}
    equalized = equalize(graph, equalizers, equalizers)
    unseen = {"x": 3 * np.random.default_rng(9).standard_normal((2, 6, 9, 5)).astype(np.float32)}
    for exact, value in zip(run(graph.to_model(), unseen), run(equalized.to_model(), unseen), strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-4, atol=1e-4)
    assert kinds(equalized).count("Mul") == kinds(graph).count("Mul") + 3


def test_scopes_choose_the_convolutions_and_only_pointwise_ones_are_centred() -> None:
    net, graph = built()
    assert make_equalizers(graph, "none", feeds(net), 1) == {}
    assert set(make_equalizers(graph, "depthwise", feeds(net), 1)) == {"deep"}
    everything = make_equalizers(graph, "all", feeds(net), 1)
    assert not everything["deep"].centre.any()
    assert not everything["wide"].centre.any()
    assert everything["point"].centre[5] == pytest.approx(9, abs=0.1)


def test_a_depthwise_convolution_reads_channels_of_one_size() -> None:
    net, graph = built()
    equalizers = make_equalizers(graph, "depthwise", feeds(net), 1)
    equalized = equalize(graph, equalizers, equalizers)
    seen = [run(equalized.to_model(["deep_equalized"]), feed, "deep_equalized")[0] for feed in feeds(net)]
    sizes = np.abs(np.concatenate(seen)).max(axis=(0, 2, 3))
    assert sizes.max() / sizes.min() < 1.01


def test_a_silent_channel_gets_no_more_than_the_floor_allows() -> None:
    net = TinyNet((1, 2, 4, 4))
    still = net.op("Mul", "x", net.const(np.float32([1, 0]).reshape(1, 2, 1, 1)))
    net.op("Conv", still, net.const(net.weights(2, 1, 3, 3)), pads=[1] * 4, group=2, name="deep")
    factor = make_equalizers(net.graph(), "depthwise", feeds(net), 1)["deep"].factor
    assert factor[1] / factor[0] == pytest.approx(FLOOR, rel=1e-5)


def test_the_model_input_and_weights_that_are_no_constants_are_left_alone() -> None:
    net = TinyNet((1, 3, 5, 5))
    net.conv("x", 3, 3)
    weight = net.op("Relu", net.const(net.weights(3, 3, 1, 1)))
    net.op("Conv", net.nodes[0].output[0], weight, name="moving")
    assert make_equalizers(net.graph(), "all", feeds(net), 1) == {}


def test_a_plan_equalizes_what_it_quantizes_and_survives_the_disk(tmp_path: Path) -> None:
    net, graph = built()
    plan = equalized_plan(net, graph)
    plan.with_only({"point"}, "tried").save(tmp_path)
    again = load_plan(tmp_path)
    assert set(again.equalizers) == {"point"}
    corrected = corrected_graph(graph, again)
    assert kinds(corrected).count("Sub") == 1
    assert kinds(corrected).count("Mul") == kinds(graph).count("Mul") + 1


def test_reverting_an_operator_changes_nothing_for_the_others() -> None:
    """An operator alone in INT8 errs as it does among others: its weights and ranges are found by name."""
    net, graph = built()
    plan = equalized_plan(net, graph)
    together = simulate(simulated_model(graph, plan), net.feed(50))
    for name, values in zip(graph.outputs, together, strict=True):
        alone = simulate(simulated_model(graph, plan.with_only({name}, "alone")), net.feed(50), name)[0]
        np.testing.assert_allclose(alone, values, atol=1e-5)
        assert np.abs(alone - run(graph.to_model(), net.feed(50), name)[0]).max() > 1e-4


def test_a_plan_of_another_graph_is_refused() -> None:
    net, graph = built()
    plan = equalized_plan(net, graph)
    plan.equalizers = {}
    with pytest.raises(ValueError, match="does not read the tensors"):
        corrected_graph(graph, plan)


def test_equalizers_survive_the_disk(tmp_path: Path) -> None:
    stored = {"b": Equalizer(np.float32([1, 2]), np.float32([0, 3])), "a": Equalizer(np.float32([4]), np.float32([0]))}
    save_equalizers(stored, tmp_path)
    again = load_equalizers(tmp_path)
    assert list(again) == ["a", "b"]
    for name, equalizer in stored.items():
        np.testing.assert_array_equal(again[name].factor, equalizer.factor)
        np.testing.assert_array_equal(again[name].centre, equalizer.centre)


def test_where_outputs_are_stored_a_pair_that_folding_evens_out_needs_no_equalizer() -> None:
    net = TinyNet((1, 3, 8, 8))
    between = net.conv("x", 3, 6)
    net.op("Conv", between, net.const(net.weights(6, 1, 3, 3)), pads=[1] * 4, group=6, name="deep")
    graph = net.graph()
    assert set(make_equalizers(graph, "depthwise", feeds(net, 2), 1)) == {"deep"}
    assert not make_equalizers(graph, "depthwise", feeds(net, 2), 1, chains=[])
