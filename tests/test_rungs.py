"""The rungs that train: which are tried, what they leave behind, and that nothing worse is ever taken."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_flow import flowing_plan, mobile_block
from test_plan import plan_of
from test_qat import feeds_of
from test_reconstruction import coarse, error
from tiny_models import TinyNet, small_detector

from eval.dataset import Sample
from quant.bias import sequential_biases
from quant.errors import InputError, NotTrainable
from quant.job import Job, Options
from quant.ladder import (
    Limits,
    Rung,
    SearchScore,
    climb,
    load_rung,
    load_rungs,
    read_seconds,
    result_text,
    rung_rows,
    trains,
    try_plan,
    write_seconds,
)
from quant.least_squares import refit
from quant.pipeline import _run_name
from quant.plan import QuantPlan, load_plan
from quant.planning import _explored, _laddered_stage
from quant.recipe import RecipeError, load_recipe
from quant.rungs import _checkpoint, estimated_minutes, train_on
from quant.selection import Selection
from quant.source import ModelFiles
from quant.stage import StageStore, file_digests

FEW = [
    *("reconstruction.iterations=30", "reconstruction.learning_rate=0.05", "reconstruction.batch=2"),
    *("qat.iterations=20", "qat.evaluate_every=10", "qat.learning_rate=0.05", "qat.batch=2", "qat.nodes=[]"),
]
"""Both trainings in seconds."""


class ErrorJudge:
    """Passes plans by their error alone."""

    def __init__(self, net: TinyNet, enough: float) -> None:
        self.net, self.enough = net, enough

    def error(self, plan: QuantPlan) -> float:
        return error(self.net, plan)

    def score(self, plan: QuantPlan) -> SearchScore:
        drop = 0.0 if self.error(plan) <= self.enough else 2 + 100 * self.error(plan)
        return SearchScore(drop, drop, drop, 8)


def job_of(method: str, place: Path, monkeypatch: pytest.MonkeyPatch, net: TinyNet, *overrides: str) -> Job:
    """A job whose calibration pictures are those of a tiny net."""
    monkeypatch.setattr("quant.rungs.first_feeds", lambda job, samples, count: feeds_of(net)[:count])
    monkeypatch.setenv("QUANT_CACHE", str(place / "cache"))
    recipe = load_recipe("PP-OCRv4_mobile_det", [*FEW, f"ladder.method={method}", "ladder.max_error=10", *overrides])
    files = ModelFiles(place, "paddle", place, place, {}, "tiny", {"tiny": "0"})
    options = Options(place, 1, lambda what, done, total: None)
    return Job(recipe, options, files, Selection([], [], [], {}, {}), StageStore(place / "stages"))


def climbed(
    job: Job,
    net: TinyNet,
    plan: QuantPlan,
    enough: float,
    corrected: Callable[[QuantPlan], QuantPlan] = lambda trained: trained,
) -> tuple[QuantPlan, list[Rung], dict[str, float]]:
    judge = ErrorJudge(net, enough)
    rung = try_plan("ptq", plan, 0, job.recipe.ladder, job.recipe.gate, judge)
    job.options.results.mkdir(exist_ok=True)
    done = train_on(job, net.graph(), plan, rung, judge, corrected, job.options.results)
    return done.plan, done.rungs, done.seconds


def test_the_first_method_that_passes_is_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_detector()
    plan = coarse(plan_of(net))
    found, rungs, seconds = climbed(job_of("auto", tmp_path, monkeypatch, net), net, plan, 0.9 * error(net, plan))
    assert [(rung.name, rung.passed) for rung in rungs] == [("recon", True)]
    assert found.method == "ptq+recon" and error(net, found) < error(net, plan)
    assert list(seconds) == ["recon"] and seconds["recon"] > 0
    parts = json.loads((tmp_path / "recon.json").read_text(encoding="utf-8"))
    assert [part["aim"] for part in parts] == list(plan.quantized())
    found.save(tmp_path / "plan")
    assert error(net, load_plan(tmp_path / "plan")) == pytest.approx(error(net, found))


@pytest.mark.parametrize("better", [True, False])
def test_biases_corrected_anew_are_kept_where_they_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: bool
) -> None:
    net = small_detector()
    plan = coarse(plan_of(net))

    def corrected(trained: QuantPlan) -> QuantPlan:
        moved = sequential_biases(net.graph(), trained, feeds_of(net), 1)
        return replace(trained, bias_shifts={name: shift if better else shift + 9 for name, shift in moved.items()})

    found, *_ = climbed(job_of("recon", tmp_path, monkeypatch, net), net, plan, 0.0, corrected)
    again = error(net, corrected(found))
    assert (error(net, found) == pytest.approx(again)) if better else error(net, found) < again
    assert found.method == "ptq+recon"


def test_what_reconstruction_gained_stays_where_qat_cannot_compare_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe names nodes for all models of its task; in some of them one flows in integers."""
    net = mobile_block()
    job = job_of("auto", tmp_path, monkeypatch, net, "qat.nodes=[-1]")
    found, rungs, _ = climbed(job, net, flowing_plan(net), 0.0)
    assert [rung.name for rung in rungs] == ["recon"]
    with pytest.raises(NotTrainable, match="flows in integers"):
        climbed(job_of("qat", tmp_path, monkeypatch, net, "qat.nodes=[-1]"), net, found, 0.0)


