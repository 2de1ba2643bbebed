"""The ladder's upper rungs, which change weights: reconstruction, then QAT, each from the best plan so far."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from quant.bias import sequential_biases
from quant.calibration import collect_statistics
from quant.errors import NotTrainable
from quant.graph import Graph
from quant.job import Job, counted, first_feeds, prepared_graph, sample_ids
from quant.ladder import Judge, Rung, badness, by_error, read_seconds, rung_at, write_seconds
from quant.launch import distil_together
from quant.least_squares import PartResult, refit
from quant.observer import MinMax
from quant.plan import QuantPlan, load_plan, quantizable_operators
from quant.ptq import activation_tensors, make_plan
from quant.qat import Evaluation, check_trainable, distil
from quant.recipe import Recipe
from quant.reconstruction import reconstruct
from quant.runtime import Feed
from quant.simulation import simulated_session
from quant.source import cache_dir
from quant.stage import code_digest, digest
from quant.training import batches, load_checkpoint

log = logging.getLogger(__name__)

Method = Literal["recon", "qat"]

METHODS: dict[str, tuple[Method, ...]] = {"auto": ("recon", "qat"), "recon": ("recon",), "qat": ("recon", "qat")}
"""What is tried in which order, by the recipe's `ladder.method`."""


@dataclass
class Trained:
    """What training left of a plan.

    Attributes:
        plan: the best one, which may be the one that was given.
        rungs: one for each method that was tried.
        seconds: that each took.
        checkpoints: files that are of no use any more once all this is kept.
    """

    plan: QuantPlan
    rungs: list[Rung] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    checkpoints: list[Path] = field(default_factory=list)


def train_on(
    job: Job,
    graph: Graph,
    plan: QuantPlan,
    rung: Rung,
    judge: Judge,
    corrected: Callable[[QuantPlan], QuantPlan],
    folder: Path,
) -> Trained:
    """Train from a plan, method after method until one passes; QAT is not left out where it was asked for.

    Args:
        rung: of the plan.
        corrected: corrects the biases of what was trained anew, which is kept where it makes the error smaller.
        folder: receives `recon.json`, the error of each part before and after, and `qat.json`, the learning curve.
    """
    done, methods = Trained(plan), _methods(job.recipe, "fit" in plan.method.split("+"))
    if job.recipe.ladder.method == "qat":
        left_out = check_trainable(graph, plan, job.recipe.qat, first_feeds(job, job.selection.calibration, 1)[0])
        if left_out:
            log.warning("%s: %s", job.recipe.name, left_out)
    for method in methods:
        try:
            candidate, seconds = _trained(job, graph, done, method, judge, folder)
        except NotTrainable as error:
            if job.recipe.ladder.method != "auto":
                raise
            log.warning("%s: %s is left out: %s", job.recipe.name, method, error)
            break
        begun = time.monotonic()
        least, candidate = by_error((candidate, corrected(candidate)), judge)[0]
        candidate.method = f"{done.plan.method}+{method}"
        found = rung_at(method, candidate, rung.reverted, least, job.recipe.ladder, job.recipe.gate, judge)
        done.seconds[method] = round(seconds + time.monotonic() - begun, 1)
        done.rungs.append(found)
        if _order(found) < _order(rung):
            done.plan, rung = candidate, found
        if rung.passed and job.recipe.ladder.method != "qat":
            break
    return done


def _order(rung: Rung) -> tuple[bool, tuple[bool, float, float]]:
    """Lower is better: one that passes, then outcomes and the error."""
    return not rung.passed, badness(rung)


def _methods(recipe: Recipe, fitted: bool) -> list[Method]:
    """What is tried after a plan; what is fitted in closed form gains nothing by being fitted again."""
    done = recipe.reconstruction.method == "least_squares" and fitted
    alone = recipe.ladder.method == "qat" and recipe.qat.start == "ptq"
    return [m for m in METHODS.get(recipe.ladder.method, ()) if not ((done or alone) and m == "recon")]


