"""Many models at once: what fits beside what, what comes back from a node, and the same results as one by one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from interruptions import content, make_models
from test_manifest import manifest
from test_pipeline import NAME, RECIPE
from tiny_run import TinyRun

from eval.dataset import Sample
from eval.evaluation import Outcomes
from quant import cli, cluster, executor, work
from quant.cli import _guarded
from quant.cluster import Needs, RayPool, Unfit, contents, perform, program_digest, too_large
from quant.errors import HANDED_OVER, InputError
from quant.executor import finish, spread
from quant.manifest import newest_run
from quant.parcel import packed_runs, receive_runs, run_folders, sha256_of
from quant.shards import Offer, cut
from quant.shares import Share
from quant.stage import file_digests
from quant.verification import verify
from quant.work import USUAL_PEAK, Attempt, Ended, ModelJob, Shard, Task, note_peak, peak_of

GIB = 1 << 30
NAMES = ["reader_a", "reader_b", "reader_c"]
SHARD = 12  # samples; the tiny models are judged on about 30


def job(name: str = "m", threads: int = 1) -> ModelJob:
    return ModelJob("run", name, (name,), threads)


def ended(**changes: Any) -> Ended:
    return replace(Ended(0, '{"schema": 1, "rows": []}', "", 1.0, GIB), **changes)


# --- what fits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threads", "running", "count", "room", "fits"),
    [
        (8, 0, None, 0, True),  # the first one always
        (1, 1, None, 10, True),
        (2, 1, None, 10, True),
        (3, 2, None, 10, False),  # four cores
        (1, 3, 3, 10, False),
        (4, 2, 3, 10, True),  # asked for: more threads than cores
        (1, 1, None, 1, False),
    ],
)
def test_jobs_start_as_cores_memory_and_number_allow(
    threads: int, running: int, count: int | None, room: int, fits: bool
) -> None:
    others = [Attempt(job(f"m{index}")) for index in range(running)]
    this = Attempt(job("m", threads))
    peaks = dict.fromkeys([this, *others], GIB)
    assert executor.fits(this, others, count, 4, room * GIB, peaks) == fits


def test_peaks_are_kept_beside_the_runs(tmp_path: Path) -> None:
    evaluation, twin = replace(job(), action="eval"), replace(job(), twins=True)
    assert peak_of(job(), tmp_path) == USUAL_PEAK
    for done, peak in ((job(), 5), (evaluation, 7), (twin, 2)):
        note_peak(done, tmp_path, ended(peak=peak))
    assert [peak_of(done, tmp_path) for done in (job(), evaluation, twin)] == [5, 7, 2]
    (tmp_path / "m" / "peaks.json").write_text("[", encoding="utf-8")
    assert peak_of(job(), tmp_path) == USUAL_PEAK


def test_the_largest_peak_of_work_that_was_done_is_kept(tmp_path: Path) -> None:
    """Not that of a job that found its run, and not that of one that failed."""
    for code, peak in ((HANDED_OVER, 5), (0, 1), (2, 9), (70, 9), (-9, 9)):
        note_peak(job(), tmp_path, ended(code=code, peak=peak))
        assert peak_of(job(), tmp_path) == 5
    note_peak(job(), tmp_path, ended(code=1, peak=6))
    assert peak_of(job(), tmp_path) == 6


def test_results_that_take_no_file_are_no_error_for_a_peak(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("a file where the folder should be", encoding="utf-8")
    note_peak(job(), tmp_path, ended())
    assert peak_of(job(), tmp_path) == USUAL_PEAK


# --- what comes back -------------------------------------------------------------------------------


def run_in(results: Path, name: str) -> Path:
    folder = results / "m" / name
    (folder / "onnxruntime").mkdir(parents=True)
    (folder / "onnxruntime" / "inference.onnx").write_bytes(b"model")
    manifest(run=name, artifacts={"onnxruntime": file_digests(folder / "onnxruntime")}).save(folder)
    return folder


def packed(results: Path) -> bytes:
    return packed_runs(results, run_folders(results))


def test_runs_arrive_whole_or_not_at_all(tmp_path: Path) -> None:
    run = run_in(tmp_path / "node", "0" * 12)
    sent = packed(tmp_path / "node")
    assert packed(tmp_path / "node") == sent, "the bytes follow from the content"
    receive_runs(sent, tmp_path / "here")
    arrived = tmp_path / "here" / "m" / run.name
    assert (arrived / "onnxruntime" / "inference.onnx").read_bytes() == b"model"
    receive_runs(sent, tmp_path / "here")  # once more, after a retry
    (run / "onnxruntime" / "inference.onnx").write_bytes(b"other")
    with pytest.raises(InputError, match=r"arrived damaged: changed: onnxruntime/inference\.onnx"):
        receive_runs(packed(tmp_path / "node"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_damaged_folder_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    name = run_in(tmp_path / "node", "0" * 12).name
    for file, text in (("manifest.json", "{"), ("onnxruntime/inference.onnx", "damaged")):
        receive_runs(packed(tmp_path / "node"), tmp_path / "here")
        (tmp_path / "here" / "m" / name / file).write_text(text, encoding="utf-8")
        receive_runs(packed(tmp_path / "node"), tmp_path / "here")
        assert verify(tmp_path / "here" / "m" / name).good


def test_what_arrives_again_is_the_newest_as_it_is_here(tmp_path: Path) -> None:
    sent = []
    for index in range(2):
        run_in(tmp_path / f"node{index}", str(index) * 12)
        sent.append(packed(tmp_path / f"node{index}"))
    for index in (0, 1, 0, 0, 1):
        receive_runs(sent[index], tmp_path / "here")
        assert newest_run(tmp_path / "here", "m") == tmp_path / "here" / "m" / (str(index) * 12)
        assert verify(tmp_path / "here" / "m" / (str(index) * 12)).good


# --- shards ----------------------------------------------------------------------------------------


class Script:
    """A pool whose work ends as it is told, the last first."""

    def __init__(self, end: Callable[[Task], Ended]) -> None:
        self.end, self.tasks = end, list[Task]()
        self.attempts, self.shards = list[Attempt](), list[Shard]()

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, task: Task) -> None:
        self.tasks.append(task)
        if isinstance(task, Attempt):
            self.attempts.append(task)
        else:
            self.shards.append(task)

    def next_ended(self) -> tuple[Task, Ended]:
        task = self.tasks.pop()
        return task, self.end(task)


def offer_of(count: int, size: int) -> Offer:
    samples = [Sample(f"{index:02}", "lines", Path(f"{index}.png"), "x") for index in range(count)]
    share = Share("paddle", Path("fp32"), Path("int8"), 1, "text_recognition", {}, "m", "line_accuracy", samples)
    return Offer("outcomes-0", tuple(cut(share, size)), "this machine")


def judged(samples: list[Sample]) -> Ended:
    counts = np.array([[float(sample.id)] for sample in samples])
    data = Outcomes([s.id for s in samples], [s.dataset for s in samples], counts, -counts, []).to_bytes()
    return ended(parcel=data, sha256=sha256_of(data))


def scripted(offer: Offer, shard: Callable[[Shard], Ended]) -> Callable[[Task], Ended]:
    """The first attempt hands its evaluation over, as does any that does not know the outcomes and may do so."""

    def end(task: Task) -> Ended:
        if isinstance(task, Shard):
            return shard(task)
        waits = task.shard_samples and offer.stage not in task.outcomes
        return ended(code=HANDED_OVER, offers=(offer,), node="n") if waits else ended()

    return end


def test_outcomes_of_shards_come_together_in_their_order(tmp_path: Path) -> None:
    offer = offer_of(10, 3)
    pool = Script(scripted(offer, lambda task: judged(list(task.share.samples))))
    ((done, end),) = finish([job(), job()], tmp_path, pool, 3)  # named twice, it is one job
    assert (done, end.code) == (job(), 0)
    first, second = pool.attempts
    assert (first.outcomes, second.node) == ({}, "n")
    whole = [sample for piece in offer.pieces for sample in piece.samples]
    assert second.outcomes == {offer.stage: judged(whole).parcel}, "to the byte"
    assert peak_of(Shard(job(), offer, 0), tmp_path) == GIB


@pytest.mark.parametrize("wrong", [{"code": 2, "stderr": "quant: lost"}, {"parcel": b"cut"}])
def test_where_a_shard_fails_the_job_judges_all_itself(
    wrong: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def shard(task: Shard) -> Ended:
        good = judged(list(task.share.samples))
        return replace(good, **wrong) if task.number == 1 else good

    pool = Script(scripted(offer_of(10, 3), shard))
    ((_, end),) = finish([job()], tmp_path, pool, 3)
    assert end.code == 0 and "it judges all samples itself" in caplog.text
    assert [(attempt.shard_samples, attempt.outcomes) for attempt in pool.attempts] == [(3, {}), (0, {})]


def test_an_offer_that_comes_again_is_not_judged_for_ever(tmp_path: Path) -> None:
    """A node that cannot use what another kind of machine has judged."""
    offer = offer_of(4, 2)

    def end(task: Task) -> Ended:
        if isinstance(task, Shard):
            return judged(list(task.share.samples))
        return ended(code=HANDED_OVER, offers=(offer,)) if task.shard_samples else ended()

    pool = Script(end)
    assert [end.code for _, end in finish([job()], tmp_path, pool, 2)] == [0]
    assert [attempt.shard_samples for attempt in pool.attempts] == [2, 2, 0]
    assert len(pool.shards) == 2


def test_what_belongs_to_a_job_that_was_begun_goes_first(tmp_path: Path) -> None:
    """Also where it has no outcomes of others, since a shard has failed: its steps are done, and others wait."""
    offer = offer_of(4, 2)
    gathering = executor._Gathering(Attempt(job(), 2), [offer], "")
    for shard in gathering.shards:
        last = gathering.take(shard, ended(code=2))
    again = gathering.next_attempt()
    assert last and not again.outcomes and again.shard_samples == 0
    with executor.LocalPool(tmp_path, 1) as pool:
        first = Attempt(job("n"))
        for task in (first, again):
            pool.submit(task)
        assert list(pool._waiting) == [again, first]


# --- Ray, by a stand-in ----------------------------------------------------------------------------


class Cluster:
    """What `RayPool` asks of Ray; each job comes back as it is told, or is raised; None: it waits for ever."""

    class RayError(Exception): ...

    class RayTaskError(RayError):
        cause = RuntimeError("it has another\nversion")

    def __init__(self, answers: dict[str, Ended | Exception | None], memory: int = 8 * GIB) -> None:
        self.answers, self.exceptions, self.memory = answers, self, memory
        self.asked: list[dict[str, Any]] = []
        self.cancelled: list[str] = []

    def is_initialized(self) -> bool:
        return False

    def init(self, **settings: Any) -> None:
        assert (
            settings["address"] == "local" and settings["include_dashboard"] is False and not settings["log_to_driver"]
        )

    def shutdown(self) -> None:
        self.over = True

    def nodes(self) -> list[dict[str, Any]]:
        dead = {"NodeID": "dead", "Alive": False, "Resources": {"CPU": 64.0, "memory": 64.0 * GIB}}
        return [dead, {"NodeID": "one", "Alive": True, "Resources": {"CPU": 2.0, "memory": float(self.memory)}}]

    def remote(self, function: Any) -> Any:
        def options(**asked: Any) -> SimpleNamespace:
            self.asked.append(asked)
            return SimpleNamespace(remote=lambda attempt, *_: attempt.model)

        return SimpleNamespace(options=options)

    def wait(self, references: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        ready = [name for name in references if self.answers[name] is not None]
        if not ready:
            self.memory = GIB  # the large node is lost meanwhile
        return ready[:num_returns], []

    def get(self, reference: str) -> Ended:
        answer = self.answers[reference]
        if isinstance(answer, Exception):
            raise answer
        assert answer is not None
        return answer

    def cancel(self, reference: str, force: bool) -> None:
        self.cancelled.append(reference)


def on_cluster(stand_in: Cluster, jobs: list[ModelJob], results: Path, patch: pytest.MonkeyPatch) -> dict[str, Ended]:
    patch.setitem(sys.modules, "ray", stand_in)  # type: ignore[arg-type]
    patch.delenv("RAY_ADDRESS", raising=False)
    return {done.model: end for done, end in finish(jobs, results, RayPool(jobs, results, None), 0)}


def test_what_fails_on_a_node_fails_one_job_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in(tmp_path / "node", "0" * 12)
    data = packed(tmp_path / "node")
    good = ended(parcel=data, sha256=sha256_of(data))
    answers = {"other": Cluster.RayTaskError(), "lost": Cluster.RayError(), "cut": replace(good, sha256=""), "m": good}
    stand_in = Cluster({**answers})
    ends = on_cluster(stand_in, [job(name) for name in answers], tmp_path / "here", monkeypatch)
    assert ends.pop("m").rows() == [] and (tmp_path / "here" / "m" / ("0" * 12)).is_dir()
    said = {"other": "cannot do it .it has another version", "lost": "its node was lost", "cut": "not what it sent"}
    for name, end in ends.items():
        with pytest.raises(InputError, match=f"^{name}: .*{said[name]}"):
            end.rows()
        assert (end.code, end.parcel) == (2, b"")
    assert stand_in.over and {asked["max_retries"] for asked in stand_in.asked} == {0}
    assert len(stand_in.asked) == len(answers) + cluster.RETRIES


class Kept:
    """What the cluster keeps in its memory, until nobody asks for it any more."""

    def __init__(self, data: bytes) -> None:
        self.data = data


class ShardCluster(Cluster):
    """A node that offers an evaluation for two targets, and one that may not judge it."""

    class Refusal(Cluster.RayTaskError):
        cause = Unfit("it has another processor")

    def __init__(self, refusals: int) -> None:
        super().__init__({})
        self.refusals, self.kept, self.tasks = refusals, weakref.WeakSet[Kept](), dict[str, Any]()
        self.given: list[tuple[Any, ...]] = []

    def put(self, data: bytes) -> Kept:
        kept = Kept(data)
        self.kept.add(kept)
        self.given.append((data,))
        return kept

    def remote(self, function: Any) -> Any:
        def options(**asked: Any) -> SimpleNamespace:
            self.asked.append(asked)
            return SimpleNamespace(remote=lambda *given: self.begun(given))

        return SimpleNamespace(options=options)

    def begun(self, given: tuple[Any, ...]) -> str:
        name = str(len(self.asked))
        self.tasks[name] = given
        return name

    def wait(self, references: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        return references[:num_returns], []

    def get(self, reference: str) -> Ended:
        task, *files = self.tasks.pop(reference)
        if isinstance(task, Attempt) and not task.begun:
            return ended(code=HANDED_OVER, offers=self.offers(), node="home")
        if isinstance(task, Attempt):
            assert not (task.outcomes and self.kept), "what was judged is kept no longer"
            return ended()
        assert [file.data for file in files[:2]] == [b"models " + task.target.encode(), task.samples[0].id.encode()]
        if self.refusals:
            self.refusals -= 1
            raise self.Refusal
        return judged(task.samples)

    def offers(self) -> tuple[Offer, ...]:
        found = []
        pictures: list[bytes] = []
        for target in ("paddle", "openvino"):
            offer = offer_of(6, 2)
            pictures = pictures or [piece.samples[0].id.encode() for piece in offer.pieces]
            pieces = tuple(replace(piece, target=target) for piece in offer.pieces)
            files = {"models": b"models " + target.encode(), "pictures": tuple(pictures)}
            found.append(replace(offer, stage=f"outcomes-{target}", pieces=pieces, **files))
        return tuple(found)


def scheduling(patch: pytest.MonkeyPatch) -> None:
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft))
    patch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)  # type: ignore[arg-type]


def test_files_of_shards_are_kept_once_and_no_longer_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduling(monkeypatch)
    stand_in = ShardCluster(refusals=0)
    assert on_cluster(stand_in, [job()], tmp_path, monkeypatch)["m"].code == 0
    assert len(stand_in.given) == 2 + 3, "two models, and the pictures of three pieces for both"
    assert len(stand_in.asked) == 1 + 2 * 3 + 1


@pytest.mark.parametrize(("refusals", "whole"), [(2, False), (12, True)])
def test_a_shard_that_a_node_may_not_judge_is_judged_where_it_was_offered(
    refusals: int, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once; if that node is another one by then, the job judges all samples itself."""
    scheduling(monkeypatch)
    stand_in = ShardCluster(refusals)
    assert on_cluster(stand_in, [job()], tmp_path, monkeypatch)["m"].code == 0
    homes = [asked.get("scheduling_strategy") for asked in stand_in.asked]
    assert homes.count(("home", True)) == min(refusals, 6) + 1, "and the job itself"
    assert ("it judges all samples itself" in caplog.text) == whole


