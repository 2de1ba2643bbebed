"""The main job: fetch, prepare, calibrate, quantize, export, evaluate, gate.

Every step is a stage whose result is stored under the hash of its inputs (see `quant.stage`), so
a run can stop anywhere and go on, and the same run done again does no work.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx

from eval.benchmark import interleaved_latency
from eval.dataset import Sample, by_shape, picture_of
from eval.evaluation import Outcomes, compare, judged_rows, load_outcomes, readable
from eval.gate import EvalReport, JudgedRow, SkippedRow
from eval.metric import make_metric
from eval.statistics import estimate_drop
from quant.archive import Progress, staged
from quant.calibration import collect_statistics, count_work, load_statistics, save_statistics
from quant.equalization import Equalizer, equalize, load_equalizers, make_equalizers, save_equalizers
from quant.errors import InputError, Unavailable
from quant.export import check_artifact, export_artifact
from quant.graph import Graph
from quant.ladder import Rung, SearchScore, climb, load_rung
from quant.manifest import Manifest, load_manifest, newest_run, now, processor, versions
from quant.observer import make_range_method
from quant.plan import Operator, QuantPlan, load_plan, quantizable_operators
from quant.prepare import prepare, read_proof
from quant.ptq import activation_tensors, correct_biases, make_plan, with_damages
from quant.recipe import EqualizationScope, Recipe, TargetChoice, TargetName
from quant.rounding import collect_moments, round_by_moments
from quant.runtime import (
    Feed,
    Session,
    model_files,
    onnx_session,
    open_session,
    streams,
    target_format,
)
from quant.selection import Selection, find_datasets, select, unused
from quant.sensitivity import measure_damages, output_error
from quant.simulation import simulated_model
from quant.source import SHIPPED_FILES, ModelFiles, cache_dir, resolve_model, without_places
from quant.stage import StageStore, code_digest, digest, file_digests
from quant.task import TaskAdapter, make_task

PROOF_PICTURES = 3
CHECK_PICTURES = 12
Item = TypeVar("Item")


@dataclass(frozen=True)
class Options:
    """What the command line says beside the recipe."""

    results: Path
    threads: int
    progress: Progress
    model_dir: Path | None = None
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder, its rows, and whether it had been done before."""

    folder: Path
    report: EvalReport
    reused: bool


@dataclass(frozen=True)
class Job:
    """Everything a run starts from."""

    recipe: Recipe
    options: Options
    files: ModelFiles
    selection: Selection
    store: StageStore

    @property
    def key(self) -> dict[str, Any]:
        """What every stage of the model depends on."""
        return {
            "model": self.files.sha256,
            "inference": digest(self.files.inference_yml),
            "threads": self.options.threads,
            "versions": versions(),
            "task": self.recipe.task,
        }

    @property
    def adapter(self) -> TaskAdapter:
        return make_task(self.recipe.task, self.files.inference_yml, self.recipe.name)

    @property
    def run_name(self) -> str:
        selection = self.selection
        return digest(
            {
                **self.key,
                "code": code_digest(),
                "recipe": self.recipe.content_hash(),
                "samples": [_ids(selection.calibration), _ids(selection.search), _ids(selection.report)],
                "labels": _labels([*selection.search, *selection.report]),
            }
        )[:12]


@dataclass(frozen=True)
class Quantized:
    """A target's plan, how the ladder came to it, and where its artifact is."""

    plan: QuantPlan
    rungs: list[Rung]
    artifact: Path


def run_model(recipe: Recipe, options: Options) -> Finished:
    """Quantize, export, evaluate and gate one model on every target of its recipe.

    Raises:
        Unavailable: the model or a data set cannot be had.
        InputError: an input is broken, or an export does not agree with its plan.
    """
    job = start(recipe, options)
    folder = options.results / recipe.name / job.run_name
    if folder.is_dir():
        manifest = load_manifest(folder)
        if manifest.intact(folder):
            return Finished(folder, read_report(folder), reused=True)
        shutil.rmtree(folder)
    with staged(folder) as temporary:
        temporary.mkdir()
        quantized = {target: quantize(job, target) for target in recipe.targets}
        rows: list[JudgedRow | SkippedRow] = []
        for target, result in quantized.items():
            rows += evaluate_target(job, target, result, job.selection.report)
        report = EvalReport(rows=rows)
        _write_run(job, quantized, report, temporary)
    return Finished(folder, report, reused=False)


