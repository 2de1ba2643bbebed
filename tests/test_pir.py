"""PIR models: what their program says, the import with its proof, and the way to all three artifacts."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_models import kinds
from tiny_pir import fill_graph, tiny_feeds, write_tiny_pir, write_weights

from quant.bridge import bridge
from quant.calibration import collect_statistics
from quant.conversion import ANCHORS, trace_anchors
from quant.errors import InputError
from quant.export import check_artifact, export_artifact
from quant.graph import Graph
from quant.observer import make_range_method
from quant.pir import check_pir, operators, parameter_shapes, with_fetches
from quant.plan import quantizable_operators
from quant.prepare import prepare
from quant.program import write_program
from quant.ptq import activation_tensors, make_plan
from quant.recipe import load_recipe
from quant.runtime import Feed, model_files, open_session
from quant.source import ModelFiles, read_model
from quant.target import TargetName

DOC_ORI = "PP-LCNet_x1_0_doc_ori"
MODEL_HOME = os.environ.get("QUANT_MODEL_HOME", "")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return write_tiny_pir(tmp_path_factory.mktemp("tiny"))


def document_of(files: ModelFiles) -> dict[str, Any]:
    return dict(json.loads(files.model.read_text(encoding="utf-8")))


# --- what a program says ---------------------------------------------------------------------------


def test_a_program_names_its_weights_and_operators(tiny: ModelFiles) -> None:
    document = document_of(tiny)
    check_pir(document)
    shapes = parameter_shapes(document)
    assert list(shapes) == sorted(shapes)
    assert {(4, 3, 3, 3), (4, 1, 3, 3), (4, 2), (2,)} < set(shapes.values())
    names = [operator.kind for operator in operators(document)]
    assert names[0] == "data" and names[-1] == "fetch" and "p" not in names
    assert [kind for kind in names if kind in ANCHORS] == [
        "conv2d",
        "hardswish",
        "depthwise_conv2d",
        "relu",
        "matmul",
        "softmax",
    ]


def test_fetches_are_added_to_a_copy(tiny: ModelFiles) -> None:
    document = document_of(tiny)
    before = json.dumps(document)
    traced, found = with_fetches(document, {"conv2d", "softmax"})
    assert json.dumps(document) == before
    assert [operator.kind for operator in found] == ["conv2d", "softmax"]
    assert [operator.kind for operator in operators(traced)].count("fetch") == 3


@pytest.mark.parametrize("broken", [{}, {"base_code": {"magic": "x"}}, {"base_code": {"magic": "pir"}, "program": {}}])
def test_other_json_is_no_program(broken: dict[str, Any]) -> None:
    with pytest.raises((KeyError, ValueError)):
        check_pir(broken)


def test_weights_of_another_model_are_refused(tiny: ModelFiles, tmp_path: Path) -> None:
    recipe = load_recipe(DOC_ORI)
    shapes = parameter_shapes(document_of(tiny))
    (tmp_path / "inference.json").write_bytes(tiny.model.read_bytes())
    write_weights(tmp_path / "inference.pdiparams", {name: np.zeros(shape) for name, shape in shapes.items()})
    assert read_model(recipe, tmp_path, "test").format == "pir"
    write_weights(tmp_path / "inference.pdiparams", {name: np.zeros(3) for name in shapes})
    with pytest.raises(InputError, match="holds the weights of another model"):
        read_model(recipe, tmp_path, "test")


# --- import, proof, artifacts ----------------------------------------------------------------------


def test_inner_values_are_traced(tiny: ModelFiles, tmp_path: Path) -> None:
    (feed,) = tiny_feeds(1)
    traced = trace_anchors(tiny, feed, tmp_path)
    assert [kind for kind, _, _ in traced] == ["conv2d", "hardswish", "depthwise_conv2d", "relu", "matmul", "softmax"]
    assert [value.shape[1] for _, _, value in traced] == [4, 4, 4, 4, 2, 2]
    assert all(name.startswith("%") for _, name, _ in traced)
    value = traced[0][2]
    np.testing.assert_allclose(traced[1][2][value == 0], 0)


def test_the_import_is_proven_and_the_first_operator_apart_is_named(tiny: ModelFiles, tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir()
    proof = prepare(tiny, tiny_feeds(), 1e-3, 1, tmp_path / "prepared")
    assert proof.max_difference < 1e-5 and proof.folds["batch_norm"] == 1
    with pytest.raises(InputError, match=r"first at operator conv2d '%\d+ .*' \(ONNX Conv"):
        prepare(tiny, tiny_feeds(1), 1e-30, 1, tmp_path / "strict")


def test_originals_run_side_by_side_on_paddle_inference(tiny: ModelFiles) -> None:
    """A PIR original and an old-IR artifact, opened by several threads at once, as the evaluation does."""
    assert [path.name for path in model_files(tiny.folder, "paddle")] == ["inference.json", "inference.pdiparams"]
    (feed,) = tiny_feeds(1)
    expected = open_session("paddle", tiny.folder, 1).run(feed)[0]
    results: list[np.ndarray[Any, Any]] = []

    def work() -> None:
        results.append(open_session("paddle", tiny.folder, 1).run(feed)[0])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for result in results:
        np.testing.assert_array_equal(result, expected)


def artifacts_of(files: ModelFiles, feeds: list[Feed], folder: Path) -> Graph:
    """Prepare a model, quantize all of it and export it to every runtime; each export is checked on its runtime."""
    prepared = folder / "prepared"
    prepared.mkdir()
    prepare(files, feeds[:2], 1e-3, 1, prepared)
    graph = Graph(onnx.load(prepared / "prepared.onnx"))
    found = quantizable_operators(graph, {})
    statistics = collect_statistics(graph, activation_tensors(found), feeds, 1)
    targets: list[tuple[TargetName, str]] = [("onnxruntime", "uint8"), ("openvino", "uint8"), ("paddle", "int8")]
    for target, dtype in targets:
        method = make_range_method("minmax", 100)
        plan = make_plan(graph, found, statistics, method, model="test", dtype=dtype, prepared_sha256="")
        export_artifact(target, graph, plan, {"Global": {"model_name": "test"}}, folder / target)
        check_artifact(target, folder / target, graph, plan, feeds[:2], 1)
    return graph


def test_artifacts_of_a_tiny_model(tiny: ModelFiles, tmp_path: Path) -> None:
    artifacts_of(tiny, tiny_feeds(8), tmp_path)


def official_graph(name: str) -> Path:
    """An official graph, which lies beside the folder of models that QUANT_MODEL_HOME names."""
    for home in MODEL_HOME.split(os.pathsep) if MODEL_HOME else []:
        graph = Path(home).parent / "graphs" / name / "inference.json"
        if graph.is_file():
            return graph
    pytest.skip(f"no official graph of {name}: QUANT_MODEL_HOME names no folder with graphs/ beside it")


@pytest.mark.parametrize("form", ["pir", "paddle"])
def test_the_official_graph_of_doc_ori_goes_through(form: str, tmp_path: Path) -> None:
    """With made-up weights, in both published forms: import, proof, folding, PaddleSlim's program, the artifacts."""
    files = fill_graph(official_graph(DOC_ORI), tmp_path / "model")
    assert files.params.stat().st_size == pytest.approx(6_754_166, abs=2)
    feeds = tiny_feeds(4, shape=(1, 3, 224, 224))
    if form == "paddle":
        files = bridge(files, feeds[:1], tmp_path / "old").files
    assert files.format == form
    graph = artifacts_of(files, feeds, tmp_path)
    assert "BatchNormalization" not in kinds(graph) and kinds(graph).count("Conv") == 32
    write_program(graph, tmp_path / "fp32")
    expected = open_session("paddle", files.folder, 1).run(feeds[0])[0]
    np.testing.assert_allclose(open_session("paddle", tmp_path / "fp32", 1).run(feeds[0])[0], expected, atol=1e-4)


def test_editions_of_one_name_are_told_apart_by_their_hashes() -> None:
    recipe = load_recipe("PP-LCNet_x0_25_textline_ori")
    folder = Path(MODEL_HOME.split(os.pathsep)[0]) / recipe.name
    if not MODEL_HOME or not folder.is_dir():
        pytest.skip("QUANT_MODEL_HOME names no folder with the real weights")
    assert read_model(recipe, folder, "here").source == "here, the weights published before 2025-05-26"
