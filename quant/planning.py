"""The plan of one target: calibrate or ask PaddleSlim, equalize, round, correct, climb the ladder, perhaps train."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from eval.dataset import Sample
from eval.evaluation import readable
from eval.metric import make_metric
from eval.statistics import compare_counts
from quant.arrays import write_array
from quant.bias import corrected_operators, sequential_biases
from quant.calibration import Statistics, collect_statistics, load_statistics, mean_work, save_statistics
from quant.equalization import Equalizer, equalize, load_equalizers, make_equalizers, save_equalizers
from quant.errors import InputError
from quant.flow import find_chains
from quant.graph import Graph
from quant.job import (
    Job,
    calibration_feeds,
    counted,
    first_feeds,
    labels_digest,
    prepared_graph,
    prepared_stage,
    sample_ids,
    tracked,
    work_feeds,
)
from quant.judging import outcomes_of
from quant.ladder import (
    TRAINED,
    TRAINING_FILES,
    Limits,
    SearchScore,
    best_rung,
    climb,
    fits,
    load_rungs,
    read_seconds,
    reverts,
    save_rungs,
    trains,
    try_plan,
    write_seconds,
)
from quant.least_squares import fitted_operators, refit
from quant.manifest import processor, products_saturate
from quant.observer import candidate_methods, make_range_method
from quant.plan import (
    FULL_WEIGHTS,
    REDUCED_WEIGHTS,
    Operator,
    QuantPlan,
    corrected_graph,
    load_plan,
    quantizable_operators,
    quantize_weight,
)
from quant.policy import kept
from quant.ptq import (
    activation_tensors,
    correct_biases,
    make_plan,
    observed_outputs,
    scales_for_biases,
    stored_name,
    stored_outputs,
    with_damages,
)
from quant.ranges import PerTensor
from quant.recipe import Recipe, TargetChoice
from quant.rounding import collect_moments, round_by_moments
from quant.runtime import Feed, Session, onnx_session
from quant.search import FINAL_SHARE, Point, confirmed, draw_front, explore, front, taken, timed_again
from quant.sensitivity import OutputError, load_errors, measure_errors, output_error, save_errors
from quant.simulation import simulated_session
from quant.speed import exported_plan, measured_gains, relative_latencies
from quant.stage import file_digests
from quant.storage import scratch
from quant.target import TARGETS, TargetName


def planned_stage(job: Job, target: TargetName) -> Path:
    """Stage: the plan of a target, with `ladder.json` and, where a search was asked for, `search.json` and its plot.

    Targets with equal choices share their plan, unless its latency was measured.
    """
    laddered = _laddered_stage(replace(job, targets=_sharing(job.recipe, target)), job.recipe.targets[target])
    minutes, latency = job.recipe.search.minutes, job.recipe.latency.model_dump(exclude={"shapes"})
    if not minutes or not TARGETS[target].executed:
        return laddered

    def build(folder: Path) -> None:
        shutil.copyfile(laddered / "ladder.json", folder / "ladder.json")
        write_seconds(read_seconds(laddered), folder)
        for name in TRAINING_FILES:
            if (laddered / name).is_file():
                shutil.copyfile(laddered / name, folder / name)
        end = time.monotonic() + 60 * minutes * (1 - FINAL_SHARE)
        limits = Limits.of(job.recipe.ladder, job.recipe.gate)
        tried = _explored(replace(job, targets=(target,)), target, laddered, end)
        timed = timed_again(tried, partial(relative_latencies, job, target))
        points = confirmed(timed, limits, partial(_target_score, job, target))
        final = taken(points, limits)
        plan = final.plan
        plan.method = plan.method if final is points[0] else f"{plan.method}+search"
        plan.save(folder)
        best = front(points)
        documents = [{**p.document(), "front": p in best, "chosen": p is final} for p in points]
        (folder / "search.json").write_text(json.dumps(documents, sort_keys=True), encoding="utf-8")
        draw_front(points, final, f"{job.recipe.name} on {target}", folder / "search.svg")

    key = {
        **_judged_by(job),
        "target": target,
        "plans": [file_digests(laddered), file_digests(full_stage(job, job.recipe.targets[target]))],
        "min_coverage": least_coverage(job.recipe, job.recipe.targets[target]),
        "minutes": minutes,
        "latency": latency,
        "processor": processor(),
    }
    return job.store.result("explored", key, build)


def _sharing(recipe: Recipe, target: TargetName) -> tuple[TargetName, ...]:
    """Targets whose plan is that of a target."""
    choices = {name: choice.model_dump(exclude={"judged_in"}) for name, choice in recipe.targets.items()}
    return tuple(name for name, choice in choices.items() if choice == choices[target])


def _judged_by(job: Job) -> dict[str, Any]:
    """What the score of a plan on the search split depends on, beside the plan."""
    recipe = job.recipe
    return {
        **job.key,
        "calibration": recipe.calibration.model_dump(),
        "ladder": recipe.ladder.model_dump(),
        "gate": recipe.gate.model_dump(),
        "samples": [sample_ids(job.selection.calibration), sample_ids(job.selection.search)],
        "labels": labels_digest(job.selection.search),
        "metric": recipe.metric,
        "seed": recipe.seed,
    }


def _explored(job: Job, target: TargetName, laddered: Path, end: float) -> list[Point]:
    """The search on the target's own runtime, from the ladder's plan; a trained plan is the only point.

    Its weights and biases fit the operators that are in INT8, and correcting biases anew would undo what they learned.
    """
    recipe, graph = job.recipe, prepared_graph(job)
    judge, measure = SearchJudge(job, graph), partial(_latency, job, target)
    full, best = full_plan(job, recipe.targets[target]), load_plan(laddered)
    reverted = len(full.quantized()) - len(best.quantized())
    if trained := TRAINED.intersection(best.method.split("+")):
        note = f"no faster plan was looked for: {' and '.join(sorted(trained))} fitted this one to its operators"
        best.notes.append(note)
        rung = try_plan("ladder", best, reverted, recipe.ladder, recipe.gate, judge)
        return [Point(best, rung, measure(best))]
    shifts = full.bias_shifts | best.bias_shifts
    integers = full.integers | best.integers
    plan = replace(full, operators=best.operators, integers=integers, bias_shifts=shifts, method=best.method)
    rung = try_plan("ladder", plan, reverted, recipe.ladder, recipe.gate, judge)
    floor = least_coverage(job.recipe, recipe.targets[target])
    return explore(
        Point(plan, rung, measure(plan)),
        measured_gains(job, target, full),
        (recipe.ladder, recipe.gate),
        judge,
        measure,
        partial(_with_full_biases, job, graph),
        lambda plan: plan.coverage() >= floor and plan.weight_share() >= recipe.ladder.min_weights,
        lambda: time.monotonic() < end,
    )


def _latency(job: Job, target: TargetName, plan: QuantPlan) -> float:
    return relative_latencies(job, target, [plan])[0]


def _target_score(job: Job, target: TargetName, plan: QuantPlan) -> SearchScore:
    """The artifact on its own runtime against FP32 as shipped there, on the search split: as the gate will judge it."""
    samples = job.selection.search
    advance = counted(job.options.progress, job.title(f"search split on {target}"), len(samples))
    with scratch() as place:
        outcomes = outcomes_of(job, target, exported_plan(job, target, plan, place), samples, advance)
    return _search_score(job, outcomes.fp32, outcomes.int8)


def _laddered_stage(job: Job, choice: TargetChoice) -> Path:
    """Stage: the plan that the ladder chose, with `ladder.json`; trained where none passed or training was asked for.

    What was climbed is a stage of its own: a training that is killed, or asked for anew, goes on from there.
    """
    climbed = _climbed_stage(job, choice)
    rungs, checkpoints = load_rungs(climbed), list[Path]()
    if not trains(job.recipe.ladder, best_rung(rungs)):
        return climbed

    def build(folder: Path) -> None:
        from quant.rungs import train_on  # not above: Paddle is wanted where something is trained

        graph = prepared_graph(job)
        judge, refine = SearchJudge(job, graph), partial(_with_full_biases, job, graph)
        trained = train_on(job, graph, load_plan(climbed), best_rung(rungs), judge, refine, folder)
        checkpoints.extend(trained.checkpoints)
        write_seconds(trained.seconds, folder)
        save_rungs(rungs + trained.rungs, folder)
        trained.plan.save(folder)

    settings = [job.recipe.reconstruction.model_dump(), job.recipe.qat.model_dump()]
    done = job.store.result("trained", {**_judged_by(job), "plan": file_digests(climbed), "training": settings}, build)
    for checkpoint in checkpoints:
        checkpoint.unlink(missing_ok=True)
    return done


def _climbed_stage(job: Job, choice: TargetChoice) -> Path:
    """Stage: the plan that the ladder's lower rungs chose, those before training, with `ladder.json`."""
    recipe = job.recipe
    everything = full_stage(job, choice)

    def build(folder: Path) -> None:
        def damaged(plan: QuantPlan) -> QuantPlan:
            damages = {name: error.damage for name, error in alone_errors(job, choice).items()}
            return replace(plan, operators=with_damages(plan.operators, damages))

        graph = prepared_graph(job)
        minimum = least_coverage(job.recipe, choice) if reverts(recipe.ladder) else 1.0
        judge, refine = SearchJudge(job, graph), partial(_with_full_biases, job, graph)
        fit = partial(fitted, job, graph) if fits(recipe.ladder) else None
        best, rungs = climb(load_plan(everything), recipe.ladder, recipe.gate, minimum, judge, damaged, refine, fit)
        best.save(folder)
        save_rungs(rungs, folder)

    key = {**_judged_by(job), "plan": file_digests(everything), "min_coverage": choice.min_coverage}
    return job.store.result("plan", key, build)