def start(recipe: Recipe, options: Options) -> Job:
    """Find the model and the data of a run."""
    files = resolve_model(recipe, options.model_dir, options.progress)
    selection = select(recipe, options.data, options.progress)
    return Job(recipe, options, files, selection, StageStore(cache_dir() / "stages"))


def evaluate_model(recipe: Recipe, options: Options) -> EvalReport:
    """FP32 against the newest run's artifacts: a row per set, and the pooled row of every target.

    With `options.data` all samples of those sets that the run did not use are judged, else the
    report split of the recipe's sets. What cannot be had becomes a skipped row.
    """
    targets = list(recipe.targets)
    folder = newest_run(options.results, recipe.name)
    if folder is None:
        fix = f"Run `quant run {recipe.name}` (or `make quant MODEL={recipe.name}`)"
        return EvalReport(rows=_skipped(recipe, targets, "not quantized yet", fix))
    manifest = load_manifest(folder)
    if not manifest.intact(folder):
        fix = f"Run `quant run {recipe.name}` again"
        return EvalReport(rows=_skipped(recipe, targets, f"the artifacts in {folder} are damaged", fix))
    used = {*manifest.calibration_ids, *manifest.search_ids}
    if options.data:
        datasets, _ = find_datasets(recipe, options.data, options.progress)
        samples, dropped = unused(datasets, used)
        if dropped:
            options.progress(f"samples left out because calibration or search saw them: {dropped}", 1, 1)
        if not samples:
            raise InputError("every sample was used for calibration or search; give another set with --data")
    try:
        if not options.data:
            samples, _ = unused_report(select(recipe, (), options.progress), used)
        files = resolve_model(recipe, options.model_dir, options.progress)
    except Unavailable as error:
        return EvalReport(rows=_skipped(recipe, targets, error.reason, error.fix))
    if set(files.sha256.values()) != set(manifest.model_sha256.values()):
        reason = f"the newest run is of another FP32 model than {files.source}"
        return EvalReport(rows=_skipped(recipe, targets, reason, f"Run `quant run {recipe.name}` again"))
    judged = Selection([], [], samples, {}, {})
    job = Job(recipe, options, files, judged, StageStore(cache_dir() / "stages"))
    rows: list[JudgedRow | SkippedRow] = []
    for target in targets:
        if target not in manifest.artifacts:
            rows += _skipped(recipe, [target], "the newest run has no such target", f"Run `quant run {recipe.name}`")
            continue
        plan = load_plan(folder / "plans" / target)
        rows += evaluate_target(job, target, Quantized(plan, [], folder / target), samples)
    return EvalReport(rows=rows)


def unused_report(selection: Selection, used: set[str]) -> tuple[list[Sample], int]:
    """The report split without samples that another run's calibration or search used."""
    pictures = {picture_of(sample_id) for sample_id in used}
    kept = [sample for sample in selection.report if sample.picture not in pictures]
    return kept, len(selection.report) - len(kept)


def quantize(job: Job, target: TargetName) -> Quantized:
    """Plan and artifact of one target; targets with equal choices share their plan."""
    choice = job.recipe.targets[target]
    planned = _planned(job, choice)
    rungs = [load_rung(document) for document in _read_json(planned / "ladder.json")]
    plan = load_plan(planned)
    plan.target = target
    graph = _prepared_graph(job)

    def build(folder: Path) -> None:
        export_artifact(target, graph, plan, job.files.inference_yml, folder)
        feeds = _first_feeds(job, job.selection.calibration, CHECK_PICTURES)
        check_artifact(target, folder, graph, plan, feeds, job.options.threads)

    artifact = job.store.result("artifact", {**job.key, "plan": file_digests(planned), "target": target}, build)
    return Quantized(plan, rungs, artifact)


