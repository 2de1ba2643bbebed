"""The main job from end to end, on a tiny network that really reads: coloured bars on white, one letter a colour."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import yaml
from tiny_models import TinyNet

from eval.dataset import Sample, read_image
from eval.gate import JudgedRow, SkippedRow
from quant import export, judging, pipeline, shares
from quant.archive import staged
from quant.child import Limits, child_environment, raise_answer, run_child
from quant.cli import _export_fp32
from quant.errors import InputError, Unavailable
from quant.execution import executed_coverage
from quant.job import Options, prepared_stage, start
from quant.judging import evaluate_model
from quant.manifest import CARD, EXHIBITS, Manifest, artifact_digests, load_manifest, newest_run, processor
from quant.pipeline import Finished, run_model
from quant.plan import load_plan
from quant.planning import planned_stage
from quant.program import write_program
from quant.recipe import Recipe, limited_to, load_recipe
from quant.runtime import MODEL_FILES, open_session, target_format
from quant.shares import Share, apart, judged_in_processes
from quant.stage import StageStore, file_digests
from quant.verification import verify

NAME = "colour_reader"
HEIGHT, BAR = 16, 8
COLOURS = {"r": (30, 30, 220), "g": (30, 220, 30), "b": (220, 30, 30)}  # blue, green, red
SETS = {"icdar2015_rec": 3, "iiit5k_rec": 4}  # registered sets, and how many letters a line of each has
LINES = 40
TARGETS = ["onnxruntime", "openvino", "paddle"]
ONNX_TARGETS = ["onnxruntime", "openvino"]
EXPORTED = [*TARGETS, "tensorrt"]  # the last one cannot be judged here
TIMINGS = {"fp32_ms", "fp32_prepared_ms", "int8_ms", "speedup"}
OWN = {*TIMINGS, "run"}
RECIPE: dict[str, Any] = {
    "base": "text_recognition",
    "name": NAME,
    "description": "Names the colours of bars",
    "model": {},
    "expect": {"metric": "line_accuracy", "value": 100, "source": "made so"},
    "data": {"sets": list(SETS), "splits": {"calibration": 0.3, "search": 0.3, "report": 0.4}},
    "calibration": {"samples": 6, "range": "percentile"},
    "ladder": {"search_samples": 6, "damage_samples": 1, "error_samples": 2, "coverage_steps": [], "max_error": 1.0},
    "paddleslim": {"algo": "avg", "samples": 4},
    "latency": {"shape": [1, 3, HEIGHT, 80], "runs": 1},
}


# --- a model and its pictures ----------------------------------------------------------------------


def colour_reader(sharpness: float = 6.0, output: str = "characters") -> TinyNet:
    """Blurs each colour, tells bright from dark, takes the mean of every column, and weighs the letters."""
    net = TinyNet((1, 3, HEIGHT, 80), free=(0, 3))
    blur = np.zeros((6, 3, 3, 3))
    for colour in range(3):
        blur[colour, colour], blur[colour + 3, colour] = 1 / 9, -1 / 9
    bright = net.op("Relu", net.op("Conv", "x", net.const(blur), net.const(np.zeros(6)), pads=[1] * 4))
    mixed = np.eye(6)[:, :, None, None] + 0.02 * net.weights(6, 6, 1, 1)
    parts = net.op("Relu", net.op("Conv", bright, net.const(mixed), net.const(np.zeros(6))))
    columns = net.op("Transpose", net.op("ReduceMean", parts, axes=[2], keepdims=0), perm=[0, 2, 1])
    wanted = np.array([[0, -1, -1, 1, 0], [0, -1, 1, -1, 0], [0, 1, -1, -1, 0]])  # blank, r, g, b, space
    scores = net.op("MatMul", columns, net.const(sharpness * np.vstack([wanted, -wanted])))
    biased = net.op("Add", scores, net.const(sharpness * np.array([1.5, 0, 0, 0, -9])))
    net.op("Softmax", biased, axis=-1, name=output)
    return net


def write_model(folder: Path, net: TinyNet) -> Path:
    """As PaddleX has it: a Paddle program, its weights, and inference.yml."""
    write_program(net.graph(), folder)
    described = {
        "Global": {"model_name": NAME},
        "PreProcess": {
            "transform_ops": [{"DecodeImage": {"img_mode": "BGR"}}, {"RecResizeImg": {"image_shape": [3, HEIGHT, 32]}}]
        },
        "PostProcess": {"name": "CTCLabelDecode", "character_dict": list(COLOURS)},
    }
    (folder / "inference.yml").write_text(yaml.safe_dump(described), encoding="utf-8")
    return folder


def write_lines(folder: Path, count: int, letters: int, seed: int) -> Path:
    """A set of noisy pictures in the documented format."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "label.txt").open("a", encoding="utf-8") as labels:
        for index in range(count):
            text = "".join(rng.choice(list(COLOURS), letters))
            image = np.full((HEIGHT, BAR * (2 * letters + 1), 3), 235.0)
            for place, letter in enumerate(text):
                left = BAR * (2 * place + 1)
                image[:, left : left + BAR] = COLOURS[letter]
            image += rng.uniform(-20, 20, image.shape)
            name = f"{seed}-{index}.png"
            assert cv2.imwrite(str(folder / name), image.round().astype(np.uint8))
            labels.write(f"{name}\t{text}\n")
    return folder