def least_coverage(recipe: Recipe, choice: TargetChoice) -> float:
    """Where the ladder ends on a target."""
    return recipe.ladder.min_coverage if choice.min_coverage is None else choice.min_coverage


def full_plan(job: Job, choice: TargetChoice) -> QuantPlan:
    """The plan with everything in INT8 that has a kernel for it, before any operator goes back to FP32."""
    return load_plan(full_stage(job, choice))


def full_stage(job: Job, choice: TargetChoice) -> Path:
    """Stage: calibrated, equalized, rounded, ranges and biases corrected."""
    recipe = job.recipe
    key = {
        **job.key,
        "choice": choice.model_dump(exclude={"min_coverage", "judged_in"}),
        "largest_weight": _largest_weight(choice),
        "calibration": recipe.calibration.model_dump(),
        "slim": recipe.paddleslim.model_dump(),
        "samples": sample_ids(job.selection.calibration),
        "policy": [entry.model_dump() for entry in recipe.policy],
        "shape": recipe.latency.shape,
        "seed": recipe.seed,
    }

    def build(folder: Path) -> None:
        graph = prepared_graph(job)
        equalizers = _equalizers(job, graph, choice)
        equalized = equalize(graph, equalizers, equalizers)
        plan = _base_plan(job, equalized, choice)
        plan.equalizers = equalizers
        biases = recipe.calibration.bias_correction != "none"
        if recipe.calibration.rounding == "second_moment":
            feeds = calibration_feeds(job, "rounding weights", recipe.calibration.rounding_samples)
            # On a busy machine the threads of small matrix products wait for one another far longer than they work.
            with threadpool_limits(limits=1, user_api="blas"):
                moments = collect_moments(equalized, plan.operators, feeds, job.options.threads, recipe.seed)
                plan.integers = round_by_moments(equalized, plan, moments, biases_follow=biases)
            plan.notes.append(f"weights rounded by second moments: {', '.join(sorted(moments))}")
        if recipe.calibration.range == "per_tensor" and choice.method == "ptq":
            plan = _with_best_ranges(job, equalized, plan, choice)
        plan.integers = scales_for_biases(equalized, plan)
        if recipe.calibration.bias_correction == "fast":
            plan.bias_shifts = _fast_biases(job, equalized, plan, None)
        _with_full_biases(job, graph, plan).save(folder)

    return job.store.result("full", key, build)