def evaluate_target(
    job: Job, target: TargetName, quantized: Quantized, samples: Sequence[Sample]
) -> list[JudgedRow | SkippedRow]:
    """Judge one artifact on its own runtime against the FP32 model as shipped on the same runtime."""
    recipe, threads = job.recipe, job.options.threads
    shipped = _prepared(job) / "shipped"
    metric = make_metric(recipe.metric)
    key = {
        "artifact": file_digests(quantized.artifact),
        "fp32": job.files.sha256,
        "target": target,
        "samples": _ids(samples),
        "labels": _labels(samples),
        "metric": recipe.metric,
        "datasets": [s.dataset for s in samples],
        "latency": recipe.latency.model_dump(),
        "threads": threads,
        "versions": versions(),
    }

    def build(folder: Path) -> None:
        advance = _advance(job.options.progress, f"{recipe.name}: evaluating {target}", len(samples))
        workers, each = streams(target, threads)

        def open_pair() -> tuple[Session, Session]:
            return open_session(target, shipped, each), open_session(target, quantized.artifact, each)

        compare(open_pair, by_shape(samples), job.adapter, metric, workers, advance).save(folder / "outcomes.npz")
        latency = _latency(job, target, quantized.artifact)
        (folder / "latency.json").write_text(json.dumps(latency), encoding="utf-8")

    try:
        stored = job.store.result("evaluation", key, build)
    except Unavailable as error:
        return _skipped(recipe, [target], error.reason, error.fix)
    outcomes = load_outcomes(stored / "outcomes.npz")
    for sentence in outcomes.broken:
        job.options.progress(f"left out: {sentence}", 1, 1)
    facts = _facts(job, target, quantized, outcomes, _read_json(stored / "latency.json"))
    return list(judged_rows(recipe, target, outcomes, metric, facts))