# --- a place of its own, and one finished run ------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A recipe and where things lie; `said` holds every message of progress."""

    root: Path
    recipe: Recipe
    said: list[str] = field(default_factory=list)

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def onnx_recipe(self) -> Recipe:
        return limited_to(self.recipe, ["onnxruntime"])

    def options(self, **changes: Any) -> Options:
        plain = Options(self.results, 2, lambda what, done, total: self.said.append(what), self.root / "model")
        return replace(plain, **changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The model, its recipe and two registered sets; nothing else on this machine is seen."""
    root = tmp_path_factory.mktemp("place")
    for seed, (name, letters) in enumerate(SETS.items()):
        write_lines(root / "data" / name, LINES, letters, seed)
    write_model(root / "model", colour_reader())
    (root / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(root / "home"))
        patch.setenv("QUANT_CACHE", str(root / "cache"))
        patch.setenv("QUANT_DATA_HOME", str(root / "data"))
        patch.delenv("QUANT_MODEL_HOME", raising=False)
        patch.setattr(pipeline, "processor", cache(processor))  # asking takes a second
        yield Place(root, load_recipe(str(root / "recipe.yaml")))


@dataclass(frozen=True)
class First:
    """The first run on all targets, the stages that it made, and how far each step of its progress came."""

    finished: Finished
    built: list[str]
    said: dict[str, tuple[int, int | None]]

    @property
    def folder(self) -> Path:
        return self.finished.folder


@pytest.fixture(scope="module")
def first(place: Place) -> First:
    with pytest.MonkeyPatch.context() as patch:
        built, said = noted_stages(patch), dict[str, tuple[int, int | None]]()
        options = place.options(progress=lambda what, done, total: said.update({what: (done, total)}))
        return First(run_model(place.recipe, options), built, said)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return noted_stages(monkeypatch)


def noted_stages(
    patch: pytest.MonkeyPatch, before: Callable[[str, Path], None] = lambda name, folder: None
) -> list[str]:
    """Names of the stages that are finished from now on; `before` is called as each begins."""
    built: list[str] = []
    original = StageStore.result

    def result(store: StageStore, name: str, inputs: dict[str, Any], build: Callable[[Path], None]) -> Path:
        def noted(folder: Path) -> None:
            before(name, folder)
            build(folder)
            built.append(name)

        return original(store, name, inputs, noted)

    patch.setattr(StageStore, "result", result)
    return built


def model_bytes(folder: Path) -> dict[str, bytes]:
    """The artifacts and plans of a run."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def judged(finished: Finished) -> list[JudgedRow]:
    rows = [row for row in finished.report.rows if isinstance(row, JudgedRow)]
    left = [row.target for row in finished.report.rows if not isinstance(row, JudgedRow)]
    assert left in ([], ["tensorrt"])
    return rows


def comparable(finished: Finished, *targets: str) -> list[dict[str, Any]]:
    return [row.model_dump(exclude=OWN) for row in judged(finished) if row.target in targets]


def skipped(rows: list[JudgedRow | SkippedRow]) -> dict[str, SkippedRow]:
    assert all(isinstance(row, SkippedRow) for row in rows)
    return {row.target: row for row in rows if isinstance(row, SkippedRow)}


# --- what a run leaves -----------------------------------------------------------------------------


def test_a_run_is_one_folder_named_by_its_hash(place: Place, first: First) -> None:
    assert not first.finished.reused
    assert first.folder.parent == place.results / NAME
    assert re.fullmatch("[0-9a-f]{12}", first.folder.name)
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name]
    names = {path.name for path in first.folder.iterdir()}
    assert names == {"manifest.json", "plan.json", "metrics.json", "plans", EXHIBITS, *EXPORTED}
    assert {path.name for path in (first.folder / "plans").iterdir()} == set(EXPORTED)
    metrics = json.loads((first.folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics == first.finished.report.to_document()


def test_the_manifest_says_what_made_the_run(place: Place, first: First) -> None:
    manifest = load_manifest(first.folder)
    assert (manifest.model, manifest.run, manifest.threads) == (NAME, first.folder.name, 2)
    assert manifest.recipe_sha256 == place.recipe.content_hash()
    assert manifest.model_sha256 == {
        name: digest for name, digest in file_digests(place.root / "model").items() if name != "inference.yml"
    }
    assert manifest.artifacts == {target: artifact_digests(first.folder / target) for target in EXPORTED}
    assert manifest.intact(first.folder)
    groups = [manifest.calibration_ids, manifest.search_ids, manifest.report_ids]
    assert [len(group) for group in groups[:2]] == [6, 6]
    assert len(set().union(*groups)) == sum(map(len, groups)), "no picture serves two purposes"
    assert set(manifest.data) == set(SETS)
    assert sum(record.report for record in manifest.data.values()) == len(manifest.report_ids)
    assert sum(r.calibration + r.search + r.report for r in manifest.data.values()) == LINES * len(SETS)
    assert manifest.proof["max_difference"] <= place.recipe.tolerance
    assert set(manifest.ladder) == set(EXPORTED)
    assert all(rungs[-1].passed for rungs in manifest.ladder.values())


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_an_artifact_its_plan_and_its_rows(first: First, target: Any) -> None:
    files = MODEL_FILES[target_format(target)]
    assert {path.name for path in (first.folder / target).iterdir()} == {*files, "inference.yml", CARD}
    written = (first.folder / target / files[0]).read_bytes()
    assert (b"quantize_linear" if target == "paddle" else b"QuantizeLinear") in written
    plan = load_plan(first.folder / "plans" / target)
    assert (plan.model, plan.target) == (NAME, target)
    assert plan.quantized()
    assert json.loads((first.folder / "plan.json").read_text(encoding="utf-8"))["plans"][target] == plan.document()
    rows = [row for row in judged(first.finished) if row.target == target]
    assert [row.dataset for row in rows] == ["pooled", *sorted(SETS)]
    assert rows[0].samples == rows[1].samples + rows[2].samples == len(load_manifest(first.folder).report_ids)
    for row in rows:
        assert (row.fp32, row.int8, row.drop, row.discordance) == (100, 100, 0, 0)
        assert row.gate.passed and row.gate.evidence == "real"
        assert (row.coverage, row.method) == (plan.coverage(), plan.method)
        assert row.executed_coverage == executed_coverage(target, first.folder / target, plan)
        assert (row.executed_coverage is None) == (target == "paddle")
        assert row.int8_bytes == sum((first.folder / target / name).stat().st_size for name in files)
        assert row.format == target_format(target)


@pytest.mark.parametrize("target", TARGETS)
def test_the_artifact_reads_pictures_that_nobody_has_seen(
    place: Place, first: First, tmp_path: Path, target: Any
) -> None:
    session = open_session(target, first.folder / target, 1)
    adapter = start(place.recipe, place.options()).adapter
    lines = write_lines(tmp_path, 3, 5, 77)
    for line in (lines / "label.txt").read_text(encoding="utf-8").splitlines():
        name, text = line.split("\t")
        prepared = adapter.preprocess(read_image(lines / name))
        prediction = adapter.postprocess(session.run(prepared.inputs), prepared.context)
        assert prediction.text == text  # type: ignore[union-attr]


def test_what_killed_runs_left_is_swept_up(place: Place, first: First) -> None:
    """Of other runs of the model too, and of its steps; not what a living process works on."""
    stages = place.root / "cache" / "stages"
    dead = [first.folder.parent / ".0123456789ab-x.part", stages / ".plan-0123-x.part"]
    for folder in dead:
        (folder / "half").mkdir(parents=True)
        os.utime(folder, (0, 0))
    with staged(stages / "another") as alive:
        os.utime(alive.parent, (0, 0))
        assert run_model(place.recipe, place.options()).reused
        assert alive.parent.is_dir() and not any(folder.exists() for folder in dead)
        alive.mkdir()
    (stages / "another").rmdir()


def test_targets_with_equal_choices_share_their_plan(first: First) -> None:
    stages = {"equalization": 3, "calibration": 2, "full": 3, "plan": 3, "artifact": 4, "outcomes": 3, "evaluation": 3}
    assert Counter(first.built) == {**dict.fromkeys(("prepared", "search", "slim"), 1), **stages}
    plans = [load_plan(first.folder / "plans" / target).document() for target in ("paddle", "tensorrt")]
    assert {**plans[0], "target": ""} == {**plans[1], "target": ""}


def test_progress_says_for_which_targets_a_step_is(first: First) -> None:
    """But for the steps that all of them need; PaddleSlim is asked once for two. And each comes to its end."""
    of_all = {f"{NAME}: {step}" for step in ("importing and folding", "FP32 on the search split", "writing the run")}
    of_some = {title for title in first.said if title not in of_all}
    each = {f"{NAME}: exporting for {target}" for target in EXPORTED}
    each |= {f"{NAME}: exhibits and times of {target}" for target in TARGETS}
    assert of_all | each < set(first.said) and f"{NAME}: PaddleSlim PTQ for paddle, tensorrt" in of_some
    assert [title for title in of_some if not any(target in title for target in EXPORTED)] == []
    assert {title: moved for title, moved in first.said.items() if moved[0] != moved[1]} == {}


def test_weights_and_pictures_are_said(place: Place, first: First, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "quant"):
        run_model(place.recipe, place.options())
        evaluate_model(place.recipe, place.options())
    of_run, of_both, of_eval = (caplog.messages[index] for index in (1, 0, 3))
    assert of_both == caplog.messages[2] == f"{NAME}: weights: --model-dir (model)"
    judged_on = next(row.samples for row in judged(first.finished) if row.gates)
    sets = [f"{name} (QUANT_DATA_HOME ($QUANT_DATA_HOME))" for name in sorted(SETS)]
    counts = f"calibration: 6 samples; search: 6 samples; evaluation: {judged_on} samples"
    assert of_run == f"{NAME}: {counts}; from {', '.join(sets)}"
    assert of_eval == f"{NAME}: evaluation: {judged_on} samples; from {', '.join(sorted(SETS))}"


def test_damage_is_measured_once_where_everything_in_int8_does_not_pass(place: Place, built: list[str]) -> None:
    limits = {"max_error": 1e-9, "coverage_steps": [], "min_coverage": 0.0, "min_weights": 0.0}
    recipe = place.recipe.model_copy(update={"ladder": place.recipe.ladder.model_copy(update=limits)})
    plan = load_plan(planned_stage(start(recipe, place.options()), "onnxruntime"))
    assert built.count("damage") == 1
    assert f"{NAME}: damage per operator for onnxruntime" in place.said
    assert len(plan.quantized()) < len(plan.operators)
    assert any(op.damage for op in plan.operators)


@pytest.mark.parametrize(
    ("method", "taken"),
    [
        pytest.param("recon", ONNX_TARGETS, id="recon, which betters what PaddleSlim calibrated no further here"),
        pytest.param("qat", TARGETS, id="qat"),
    ],
)
def test_a_trained_plan_goes_where_any_other_goes(method: str, taken: list[str], place: Place, tmp_path: Path) -> None:
    """Both exporters, the comparison with the plan on each runtime, and the gate."""
    parts: dict[str, dict[str, Any]] = {
        "calibration": {"rounding": "nearest", "bias_correction": "none"},  # something is left to be learned
        "ladder": {"method": method},
        "qat": {"start": "ptq", "iterations": 12, "evaluate_every": 4, "batch": 2, "learning_rate": 0.05},
    }
    changed = {part: getattr(place.recipe, part).model_copy(update=values) for part, values in parts.items()}
    recipe = place.recipe.model_copy(update=changed)
    finished = run_model(recipe, place.options(results=tmp_path))
    rows = [row for row in judged(finished) if row.gates]
    assert [row.target for row in rows] == TARGETS and all(row.gate.passed for row in rows)
    assert [row.target for row in rows if method in row.method.split("+")] == taken
    manifest = load_manifest(finished.folder)
    for target in taken:
        before, after = manifest.ladder[target][-2:]
        assert (after.name, after.error < before.error, bool(after.seconds)) == (method, True, True)


@pytest.mark.parametrize("method", ["entropy", "moving_average", "per_tensor"])
@pytest.mark.parametrize("target", ONNX_TARGETS)
def test_every_way_to_choose_ranges_makes_a_plan(place: Place, first: First, method: Any, target: Any) -> None:
    calibration = place.recipe.calibration.model_copy(update={"range": method})
    recipe = place.recipe.model_copy(update={"calibration": calibration})
    plan = load_plan(planned_stage(start(recipe, place.options()), target))
    usual = load_plan(first.folder / "plans" / target)
    assert plan.quantized() and plan.activations != usual.activations
    assert any("chosen per tensor" in note for note in plan.notes) == (method == "per_tensor")


def test_another_momentum_is_another_calibration(place: Place, built: list[str]) -> None:
    for momentum in (0.5, 0.6, 0.5):
        calibration = place.recipe.calibration.model_copy(update={"range": "moving_average", "momentum": momentum})
        recipe = limited_to(place.recipe.model_copy(update={"calibration": calibration}), ["onnxruntime"])
        planned_stage(start(recipe, place.options()), "onnxruntime")
    assert built.count("calibration") == built.count("full") == 2


def test_operators_that_the_recipe_names_stay_in_fp32(place: Place, first: First) -> None:
    name = load_plan(first.folder / "plans" / "openvino").operators[0].name
    for wanted, said in (([name], ""), (["nothing"], "'nothing' is no Conv")):
        choice = place.recipe.targets["openvino"].model_copy(update={"fp32": wanted})
        recipe = place.recipe.model_copy(update={"targets": {"openvino": choice}})
        job = start(recipe, place.options())
        if said:
            with pytest.raises(InputError, match=said):
                planned_stage(job, "openvino")
        else:
            (kept,) = [op for op in load_plan(planned_stage(job, "openvino")).operators if op.name == name]
            assert (kept.quantized, kept.reason) == (False, "the recipe keeps it in FP32")


def test_the_prepared_fp32_model_is_exported_with_its_processing(place: Place, first: First, tmp_path: Path) -> None:
    folder = tmp_path / f"{NAME}_fp32"
    _export_fp32(place.recipe, folder, place.results, place.root / "model")
    assert {path.name for path in folder.iterdir()} == {"inference.onnx", "inference.yml", "manifest.json"}
    assert verify(folder).good and verify(folder).run == first.folder.name
    assert (folder / "inference.yml").read_bytes() == (first.folder / "onnxruntime" / "inference.yml").read_bytes()
    kinds = {node.op_type for node in onnx.load(folder / "inference.onnx").graph.node}
    assert "Conv" in kinds and "QuantizeLinear" not in kinds


def test_a_run_and_its_artifacts_are_verified(first: First, tmp_path: Path) -> None:
    whole = verify(first.folder)
    assert whole.good and whole.kind == "run"
    assert whole.checked == sum(path.is_file() for path in first.folder.rglob("*")) - 5, (
        "all but the manifest itself and the four cards"
    )
    assert [verify(first.folder / target).problems for target in EXPORTED] == [[]] * len(EXPORTED)
    copy = shutil.copytree(first.folder, tmp_path / "copy")
    (copy / "metrics.json").write_text("{}", encoding="utf-8")
    (copy / "plans" / "paddle" / "plan.json").unlink()
    (copy / "onnxruntime" / "extra.bin").write_bytes(b"")
    assert verify(copy).problems == [
        "missing: plans/paddle/plan.json",
        "changed: metrics.json",
        "added: onnxruntime/extra.bin",
    ]


def test_a_search_leaves_its_front_beside_the_plan(place: Place, first: First, tmp_path: Path) -> None:
    search = place.recipe.search.model_copy(update={"minutes": 0.02})
    recipe = limited_to(place.recipe.model_copy(update={"search": search}), ["onnxruntime", "paddle"])
    finished = run_model(recipe, place.options(results=tmp_path))
    for target in recipe.targets:
        folder = finished.folder / "plans" / target
        points = json.loads((folder / "search.json").read_text(encoding="utf-8"))
        assert sum(point["chosen"] for point in points) == 1 and any(point["front"] for point in points)
        assert all(point["latency"] > 0 for point in points)
        assert points[0]["name"] == "ladder"
        chosen = next(point for point in points if point["chosen"])
        assert chosen["finalist"], "its latency was measured once more, beside the others'"
        assert chosen["measured"]["samples"] == chosen["score"]["samples"], "on the target itself, on the same pictures"
        assert load_plan(folder).coverage() == pytest.approx(chosen["coverage"])
        assert (folder / "search.svg").read_text(encoding="utf-8").startswith("<?xml")
    again = run_model(recipe, place.options(results=tmp_path))
    assert again.reused and again.folder == finished.folder
    assert finished.folder.name != start(recipe, place.options()).run_name, "latencies are an input, too"
    assert not (first.folder / "plans" / "onnxruntime" / "search.json").exists(), "only where it was asked for"


# --- shares of the pictures ------------------------------------------------------------------------


def share_of(place: Place, artifact: Path, samples: list[Sample]) -> Share:
    job = start(place.recipe, place.options())
    recipe, files = place.recipe, job.files
    shipped = prepared_stage(job) / "shipped"
    described = (recipe.task, files.inference_yml, recipe.name, recipe.metric)
    return Share("paddle", shipped, artifact, 1, *described, samples)


def test_processes_side_by_side_judge_as_one(
    place: Place, first: First, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "LEAST_SAMPLES", 1)
    samples = list(start(place.recipe, place.options()).selection.report)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    samples[3] = replace(samples[3], image=tmp_path / "broken.png")
    share = share_of(place, first.folder / "paddle", samples)
    steps: list[int] = []
    alone, together = share.judged(lambda: None), judged_in_processes(share, 2, lambda: steps.append(1))
    assert together.ids == alone.ids and together.datasets == alone.datasets
    assert np.array_equal(together.fp32, alone.fp32) and np.array_equal(together.int8, alone.int8)
    assert together.broken == alone.broken and len(together.broken) == 1
    assert len(steps) == len(samples)


def test_a_process_that_fails_says_why(
    place: Place, first: First, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "LEAST_SAMPLES", 1)
    samples = list(start(place.recipe, place.options()).selection.report)
    with pytest.raises(InputError, match=r"inference.pdmodel is missing"):
        judged_in_processes(share_of(place, tmp_path, samples), 2, lambda: None)


def test_a_process_without_room_for_its_outcomes_names_them(place: Place, first: First, tmp_path: Path) -> None:
    job = start(place.recipe, place.options())
    share = share_of(place, first.folder / "onnxruntime", list(job.selection.report)[:2])
    command, outcomes = apart(replace(share, target="onnxruntime", fp32=prepared_stage(job) / "prepared"), tmp_path)
    outcomes.symlink_to("/dev/full")
    code = run_child(command, tmp_path / "log", child_environment(), Limits(300, 8 << 30))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        raise_answer(tmp_path, code)
    assert (code, caught.value.filename) == (2, str(outcomes))


def test_without_paddleslim_its_target_is_skipped(
    place: Place, first: First, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other targets do not need it; a run that asks for other scales is not one that was done before."""
    monkeypatch.setitem(sys.modules, "paddleslim", None)
    recipe = limited_to(
        load_recipe(str(place.root / "recipe.yaml"), ["paddleslim.samples=3"]), ["paddle", "onnxruntime"]
    )
    rows = run_model(recipe, place.options(results=tmp_path)).report.rows
    assert [(row.target, row.reason) for row in rows if isinstance(row, SkippedRow)] == [
        ("paddle", "the package paddleslim is not installed")
    ]
    assert {row.target for row in rows if isinstance(row, JudgedRow)} == {"onnxruntime"}


# --- the same run again ----------------------------------------------------------------------------


def test_the_same_run_again_does_no_work(place: Place, first: First, built: list[str]) -> None:
    before = model_bytes(first.folder)
    again = run_model(place.recipe, place.options())
    assert again == replace(first.finished, reused=True)
    assert built == []
    assert model_bytes(first.folder) == before


def test_stored_stages_give_the_same_files_elsewhere(
    place: Place, first: First, tmp_path: Path, built: list[str]
) -> None:
    other = run_model(place.recipe, place.options(results=tmp_path))
    assert not other.reused
    assert other.folder == tmp_path / NAME / first.folder.name
    assert built == []
    assert other.report == first.finished.report
    assert model_bytes(other.folder) == model_bytes(first.folder)


def cut_off(folder: Path) -> None:
    file = folder / "onnxruntime" / "inference.onnx"
    file.write_bytes(file.read_bytes()[:-1])


def take_away(folder: Path) -> None:
    (folder / "paddle" / "inference.pdiparams").unlink()


def take_all_away(folder: Path) -> None:
    shutil.rmtree(folder / "openvino")


@pytest.mark.parametrize("damage", [cut_off, take_away, take_all_away])
def test_a_damaged_artifact_is_made_anew(
    place: Place, first: First, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(first.folder, tmp_path / NAME / first.folder.name))
    damage(folder)
    assert not load_manifest(folder).intact(folder)
    report = evaluate_model(place.recipe, place.options(results=tmp_path))
    for row in skipped(report.rows).values():
        assert str(folder) in row.reason and "damaged" in row.reason
        assert f"quant run {NAME}" in row.fix
    again = run_model(place.recipe, place.options(results=tmp_path))
    assert (again.folder, again.reused) == (folder, False)
    assert model_bytes(folder) == model_bytes(first.folder)
    assert run_model(place.recipe, place.options(results=tmp_path)).reused


@pytest.mark.parametrize("note", ["metrics.json", "manifest.json"])
def test_damaged_notes_are_made_again(
    note: str, place: Place, first: First, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(first.folder, tmp_path / NAME / first.folder.name))
    (folder / note).write_text("{", encoding="utf-8")
    again = run_model(place.recipe, place.options(results=tmp_path))
    assert not again.reused and again.report == first.finished.report
    assert f"{folder} is not as it was written; it is made again" in caplog.text
    assert verify(folder).good


def test_what_a_run_is_named_by(place: Place, first: First, tmp_path: Path) -> None:
    def name(recipe: Recipe = place.recipe, **changes: Any) -> str:
        return start(recipe, place.options(**changes)).run_name

    sets = [Path(shutil.copytree(place.root / "data" / name, tmp_path / name)) for name in SETS]
    data = tuple(str(folder) for folder in sets)
    assert name() == name(data=data) == first.folder.name, "the place of the data does not matter"
    report = start(place.recipe, place.options()).selection.report
    mended = tmp_path / report[0].dataset / "label.txt"
    text = mended.read_text(encoding="utf-8")
    assert f"{report[0].image.name}\t" in text
    mended.write_text(text.replace(f"{report[0].image.name}\t", f"{report[0].image.name}\tx"), encoding="utf-8")
    others = [
        name(data=data),
        name(data=data[:1]),
        name(threads=1),
        name(limited_to(place.recipe, ["paddle"])),
        name(load_recipe(str(place.root / "recipe.yaml"), ["gate.max_drop=2"])),
        name(load_recipe(str(place.root / "recipe.yaml"), ["seed=1"])),
        name(model_dir=write_model(tmp_path / "model", colour_reader(sharpness=7.0))),
    ]
    assert len({*others, first.folder.name}) == len(others) + 1


# --- stopped on the way ----------------------------------------------------------------------------


def test_stopped_in_every_stage_it_goes_on_and_does_nothing_twice(
    place: Place, first: First, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "cache"))
    recipe, options = limited_to(place.recipe, ONNX_TARGETS), place.options(results=tmp_path / "results")
    stopped: list[str] = []

    def stop_once(name: str, folder: Path) -> None:
        if name not in stopped:
            stopped.append(name)
            (folder / "half").write_text("half", encoding="utf-8")
            raise KeyboardInterrupt

    built = noted_stages(monkeypatch, stop_once)
    stages = tmp_path / "cache" / "stages"
    for attempt in range(1, 10):
        with pytest.raises(KeyboardInterrupt):
            run_model(recipe, options)
        assert len(stopped) == attempt
        assert list((tmp_path / "results" / NAME).iterdir()) == []
        assert Counter(path.name.partition("-")[0] for path in stages.iterdir()) == Counter(built)
        assert not list(stages.rglob("half"))
    finished = run_model(recipe, options)
    each = {"equalization", "calibration", "full", "plan", "artifact", "outcomes", "evaluation"}
    assert set(stopped) == {"prepared", "search", *each}
    assert Counter(built) == {"prepared": 1, "search": 1, **dict.fromkeys(each, 2)}
    assert [path.name for path in (tmp_path / "results" / NAME).iterdir()] == [finished.folder.name]
    # It never was in one piece, shares nothing with the first run, and is the same.
    assert comparable(finished, *ONNX_TARGETS) == comparable(first.finished, *ONNX_TARGETS)
    for target in ONNX_TARGETS:
        assert model_bytes(finished.folder / target) == model_bytes(first.folder / target)
        assert artifact_digests(finished.folder / target) == artifact_digests(first.folder / target)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_stopped_while_the_folder_is_written(
    place: Place, first: First, tmp_path: Path, built: list[str], error: BaseException
) -> None:
    def fail(manifest: Manifest, folder: Path) -> None:
        assert (folder / "metrics.json").is_file()
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "save", fail)
        with pytest.raises(type(error)):
            run_model(place.recipe, place.options(results=tmp_path))
    assert list((tmp_path / NAME).iterdir()) == []
    assert run_model(place.recipe, place.options(results=tmp_path)).report == first.finished.report
    assert built == []


def test_no_model(place: Place, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=f"the FP32 model {NAME} cannot be had"):
        run_model(place.recipe, place.options(results=tmp_path / "results", model_dir=None))
    assert not (tmp_path / "results").exists()


def test_a_target_whose_runtime_is_missing_is_skipped(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def openvino_missing(target: Any, folder: Path, threads: int) -> Any:
        if target == "openvino":
            raise Unavailable("the runtime of target 'openvino' is not installed", "install it")
        return open_session(target, folder, threads)

    monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "cache"))
    for module in (judging, export):
        monkeypatch.setattr(module, "open_session", openvino_missing)
    finished = run_model(limited_to(place.recipe, ONNX_TARGETS), place.options(results=tmp_path / "results"))
    assert {row.target for row in finished.report.rows if isinstance(row, JudgedRow)} == {"onnxruntime"}
    rows = skipped([row for row in finished.report.rows if isinstance(row, SkippedRow)])
    assert "not installed" in rows["openvino"].reason
    assert list(load_manifest(finished.folder).artifacts) == ["onnxruntime"]
    with pytest.raises(Unavailable, match="not installed"):
        run_model(limited_to(place.recipe, ["openvino"]), place.options(results=tmp_path / "alone"))
    assert not list((tmp_path / "alone" / NAME).iterdir())


def test_a_model_of_another_kind(place: Place, tmp_path: Path) -> None:
    """It has the task's input, and outputs that the task's dictionary cannot decode."""
    other = write_model(tmp_path / "model", colour_reader())
    described = (other / "inference.yml").read_text(encoding="utf-8")
    (other / "inference.yml").write_text(described.replace("- g\n", "- g\n  - y\n"), encoding="utf-8")
    with pytest.raises(InputError, match=r"it writes \[1, \d+, 5\] where .* need \[1, any, 6\].*another model"):
        run_model(place.recipe, place.options(results=tmp_path / "results", model_dir=other))
    assert not list((tmp_path / "results" / NAME).iterdir())


def test_a_run_asked_for_again_is_the_newest(place: Place, first: First, tmp_path: Path) -> None:
    options = place.options(results=tmp_path)
    older = run_model(place.onnx_recipe, options)
    manifest = load_manifest(older.folder)
    manifest.model_copy(update={"created": "2026-01-01T00:00:00+00:00"}).save(older.folder)
    newer = run_model(limited_to(place.recipe, ["openvino"]), options)
    assert newest_run(tmp_path, NAME) == newer.folder
    notes = (newer.folder / "manifest.json").read_bytes()
    assert run_model(limited_to(place.recipe, ["openvino"]), options).reused
    assert (newer.folder / "manifest.json").read_bytes() == notes, "it is the newest already"
    assert run_model(place.onnx_recipe, options).reused
    assert newest_run(tmp_path, NAME) == older.folder


# --- FP32 against the newest run -------------------------------------------------------------------


def test_before_any_run_every_target_is_skipped_with_the_command_to_run(place: Place, tmp_path: Path) -> None:
    rows = skipped(evaluate_model(place.recipe, place.options(results=tmp_path)).rows)
    assert sorted(rows) == EXPORTED
    for row in rows.values():
        assert (row.model, row.task, row.reason) == (NAME, "text_recognition", "not quantized yet")
        assert f"quant run {NAME}" in row.fix


def test_the_run_is_judged_on_its_own_report_split(place: Place, first: First, built: list[str]) -> None:
    assert evaluate_model(place.recipe, place.options()) == first.finished.report
    assert built == [], "it was judged when the run was made"


def test_samples_that_calibration_or_search_saw_are_left_out(
    place: Place, first: First, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = Path(shutil.copytree(place.root / "data" / "iiit5k_rec", tmp_path / "mine"))
    write_lines(mine, 5, 2, 55)
    manifest = load_manifest(first.folder)
    digests = {name: digest[:16] for name, digest in file_digests(mine).items() if name.endswith(".png")}
    seen = {*manifest.calibration_ids, *manifest.search_ids} & set(digests.values())
    assert seen
    report = evaluate_model(place.onnx_recipe, place.options(data=(str(mine),)))
    assert f"left out because calibration or search saw them: {len(seen)} samples" in caplog.messages
    rows = [row for row in report.rows if isinstance(row, JudgedRow)]
    assert [(row.dataset, row.samples) for row in rows] == [
        (name, LINES + 5 - len(seen)) for name in ("pooled", "mine")
    ]
    assert all((row.fp32, row.int8) == (100, 100) for row in rows)


def test_nothing_is_left_where_calibration_saw_everything(place: Place, first: First, tmp_path: Path) -> None:
    seen = set(load_manifest(first.folder).calibration_ids)
    mine = Path(shutil.copytree(place.root / "data" / "iiit5k_rec", tmp_path / "mine"))
    names = [name for name, digest in file_digests(mine).items() if digest[:16] in seen]
    (mine / "label.txt").write_text("".join(f"{name}\tr\n" for name in names), encoding="utf-8")
    with pytest.raises(InputError, match="every sample was used .* --data"):
        evaluate_model(place.onnx_recipe, place.options(data=(str(mine),)))


def test_a_broken_picture_is_named_and_left_out(
    place: Place, first: First, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = write_lines(tmp_path / "mine", 4, 2, 66)
    whole = (mine / "66-0.png").read_bytes()
    (mine / "66-0.png").write_bytes(whole[:45] + bytes(len(whole) - 57) + whole[-12:])
    for _ in range(2):  # also when the outcomes come from a stored stage
        caplog.clear()
        report = evaluate_model(place.onnx_recipe, place.options(data=(str(mine),)))
        assert [row.samples for row in report.rows if isinstance(row, JudgedRow)] == [3, 3]
        (sentence,) = [message for message in caplog.messages if message.startswith("left out: ")]
        assert str(mine / "66-0.png") in sentence


@pytest.mark.parametrize("output", ["letters", "characters"])
def test_a_model_that_is_not_the_one_of_the_run(place: Place, first: First, tmp_path: Path, output: str) -> None:
    """Trained anew, with a graph that differs in a name or not at all."""
    other = write_model(tmp_path / "model", colour_reader(sharpness=7.0, output=output))
    rows = skipped(evaluate_model(place.onnx_recipe, place.options(model_dir=other)).rows)
    assert list(rows) == ["onnxruntime"]
    assert f"({other.name})" in rows["onnxruntime"].reason and f"quant run {NAME}" in rows["onnxruntime"].fix


def test_without_the_model_there_is_a_row_that_says_so(place: Place, first: First) -> None:
    rows = skipped(evaluate_model(place.recipe, place.options(model_dir=None)).rows)
    assert sorted(rows) == EXPORTED
    assert all("cannot be had" in row.reason and "--model-dir" in row.fix for row in rows.values())


def test_a_target_that_the_newest_run_has_not(place: Place, first: First, tmp_path: Path, built: list[str]) -> None:
    small = run_model(place.onnx_recipe, place.options(results=tmp_path))
    assert {path.name for path in small.folder.iterdir() if path.is_dir()} == {"onnxruntime", "plans", EXHIBITS}
    assert built == []
    report = evaluate_model(limited_to(place.recipe, ONNX_TARGETS), place.options(results=tmp_path))
    assert [row.target for row in report.rows if isinstance(row, JudgedRow)] == 3 * ["onnxruntime"]
    rows = skipped([row for row in report.rows if isinstance(row, SkippedRow)])
    assert list(rows) == ["openvino"]
    assert "no such target" in rows["openvino"].reason and f"quant run {NAME}" in rows["openvino"].fix


def test_a_runtime_that_is_not_installed(
    place: Place, first: First, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(target: str, folder: Path, threads: int) -> None:
        raise Unavailable(f"the runtime of target '{target}' is not installed", "install it")

    monkeypatch.setattr(judging, "open_session", missing)
    mine = write_lines(tmp_path / "mine", 4, 2, 88)
    rows = skipped(evaluate_model(place.onnx_recipe, place.options(data=(str(mine),))).rows)
    assert (rows["onnxruntime"].reason, rows["onnxruntime"].fix) == (
        "the runtime of target 'onnxruntime' is not installed",
        "install it",
    )