def alone_stage(job: Job, choice: TargetChoice) -> Path:
    """Stage: the full plan with biases for scores of the metric with one operator alone, or one kind, in INT8."""
    everything = full_stage(job, choice)
    if job.recipe.calibration.bias_correction != "full":
        return everything

    def build(folder: Path) -> None:
        plan = load_plan(everything)
        graph = equalize(prepared_graph(job), plan.equalizers, plan.equalizers)
        plan.bias_shifts = _fast_biases(job, graph, plan, job.recipe.calibration.bias_samples)
        plan.save(folder)

    samples = sample_ids(job.selection.calibration)[: job.recipe.calibration.bias_samples]
    return job.store.result("alone", {**job.key, "plan": file_digests(everything), "samples": samples}, build)


def _fast_biases(job: Job, equalized: Graph, plan: QuantPlan, limit: int | None) -> dict[str, np.ndarray]:
    """Corrections of each convolution for its own rounding, as if it alone were in INT8."""
    feeds = calibration_feeds(job, "correcting biases", limit)
    return correct_biases(equalized, plan, feeds, job.options.threads)


def _with_full_biases(job: Job, graph: Graph, plan: QuantPlan) -> QuantPlan:
    """The plan with biases that fit the operators that it quantizes, and one another."""
    if job.recipe.calibration.bias_correction != "full":
        return plan
    feeds = first_feeds(job, job.selection.calibration, job.recipe.calibration.bias_samples)
    advance = counted(job.options.progress, job.title("correcting biases"), len(corrected_operators(plan)))
    return replace(plan, bias_shifts=sequential_biases(graph, plan, feeds, job.options.threads, advance))