def test_a_job_that_no_node_can_do_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = Cluster({})
    note_peak(job(), tmp_path, ended(peak=9 * GIB))
    said = (
        r"m: no node .* it asks for 1 core and 9.0 GiB, the largest node has 2 cores and 8.0 GiB.*--memory 9663676416"
    )
    with pytest.raises(InputError, match=said):
        on_cluster(stand_in, [job()], tmp_path, monkeypatch)
    with pytest.raises(InputError, match="asks for 3 cores.*give --threads 2"):
        on_cluster(stand_in, [job("n", threads=3)], tmp_path, monkeypatch)
    assert stand_in.asked == [] and stand_in.over


def test_a_job_whose_last_large_node_is_lost_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note_peak(job(), tmp_path, ended(peak=2 * GIB))
    stand_in = Cluster({"m": None, "small": ended()})
    ends = on_cluster(stand_in, [job(), job("small")], tmp_path, monkeypatch)
    assert ends["small"].code == 0 and stand_in.cancelled == ["m"]
    assert "asks for 1 core and 2.0 GiB, the largest node has 2 cores and 1.0 GiB" in ends["m"].said


def test_what_is_only_assumed_keeps_no_small_node_from_working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = Cluster({"m": ended()}, memory=GIB)
    on_cluster(stand_in, [job()], tmp_path, monkeypatch)
    assert [asked["memory"] for asked in stand_in.asked] == [GIB] and USUAL_PEAK > GIB