def read_report(folder: Path) -> EvalReport:
    """The rows of a finished run."""
    try:
        return EvalReport.model_validate_json((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: metrics.json is missing or damaged; delete the folder and run again") from error


def _planned(job: Job, choice: TargetChoice) -> Path:
    """Stage: the plan that the ladder chose, with `ladder.json`."""
    recipe = job.recipe
    key = {
        **job.key,
        "choice": choice.model_dump(),
        "calibration": recipe.calibration.model_dump(),
        "ladder": recipe.ladder.model_dump(),
        "slim": recipe.paddleslim.model_dump(),
        "gate": recipe.gate.model_dump(),
        "samples": [_ids(job.selection.calibration), _ids(job.selection.search)],
        "labels": _labels(job.selection.search),
        "latency": recipe.latency.model_dump(),
        "metric": recipe.metric,
        "seed": recipe.seed,
    }

    def build(folder: Path) -> None:
        graph = _prepared_graph(job)
        equalizers = _equalizers(job, graph, choice.equalization)
        equalized = equalize(graph, equalizers, equalizers)
        plan = _base_plan(job, equalized, choice)
        plan.equalizers = equalizers
        if recipe.calibration.rounding == "second_moment":
            feeds = _calibration_feeds(job, "rounding weights", recipe.calibration.rounding_samples)
            moments = collect_moments(equalized, plan.operators, feeds, job.options.threads, recipe.seed)
            plan.integers = round_by_moments(equalized, plan, moments, biases_follow=recipe.calibration.bias_correction)
        if recipe.calibration.bias_correction:
            feeds = _calibration_feeds(job, "correcting biases")
            plan.bias_shifts = correct_biases(equalized, plan, feeds, job.options.threads)
        plan.operators = with_damages(plan.operators, _damages(job, graph, plan))
        minimum = recipe.ladder.min_coverage if choice.min_coverage is None else choice.min_coverage
        chosen, rungs = climb(plan, recipe.ladder, recipe.gate, minimum, _SearchJudge(job, graph))
        chosen.save(folder)
        (folder / "ladder.json").write_text(json.dumps([r.document() for r in rungs], sort_keys=True), encoding="utf-8")

    return job.store.result("plan", key, build)


def _equalizers(job: Job, graph: Graph, scope: EqualizationScope) -> dict[str, Equalizer]:
    """Stage: the equalizers of a scope."""

    def build(folder: Path) -> None:
        feeds = _calibration_feeds(job, "equalizing channels")
        save_equalizers(make_equalizers(graph, scope, feeds, job.options.threads), folder)

    key = {**job.key, "samples": _ids(job.selection.calibration), "scope": scope}
    return load_equalizers(job.store.result("equalization", key, build))


def _base_plan(job: Job, graph: Graph, choice: TargetChoice) -> QuantPlan:
    """Everything in INT8: ranges by our own calibration or by PaddleSlim."""
    recipe = job.recipe
    operators = _operators(job, graph)
    prepared_sha256 = file_digests(_prepared(job))["prepared.onnx"]
    if choice.method == "paddleslim":
        from quant.slim import load_scales, slim_plan, slim_scales

        samples = job.selection.calibration[: recipe.paddleslim.samples]
        key = {
            **job.key,
            "slim": recipe.paddleslim.model_dump(),
            "samples": _ids(samples),
            "equalized": [choice.equalization, _ids(job.selection.calibration)],
        }

        def build(folder: Path) -> None:
            feeds = (prepared.inputs for _, prepared in readable(samples, job.adapter, []))
            what = f"{recipe.name}: PaddleSlim PTQ"
            advance = partial(job.options.progress, what)
            slim_scales(graph, feeds, recipe.paddleslim, folder, advance).save(folder)

        scales = load_scales(job.store.result("slim", key, build))
        return slim_plan(
            graph,
            operators,
            scales,
            model=recipe.name,
            target="",
            dtype=choice.activations,
            prepared_sha256=prepared_sha256,
        )
    statistics = load_statistics(_calibrated(job, graph, operators, choice.equalization) / "statistics.npz")
    method = make_range_method(recipe.calibration.range, recipe.calibration.percentile)
    return make_plan(
        graph,
        operators,
        statistics,
        method,
        model=recipe.name,
        dtype=choice.activations,
        prepared_sha256=prepared_sha256,
    )


def _calibrated(job: Job, graph: Graph, operators: list[Operator], scope: EqualizationScope) -> Path:
    """Stage: histograms of every activation that may be quantized."""

    def build(folder: Path) -> None:
        tensors = activation_tensors(operators)
        feeds = _calibration_feeds(job, "calibrating")
        save_statistics(collect_statistics(graph, tensors, feeds, job.options.threads), folder / "statistics.npz")

    key = {**job.key, "samples": _ids(job.selection.calibration), "equalized": scope}
    return job.store.result("calibration", key, build)


def _damages(job: Job, graph: Graph, plan: QuantPlan) -> dict[str, float]:
    recipe = job.recipe
    feeds = _first_feeds(job, job.selection.search, recipe.ladder.damage_samples)
    advance = _advance(job.options.progress, f"{recipe.name}: damage per operator", len(plan.quantized()))
    return measure_damages(graph, plan, feeds, job.options.threads, advance)


@dataclass(frozen=True)
class _SearchJudge:
    """Judges plans on the search split, in simulation on onnxruntime."""

    job: Job
    graph: Graph

    def error(self, plan: QuantPlan) -> float:
        feeds, exact = self._exact
        return output_error(self._session(plan, self.job.options.threads), feeds, exact)

    def score(self, plan: QuantPlan) -> SearchScore:
        recipe = self.job.recipe
        what = f"{recipe.name}: search split, coverage {plan.coverage():.3f}"
        scores = _search_scores(self.job, self._session(plan, 1), what)
        exact = np.load(_exact_search_scores(self.job, self.graph) / "scores.npy", allow_pickle=False)
        estimate = estimate_drop(make_metric(recipe.metric), exact, scores, seed=recipe.seed)
        return SearchScore(estimate.drop, estimate.relative_drop, estimate.discordance, estimate.samples)

    @cached_property
    def _exact(self) -> tuple[list[Feed], list[list[np.ndarray]]]:
        feeds = _first_feeds(self.job, self.job.selection.search, self.job.recipe.ladder.error_samples)
        session = onnx_session(self.graph.to_model(), self.job.options.threads)
        return feeds, [session.run(feed) for feed in feeds]

    def _session(self, plan: QuantPlan, threads: int) -> Session:
        return onnx_session(simulated_model(self.graph, plan), threads)


def _exact_search_scores(job: Job, graph: Graph) -> Path:
    """Stage: the prepared FP32 model on the search split; every plan is compared with it."""

    def build(folder: Path) -> None:
        session = onnx_session(graph.to_model(), 1)
        scores = _search_scores(job, session, f"{job.recipe.name}: FP32 on the search split")
        np.save(folder / "scores.npy", scores)

    search = job.selection.search
    key = {**job.key, "samples": _ids(search), "labels": _labels(search), "metric": job.recipe.metric}
    return job.store.result("search", {**key, "tolerance": job.recipe.tolerance}, build)


def _search_scores(job: Job, session: Session, what: str) -> np.ndarray:
    """Counts of the metric for each readable picture of the search split; the session serves several threads."""
    search, adapter, metric = job.selection.search, job.adapter, make_metric(job.recipe.metric)

    def score(sample: Sample) -> list[np.ndarray]:
        pictures = (prepared for _, prepared in readable([sample], adapter, []))
        return [metric.score(adapter.postprocess(session.run(p.inputs), p.context), sample.label) for p in pictures]

    with ThreadPoolExecutor(job.options.threads) as pool:
        scores = _tracked(pool.map(score, search), job.options.progress, what, len(search))
        return np.array([counts for found in scores for counts in found])


def _operators(job: Job, graph: Graph) -> list[Operator]:
    feed = {name: np.zeros(job.recipe.latency.shape, dtype=np.float32) for name in graph.inputs}
    return quantizable_operators(graph, count_work(graph, feed, job.options.threads).macs)


def _prepared(job: Job) -> Path:
    """Stage: `prepared.onnx`, its proof, and the FP32 model as shipped in both formats."""

    def build(folder: Path) -> None:
        feeds = _first_feeds(job, job.selection.calibration or job.selection.report, PROOF_PICTURES)
        job.options.progress(f"{job.recipe.name}: importing and folding", 0, 1)
        prepare(job.files, feeds, job.recipe.tolerance, job.options.threads, folder)
        shipped = folder / "shipped"
        shipped.mkdir()
        (folder / "imported.onnx").rename(shipped / "inference.onnx")
        for source, name in zip((job.files.model, job.files.params), SHIPPED_FILES[job.files.format], strict=True):
            shutil.copyfile(source, shipped / name)
        shutil.rmtree(folder / "import")
        job.options.progress(f"{job.recipe.name}: importing and folding", 1, 1)

    return job.store.result("prepared", {**job.key, "tolerance": job.recipe.tolerance}, build)


def _prepared_graph(job: Job) -> Graph:
    return Graph(onnx.load(_prepared(job) / "prepared.onnx"))


def _latency(job: Job, target: TargetName, artifact: Path) -> dict[str, float]:
    """Median milliseconds of FP32 as shipped, FP32 prepared (ONNX targets) and INT8."""
    prepared, threads = _prepared(job), job.options.threads
    folders = {"fp32": prepared / "shipped", "int8": artifact}
    sessions = {name: open_session(target, folder, threads) for name, folder in folders.items()}
    feed = {name: _noise(job.recipe) for name in _prepared_graph(job).inputs}
    if target == "onnxruntime":
        sessions["fp32_prepared"] = onnx_session(prepared / "prepared.onnx", threads)
    return interleaved_latency(sessions, feed, job.recipe.latency.runs)


def _noise(recipe: Recipe) -> np.ndarray:
    return np.random.default_rng(recipe.seed).uniform(-1, 1, recipe.latency.shape).astype(np.float32)


def _facts(
    job: Job, target: TargetName, quantized: Quantized, outcomes: Outcomes, latency: dict[str, float]
) -> dict[str, Any]:
    sizes = {
        place: sum(path.stat().st_size for path in model_files(folder, target_format(target)))
        for place, folder in (("fp32", _prepared(job) / "shipped"), ("int8", quantized.artifact))
    }
    return {
        "coverage": quantized.plan.coverage(),
        "method": quantized.plan.method,
        "fp32_bytes": sizes["fp32"],
        "int8_bytes": sizes["int8"],
        "latency_shape": job.recipe.latency.shape,
        "fp32_ms": latency["fp32"],
        "fp32_prepared_ms": latency.get("fp32_prepared"),
        "int8_ms": latency["int8"],
        "speedup": latency["fp32"] / latency["int8"],
    }


def _write_run(job: Job, quantized: dict[TargetName, Quantized], report: EvalReport, folder: Path) -> None:
    """Lay out results/<model>/<run>/."""
    artifacts = {}
    for target, result in quantized.items():
        shutil.copytree(result.artifact, folder / target)
        artifacts[str(target)] = file_digests(folder / target)
        result.plan.save(folder / "plans" / target)
    plans = {str(target): result.plan.document() for target, result in quantized.items()}
    text = json.dumps({"schema": 1, "plans": plans}, indent=1, sort_keys=True)
    (folder / "plan.json").write_text(text + "\n", encoding="utf-8")
    (folder / "metrics.json").write_text(report.to_json(), encoding="utf-8")
    recipe, selection = job.recipe, job.selection
    Manifest(
        model=recipe.name,
        run=job.run_name,
        created=now(),
        recipe=recipe.model_dump(mode="json", by_alias=True),
        recipe_sha256=recipe.content_hash(),
        source=without_places(job.files.source),
        model_sha256=job.files.sha256,
        data=selection.records,
        unavailable=selection.unavailable,
        calibration_ids=_ids(selection.calibration),
        search_ids=_ids(selection.search),
        report_ids=_ids(selection.report),
        proof=vars(read_proof(_prepared(job))),
        ladder={str(t): [rung.document() for rung in q.rungs] for t, q in quantized.items()},
        artifacts=artifacts,
        seed=recipe.seed,
        threads=job.options.threads,
        code_sha256=code_digest(),
        versions=versions(),
        processor=processor(),
    ).save(folder)


def _calibration_feeds(job: Job, what: str, limit: int | None = None) -> Iterator[Feed]:
    samples = job.selection.calibration[:limit]
    pictures = readable(samples, job.adapter, [])
    for _, prepared in _tracked(pictures, job.options.progress, f"{job.recipe.name}: {what}", len(samples)):
        yield prepared.inputs


def _first_feeds(job: Job, samples: Sequence[Sample], count: int) -> list[Feed]:
    """The first pictures that can be read."""
    feeds = [prepared.inputs for _, prepared in islice(readable(samples, job.adapter, []), count)]
    if not feeds:
        raise InputError(f"none of {len(samples)} pictures can be read, first {samples[0].image}; give another --data")
    return feeds


def _tracked(items: Iterable[Item], progress: Progress, what: str, total: int) -> Iterator[Item]:
    """Report every item that has been worked on."""
    progress(what, 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        progress(what, done, total)


def _advance(progress: Progress, what: str, total: int) -> Callable[[], None]:
    """A callable that reports one more of `total`."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    progress(what, 0, total)
    return step


def _skipped(recipe: Recipe, targets: Sequence[TargetName], reason: str, fix: str) -> list[JudgedRow | SkippedRow]:
    return [
        SkippedRow(model=recipe.name, task=recipe.task, target=target, reason=reason, fix=fix) for target in targets
    ]


def _ids(samples: Sequence[Sample]) -> list[str]:
    return [sample.id for sample in samples]


def _labels(samples: Sequence[Sample]) -> str:
    """Hash of sets and labels: a label that was mended is another input."""
    return digest([(sample.dataset, str(sample.label)) for sample in samples])


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