def fitted(job: Job, graph: Graph, plan: QuantPlan) -> QuantPlan:
    """The plan with weights and biases that fit the operators that it quantizes."""
    feeds = first_feeds(job, job.selection.calibration, job.recipe.ladder.fit_samples)
    layers = len(fitted_operators(corrected_graph(graph, plan), plan))
    advance = counted(job.options.progress, job.title("fitting weights"), layers)
    found, results = refit(graph, plan, feeds, job.options.threads, job.recipe.seed, advance)
    nearer = sum(result.after < result.before for result in results)
    return replace(found, notes=[*plan.notes, f"weights of {nearer} of {len(results)} layers fitted to FP32"])


def _equalizers(job: Job, graph: Graph, choice: TargetChoice) -> dict[str, Equalizer]:
    """Stage: the equalizers that fit a scope and a placement."""

    def build(folder: Path) -> None:
        chains = find_chains(graph) if choice.placement == "outputs" else None
        feeds = calibration_feeds(job, "equalizing channels")
        save_equalizers(make_equalizers(graph, choice.equalization, feeds, job.options.threads, chains), folder)

    scope = [choice.equalization, choice.placement]
    key = {**job.key, "samples": sample_ids(job.selection.calibration), "scope": scope}
    return load_equalizers(job.store.result("equalization", key, build))


def _base_plan(job: Job, graph: Graph, choice: TargetChoice) -> QuantPlan:
    """Everything in INT8: ranges by our own calibration or by PaddleSlim."""
    recipe = job.recipe
    operators = _operators(job, graph, choice)
    prepared_sha256 = file_digests(prepared_stage(job) / "prepared")["inference.onnx"]
    if choice.method == "paddleslim":
        from quant.slim import load_scales, slim_plan, slim_scales

        samples = job.selection.calibration[: recipe.paddleslim.samples]
        key = {
            **job.key,
            "slim": recipe.paddleslim.model_dump(),
            "samples": sample_ids(samples),
            "equalized": [choice.equalization, choice.placement, sample_ids(job.selection.calibration)],
            "fp32": choice.fp32,
            "policy": [entry.model_dump() for entry in recipe.policy],
        }

        def build(folder: Path) -> None:
            feeds = (prepared.inputs for _, prepared in readable(samples, job.adapter, []))
            advance = partial(job.options.progress, job.title("PaddleSlim PTQ"))
            advance(0, len(samples))
            slim_scales(graph, feeds, recipe.paddleslim, folder, advance).save(folder)

        scales = load_scales(job.store.result("slim", key, build))
        plan = slim_plan(
            graph,
            operators,
            scales,
            model=recipe.name,
            target="",
            dtype=choice.activations,
            prepared_sha256=prepared_sha256,
        )
        if (largest := _largest_weight(choice)) != FULL_WEIGHTS:
            for name, quantizer in plan.weights.items():
                plan.integers[name] = quantize_weight(graph.constants[name], quantizer.axis, largest)
        return plan
    statistics, outputs = _statistics(job, graph, operators, choice)
    method = make_range_method(recipe.calibration.range, recipe.calibration.percentile)
    plan = make_plan(
        graph,
        operators,
        statistics,
        method,
        model=recipe.name,
        dtype=choice.activations,
        prepared_sha256=prepared_sha256,
        largest=_largest_weight(choice),
    )
    plan.outputs = stored_outputs(outputs, statistics, method, choice.activations)
    return plan