def estimated_minutes(job: Job) -> dict[Method, float]:
    """About how long each method of the recipe would take.

    By gradients: from one iteration with pictures of the first one's size. It is the second one: the first also waits
    for what is made once. Ranges are those of these pictures: an iteration takes as long with any. One iteration of
    every part is about one of the whole network. QAT's looks are added; the last one comes after its `minutes`. In
    closed form: from fits to two pictures and to four.
    """
    recipe, graph = job.recipe, prepared_graph(job)
    methods = _methods(recipe, fitted=False)
    if not methods:
        return {}
    feeds = first_feeds(job, job.selection.calibration, max(recipe.qat.batch, 4))
    pictures = feeds[:4]
    feeds = [feed for feed in feeds if _sizes(feed) == _sizes(feeds[0])]
    operators = quantizable_operators(graph, {})
    statistics = collect_statistics(graph, activation_tensors(operators), feeds, job.options.threads)
    plan = make_plan(graph, operators, statistics, MinMax(), model=recipe.name, dtype="uint8", prepared_sha256="")

    def minutes(method: Method) -> float:
        if method == "recon" and recipe.reconstruction.method == "least_squares":
            return _closed_form_minutes(job, graph, plan, pictures)
        look = _look_minutes(job, graph, plan, pictures) if method == "qat" else 0.0
        return _gradient_minutes(job, graph, plan, feeds, method, look)

    return {method: round(minutes(method), 1) for method in methods}


def _closed_form_minutes(job: Job, graph: Graph, plan: QuantPlan, feeds: Sequence[Feed]) -> float:
    def fit(pictures: Sequence[Feed]) -> None:
        refit(graph, plan, pictures, job.options.threads, job.recipe.seed)

    return _minutes_for(job.recipe.reconstruction.samples, feeds, fit)


def _minutes_for(count: int, feeds: Sequence[Feed], work: Callable[[Sequence[Feed]], None]) -> float:
    """Of work on many pictures, from that on two of them and on all: some of it is done once."""
    seconds = []
    for few in (feeds[:2], feeds):
        begun = time.monotonic()
        work(few)
        seconds.append(time.monotonic() - begun)
    each = max(seconds[1] - seconds[0], 0.0) / max(len(feeds) - 2, 1)
    return max(seconds[0] + each * (count - 2), 0.0) / 60


def _gradient_minutes(
    job: Job, graph: Graph, plan: QuantPlan, feeds: Sequence[Feed], method: Method, look: float
) -> float:
    recipe = job.recipe
    done: list[float] = []
    twice = recipe.qat.model_copy(update={"iterations": 2, "evaluate_every": 2})
    threads = job.options.threads
    distil(
        graph,
        plan,
        feeds,
        twice,
        lambda _: 0.0,
        seed=recipe.seed,
        threads=threads,
        advance=lambda: done.append(time.monotonic()),
    )
    pictures = len(feeds) / len(batches(graph, feeds, recipe.qat.batch))
    each = (done[1] - done[0]) / 60 / pictures
    settings = recipe.reconstruction if method == "recon" else recipe.qat
    step, looks = settings.batch * each, math.ceil(settings.iterations / recipe.qat.evaluate_every) + 1
    return min(settings.iterations * step + looks * look, settings.minutes + step + look)


def _look_minutes(job: Job, graph: Graph, plan: QuantPlan, feeds: Sequence[Feed]) -> float:
    """Of what is done before the first iteration and at every look: biases corrected anew, and the plan's error."""
    recipe, threads = job.recipe, job.options.threads

    def correct(pictures: Sequence[Feed]) -> None:
        sequential_biases(graph, plan, pictures, threads)

    def judge(pictures: Sequence[Feed]) -> None:
        session = simulated_session(graph, plan, threads)
        for feed in pictures:
            session.run(feed)

    minutes = _minutes_for(recipe.ladder.error_samples, feeds, judge)
    if not _bias_pictures(recipe):
        return minutes
    return minutes + _minutes_for(_bias_pictures(recipe), feeds, correct)


def _bias_pictures(recipe: Recipe) -> int:
    """Calibration pictures that biases are corrected on at every look; 0 where they are not corrected."""
    return recipe.calibration.bias_samples if recipe.calibration.bias_correction == "full" else 0


def _sizes(feed: Feed) -> list[tuple[int, ...]]:
    return [values.shape for values in feed.values()]


