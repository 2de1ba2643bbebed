"""The classifiers of orientation from end to end: the main job on the real model, and the clients."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from client_code import code_for, run_clients
from main_jobs import THREADS
from test_card import card_of, code_of
from tiny_pir import fill_graph, tiny_feeds

from eval.dataset import Sample, read_sample
from quant.calibration import collect_statistics
from quant.export import export_artifact
from quant.graph import Graph
from quant.observer import make_range_method
from quant.pipeline import Finished, Job, Options, run_model, start
from quant.plan import quantizable_operators
from quant.prepare import prepare
from quant.ptq import activation_tensors, make_plan
from quant.recipe import load_recipe
from quant.runtime import open_session
from quant.target import TargetName
from quant.task import ClassPrediction, make_task

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("orientation")]

LINES, PAGES = "PP-LCNet_x0_25_textline_ori", "PP-LCNet_x1_0_doc_ori"
MODEL_HOME = Path(os.environ.get("QUANT_MODEL_HOME", "nowhere").split(os.pathsep)[0])
LEAST_SAMPLES, LEAST_COVERAGE, PICTURES = 1000, 0.8, 40
SCORE_NOISE = 0.01  # other numbers of threads sum in another order; single values round differently

needs_model = pytest.mark.skipif(not (MODEL_HOME / LINES).is_dir(), reason=f"QUANT_MODEL_HOME has no folder {LINES}")
needs_data = pytest.mark.skipif("QUANT_DATA_HOME" not in os.environ, reason="QUANT_DATA_HOME is not set")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Finished]:
    options = Options(tmp_path_factory.mktemp("results"), THREADS, lambda what, done, total: None)
    recipe = load_recipe(LINES)
    done = run_model(recipe, options)
    return start(recipe, options), done


@needs_model
@needs_data
def test_turned_real_lines_pass_on_every_target(finished: tuple[Job, Finished]) -> None:
    rows = [row for row in finished[1].report.rows if row.status == "judged" and row.dataset == "pooled"]
    assert sorted(row.target for row in rows) == ["onnxruntime", "openvino", "paddle"]
    for row in rows:
        assert row.gate.passed and row.gate.evidence == "real", row
        assert row.samples >= LEAST_SAMPLES and row.coverage >= LEAST_COVERAGE
        assert set(row.details["fp32"]) == {"top1", "class_0", "class_1"}
    assert len({row.fp32 for row in rows}) <= 2, "one original on three runtimes"


def assert_equal(ours: list[ClassPrediction], theirs: list[dict[str, Any]]) -> None:
    for mine, result in zip(ours, theirs, strict=True):
        if abs(mine.score - 0.5) < SCORE_NOISE:
            continue  # either class is right
        assert (mine.index, mine.label) == (result["class_ids"][0], result["label_names"][0])
        assert mine.score == pytest.approx(result["scores"][0], abs=SCORE_NOISE)


def ours(job: Job, folder: Path, target: str, samples: list[Sample]) -> list[ClassPrediction]:
    session = open_session(target, folder / target, THREADS)  # type: ignore[arg-type]
    prepared = [job.adapter.preprocess(read_sample(sample)) for sample in samples]
    found = [job.adapter.postprocess(session.run(p.inputs), p.context) for p in prepared]
    assert all(isinstance(prediction, ClassPrediction) for prediction in found)
    return found  # type: ignore[return-value]


@needs_model
@needs_data
@pytest.mark.parametrize("target", ["onnxruntime", "paddle"])
def test_the_clients_of_the_card_give_what_the_evaluation_gives(finished: tuple[Job, Finished], target: str) -> None:
    job, done = finished
    samples = job.selection.report[:PICTURES]
    expected = ours(job, done.folder, target, samples)
    pictures = [read_sample(sample) for sample in samples]
    for names in run_clients(code_of(card_of(done.folder, target)), done.folder / target, pictures[0]).values():
        assert_equal(expected[:1], [names["result"]])
        assert_equal(expected, [dict(result) for result in names["model"].predict(pictures, batch_size=1)])


@pytest.mark.parametrize("target", ["onnxruntime", "paddle"])
def test_the_page_model_loads_under_its_official_name(tmp_path: Path, target: TargetName) -> None:
    """The official graph with made-up weights: classes mean nothing, but clients agree with the evaluation."""
    official = MODEL_HOME.parent / "graphs" / PAGES
    if not (official / "inference.json").is_file():
        pytest.skip(f"no official graph of {PAGES} beside the folder that QUANT_MODEL_HOME names")
    yml = yaml.safe_load((official / "inference.yml").read_text(encoding="utf-8"))
    described = load_recipe(PAGES).inference
    assert all(yml[part] == described[part] for part in ("Global", "PreProcess", "PostProcess"))
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    feeds = tiny_feeds(4, shape=(1, 3, 224, 224))
    prepare(fill_graph(official / "inference.json", tmp_path / "model"), feeds[:1], 1e-3, THREADS, prepared)
    graph = Graph(onnx.load(prepared / "prepared.onnx"))
    operators = quantizable_operators(graph, {})
    statistics = collect_statistics(graph, activation_tensors(operators), feeds, THREADS)
    dtype = "int8" if target == "paddle" else "uint8"
    method = make_range_method("minmax", 100)
    plan = make_plan(graph, operators, statistics, method, model=PAGES, dtype=dtype, prepared_sha256="")
    folder = tmp_path / "deploy" / target
    export_artifact(target, graph, plan, yml, folder)

    task = make_task("image_classification", yml, PAGES)
    session = open_session(target, folder, THREADS)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (300, 400 + 50 * number, 3), dtype=np.uint8) for number in range(4)]
    ready = [task.preprocess(picture) for picture in pictures]
    expected = [task.postprocess(session.run(p.inputs), p.context) for p in ready]
    for names in run_clients(code_for(target, "image_classification", PAGES), folder, pictures[0]).values():
        found = [dict(result) for result in names["model"].predict(pictures, batch_size=1)]
        assert_equal(expected, found)  # type: ignore[arg-type]
        assert_equal(expected[:1], [names["result"]])  # type: ignore[arg-type]