def _with_best_ranges(job: Job, graph: Graph, plan: QuantPlan, choice: TargetChoice) -> QuantPlan:
    """The plan with the range of each tensor that hurts its readers least."""
    calibration = job.recipe.calibration
    statistics, outputs = _statistics(job, graph, plan.operators, choice)
    method = PerTensor(tuple(candidate_methods(calibration.percentile)))
    feeds = first_feeds(job, job.selection.calibration, calibration.range_samples)
    return method.refine(graph, plan, statistics, outputs, feeds, job.options.threads)


def calibrated_statistics(job: Job, target: TargetName) -> Statistics:
    """Histograms that the ranges of a target were chosen from, by its quantizers' tensors; none with PaddleSlim."""
    choice = job.recipe.targets[target]
    if choice.method == "paddleslim":
        return {}
    graph = prepared_graph(job)
    equalizers = _equalizers(job, graph, choice)
    equalized = equalize(graph, equalizers, equalizers)
    statistics, outputs = _statistics(job, equalized, _operators(job, equalized, choice), choice)
    return statistics | {stored_name(name, observed): statistics[observed] for name, observed in outputs.items()}


def _statistics(
    job: Job, graph: Graph, operators: list[Operator], choice: TargetChoice
) -> tuple[Statistics, dict[str, str]]:
    """Histograms of every tensor that may be quantized, and which of them belong to stored outputs."""
    observed, outputs = observed_outputs(graph, operators) if choice.placement == "outputs" else (graph, {})
    tensors = [*activation_tensors(operators), *outputs.values()]
    return load_statistics(_calibrated(job, observed, tensors, choice) / "statistics.npz"), outputs


def _largest_weight(choice: TargetChoice) -> int:
    reduced = choice.weights == "reduced" or (
        choice.weights == "auto" and choice.activations == "uint8" and products_saturate()
    )
    return REDUCED_WEIGHTS if reduced else FULL_WEIGHTS


def _calibrated(job: Job, graph: Graph, tensors: list[str], choice: TargetChoice) -> Path:
    """Stage: histograms of every tensor that may be quantized."""
    momentum, threads = job.recipe.calibration.momentum, job.options.threads

    def build(folder: Path) -> None:
        feeds = calibration_feeds(job, "calibrating")
        statistics = collect_statistics(graph, tensors, feeds, threads, momentum, len(job.selection.calibration))
        save_statistics(statistics, folder / "statistics.npz")

    key = {
        **job.key,
        "samples": sample_ids(job.selection.calibration),
        "equalized": choice.equalization,
        "placement": choice.placement,
        "momentum": momentum,
        "tensors": tensors,
    }
    return job.store.result("calibration", key, build)


def alone_errors(job: Job, choice: TargetChoice) -> dict[str, OutputError]:
    """Stage: how far the outputs move when one operator of the full plan is in INT8, for each of them."""
    everything, count = full_stage(job, choice), job.recipe.ladder.damage_samples

    def build(folder: Path) -> None:
        plan = load_plan(everything)
        parts = {name: {name} for name in plan.quantized()}
        advance = counted(job.options.progress, job.title("damage per operator"), len(parts))
        save_errors(part_errors(job, plan, parts, advance), folder / "errors.json")

    samples = [sample_ids(job.selection.calibration), sample_ids(job.selection.search)]
    key = {**job.key, "plan": file_digests(everything), "samples": samples, "count": count}
    return load_errors(job.store.result("damage", key, build) / "errors.json")