def test_what_a_job_took_keeps_it_from_no_node_that_it_has_begun_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = Cluster({"m": ended()})
    monkeypatch.setitem(sys.modules, "ray", stand_in)  # type: ignore[arg-type]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with RayPool([job()], tmp_path, None) as pool:
        for _ in range(2):
            pool.submit(Attempt(job()))
            task, end = pool.next_ended()
            note_peak(task, tmp_path, replace(end, peak=9 * GIB))
    assert [asked["memory"] for asked in stand_in.asked] == [USUAL_PEAK, USUAL_PEAK]


def test_the_largest_node_is_named() -> None:
    nodes = [Needs(2, 8 * GIB), Needs(4, 2 * GIB)]
    assert "--threads" not in too_large("m", Needs(1, 9 * GIB), nodes), "memory is what lacks"
    assert too_large("m", Needs(4, GIB), nodes) == too_large("m", Needs(1, 8 * GIB), nodes) == ""
    assert "the largest node has 4 cores and 2.0 GiB" in too_large("m", Needs(4, 3 * GIB), nodes)
    assert "the largest node has 0 cores" in too_large("m", Needs(1, 1), [])


@pytest.mark.parametrize("given", ["--address", "RAY_ADDRESS"])
def test_an_address_that_nobody_answers_at_is_said_at_once(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", Cluster({}))  # type: ignore[arg-type]
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    address = ["--address", "127.0.0.1:1"] if given == "--address" else []
    assert _guarded(["eval", "--all", "--out", str(tmp_path), "--executor", "ray", *address]) == 2
    assert "no Ray cluster at 127.0.0.1:1 (" in capsys.readouterr().err


def test_a_cluster_that_refuses_is_no_internal_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Guarded(Cluster):
        def init(self, **settings: Any) -> None:
            raise self.RayError("no authentication\ntoken was found")

    monkeypatch.setitem(sys.modules, "ray", Guarded({}))  # type: ignore[arg-type]
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert _guarded(["eval", "--all", "--out", str(tmp_path), "--executor", "ray", "--address", address]) == 2
    assert f"no Ray cluster at {address} (no authentication token was found)" in capsys.readouterr().err


def test_a_job_without_rows_says_why() -> None:
    assert ended().rows() == []
    with pytest.raises(InputError, match="^the picture is broken$"):
        ended(code=2, stdout="", stderr="quant: left out\nquant: the picture is broken\n").rows()
    warned = "quant: a line was left out\n"
    killed = ((-9, r"was killed \(SIGKILL\).*--jobs 1"), (-15, "SIGTERM"))
    crashed = ((-11, r"it crashed \(SIGSEGV\)"), (-40, r"it crashed \(signal 40\)"))
    for code, said in (*killed, *crashed):
        with pytest.raises(InputError, match=said):
            ended(code=code, stdout="", stderr=warned).rows()
    with pytest.raises(InputError, match="ended with code 3"):
        ended(code=3, stdout="").rows()
    internal = [ended(code=code).internal for code in (0, 1, 2, -9, -15, 70, -11)]
    assert internal == [False] * 5 + [True] * 2


def test_a_node_with_another_version_does_nothing() -> None:
    with pytest.raises(RuntimeError, match="another version"):
        perform(Attempt(job()), b"", "other code", {})


def test_other_recipes_are_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they are installed."""
    digests = []
    for folder, text in (("recipes", "a: 1"), ("_recipes", "a: 1"), ("recipes", "a: 2")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "m.yaml").write_text(text, encoding="utf-8")
        monkeypatch.setattr(cluster, "recipes_dir", lambda place=tmp_path / folder: place)
        digests.append(program_digest.__wrapped__())
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("code", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_ended_from_outside_names_its_node(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a node that goes down end before Ray knows that it does; one without memory kills them."""
    monkeypatch.setattr(cluster, "attempt_job", lambda *_: ended(code=-code))
    monkeypatch.setattr(cluster, "_node", lambda: "this node")
    with pytest.raises(cluster.Interrupted, match="this node"):
        perform(Attempt(job()), b"", program_digest(), {})


class LosingCluster(Cluster):
    """Three nodes, of which one is too small; each in turn loses what it was given, until they have done so enough."""

    class Ended(Cluster.RayTaskError):
        def __init__(self, node: str) -> None:
            self.cause = cluster.Interrupted(node)  # type: ignore[assignment]

    def __init__(self, losses: list[Exception]) -> None:
        super().__init__({"m": ended()})
        self.losses = losses

    def nodes(self) -> list[dict[str, Any]]:
        large = [{**super(LosingCluster, self).nodes()[1], "NodeID": name} for name in ("node-a", "node-b")]
        return [*large, {"NodeID": "small", "Alive": True, "Resources": {"CPU": 2.0, "memory": 1.0}}]

    def get(self, reference: str) -> Ended:
        if self.losses:
            raise self.losses.pop(0)
        return super().get(reference)


OF_A, OF_B = LosingCluster.Ended("node-a"), LosingCluster.Ended("node-b")


@pytest.mark.parametrize(
    ("losses", "places"),
    [
        ([OF_A], [None, ("node-b", True)]),
        ([Cluster.RayError("node-b has died")], [None, ("node-a", True)]),
        ([Cluster.RayError("a worker was lost")], [None, "SPREAD"]),
        ([OF_A, OF_B, OF_A], [None, ("node-b", True), "SPREAD", "SPREAD"]),
        ([OF_A, OF_B, OF_A, OF_A], [None, ("node-b", True), "SPREAD", "SPREAD"]),
    ],
)
def test_what_a_node_has_lost_goes_to_another_one(
    losses: list[Exception], places: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduling(monkeypatch)
    stand_in = LosingCluster(list(losses))
    end = on_cluster(stand_in, [job()], tmp_path, monkeypatch)["m"]
    assert [asked.get("scheduling_strategy") for asked in stand_in.asked] == places
    assert end.code == (0 if len(losses) <= cluster.RETRIES else 2)
    assert end.code == 0 or end.said == "m: its node was lost, and 3 times another one (ended from outside)"


def test_what_is_given_by_a_path_is_the_same_on_a_node(tmp_path: Path) -> None:
    """A recipe, and folders of data and models; it is said which is not, or is not there."""
    recipe, folder = tmp_path / "m.yaml", tmp_path / "lines"
    (folder / "images").mkdir(parents=True)
    recipe.write_text("a: 1", encoding="utf-8")
    for file in (folder / "label.txt", folder / "images" / "1.png"):
        file.write_text("x", encoding="utf-8")
    given = contents([str(recipe), "--data", str(folder), str(tmp_path / "none"), "1", "a=/b"])
    assert given.keys() == {str(recipe), str(folder)}
    cluster._check_given(given)
    for file, old, text in ((recipe, recipe, "a: 2"), (folder / "images" / "1.png", folder, "y")):
        kept = file.read_text(encoding="utf-8")
        file.write_text(text, encoding="utf-8")
        with pytest.raises(Unfit, match=f"^{re.escape(str(old))} is missing there, or is not what it is here"):
            perform(Attempt(job()), b"", program_digest(), given)
        file.write_text(kept, encoding="utf-8")
    (folder / "images" / "1.png").rename(folder / "images" / "2.png")
    with pytest.raises(Unfit, match="lines is missing there"):
        perform(Attempt(job()), b"", program_digest(), given)


def test_a_job_is_the_command_of_its_model(tmp_path: Path) -> None:
    evaluation = ModelJob("eval", "m", ("PP-OCRv4_mobile_det", "--dry-run"), 1)
    found = perform(Attempt(evaluation), b"", program_digest(), {})
    assert (found.code, found.parcel) == (2, b"")
    with pytest.raises(InputError, match="not quantized yet"):
        found.rows()


# --- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "many"], "--jobs many: must be a number"),
        (["--jobs", "0"], "must be a number"),
        (["--executor", "moon"], "must be local or ray"),
    ],
)
def test_wrong_use(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _guarded(["eval", "--all", "--out", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_ray_is_an_extra(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _guarded(["eval", "--all", "--out", str(tmp_path), "--executor", "ray"]) == 2
    assert "Ray is not installed" in capsys.readouterr().err


def test_what_was_asked_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lines").mkdir()
    monkeypatch.chdir(tmp_path)
    passed = cli._arguments(["a=1", "b=2"], ["lines", "icdar2015"], Path("model"), ["paddle"], 3)
    folder = str(tmp_path / "lines")
    options = ["--set", "a=1", "--set", "b=2", "--data", folder, "--data", "icdar2015", "--target", "paddle"]
    assert passed == [*options, "--model-dir", str(tmp_path / "model"), "--seed", "3"]


def test_rows_of_all_models_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One is skipped, one is broken, one crashes: the others' rows stand, and the code tells. One is named twice."""
    row = {"model": "x", "task": "t", "target": "paddle", "status": "skipped", "reason": "none", "fix": "get it"}
    names = ["PP-OCRv4_mobile_det", "PP-OCRv4_mobile_rec", "PP-OCRv4_server_det"]
    ends = [
        ended(stdout=json.dumps({"rows": [row]}), code=2),
        ended(stdout="", stderr="quant: broken"),
        ended(code=-11),
    ]

    def spread(jobs: list[ModelJob], *_: Any) -> Iterator[tuple[ModelJob, Ended]]:
        yield from reversed(list(zip(dict.fromkeys(jobs), ends, strict=True)))

    monkeypatch.setattr(executor, "spread", spread)
    command = ["eval", *names, names[0], "--jobs", "2", "--json", "--quiet", "--out", str(tmp_path)]
    assert _guarded(command) == cli.INTERNAL_ERROR
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [r["model"] for r in rows].count("x") == 1
    assert rows[0]["model"] == "x" and {r["reason"] for r in rows if r["model"] == names[1]} == {"broken"}


@pytest.mark.parametrize(
    ("arguments", "spread_out"),
    [(["--jobs", "2"], True), (["--jobs", "1"], False), (["--jobs", "2", "--offer"], False)],
)
def test_shards_of_one_model_on_this_machine(
    arguments: list[str],
    spread_out: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """They are judged side by side where they can be; a command that offers them does not do so again."""
    asked: list[Any] = []

    def spread(jobs: list[ModelJob], *where: Any) -> Iterator[tuple[ModelJob, Ended]]:
        asked.extend([jobs, *where])
        yield jobs[0], ended(stdout="", stderr="quant: broken", code=2)

    monkeypatch.setattr(executor, "spread", spread)
    name = "PP-OCRv4_mobile_rec"
    given = [*arguments, str(tmp_path)] if "--offer" in arguments else arguments
    assert _guarded(["eval", name, "--shard-samples", "7", "--quiet", "--out", str(tmp_path / "out"), *given]) == 2
    assert ([job.model for job in asked[0]], asked[-2]) == ([name], 7) if spread_out else asked == []
    assert ("--shard-samples is not used" in capfd.readouterr().err) == (arguments == ["--jobs", "1"])


def test_progress_of_a_command_is_passed_on() -> None:
    """And nothing else of what it says."""
    said = ["a: fetching: 7", "a library talks: of 3", "a: judging: 1 of 4 (25 %)", "quant: left out: 3 samples"]
    code = f"import sys, time; print(*{said!r}, sep=chr(10), file=sys.stderr, flush=True); time.sleep(1)"
    told: list[tuple[str, int, int | None]] = []
    end = work._watched([sys.executable, "-c", code], threading.Event(), lambda *step: told.append(step))
    assert told == [("a: fetching", 7, None), ("a: judging", 1, 4)]
    assert end.stderr.splitlines() == said


@pytest.mark.parametrize(("how", "code", "said"), [("SIGKILL", 2, "was killed"), ("SIGSEGV", 70, "crashed")])
def test_a_model_whose_process_dies_takes_no_other_with_it(
    how: str,
    code: int,
    said: str,
    tiny: TinyRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also without --jobs. The other one finds its run done."""
    doomed = tmp_path / "doomed.yaml"
    doomed.write_text(yaml.safe_dump({**RECIPE, "name": "doomed"}), encoding="utf-8")
    end = f"import os, signal, sys\nif {str(doomed)!r} in sys.orig_argv: os.kill(os.getpid(), signal.{how})\n"
    (tmp_path / "sitecustomize.py").write_text(end, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    run = Path(shutil.copytree(tiny.folder, tmp_path / "out" / NAME / tiny.folder.name))
    given = [str(tiny.place.root / "recipe.yaml"), str(doomed), "--model-dir", str(tiny.place.root / "model")]
    command = ["run", *given, "--threads", "2", "--quiet", "--out", str(tmp_path / "out")]
    assert _guarded([*command, "--json"]) == code
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [row for row in rows if row["model"] == NAME] == json.loads((run / "metrics.json").read_text())["rows"]
    lost = [row for row in rows if row["model"] == "doomed"]
    assert {row["target"] for row in lost} == set(tiny.place.recipe.targets)
    assert all(f"it {said} ({how})" in row["reason"] for row in lost)
    assert _guarded(command) == code
    assert f"unchanged, nothing to do: {run}" in capfd.readouterr().out.replace("\n", " ")
    assert NAME in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


# --- whole runs ------------------------------------------------------------------------------------


def tiny_jobs(place: Path, names: list[str], patch: pytest.MonkeyPatch) -> list[ModelJob]:
    recipes = make_models(place, names)
    patch.setenv("QUANT_MODEL_HOME", str(place / "models"))
    patch.setenv("QUANT_DATA_HOME", str(place / "data"))
    patch.setenv("QUANT_CACHE", str(place / "cache"))
    more = ("--target", "onnxruntime", "--threads", "1", "--quiet")
    return [ModelJob("run", name, (str(recipe), *more), 1) for name, recipe in zip(names, recipes, strict=True)]


def peaks(results: Path) -> dict[str, int]:
    return dict(json.loads((results / NAMES[0] / "peaks.json").read_text(encoding="utf-8")))


@pytest.mark.slow
@pytest.mark.xdist_group("interruption")
def test_models_side_by_side_end_like_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their evaluations in shards, too."""
    jobs = tiny_jobs(tmp_path, NAMES[:2], monkeypatch)
    for results, count, shard_samples in ((tmp_path / "alone", 1, 0), (tmp_path / "beside", 2, SHARD)):
        for done, end in spread(jobs, results, "local", count, None, shard_samples):
            assert end.code == 0, end.stderr
            assert peak_of(done, results) >= end.peak > 50 << 20
        assert ("shard" in peaks(results)) == bool(shard_samples)
        monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "another-cache"))
    assert all(content(tmp_path / "alone", name) == content(tmp_path / "beside", name) for name in NAMES[:2])


@contextmanager
def ending_commands_of(raylet: int) -> Iterator[list[int]]:
    """End all commands that a node starts, as a system does that goes down; their ids."""
    ended_there: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            with suppress(psutil.NoSuchProcess):
                for process in psutil.Process(raylet).children(recursive=True):
                    if process.pid not in ended_there and "quant.cli" in process.cmdline():
                        process.terminate()
                        ended_there.append(process.pid)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield ended_there
    finally:
        over.set()
        watcher.join()


@pytest.mark.slow
@pytest.mark.xdist_group("interruption")
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (the extra `ray`)")
def test_a_node_that_ends_all_that_it_is_given_spoils_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is free again at once and would be given the same; the other one does it."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    bad, _ = [cluster.add_node(num_cpus=1, memory=2 * GIB) for _ in range(2)]
    jobs = [ModelJob("eval", f"m{index}", ("PP-OCRv4_mobile_det", "--dry-run"), 1) for index in range(4)]
    try:
        with ending_commands_of(bad.all_processes["raylet"][0].process.pid) as ended_there:
            ends = [end for _, end in spread(jobs, tmp_path, "ray", None, cluster.address)]
    finally:
        cluster.shutdown()
    assert ended_there and len(ends) == len(jobs)
    assert [end.said for end in ends if "not quantized yet" not in end.said] == []


@pytest.mark.slow
@pytest.mark.xdist_group("interruption")
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (the extra `ray`)")
def test_a_node_that_is_killed_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without work and two nodes on this machine; one is killed when the first model has come back."""
    from ray.cluster_utils import Cluster

    jobs = tiny_jobs(tmp_path, NAMES, monkeypatch)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1, memory=2 * GIB) for _ in range(2)]
    try:
        done = []
        for finished, end in spread(jobs, tmp_path / "ray", "ray", None, cluster.address, SHARD):
            assert end.code == 0, end.stderr
            done.append(finished)
            if len(done) == 1:
                cluster.remove_node(nodes[0], allow_graceful=False)
        assert sorted(one.model for one in done) == NAMES
        assert set(peaks(tmp_path / "ray")) == {"run", "shard"}
        with pytest.raises(InputError, match="no node of the cluster is large enough: it asks for 9 cores"):
            list(spread([replace(jobs[0], threads=9)], tmp_path / "ray", "ray", None, cluster.address))
        evaluations = [replace(one, action="eval") for one in jobs[:1]]
        (judged,) = (end for _, end in spread(evaluations, tmp_path / "ray", "ray", None, cluster.address))
        assert judged.rows()[0]["status"] == "judged"
    finally:
        cluster.shutdown()
    with pytest.raises(InputError, match="no node of the cluster is large enough"):
        list(spread([replace(jobs[0], threads=999)], tmp_path / "ray", "ray", None, None))
    assert not {"raylet", "gcs_server"} & {child.name() for child in psutil.Process().children(recursive=True)}
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "another-cache"))
    for _, end in spread(jobs, tmp_path / "local", "local", 2, None):
        assert end.code == 0, end.stderr
    assert all(content(tmp_path / "ray", name) == content(tmp_path / "local", name) for name in NAMES)