def test_qat_goes_on_from_what_reconstruction_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_detector()
    plan = coarse(plan_of(net))
    found, rungs, _ = climbed(job_of("auto", tmp_path, monkeypatch, net), net, plan, 0.0)
    assert [rung.name for rung in rungs] == ["recon", "qat"]
    curve = json.loads((tmp_path / "qat.json").read_text(encoding="utf-8"))
    assert curve[0]["error"] == pytest.approx(rungs[0].error)
    assert error(net, found) == pytest.approx(min(rung.error for rung in rungs))
    assert list((tmp_path / "cache" / "checkpoints").iterdir())


def test_what_the_ladder_fitted_is_not_fitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_detector()
    plan = replace(coarse(plan_of(net)), method="ptq+fit")
    _, rungs, _ = climbed(job_of("auto", tmp_path, monkeypatch, net), net, plan, 0.0)
    assert [rung.name for rung in rungs] == ["qat"]
    job = job_of("auto", tmp_path, monkeypatch, net, "reconstruction.method=gradients")
    _, rungs, _ = climbed(job, net, plan, 0.0)
    assert [rung.name for rung in rungs] == ["recon", "qat"]


@pytest.mark.parametrize("method", ["least_squares", "gradients"])
def test_both_reconstructions_end_nearer(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_detector()
    plan = coarse(plan_of(net))
    job = job_of("recon", tmp_path, monkeypatch, net, f"reconstruction.method={method}")
    found, (rung,), seconds = climbed(job, net, plan, 0.0)
    assert error(net, found) == pytest.approx(rung.error) and rung.error < 0.9 * error(net, plan)
    parts = json.loads((tmp_path / "recon.json").read_text(encoding="utf-8"))
    assert parts and all(part["after"] <= part["before"] for part in parts) and seconds["recon"] >= 0


def test_a_checkpoint_is_of_its_code_and_pictures_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_detector()
    plan, job = plan_of(net), job_of("qat", tmp_path, monkeypatch, net)
    one, other = (Sample(id=name, dataset="d", image=Path(name), label=None) for name in "ab")

    def of(calibration: Sample, search: Sample) -> Path:
        return _checkpoint(replace(job, selection=Selection([calibration], [search], [], {}, {})), plan)

    files = [of(one, one), of(one, other), of(other, one)]
    files.append(_checkpoint(job_of("qat", tmp_path, monkeypatch, net, "ladder.error_samples=3"), plan))
    monkeypatch.setattr("quant.rungs.code_digest", lambda: "other code")
    files.append(of(one, one))
    assert len(set(files)) == len(files)


def laddered_job(method: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose ladder starts from a plan of a tiny net, which no rung gets through the gate."""
    net = small_detector()
    coarse(plan_of(net)).save(place / "full")
    monkeypatch.setattr("quant.planning.full_stage", lambda job, choice: place / "full")
    monkeypatch.setattr("quant.planning.prepared_graph", lambda job: net.graph())
    monkeypatch.setattr("quant.planning.first_feeds", lambda job, samples, count: feeds_of(net)[:count])
    monkeypatch.setattr("quant.planning.SearchJudge", lambda job, graph: ErrorJudge(net, 0.0))
    return job_of(method, place, monkeypatch, net)


def test_no_checkpoint_is_left_of_a_finished_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = laddered_job("qat", tmp_path, monkeypatch)
    stage = _laddered_stage(job, job.recipe.targets["onnxruntime"])
    assert json.loads((stage / "qat.json").read_text(encoding="utf-8"))
    assert list((tmp_path / "cache" / "checkpoints").iterdir()) == []


def test_a_killed_qat_repeats_no_rung_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = laddered_job("qat", tmp_path, monkeypatch)
    choice, begun, trained = job.recipe.targets["onnxruntime"], list[str](), list[int]()

    def counting(place: str, function: Callable[..., Any]) -> None:
        def counted(*arguments: Any, **named: Any) -> Any:
            begun.append(place)
            return function(*arguments, **named)

        monkeypatch.setattr(place, counted)

    def progress(what: str, done: int, total: int) -> None:
        if what.endswith("QAT"):
            trained.append(done)
            if trained == list(range(13)):  # killed two steps behind the first checkpoint
                raise KeyboardInterrupt

    job = replace(job, options=replace(job.options, progress=progress))
    counting("quant.planning.climb", climb)
    counting("quant.rungs.refit", refit)
    with pytest.raises(KeyboardInterrupt):
        _laddered_stage(job, choice)
    stage = _laddered_stage(job, choice)
    assert begun == ["quant.planning.climb", "quant.rungs.refit"]
    assert len(trained) == 13 + 1 + 10, "of 20 steps, the 10 after the checkpoint were done again"
    assert [rung.name for rung in load_rungs(stage)][-2:] == ["recon", "qat"]
    assert read_seconds(stage).keys() == {"recon", "qat"}
    assert (stage / "recon.json").is_file() and (stage / "qat.json").is_file()


def test_a_search_leaves_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other operators in INT8 would want other biases, and correcting them anew would undo the training."""
    net = small_detector()
    full = coarse(plan_of(net))
    best, _, _ = climbed(job_of("recon", tmp_path, monkeypatch, net), net, full, 0.0)
    best.save(tmp_path / "best")
    monkeypatch.setattr("quant.planning.full_plan", lambda job, choice: full)
    monkeypatch.setattr("quant.planning.prepared_graph", lambda job: net.graph())
    monkeypatch.setattr("quant.planning.SearchJudge", lambda job, graph: ErrorJudge(net, 0.0))
    monkeypatch.setattr("quant.planning.relative_latencies", lambda job, target, plans: [1.0] * len(plans))
    job = job_of("recon", tmp_path, monkeypatch, net)
    (point,) = _explored(job, "onnxruntime", tmp_path / "best", 0.0)
    assert point.plan.method == "ptq+recon" and "no faster plan was looked for: recon" in point.plan.notes[-1]
    assert error(net, point.plan) == pytest.approx(error(net, best))
    assert error(net, best) < error(net, full)


@pytest.mark.parametrize("limit", [0.0, 9.0], ids=["none passes", "all pass"])
@pytest.mark.parametrize(
    ("method", "start", "expected"),
    [("recon", "recon", ["recon"]), ("qat", "ptq", ["qat"]), ("qat", "recon", ["recon", "qat"])],
)
def test_one_method_can_be_asked_for(
    method: str, start: str, expected: list[str], limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = small_detector()
    plan = coarse(plan_of(net))
    found, rungs, _ = climbed(job_of(method, tmp_path, monkeypatch, net, f"qat.start={start}"), net, plan, limit)
    assert [rung.name for rung in rungs] == expected
    assert error(net, found) == pytest.approx(min(rung.error for rung in rungs))


def test_what_cannot_be_trained_keeps_its_plan_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    net = TinyNet((1, 3, 8, 8), free=(0, 2, 3))
    last = net.conv(net.op("Sin", net.conv("x", 3, 4)), 4, 2)
    plan, parts = (
        plan_of(net).with_only({last}, "kept"),
        ["reconstruction.method=gradients", "reconstruction.operators=2"],
    )
    found, rungs, _ = climbed(job_of("auto", tmp_path, monkeypatch, net, *parts), net, plan, 0.0)
    assert found is plan and rungs == []
    assert "Sin" in caplog.text
    with pytest.raises(NotTrainable, match="Sin"):
        climbed(job_of("qat", tmp_path, monkeypatch, net), net, plan, 0.0)
    assert not (tmp_path / "recon.json").exists(), "it is said before reconstruction takes its time"
    with pytest.raises(InputError, match=r"qat.nodes: 'nowhere'"):
        climbed(job_of("auto", tmp_path, monkeypatch, net, "qat.nodes=[nowhere]"), net, plan_of(net), 0.0)


@pytest.mark.parametrize(
    ("method", "passed", "expected"),
    [("auto", True, False), ("auto", False, True), ("ptq", False, False), ("recon", True, True), ("qat", True, True)],
)
def test_when_weights_are_trained(method: str, passed: bool, expected: bool) -> None:
    recipe = load_recipe("PP-OCRv4_mobile_det", [f"ladder.method={method}"])
    assert trains(recipe.ladder, Rung("ptq", 1.0, 0, 0.0, None, passed)) is expected


@pytest.mark.parametrize(
    ("method", "minutes", "others"),
    [
        pytest.param("gradients", 1.5, 3.0, id="3 seconds for 2 pictures, or for the one of the first size"),
        pytest.param("least_squares", 0.1, 0.1, id="3 seconds for 2 pictures and for all"),
    ],
)
def test_an_estimate_comes_from_what_little_takes(
    method: str, minutes: float, others: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = small_detector()
    monkeypatch.setattr("quant.rungs.prepared_graph", lambda job: net.graph())
    clock = itertools.count(0, 3)
    monkeypatch.setattr("quant.rungs.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    found = estimated_minutes(job_of("auto", tmp_path, monkeypatch, net, f"reconstruction.method={method}"))
    assert found == {"recon": minutes, "qat": 1.3}, "a minute of iterations, 3 looks of 6 seconds each"
    job = job_of("auto", tmp_path, monkeypatch, net, f"reconstruction.method={method}", "qat.minutes=0.5")
    assert estimated_minutes(job)["qat"] == 0.7, "an iteration and a look may come after the minutes"
    pictures = [net.feed(), {"x": np.zeros((1, 3, 8, 16), dtype=np.float32)}]
    job = job_of("auto", tmp_path, monkeypatch, net, f"reconstruction.method={method}")
    monkeypatch.setattr("quant.rungs.first_feeds", lambda job, samples, count: pictures)
    assert estimated_minutes(job) == {"recon": others, "qat": 2.3}
    assert estimated_minutes(job_of("ptq", tmp_path, monkeypatch, net)) == {}


@pytest.mark.parametrize("method", ["auto", "recon", "qat"])
def test_a_run_that_trained_is_named_by_its_artifacts(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock may end a training, so the same recipe may give another artifact."""
    net, artifact = small_detector(), tmp_path / "artifact"
    artifact.mkdir()
    made = {"onnxruntime": SimpleNamespace(artifact=artifact)}
    monkeypatch.setattr("quant.pipeline._quantize_all", lambda job: (made, []))
    job, names = job_of(method, tmp_path, monkeypatch, net), set()
    for content in ("one", "other"):
        (artifact / "inference.onnx").write_text(content, encoding="utf-8")
        names.add(_run_name(job))
    assert len(names | {job.run_name}) == 3
    ptq = job_of("ptq", tmp_path, monkeypatch, net)
    assert _run_name(ptq) == ptq.run_name


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(RecipeError, match=r"ladder.method"):
        load_recipe("PP-OCRv4_mobile_det", ["ladder.method=magic"])


def test_seconds_are_kept_apart_from_what_is_hashed(tmp_path: Path) -> None:
    before = file_digests(tmp_path)
    write_seconds({"qat": 12.5}, tmp_path)
    assert read_seconds(tmp_path) == {"qat": 12.5}
    assert file_digests(tmp_path) == before
    assert read_seconds(tmp_path / "nothing") == {}


LIMITS = Limits(error=0.04, drop=0.7, relative_drop=0.75, discordance=2.0)


def test_the_table_shows_what_each_rung_gave_and_cost() -> None:
    scored = Rung("qat", 1.0, 0, 0.0123, SearchScore(0.5, 0.8, 2.25, 400), True)
    rungs = [Rung("ptq", 1.0, 0, 0.05, None, False), replace(scored, seconds=61.7)]
    assert rung_rows("openvino", rungs, LIMITS) == [
        ["openvino", "ptq", "1.000", "5.00 %", "", "", "", "", "failed: error above 4 %"],
        ["openvino", "qat", "1.000", "1.23 %", "0.50", "0.80 %", "2.2 %", "62", "passed"],
    ]
    assert load_rung(scored.document()) == scored


@pytest.mark.parametrize(
    ("error", "score", "missed"),
    [
        (0.041, None, "error above 4 %"),
        (0.04, SearchScore(0.7, 0.75, 2.0, 9), ""),
        (0.04, SearchScore(0.71, 0.7, 2.0, 9), "drop above 0.7"),
        (0.04, SearchScore(0.5, 0.76, 2.1, 9), "relative drop above 0.75 %, discordance above 2 %"),
    ],
)
def test_a_failed_step_names_the_limits_that_it_missed(error: float, score: SearchScore | None, missed: str) -> None:
    assert ", ".join(LIMITS.missed(error, score)) == missed
    said = result_text(Rung("ptq", 1.0, 0, error, score, not missed), LIMITS)
    assert said == (f"failed: {missed}" if missed else "passed")


def test_limits_are_those_of_the_recipe_that_was_run() -> None:
    recipe = load_recipe("PP-OCRv4_mobile_det", ["ladder.margin=0.25", "gate.max_relative_drop=2"])
    limits = Limits.of_recipe(recipe.model_dump(mode="json"))
    assert limits == Limits.of(recipe.ladder, recipe.gate)
    assert (limits.drop, limits.relative_drop) == (0.75, 1.75)
    with pytest.raises(InputError, match="has no limits"):
        Limits.of_recipe({"ladder": {"margin": "wide"}})


@pytest.mark.parametrize(
    ("before", "after", "taken"),
    [
        (SearchScore(0.3, 0.3, 2.4, 400), SearchScore(0.75, 0.75, 1.0, 400), False),
        (SearchScore(-0.5, -0.5, 1.5, 400), SearchScore(0.4, 0.4, 2.4, 400), False),
        (SearchScore(0.6, 0.6, 2.0, 400), SearchScore(0.0, 0.0, 1.5, 400), True),
        (SearchScore(0.3, 0.3, 2.4, 400), SearchScore(0.3, 0.3, 2.4, 400), True),
    ],
    ids=["fails", "passes with more lost", "passes with less lost", "the same outcomes, less error"],
)
def test_a_plan_that_passes_gives_way_to_a_better_one_alone(
    before: SearchScore, after: SearchScore, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = small_detector()
    plan = coarse(plan_of(net))
    job = job_of("recon", tmp_path, monkeypatch, net, "ladder.max_error=1", "ladder.max_discordance=2.5")
    job.options.results.mkdir(exist_ok=True)

    class Scripted(ErrorJudge):
        def score(self, plan: QuantPlan) -> SearchScore:
            return after if plan.method.endswith("recon") else before

    judge = Scripted(net, 1.0)
    rung = try_plan("ptq", plan, 0, job.recipe.ladder, job.recipe.gate, judge)
    done = train_on(job, net.graph(), plan, rung, judge, lambda candidate: candidate, job.options.results)
    assert rung.passed and done.plan.method == ("ptq+recon" if taken else "ptq")


def test_a_plan_that_training_left_alone_is_not_called_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_detector()
    plan = coarse(plan_of(net))
    monkeypatch.setattr("quant.rungs._trained", lambda job, graph, done, *rest: (replace(done.plan), 0.0))
    found, rungs, _ = climbed(job_of("recon", tmp_path, monkeypatch, net), net, plan, 9.0)
    assert found is plan and plan.method == "ptq" and [rung.name for rung in rungs] == ["recon"]
