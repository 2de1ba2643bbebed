"""The main job: fetch, prepare, calibrate, quantize, export, evaluate, gate.

Every step is a stage whose result is stored under the hash of its inputs (see `quant.stage`), so
a run can stop anywhere and go on, and the same run done again does no work.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.gate import EvalReport, JudgedRow, SkippedRow, of_twins
from quant.archive import discard, file_sha256, staged, sweep
from quant.card import Subject, write_card
from quant.errors import InputError, Unavailable
from quant.export import RuntimeDiffers, check_artifact, export_artifact, fitted, misread_operators
from quant.graph import Graph
from quant.histograms import RANGES, range_charts, save_ranges
from quant.job import (
    Job,
    Options,
    counted,
    feed_of,
    first_feeds,
    prepared_graph,
    prepared_stage,
    runs_folder,
    sample_ids,
    say_inputs,
    start,
)
from quant.judging import judge_target, judged_stage, offer_evaluations, skipped_rows
from quant.ladder import TRAINING_FILES, Rung, load_rungs, read_seconds
from quant.loop import check_repeats, check_runtime, has_loop
from quant.manifest import EXHIBITS, Manifest, artifact_digests, load_manifest, make_newest, now, processor, versions
from quant.plan import QuantPlan, load_plan
from quant.planning import calibrated_statistics, planned_stage
from quant.prepare import missing_loop, nothing_in_int8, old_ir_form, read_proof
from quant.recipe import Recipe
from quant.record import read_record
from quant.runtime import target_format
from quant.source import without_places
from quant.stage import MADE_AGAIN, SEAL, code_digest, digest, file_digests
from quant.target import TARGETS, TargetName

log = logging.getLogger(__name__)

CHECK_PICTURES = 12


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder, its rows, and whether it had been done before."""

    folder: Path
    report: EvalReport
    reused: bool


@dataclass(frozen=True)
class Quantized:
    """A target's plan, how the ladder came to it, and the folders of its artifact and of its plan's stage."""

    plan: QuantPlan
    rungs: list[Rung]
    artifact: Path
    planned: Path


def run_model(recipe: Recipe, options: Options) -> Finished:
    """Quantize, export, evaluate and gate one model on every target of its recipe.

    A target whose runtime is not installed becomes a skipped row.

    Raises:
        Unavailable: the model, a data set or every runtime cannot be had.
        InputError: an input is broken, or an export does not agree with its plan.
    """
    job = start(recipe, options)
    say_inputs(job)
    name = _run_name(job)
    folder = runs_folder(recipe, options.results, options.model_dir) / name
    for place in (folder.parent, job.store.folder):
        sweep(place)
    if folder.is_dir():
        if _intact(folder):
            make_newest(folder)
            return Finished(folder, read_report(folder), reused=True)
        log.warning(MADE_AGAIN, folder)
        discard(folder)
    with staged(folder) as temporary:
        temporary.mkdir()
        quantized, rows = _quantize_all(job)
        offer_evaluations(job, {t: result.artifact for t, result in quantized.items()}, job.selection.report)
        for target, result in quantized.items():
            rows += judge_target(job, target, result.plan, result.artifact, job.selection.report, name)
        report = EvalReport(rows=of_twins(rows) if job.files.twin else rows)
        _write_run(job, name, quantized, report, temporary)
    return Finished(folder, report, reused=False)


def _intact(folder: Path) -> bool:
    try:
        return load_manifest(folder).intact(folder)
    except InputError:
        return False


def _run_name(job: Job) -> str:
    """What a search or a training owes to the clock is an input of its run: another artifact is another run."""
    if not job.recipe.clocked:
        return job.run_name
    quantized, _ = _quantize_all(job)
    return digest([job.run_name, {target: file_digests(found.artifact) for target, found in quantized.items()}])[:12]


def _quantize_all(job: Job) -> tuple[dict[TargetName, Quantized], list[JudgedRow | SkippedRow]]:
    quantized: dict[TargetName, Quantized] = {}
    rows: list[JudgedRow | SkippedRow] = []
    for target in job.recipe.targets:
        try:
            quantized[target] = quantize(job, target)
        except Unavailable as error:
            if len(rows) + 1 == len(job.recipe.targets):
                raise
            rows += skipped_rows(job.recipe, [target], error.reason, error.fix)
    return quantized, rows


def quantize(job: Job, target: TargetName) -> Quantized:
    """Plan and artifact of one target; targets with equal choices share their plan."""
    planned = planned_stage(job, target)
    rungs = load_rungs(planned)
    plan = load_plan(planned)
    graph = prepared_graph(job)
    original = old_ir_form(prepared_stage(job))
    if original is None and has_loop(graph) and target_format(target) == "paddle":
        raise missing_loop(prepared_stage(job))
    plan = fitted(target, graph, plan, original)
    if original is not None and target_format(target) == "paddle" and not plan.quantized():
        raise nothing_in_int8(graph)
    plan.target = target
    try:
        artifact = _artifact_stage(job, target, graph, plan, planned)
    except RuntimeDiffers as error:
        plan = _without_misread(job, target, graph, plan, planned, error)
        artifact = _artifact_stage(job, target, graph, plan, planned)
    return Quantized(plan, rungs, artifact, planned)