def _trained(
    job: Job, graph: Graph, done: Trained, method: Method, judge: Judge, folder: Path
) -> tuple[QuantPlan, float]:
    """What a method makes of the best plan so far, and the seconds that it took, those before an interruption too."""
    if method == "recon":
        stage = _reconstructed_stage(job, graph, done.plan)
        shutil.copyfile(stage / "recon.json", folder / "recon.json")
        return load_plan(stage), read_seconds(stage)[method]
    done.checkpoints.append(_checkpoint(job, done.plan))
    saved = load_checkpoint(done.checkpoints[-1])
    begun = time.monotonic() - (saved["seconds"] if saved else 0.0)
    candidate, curve = _distilled(job, graph, done.plan, judge, done.checkpoints[-1])
    _write(curve, folder / "qat.json")
    best = min(curve, key=lambda point: point.error)
    note = f"QAT: error {best.error:.4f} after {best.iteration} iterations, {curve[0].error:.4f} before"
    return replace(candidate, notes=[*candidate.notes, note]), time.monotonic() - begun


def _distilled(
    job: Job, graph: Graph, plan: QuantPlan, judge: Judge, checkpoint: Path
) -> tuple[QuantPlan, list[Evaluation]]:
    recipe, threads = job.recipe, job.options.threads
    feeds = first_feeds(job, job.selection.calibration, recipe.qat.samples)
    shared: dict[str, Any] = {"seed": recipe.seed, "threads": threads, "checkpoint": checkpoint}
    shared["bias_pictures"] = _bias_pictures(recipe)
    if recipe.qat.processes > 1:
        held_out = first_feeds(job, job.selection.search, recipe.ladder.error_samples)
        return distil_together(graph, plan, feeds, held_out, recipe.qat, **shared)
    advance = counted(job.options.progress, job.title("QAT"), recipe.qat.iterations)
    return distil(graph, plan, feeds, recipe.qat, judge.error, **shared, advance=advance)


def _reconstructed_stage(job: Job, graph: Graph, plan: QuantPlan) -> Path:
    """Stage: a plan reconstructed, with `recon.json`: a QAT that follows and is killed goes on from there."""

    def build(folder: Path) -> None:
        begun = time.monotonic()
        candidate, results = _reconstructed(job, graph, plan)
        note = f"reconstructed in {len(results)} parts, {sum(r.after < r.before for r in results)} of them better"
        replace(candidate, notes=[*candidate.notes, note]).save(folder)
        _write(results, folder / "recon.json")
        write_seconds({"recon": time.monotonic() - begun}, folder)

    settings = {"reconstruction": job.recipe.reconstruction.model_dump(), "seed": job.recipe.seed}
    key = {**job.key, **settings, "plan": _named(plan), "samples": sample_ids(job.selection.calibration)}
    return job.store.result("reconstructed", key, build)


def _reconstructed(job: Job, graph: Graph, plan: QuantPlan) -> tuple[QuantPlan, list[PartResult]]:
    recipe, threads = job.recipe, job.options.threads
    feeds = first_feeds(job, job.selection.calibration, recipe.reconstruction.samples)
    advance = counted(job.options.progress, job.title("reconstruction"), len(plan.quantized()))
    if recipe.reconstruction.method == "least_squares":
        return refit(graph, plan, feeds, threads, recipe.seed, advance)
    end = time.monotonic() + 60 * recipe.reconstruction.minutes
    return reconstruct(
        graph,
        plan,
        feeds,
        recipe.reconstruction,
        seed=recipe.seed,
        threads=threads,
        advance=advance,
        expired=lambda: time.monotonic() > end,
    )


def _write(points: Sequence[PartResult | Evaluation], file: Path) -> None:
    file.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n", encoding="utf-8")


def _checkpoint(job: Job, plan: QuantPlan) -> Path:
    """Where a training of this plan leaves its state: named by all that it learns from and is judged by."""
    settings = [job.recipe.qat.model_dump(), job.recipe.seed, job.recipe.ladder.error_samples]
    samples = [sample_ids(job.selection.calibration), sample_ids(job.selection.search)]
    key = digest([code_digest(), job.key, *_named(plan), settings, samples])
    return cache_dir() / "checkpoints" / f"qat-{key[:16]}.pdparams"


def _named(plan: QuantPlan) -> list[Any]:
    """All of a plan, weights and corrections by their hashes."""
    weights = {name: digest([w.values.tolist(), w.scale.tolist()]) for name, w in plan.integers.items()}
    shifts = {name: digest(shift.tolist()) for name, shift in plan.bias_shifts.items()}
    return [plan.document(), weights, shifts]
