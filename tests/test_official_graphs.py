"""Official graphs with made-up weights: operators, shapes and names of the real models go through the whole pipeline.

The graphs lie in a folder `graphs` beside one of the folders that QUANT_MODEL_HOME names; without it nothing is tested.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_pir import fill_graph

from quant.calibration import collect_statistics, count_work
from quant.export import check_artifact, export_artifact, fitted
from quant.graph import Graph
from quant.observer import make_range_method
from quant.plan import Operator, QuantPlan, quantizable_operators
from quant.policy import kept
from quant.prepare import old_ir_form, prepare, read_proof
from quant.ptq import activation_tensors, make_plan, observed_outputs, stored_outputs
from quant.qat import check_trainable, distil
from quant.recipe import PaddleSlim, load_recipe
from quant.runtime import Feed, open_session
from quant.slim import slim_plan, slim_scales
from quant.target import TargetName

YML = {"Global": {"model_name": "made-up"}}
PERCENTILE = make_range_method("percentile", 99.999)


def official_graph(name: str) -> Path:
    homes = os.environ.get("QUANT_MODEL_HOME", "")
    for home in homes.split(os.pathsep) if homes else []:
        graph = Path(home).parent / "graphs" / name / "inference.json"
        if graph.is_file():
            return graph
    pytest.skip(f"no official graph of {name}: QUANT_MODEL_HOME names no folder with graphs/ beside it")


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth patches with some noise, float32[1, 3, height, width]."""
    import cv2

    coarse = rng.uniform(-2, 2, (3, max(height // 8, 1), max(width // 8, 1))).astype(np.float32)
    smooth = np.stack([cv2.resize(plane, (width, height)) for plane in coarse])
    return (smooth + rng.normal(0, 0.2, smooth.shape)).astype(np.float32)[None]


def plain(height: int, width: int) -> Callable[[np.random.Generator], Feed]:
    return lambda rng: {"x": picture(rng, height, width)}


def small_layout(rng: np.random.Generator) -> Feed:
    return {"image": picture(rng, 480, 480), "scale_factor": np.array([[0.5, 0.6]], dtype=np.float32)}


def large_layout(rng: np.random.Generator) -> Feed:
    sizes = {"im_shape": np.full((1, 2), 640, dtype=np.float32), "scale_factor": np.array([[0.5, 0.6]], np.float32)}
    return {"image": picture(rng, 640, 640), **sizes}


MODELS: dict[str, tuple[Callable[[np.random.Generator], Feed], float]] = {
    "PP-LCNet_x1_0_doc_ori": (plain(224, 224), 1e-3),
    "PP-LCNet_x1_0_textline_ori": (plain(80, 160), 1e-3),
    "PP-OCRv4_server_det": (plain(128, 160), 1e-3),
    "PP-OCRv4_server_rec_doc": (plain(48, 160), 1e-3),
    "PP-DocLayout-S": (small_layout, 1e-2),
    "SLANet_plus": (plain(488, 488), 1e-3),
    "RT-DETR-H_layout_3cls": (large_layout, 1e-2),
}
"""Inputs, and the largest difference of outputs allowed (pixels, where outputs are boxes), by model."""

RECIPES = {
    "PP-LCNet_x1_0_textline_ori": "PP-LCNet_x0_25_textline_ori",
    "PP-OCRv4_server_rec_doc": "PP-OCRv4_server_rec",
    "RT-DETR-H_layout_3cls": "PP-DocLayout-L",
}
"""Recipe of the family, where the graph is that of a relative."""

LOOSE = {"PP-DocLayout-S", "SLANet_plus", "RT-DETR-H_layout_3cls"}
"""What comes behind the last quantized operator picks (detections, tokens): with made-up weights all scores lie close
together, so INT8 picks others, and the artifact cannot be compared with its plan by what was picked."""


@dataclass(frozen=True)
class Prepared:
    """An official graph with made-up weights, folded, with pictures and the operators that its recipe quantizes."""

    graph: Graph
    feeds: list[Feed]
    operators: list[Operator]
    original: Path | None


def prepared(name: str, folder: Path) -> Prepared:
    make, tolerance = MODELS[name]
    rng = np.random.default_rng(0)
    feeds = [make(rng) for _ in range(3)]
    files = fill_graph(official_graph(name), folder / "model")
    proof = prepare(files, feeds[:1], tolerance, 2, folder)
    assert read_proof(folder) == proof and proof.bridge == "equal bit for bit"
    graph = Graph(onnx.load(folder / "prepared.onnx"))
    macs = count_work(graph, feeds[0], 2).macs
    operators = kept(graph, quantizable_operators(graph, macs), load_recipe(RECIPES.get(name, name)).policy)
    return Prepared(graph, feeds, operators, old_ir_form(folder))


@pytest.mark.family
@pytest.mark.parametrize("name", MODELS)
def test_an_official_graph_goes_through(name: str, tmp_path: Path) -> None:
    found = prepared(name, tmp_path)
    graph, feeds, operators, original = found.graph, found.feeds, found.operators, found.original
    assert not {"BatchNormalization", "Identity"} & {
        node.op_type for node in graph.nodes if node.output[0] not in graph.outputs
    }
    numbers = {"im_shape", "scale_factor"}
    assert not numbers.intersection(name for op in operators if op.quantized for name in op.activations)
    targets: tuple[TargetName, ...] = ("onnxruntime", "openvino", "paddle")
    for target in targets:
        plan = own_plan(graph, operators, feeds, target)
        plan = fitted(target, graph, plan, original)
        assert plan.coverage() > 0.8
        folder = tmp_path / target
        export_artifact(target, graph, plan, YML, folder, original)
        if name in LOOSE:
            assert shapes(target, folder, feeds[0]) == shapes("onnxruntime", shipped(tmp_path), feeds[0])
        else:
            check_artifact(target, folder, graph, plan, feeds[:2], 2)


@pytest.mark.family
@pytest.mark.parametrize("name", ["RT-DETR-H_layout_3cls"])
def test_what_comes_behind_top_k_stays_in_fp32(name: str, tmp_path: Path) -> None:
    found, policy = prepared(name, tmp_path), load_recipe(RECIPES[name]).policy
    without = [entry for entry in policy if not entry.after]
    macs = {op.name: op.macs for op in found.operators}
    quantized = {op.name for op in kept(found.graph, quantizable_operators(found.graph, macs), without) if op.quantized}
    behind = quantized - {op.name for op in found.operators if op.quantized}
    assert behind and all("behind top-k" in op.reason for op in found.operators if op.name in behind)


TRAINED = {
    "PP-LCNet_x1_0_doc_ori": ("", 1.0),
    "PP-OCRv4_server_det": ("", 1.0),
    "PP-OCRv4_server_rec_doc": ("", 1.0),
    "PP-DocLayout-S": ("NonMaxSuppression", 1.0),
    "SLANet_plus": ("Loop", 1.0),
    "RT-DETR-H_layout_3cls": ("ReduceMax", 0.99),
}
"""The operator before which training ends, and the least share of the work in INT8 that comes before it."""


@pytest.mark.family
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "PP-LCNet_x1_0_doc_ori" else ()) for name in TRAINED]
)
def test_an_official_graph_is_trained(name: str, tmp_path: Path) -> None:
    found, (end, least) = prepared(name, tmp_path), TRAINED[name]
    graph, feeds = found.graph, found.feeds
    plan = fitted("onnxruntime", graph, own_plan(graph, found.operators, feeds, "onnxruntime"), found.original)
    settings = load_recipe(RECIPES.get(name, name)).qat
    settings = settings.model_copy(update={"iterations": 1, "evaluate_every": 1, "learning_rate": 1.0})
    left_out = check_trainable(graph, plan, settings, feeds[0])
    assert (f" is a {end}, which cannot be trained here" in left_out) if end else not left_out, left_out
    assert not end or float(left_out.partition("%")[0]) >= 100 * least
    looks: list[QuantPlan] = []
    trained, _ = distil(graph, plan, feeds[:1], settings, lambda p: -len(looks.append(p) or looks), seed=0, threads=2)
    assert any((trained.integers[key].values != weight.values).any() for key, weight in plan.integers.items())
    folder = tmp_path / "artifact"
    export_artifact("onnxruntime", graph, trained, YML, folder, found.original)
    assert shapes("onnxruntime", folder, feeds[0]) == shapes("onnxruntime", shipped(tmp_path), feeds[0])