def part_errors(
    job: Job, plan: QuantPlan, parts: Mapping[str, set[str]], advance: Callable[[], None]
) -> dict[str, OutputError]:
    """How far the outputs move for each part of a plan, measured on a few pictures of the search split."""
    count = job.recipe.ladder.damage_samples
    corrected = job.recipe.calibration.bias_correction == "full"
    calibration = first_feeds(job, job.selection.calibration, count) if corrected else []
    feeds = first_feeds(job, job.selection.search, count)
    return measure_errors(prepared_graph(job), plan, parts, calibration, feeds, job.options.threads, advance)


@dataclass(frozen=True)
class SearchJudge:
    """Judges plans on the search split, in simulation on onnxruntime.

    Attributes:
        pictures: the first that plans are scored on; None = all.
    """

    job: Job
    graph: Graph
    pictures: int | None = None

    def error(self, plan: QuantPlan) -> float:
        feeds, exact = self._exact
        return output_error(self._session(plan, self.job.options.threads), feeds, exact)

    def score(self, plan: QuantPlan) -> SearchScore:
        title = self.job.title(f"search split at coverage {plan.coverage():.3f}")
        search = self.job.selection.search[: self.pictures]
        scores = _search_scores(self.job, search, self._session(plan, 1), title)
        exact = np.load(_exact_search_scores(self.job, self.graph) / "scores.npy", allow_pickle=False)
        return _search_score(self.job, exact[: len(scores)], scores)

    @cached_property
    def _exact(self) -> tuple[list[Feed], list[list[np.ndarray]]]:
        feeds = first_feeds(self.job, self.job.selection.search, self.job.recipe.ladder.error_samples)
        session = onnx_session(self.graph.to_light_model(), self.job.options.threads)
        return feeds, [session.run(feed) for feed in feeds]

    def _session(self, plan: QuantPlan, threads: int) -> Session:
        return simulated_session(self.graph, plan, threads)


def _search_score(job: Job, exact: np.ndarray, scores: np.ndarray) -> SearchScore:
    """From counts of the metric for each picture, of FP32 and of INT8."""
    estimate = compare_counts(make_metric(job.recipe.metric), exact, scores)
    return SearchScore(estimate.drop, estimate.relative_drop, estimate.discordance, estimate.samples)


def _exact_search_scores(job: Job, graph: Graph) -> Path:
    """Stage: the prepared FP32 model on the search split; every plan is compared with it."""

    search = job.selection.search

    def build(folder: Path) -> None:
        session = onnx_session(graph.to_light_model(), 1)
        scores = _search_scores(job, search, session, f"{job.recipe.name}: FP32 on the search split")
        write_array(folder / "scores.npy", scores)

    key = {**job.key, "samples": sample_ids(search), "labels": labels_digest(search), "metric": job.recipe.metric}
    return job.store.result("search", {**key, "tolerance": job.recipe.tolerance}, build)


def _search_scores(job: Job, search: Sequence[Sample], session: Session, title: str) -> np.ndarray:
    """Counts of the metric for each readable picture, in their order; the session serves several threads."""
    adapter, metric = job.adapter, make_metric(job.recipe.metric)

    def score(sample: Sample) -> list[np.ndarray]:
        pictures = (prepared for _, prepared in readable([sample], adapter, []))
        return [metric.score(adapter.postprocess(session.run(p.inputs), p.context), sample.label) for p in pictures]

    with ThreadPoolExecutor(job.options.threads) as pool:
        scores = tracked(pool.map(score, search), job.options.progress, title, len(search))
        return np.array([counts for found in scores for counts in found])


def _operators(job: Job, graph: Graph, choice: TargetChoice) -> list[Operator]:
    operators = quantizable_operators(graph, mean_work(graph, work_feeds(job), job.options.threads).macs)
    known = {op.name for op in operators}
    if unknown := [name for name in choice.fp32 if name not in known]:
        raise InputError(f"targets.*.fp32: '{unknown[0]}' is no Conv, ConvTranspose or MatMul of {job.recipe.name}")
    named = {"quantized": False, "reason": "the recipe keeps it in FP32"}
    operators = [op.model_copy(update=named) if op.name in choice.fp32 else op for op in operators]
    return kept(graph, operators, job.recipe.policy)
