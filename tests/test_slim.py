"""PaddleSlim in its own process: its scales against their definition, plans from them, failures; the real models."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_program import MODES, feeds, parameters, predictor
from test_task import DET, REC, Image, adapter, drawn_line, drawn_page, model_folder, real_pictures
from tiny_models import Array, TinyNet, run, session_values, simulate, simulated_model, small_detector, small_recognizer

from quant import slim
from quant.errors import InputError, Unavailable
from quant.graph import Graph
from quant.plan import QuantPlan, quantizable_operators, quantize_weight, weight_axis
from quant.prepare import prepare
from quant.program import MODEL_FILE, PARAMS_FILE, write_program
from quant.ptq import activation_tensors
from quant.recipe import PaddleSlim, load_recipe
from quant.runtime import Feed, onnx_session
from quant.slim import SMALLEST_SCALE, SlimScales, load_scales, slim_plan, slim_scales
from quant.source import read_model

SHAPES = [(1, 3, 8, 8), (1, 3, 12, 8), (1, 3, 8, 16)]


def both() -> Graph:
    """All four kinds of operators in one graph: detector, then attention over its columns."""
    net = small_detector()
    columns = net.op("ReduceMean", net.op("Relu", "map"), axes=[2], keepdims=0)
    tokens = net.op("Transpose", columns, perm=[0, 2, 1])
    query = net.matmul(tokens, 1, 4)
    net.op("MatMul", query, net.op("Transpose", query, perm=[0, 2, 1]), name="scores")
    return net.graph()


def plan_from(graph: Graph, scales: SlimScales, dtype: str = "int8") -> QuantPlan:
    operators = quantizable_operators(graph, {})
    return slim_plan(graph, operators, scales, model="tiny", target="paddle", dtype=dtype)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, SlimScales]:
    graph = both()
    settings = PaddleSlim(algo="avg", samples=len(SHAPES))
    return graph, slim_scales(graph, feeds(SHAPES), settings, tmp_path_factory.mktemp("averaged"))


def test_the_average_is_the_mean_of_largest_values(averaged: tuple[Graph, SlimScales]) -> None:
    graph, scales = averaged
    tensors = activation_tensors(quantizable_operators(graph, {}))
    assert set(scales.activations) == set(tensors)
    assert scales.skipped == ()
    largest = [
        [np.abs(values).max() for values in run(graph.to_model(tensors), feed, *tensors)] for feed in feeds(SHAPES)
    ]
    for name, expected in zip(tensors, np.mean(largest, axis=0), strict=True):
        assert scales.activations[name] == pytest.approx(expected / 127, rel=1e-5)


def test_weights_are_rounded_as_the_plan_rounds_them(averaged: tuple[Graph, SlimScales]) -> None:
    graph, scales = averaged
    operators = [op for op in quantizable_operators(graph, {}) if op.weight]
    assert set(scales.weights) == set(scales.integers) == {op.weight for op in operators}
    for op in operators:
        assert op.weight is not None
        expected = quantize_weight(graph.constants[op.weight], weight_axis(op.op_type))
        np.testing.assert_allclose(scales.weights[op.weight], expected.scale, rtol=1e-6)
        assert np.abs(scales.integers[op.weight].astype(int) - expected.values).max() <= 1
        assert scales.integers[op.weight].dtype == np.int8


def test_the_same_samples_give_the_same_scales_and_bytes(tmp_path: Path) -> None:
    settings = PaddleSlim(algo="hist", hist_percent=0.999, samples=2)
    graph, seen = small_recognizer().graph(), []
    for folder in (tmp_path / "first", tmp_path / "second"):
        samples = feeds([(1, 3, 4, 8), (2, 3, 4, 12)])
        scales = slim_scales(graph, samples, settings, folder, lambda done, total: seen.append((done, total)))
        assert list(folder.iterdir()) == []
        scales.save(folder)
    assert seen == 2 * [(done, 4) for done in (1, 2, 3, 4)]  # hist reads the samples twice
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
    restored = load_scales(tmp_path / "first")
    assert restored.activations == scales.activations
    assert all(np.array_equal(restored.integers[name], scales.integers[name]) for name in scales.integers)


def test_no_more_samples_are_taken_than_asked_for(tmp_path: Path) -> None:
    taken: list[int] = []

    def endless() -> Iterator[Feed]:
        for index in itertools.count():
            taken.append(index)
            yield feeds([(1, 3, 8, 8)])[0]

    net = TinyNet((1, 3, 8, 8), free=(2,))
    net.conv("x", 3, 4)
    slim_scales(net.graph(), endless(), PaddleSlim(algo="abs_max", samples=2), tmp_path)
    assert taken == [0, 1]


def test_a_plan_runs_in_paddle_as_it_is_simulated(averaged: tuple[Graph, SlimScales], tmp_path: Path) -> None:
    graph, scales = averaged
    plan = plan_from(graph, scales)
    assert plan.method == "paddleslim"
    assert all(op.quantized for op in plan.operators)
    write_program(graph, tmp_path, plan)
    compute, simulated = predictor(tmp_path), simulated_model(graph, plan)
    for feed in feeds(SHAPES):
        expected = simulate(simulated, feed)[0]
        assert np.abs(compute(feed)[0] - expected).mean() < 0.02 * np.abs(expected).mean()
    assert sum(value.dtype == np.int8 for value in parameters(tmp_path).values()) == len(scales.weights)


def test_uint8_is_the_same_grid(averaged: tuple[Graph, SlimScales]) -> None:
    graph, scales = averaged
    signed, unsigned = (plan_from(graph, scales, dtype) for dtype in ("int8", "uint8"))
    assert {q.zero_point for q in unsigned.activations.values()} == {128}
    for feed in feeds(SHAPES, scale=3.0):
        results = [simulate(simulated_model(graph, plan), feed)[0] for plan in (signed, unsigned)]
        np.testing.assert_array_equal(*results)


def test_what_paddleslim_left_out_stays_in_fp32(averaged: tuple[Graph, SlimScales]) -> None:
    graph, scales = averaged
    operators = quantizable_operators(graph, {})
    weight = operators[1].weight
    assert weight is not None
    activations = {name: scale for name, scale in scales.activations.items() if name != operators[0].activations[0]}
    weights = {name: scale for name, scale in scales.weights.items() if name != weight}
    partial = SlimScales(activations, weights, scales.integers, ("x", weight))
    plan = plan_from(graph, partial)
    assert [op.quantized for op in plan.operators] == [False, False] + [True] * (len(operators) - 2)
    assert plan.operators[0].reason == "PaddleSlim left x in FP32"
    assert plan.operators[1].reason == f"PaddleSlim left {weight} in FP32"
    assert weight not in plan.integers
    assert plan.notes


def test_what_paddleslim_does_not_see_says_which_operator_ended_its_program(tmp_path: Path) -> None:
    net = TinyNet((1, 3, 5, 5))
    net.conv(net.op("Selu", net.conv("x", 3, 4), name="odd"), 4, 4)
    graph = net.graph()
    scales = slim_scales(graph, feeds([(1, 3, 5, 5)]), PaddleSlim(algo="avg", samples=1), tmp_path)
    first, second = plan_from(graph, scales).operators
    assert (first.quantized, first.reason) == (True, "") and not second.quantized
    ended = "operator Selu that writes tensor 'odd': the Paddle program has no counterpart for it"
    assert second.reason == f"the program for PaddleSlim ends before it: {ended}"
    assert plan_from(graph, scales).notes == [f"the program for PaddleSlim ends early: {ended}"]


def test_a_channel_of_zeros_gets_a_scale_that_can_be_divided_by() -> None:
    net = TinyNet((1, 3, 5, 5))
    net.conv("x", 3, 4)
    graph = net.graph()
    scale = np.array([0, 1e-30, 0.1, 0.2], dtype=np.float32)
    values = np.full((4, 3, 3, 3), 7, dtype=np.int8)
    plan = plan_from(graph, SlimScales({"x": 0.1}, {"c0": scale}, {"c0": values}, ()))
    assert plan.integers["c0"].scale.tolist() == [SMALLEST_SCALE, SMALLEST_SCALE, scale[2], scale[3]]
    assert plan.integers["c0"].values[:, 0, 0, 0].tolist() == [0, 0, 7, 7]


def test_a_tensor_of_zeros_gets_a_scale_that_can_be_divided_by() -> None:
    """Behind a dead ReLU `avg` finds a range of 0."""
    net = TinyNet((1, 3, 5, 5))
    net.conv("x", 3, 4)
    scales = SlimScales({"x": 0.0}, {"c0": np.ones(4, np.float32)}, {"c0": np.ones((4, 3, 3, 3), np.int8)}, ())
    assert plan_from(net.graph(), scales).activations["x"].scale == SMALLEST_SCALE


def test_scales_of_another_graph_are_refused() -> None:
    net = TinyNet((1, 3, 5, 5))
    net.conv("x", 3, 4)
    foreign = SlimScales({"x": 0.1}, {"c0": np.ones(2, np.float32)}, {"c0": np.ones((2, 3, 3, 3), np.int8)}, ())
    with pytest.raises(ValueError, match="c0: the scales were made for another graph"):
        plan_from(net.graph(), foreign)


def test_a_failure_names_a_log_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs, work = tmp_path / "logs", tmp_path / "work"
    logs.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(logs))
    net = TinyNet((1, 3, 8, 8))
    net.conv("x", 3, 4)
    settings = PaddleSlim(algo="avg", samples=1)
    with pytest.raises(RuntimeError, match="PaddleSlim failed with code 1, see ") as caught:
        slim_scales(net.graph(), [{"x": np.zeros((1, 5, 8, 8), np.float32)}], settings, work)
    (log,) = logs.iterdir()
    last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
    assert "1, 5, 8, 8" in last
    assert str(caught.value).endswith(f"see {log}: {last}")
    assert list(work.iterdir()) == []


def test_without_the_package_there_are_no_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paddleslim", None)
    with pytest.raises(Unavailable, match="paddleslim is not installed") as caught:
        slim_scales(small_detector().graph(), [], PaddleSlim(algo="avg", samples=1), tmp_path)
    assert "pip install --no-deps paddleslim" in caught.value.fix


def test_paddleslim_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANT_CHILD_GIB", "0.1")
    net = TinyNet((1, 3, 8, 8))
    net.conv("x", 3, 4)
    with pytest.raises(InputError, match=r"^PaddleSlim took more than 0\.1 GiB of memory .*; give it fewer samples"):
        slim_scales(net.graph(), feeds([(1, 3, 8, 8)]), PaddleSlim(algo="avg", samples=1), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_said_where_no_log_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log").write_text("the last line", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        assert slim._kept(tmp_path / "log") == ""


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    net = TinyNet((1, 3, 8, 8))
    net.conv("x", 3, 4)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slim_scales(net.graph(), feeds([(1, 3, 8, 8)]), PaddleSlim(algo="avg", samples=1), tmp_path, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_no_samples_are_an_input_error(tmp_path: Path) -> None:
    graph = small_detector().graph()
    with pytest.raises(InputError, match="needs calibration samples"):
        slim_scales(graph, [], PaddleSlim(algo="avg", samples=4), tmp_path)
    assert list(tmp_path.iterdir()) == []


LINES = ["Total 12.80", "hello world", "Rechnung Nr. 4711", "B 17-05-2024"]


def pictures(name: str) -> list[Image]:
    """Drawn ones, and real ones where QUANT_DATA_HOME points at them."""
    if name == REC:
        drawn = [drawn_line(text, 80 + 25 * len(text)) for text in LINES]
        return drawn + real_pictures("sroie_rec", 12) + real_pictures("icdar2015_rec", 12)
    return [drawn_page(), drawn_page(700, 1100)] + real_pictures("sroie_det", 3) + real_pictures("icdar2015_det", 3)


@pytest.fixture(scope="module", params=[DET, REC])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Graph, list[Feed]]:
    """A real model, prepared, and pre-processed pictures of many sizes."""
    name, folder = request.param, tmp_path_factory.mktemp("real")
    files = read_model(load_recipe(name), model_folder(name, folder), "for the test")
    inputs = [adapter(name).preprocess(picture).inputs for picture in pictures(name)]
    prepare(files, inputs[:2], load_recipe(name).tolerance, 1, folder)
    return name, Graph(onnx.load(folder / "prepared.onnx")), inputs


@pytest.mark.xdist_group("slim")
@pytest.mark.slow
@pytest.mark.parametrize(("onednn", "new_ir"), MODES)
def test_real_models_compute_the_same_in_fp32(
    real: tuple[str, Graph, list[Feed]], onednn: bool, new_ir: bool, tmp_path: Path
) -> None:
    name, graph, inputs = real
    write_program(graph, tmp_path)
    compute, exact = predictor(tmp_path, onednn=onednn, new_ir=new_ir), onnx_session(graph.to_model(), 1)
    for feed in inputs:
        difference = np.abs(compute(feed)[0] - exact.run(feed)[0])
        assert difference.max() <= load_recipe(name).tolerance
        assert difference.mean() <= 1e-6


def mean_difference(found: list[Array], expected: list[Array]) -> float:
    return float(np.mean([np.abs(a - b).mean() for a, b in zip(found, expected, strict=True)]))


@pytest.mark.xdist_group("slim")
@pytest.mark.slow
def test_real_models_compute_their_plan_in_every_mode(real: tuple[str, Graph, list[Feed]], tmp_path: Path) -> None:
    _, graph, inputs = real
    scales = slim_scales(graph, inputs, PaddleSlim(algo="hist", samples=6), tmp_path / "slim")
    assert scales.skipped == ()
    plan = plan_from(graph, scales)
    # The first convolutions magnify every rounding; all plans that pass the gate have them in FP32.
    plan = plan.with_only({op.name for op in plan.operators[4:] if op.quantized}, "for the test")
    write_program(graph, tmp_path, plan)
    onnx.save(simulated_model(graph, plan), tmp_path / "simulated.onnx")
    expected, again = (
        [session_values(tmp_path / "simulated.onnx", feed, optimized=optimized)[0] for feed in inputs]
        for optimized in (False, True)
    )
    # A value on the edge between two steps falls to either side, and moves others behind it: so the
    # yardstick is onnxruntime itself, with and without its optimizations.
    noise = mean_difference(again, expected)
    for onednn, new_ir in MODES:
        compute = predictor(tmp_path, onednn=onednn, new_ir=new_ir)
        assert mean_difference([compute(feed)[0] for feed in inputs], expected) < 4 * noise
    stored = sum((tmp_path / file).stat().st_size for file in (MODEL_FILE, PARAMS_FILE))
    assert stored < 0.35 * sum(value.nbytes for value in graph.constants.values())