def shapes(target: TargetName, folder: Path, feed: Feed) -> list[tuple[int, ...]]:
    """Of the outputs, without the first axis: how many regions are found is open."""
    return [value.shape[1:] for value in open_session(target, folder, 2).run(feed)]


def own_plan(graph: Graph, operators: list[Operator], feeds: list[Feed], target: TargetName) -> QuantPlan:
    """All in INT8: PaddleSlim's ranges for Paddle, the plain own ones for the others."""
    if target == "paddle":
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            scales = slim_scales(graph, feeds[:2], PaddleSlim(algo="avg", samples=2), Path(folder))
        return slim_plan(graph, operators, scales, model="made-up", target=target, dtype="int8")
    stored = target == "onnxruntime"
    observed, outputs = observed_outputs(graph, operators) if stored else (graph, {})
    tensors = [*activation_tensors(operators), *outputs.values()]
    statistics = collect_statistics(observed, tensors, feeds, 2)
    plan = make_plan(graph, operators, statistics, PERCENTILE, model="made-up", dtype="uint8", prepared_sha256="")
    plan.outputs = stored_outputs(outputs, statistics, PERCENTILE, "uint8")
    return plan


def shipped(folder: Path) -> Path:
    """The prepared FP32 model where onnxruntime looks for it."""
    place = folder / "fp32"
    place.mkdir(exist_ok=True)
    (place / "inference.onnx").write_bytes((folder / "prepared.onnx").read_bytes())
    return place