def _artifact_stage(job: Job, target: TargetName, graph: Graph, plan: QuantPlan, planned: Path) -> Path:
    """Stage: the artifact of a plan, compared with it on its runtime."""
    original = old_ir_form(prepared_stage(job))

    def build(folder: Path) -> None:
        advance = counted(job.options.progress, f"{job.recipe.name}: exporting for {target}", 1)
        feeds = first_feeds(job, job.selection.calibration, CHECK_PICTURES)
        if has_loop(graph) and target_format(target) == "onnx" and TARGETS[target].executed:
            prepared = prepared_stage(job) / "prepared"
            check_runtime(target, prepared, feeds, job.recipe.tolerance, job.options.threads)
        export_artifact(target, graph, plan, job.files.inference_yml, folder, original)
        check_artifact(target, folder, graph, plan, feeds, job.options.threads)
        if has_loop(graph) and TARGETS[target].executed:
            check_repeats(target, folder, feeds, job.recipe.tolerance, job.options.threads)
        advance()

    key = {**_executed_plan(job, target, plan, planned), "tolerance": job.recipe.tolerance}
    return job.store.result("artifact", {**key, "bridged": original is not None}, build)


def _executed_plan(job: Job, target: TargetName, plan: QuantPlan, planned: Path) -> dict[str, Any]:
    """What stages depend on that execute a plan: numbers stand in the files, what was changed since in the document."""
    return {**job.key, "plan": [file_digests(planned), digest(plan.document())], "target": target}


def _without_misread(
    job: Job, target: TargetName, graph: Graph, plan: QuantPlan, planned: Path, error: RuntimeDiffers
) -> QuantPlan:
    """The plan without the operators that its runtime computes wrongly in INT8; raises the error if there are none."""

    def build(folder: Path) -> None:
        feeds = first_feeds(job, job.selection.calibration, CHECK_PICTURES)
        wrong = misread_operators(target, graph, plan, feeds, job.options.threads)
        (folder / "misread.json").write_text(json.dumps(wrong), encoding="utf-8")

    if target_format(target) != "onnx":
        raise error
    stage = job.store.result("misread", _executed_plan(job, target, plan, planned), build)
    wrong = json.loads((stage / "misread.json").read_text(encoding="utf-8"))
    if not wrong:
        raise error
    return plan.with_only(set(plan.quantized()) - set(wrong), f"{target} computes something else with it in INT8")


def read_report(folder: Path) -> EvalReport:
    """The rows of a finished run."""
    try:
        return read_record(folder / "metrics.json", EvalReport)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: metrics.json is missing or damaged; delete the folder and run again") from error


def _timed_rungs(result: Quantized) -> list[Rung]:
    """The rungs, with the seconds that training took."""
    seconds = read_seconds(result.planned)
    return [replace(rung, seconds=seconds.get(rung.name)) for rung in result.rungs]


def _write_run(job: Job, name: str, quantized: dict[TargetName, Quantized], report: EvalReport, folder: Path) -> None:
    """Lay out results/<model>/<run>/."""
    artifacts: dict[TargetName, dict[str, str]] = {}
    advance = counted(job.options.progress, f"{job.recipe.name}: writing the run", len(quantized))
    for target, result in quantized.items():
        shutil.copytree(result.artifact, folder / target, ignore=shutil.ignore_patterns(SEAL))
        artifacts[target] = artifact_digests(folder / target)
        result.plan.save(folder / "plans" / target)
        for path in [*result.planned.glob("search.*"), *map(result.planned.joinpath, TRAINING_FILES)]:
            if path.is_file():
                shutil.copy(path, folder / "plans" / target)
        ranges = range_charts(calibrated_statistics(job, target), result.plan)
        save_ranges(ranges, folder / "plans" / target / RANGES)
        if any(row.target == target and row.status == "judged" for row in report.rows):
            judged = judged_stage(job, target, result.plan, result.artifact, job.selection.report)
            shutil.copytree(judged / "exhibits", folder / EXHIBITS / target)
        advance()
    plans = {str(target): result.plan.document() for target, result in quantized.items()}
    text = json.dumps({"schema": 1, "plans": plans}, indent=1, sort_keys=True)
    (folder / "plan.json").write_text(text + "\n", encoding="utf-8")
    (folder / "metrics.json").write_text(report.to_json(), encoding="utf-8")
    recipe, selection = job.recipe, job.selection
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    manifest = Manifest(
        model=recipe.name,
        run=name,
        created=now(),
        recipe=recipe.model_dump(mode="json", by_alias=True),
        recipe_sha256=recipe.content_hash(),
        source=without_places(job.files.source),
        model_sha256=job.files.sha256,
        data=selection.records,
        unavailable=selection.unavailable,
        calibration_ids=sample_ids(selection.calibration),
        search_ids=sample_ids(selection.search),
        report_ids=sample_ids(selection.report),
        proof=vars(read_proof(prepared_stage(job))),
        ladder={target: _timed_rungs(result) for target, result in quantized.items()},
        artifacts=artifacts,
        files={name: file_sha256(path) for name, path in files.items() if name.partition("/")[0] not in artifacts},
        seed=recipe.seed,
        threads=job.options.threads,
        code_sha256=code_digest(),
        versions=versions(),
        processor=processor(),
    )
    for target, result in quantized.items():
        write_card(_subject(job, manifest, target, result.plan, report), folder / target)
    manifest.save(folder)


def _subject(job: Job, manifest: Manifest, target: TargetName, plan: QuantPlan, report: EvalReport) -> Subject:
    """What the card of an artifact is about."""
    described = job.files.inference_yml.get("Global") or {}
    return Subject(
        manifest=manifest,
        target=target,
        plan=plan,
        rows=[row for row in report.rows if row.target == target],
        model_name=str(described.get("model_name") or job.recipe.name),
        inputs={name: values.shape for name, values in feed_of(job, job.recipe.latency.shape).items()},
        steps=has_loop(prepared_graph(job)),
    )
