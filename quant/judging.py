"""Artifacts judged on their own runtimes against the FP32 model as shipped: for a run, and for `quant eval`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmark import interleaved_latency
from eval.dataset import Sample, by_shape, read_sample
from eval.evaluation import Outcomes, judged_rows, load_outcomes
from eval.exhibits import InputSize, Predict, write_exhibits
from eval.gate import EvalReport, JudgedRow, SkippedRow, of_twins
from eval.metric import make_metric
from quant.errors import HandedOver, InputError, Unavailable
from quant.execution import executed_coverage
from quant.job import (
    Job,
    Options,
    counted,
    fp32_folders,
    labels_digest,
    latency_feed,
    picture_input,
    prepared_stage,
    runs_folder,
    sample_ids,
    say_inputs,
)
from quant.manifest import Manifest, artifact_digests, load_manifest, newest_run, processor
from quant.plan import QuantPlan, load_plan
from quant.recipe import Recipe, class_labels
from quant.runtime import model_bytes, open_session, streams
from quant.selection import Selection, find_datasets, select, unused
from quant.shards import OUTCOMES, offer
from quant.shares import Share, judged_in_processes
from quant.source import cache_dir, is_twin, local_source, resolve_model
from quant.stage import StageStore, holds
from quant.target import TARGETS, TargetName
from quant.task import TaskAdapter
from quant.twins import hint

log = logging.getLogger(__name__)

_OUTCOMES = "outcomes"  # stage


@dataclass(frozen=True)
class Evaluation:
    """The newest run of a model and the samples that it is to be judged on.

    Attributes:
        dropped: how many samples are left out because calibration or search saw them.
    """

    folder: Path
    manifest: Manifest
    job: Job
    dropped: int


def evaluate_model(recipe: Recipe, options: Options) -> EvalReport:
    """FP32 against the newest run's artifacts: a row per set, and the pooled row of every target.

    What cannot be had becomes a skipped row.

    Raises:
        InputError: a set is broken, or the run has seen every sample of it.
    """
    rows = _evaluated(recipe, options)
    return EvalReport(rows=of_twins(rows) if is_twin(recipe, options.model_dir) else rows)


def _evaluated(recipe: Recipe, options: Options) -> list[JudgedRow | SkippedRow]:
    try:
        found = find_evaluation(recipe, options)
    except Unavailable as error:
        return [*skipped_rows(recipe, list(recipe.targets), error.reason, error.fix)]
    say_inputs(found.job)
    folder, samples = found.folder, found.job.selection.report
    offer_evaluations(found.job, {t: folder / t for t in recipe.targets if t in found.manifest.artifacts}, samples)
    rows: list[JudgedRow | SkippedRow] = []
    for target in recipe.targets:
        if target in found.manifest.artifacts:
            plan = load_plan(folder / "plans" / target)
            rows += judge_target(found.job, target, plan, folder / target, samples, folder.name)
        else:
            fix = f"Run `{run_command(recipe, options)}`"
            rows += skipped_rows(recipe, [target], "the newest run has no such target", fix)
    return rows


def run_command(recipe: Recipe, options: Options) -> str:
    """What quantizes a model or its twin; a folder that was given tells by itself which of them it is."""
    named = "--model-dir" in options.asked
    return options.run_command(recipe.name, twin=not named and is_twin(recipe, options.model_dir))


def find_evaluation(recipe: Recipe, options: Options) -> Evaluation:
    """The newest run, its FP32 model, and samples that neither calibration nor search saw.

    With `options.data` those are all samples of these sets unless `options.report_split` is set, else the report split
    of the recipe's sets.

    Raises:
        Unavailable: no run, or not of this model; the model or a set cannot be had.
        InputError: a set is broken, or the run has seen every sample of it.
    """
    runs = runs_folder(recipe, options.results, options.model_dir)
    folder = newest_run(runs.parent, runs.name)
    if folder is None:
        command = f"`{run_command(recipe, options)}`"
        if options.model_dir is None and local_source(recipe) is None:
            fetch = f"Run `quant models fetch {recipe.name}` (or give the folder with --model-dir), then {command}"
            fetch += hint(recipe.name, options.run_command(recipe.name, twin=True))
            raise Unavailable("not quantized yet, and its FP32 model is not on this machine", fetch)
        raise Unavailable("not quantized yet", f"Run {command}")
    manifest, again = load_manifest(folder), f"Run `{run_command(recipe, options)}` again"
    if not manifest.intact(folder):
        raise Unavailable(f"files in {folder} are not what was written", again)
    samples, dropped = _unseen(recipe, options, {*manifest.calibration_ids, *manifest.search_ids})
    files = resolve_model(recipe, options.model_dir, options.progress)
    if set(files.sha256.values()) != set(manifest.model_sha256.values()):
        raise Unavailable(f"the newest run is of another FP32 model than {files.source}", again)
    job = Job(recipe, options, files, Selection([], [], samples, {}, {}), StageStore(cache_dir() / "stages"))
    return Evaluation(folder, manifest, job, dropped)


def _unseen(recipe: Recipe, options: Options, used: set[str]) -> tuple[list[Sample], int]:
    if options.report_split or not options.data:
        found: Iterable[Sample] = select(recipe, options.data, options.progress).report
    else:
        datasets, _ = find_datasets(recipe, options.data, options.progress)
        found = (sample for dataset in datasets for sample in dataset.samples)
    samples, dropped = unused(found, used)
    if dropped:
        log.warning("left out because calibration or search saw them: %d samples", dropped)
    if not samples:
        raise InputError("every sample was used for calibration or search; give another set with --data")
    return samples, dropped


def judge_target(
    job: Job, target: TargetName, plan: QuantPlan, artifact: Path, samples: Sequence[Sample], run: str
) -> list[JudgedRow | SkippedRow]:
    """Judge one artifact on its own runtime against the FP32 model as shipped on the same runtime."""
    recipe, metric = job.recipe, make_metric(job.recipe.metric)
    if not TARGETS[target].executed:
        reason = f"no runtime of {target} here; the artifact's structure was checked when it was exported"
        fix = f"Build an engine of its inference.onnx on a machine with {target}, for example with trtexec"
        return [*skipped_rows(recipe, [target], reason, fix)]
    try:
        stored = judged_stage(job, target, plan, artifact, samples)
        outcomes = load_outcomes(stored / OUTCOMES)
        for sentence in outcomes.broken:
            log.warning("left out: %s", sentence)
        latency, execution = (
            json.loads((stored / f"{name}.json").read_text(encoding="utf-8")) for name in ("latency", "execution")
        )
        facts = {**_facts(job, target, plan, artifact, latency), **execution, "run": run}
        return judged_rows(recipe, target, outcomes, metric, facts)
    except Unavailable as error:
        return [*skipped_rows(recipe, [target], error.reason, error.fix)]


def offer_evaluations(job: Job, artifacts: Mapping[TargetName, Path], samples: Sequence[Sample]) -> None:
    """Leave evaluations of many samples for others, where that was asked for and they are not judged yet.

    Raises:
        HandedOver: at least one was left; the job can go on when they are judged.
    """
    folder, offered = job.options.offers, False
    if folder is None or len(samples) <= job.options.shard_samples:
        return
    for target, artifact in artifacts.items():
        stage = job.store.place(_OUTCOMES, _judged_key(job, target, artifact, samples))
        if TARGETS[target].executed and not holds(stage):
            offer(_share(job, target, artifact, samples), stage, folder)
            offered = True
    if offered:
        raise HandedOver


def judged_stage(job: Job, target: TargetName, plan: QuantPlan, artifact: Path, samples: Sequence[Sample]) -> Path:
    """Stage: outcomes of every sample, the folder `exhibits`, latencies, and what the runtime executes in integers."""
    recipe = job.recipe
    judged, classes = _judged_key(job, target, artifact, samples), class_labels(recipe)

    def judge_all(folder: Path) -> None:
        advance = counted(job.options.progress, f"{recipe.name}: evaluating {target}", len(samples))
        outcomes_of(job, target, artifact, samples, advance).save(folder / OUTCOMES)

    def build(folder: Path) -> None:
        shutil.copyfile(job.store.result(_OUTCOMES, judged, judge_all) / OUTCOMES, folder / OUTCOMES)
        outcomes = load_outcomes(folder / OUTCOMES)
        metric, size = make_metric(recipe.metric), _input_size(job.adapter)
        predict = _predictor(job, _share(job, target, artifact, samples))
        advance = counted(job.options.progress, f"{recipe.name}: exhibits and times of {target}", 3)
        write_exhibits(folder / "exhibits", recipe.task, metric, outcomes, samples, predict, size, classes)
        advance()
        latency = _latency(job, target, artifact)
        (folder / "latency.json").write_text(json.dumps(latency), encoding="utf-8")
        advance()
        execution = {"executed_coverage": executed_coverage(target, artifact, plan)}
        (folder / "execution.json").write_text(json.dumps(execution), encoding="utf-8")
        advance()

    key = {
        **judged,
        "classes": classes,
        "latency": recipe.latency.model_dump(exclude={"shapes"}),
        "seed": recipe.seed,
    }
    return job.store.result("evaluation", key, build)


def _judged_key(job: Job, target: TargetName, artifact: Path, samples: Sequence[Sample]) -> dict[str, Any]:
    """What the outcomes of all samples depend on."""
    return {
        **job.key,
        "artifact": artifact_digests(artifact),
        "target": target,
        "samples": sample_ids(samples),
        "labels": labels_digest(samples),
        "metric": job.recipe.metric,
        "datasets": [s.dataset for s in samples],
        "judged_in": job.recipe.targets[target].judged_in,
        "processor": processor(),
    }


def outcomes_of(
    job: Job, target: TargetName, artifact: Path, samples: Sequence[Sample], advance: Callable[[], None] = lambda: None
) -> Outcomes:
    """FP32 as shipped and an artifact on the same pictures, in as many threads or processes as is fastest."""
    share, threads = _share(job, target, artifact, samples), job.options.threads
    if _in_processes(job, target):
        return judged_in_processes(share, threads, advance)
    return share.judged(advance)


def _share(job: Job, target: TargetName, artifact: Path, samples: Sequence[Sample]) -> Share:
    """All pictures and both models, with as many threads for each session as are fastest."""
    recipe = job.recipe
    workers, threads = (1, 1) if _in_processes(job, target) else streams(target, job.options.threads)
    return Share(
        target=target,
        fp32=fp32_folders(job, target)["fp32"],
        int8=artifact,
        threads=threads,
        task=recipe.task,
        inference_yml=job.files.inference_yml,
        model=recipe.name,
        metric=recipe.metric,
        samples=by_shape(samples),
        workers=workers,
    )


def _in_processes(job: Job, target: TargetName) -> bool:
    return job.recipe.targets[target].judged_in == "processes"


def _predictor(job: Job, share: Share) -> Predict:
    """Predictions of both models, by sessions like those that judged; they are opened for the first picture."""
    adapter, sessions = job.adapter, cache(share.sessions)

    def predict(sample: Sample) -> tuple[Any, Any]:
        prepared = adapter.preprocess(read_sample(sample))
        outputs = [session.run(prepared.inputs) for session in sessions()]
        fp32, int8 = (adapter.postprocess(output, prepared.context) for output in outputs)
        return fp32, int8

    return predict


def _input_size(adapter: TaskAdapter) -> InputSize:
    """Asks the pre-processing, with a blank picture of each size."""

    @cache
    def size(width: int, height: int) -> tuple[int, int]:
        inputs = adapter.preprocess(np.zeros((height, width, 3), np.uint8)).inputs
        _, _, high, wide = inputs[picture_input(inputs)].shape
        return wide, high

    return size


def _latency(job: Job, target: TargetName, artifact: Path) -> dict[str, float]:
    """Median milliseconds of FP32 as shipped, FP32 prepared (ONNX targets) and INT8."""
    folders = {**fp32_folders(job, target), "int8": artifact}
    sessions = {name: open_session(target, folder, job.options.threads) for name, folder in folders.items()}
    return interleaved_latency(sessions, latency_feed(job), job.recipe.latency.runs)


def _facts(job: Job, target: TargetName, plan: QuantPlan, artifact: Path, latency: dict[str, float]) -> dict[str, Any]:
    return {
        "coverage": plan.coverage(),
        "method": plan.method,
        "fp32_bytes": model_bytes(target, prepared_stage(job) / "shipped"),
        "int8_bytes": model_bytes(target, artifact),
        "latency_shape": job.recipe.latency.shape,
        "fp32_ms": latency["fp32"],
        "fp32_prepared_ms": latency.get("fp32_prepared"),
        "int8_ms": latency["int8"],
        "speedup": latency["fp32"] / latency["int8"],
    }


def skipped_rows(recipe: Recipe, targets: Sequence[TargetName], reason: str, fix: str) -> list[SkippedRow]:
    return [
        SkippedRow(model=recipe.name, task=recipe.task, target=target, reason=reason, fix=fix) for target in targets
    ]
