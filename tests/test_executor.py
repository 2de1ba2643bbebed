"""Many models at once: what fits beside what, what comes back from a node, and the same results as one by one."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from interruptions import content, make_models
from test_manifest import manifest

from quant import cli, executor
from quant.cli import _guarded
from quant.errors import InputError
from quant.executor import USUAL_PEAK, Ended, ModelJob, peak_of, perform, receive, run_locally, run_on_ray
from quant.manifest import newest_run
from quant.stage import code_digest, file_digests
from quant.verification import verify

GIB = 1 << 30
NAMES = ["reader_a", "reader_b", "reader_c", "reader_d"]


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
    others = [job(f"m{index}") for index in range(running)]
    this = job("m", threads)
    peaks = dict.fromkeys([this, *others], GIB)
    assert executor._fits(this, others, count, 4, room * GIB, peaks) == fits


def test_peaks_are_kept_beside_the_runs(tmp_path: Path) -> None:
    evaluation, twin = replace(job(), action="eval"), replace(job(), twins=True)
    assert peak_of(job(), tmp_path) == USUAL_PEAK
    for done, peak in ((job(), 5), (evaluation, 7), (twin, 2)):
        executor._note_peak(done, tmp_path, ended(peak=peak))
    assert [peak_of(done, tmp_path) for done in (job(), evaluation, twin)] == [5, 7, 2]
    (tmp_path / "m" / "peaks.json").write_text("[", encoding="utf-8")
    assert peak_of(job(), tmp_path) == USUAL_PEAK


def test_the_largest_peak_of_work_that_was_done_is_kept(tmp_path: Path) -> None:
    """Not that of a job that found its run, and not that of one that failed."""
    for code, peak in ((0, 5), (0, 1), (2, 9), (70, 9), (-9, 9)):
        executor._note_peak(job(), tmp_path, ended(code=code, peak=peak))
        assert peak_of(job(), tmp_path) == 5
    executor._note_peak(job(), tmp_path, ended(code=1, peak=6))
    assert peak_of(job(), tmp_path) == 6


def test_results_that_take_no_file_are_no_error_for_a_peak(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("a file where the folder should be", encoding="utf-8")
    executor._note_peak(job(), tmp_path, ended())
    assert peak_of(job(), tmp_path) == USUAL_PEAK


# --- what comes back -------------------------------------------------------------------------------


def run_in(results: Path, name: str) -> Path:
    folder = results / "m" / name
    (folder / "onnxruntime").mkdir(parents=True)
    (folder / "onnxruntime" / "inference.onnx").write_bytes(b"model")
    manifest(run=name, artifacts={"onnxruntime": file_digests(folder / "onnxruntime")}).save(folder)
    return folder


def packed(results: Path) -> Ended:
    data = executor._packed(results, executor._run_folders(results))
    return ended(runs=data, sha256=executor.hashlib.sha256(data).hexdigest())


def test_runs_arrive_whole_or_not_at_all(tmp_path: Path) -> None:
    run = run_in(tmp_path / "node", "0" * 12)
    sent = packed(tmp_path / "node")
    assert packed(tmp_path / "node").sha256 == sent.sha256, "the bytes follow from the content"
    receive(sent, tmp_path / "here")
    arrived = tmp_path / "here" / "m" / run.name
    assert (arrived / "onnxruntime" / "inference.onnx").read_bytes() == b"model"
    receive(sent, tmp_path / "here")  # once more, after a retry
    with pytest.raises(InputError, match="not what it sent"):
        receive(replace(sent, runs=sent.runs + b"x"), tmp_path / "other")
    (run / "onnxruntime" / "inference.onnx").write_bytes(b"other")
    with pytest.raises(InputError, match=r"arrived damaged: changed: onnxruntime/inference\.onnx"):
        receive(packed(tmp_path / "node"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_damaged_folder_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    name = run_in(tmp_path / "node", "0" * 12).name
    for file, text in (("manifest.json", "{"), ("onnxruntime/inference.onnx", "damaged")):
        receive(packed(tmp_path / "node"), tmp_path / "here")
        (tmp_path / "here" / "m" / name / file).write_text(text, encoding="utf-8")
        receive(packed(tmp_path / "node"), tmp_path / "here")
        assert verify(tmp_path / "here" / "m" / name).good


def test_what_arrives_again_is_the_newest_as_it_is_here(tmp_path: Path) -> None:
    sent = []
    for index in range(2):
        run_in(tmp_path / f"node{index}", str(index) * 12)
        sent.append(packed(tmp_path / f"node{index}"))
    for index in (0, 1, 0, 0, 1):
        receive(sent[index], tmp_path / "here")
        assert newest_run(tmp_path / "here", "m") == tmp_path / "here" / "m" / (str(index) * 12)
        assert verify(tmp_path / "here" / "m" / (str(index) * 12)).good


class Cluster:
    """What `run_on_ray` asks of Ray; each job comes back as it is told, or is raised."""

    class RayError(Exception): ...

    class RayTaskError(RayError):
        cause = RuntimeError("it has another\nversion")

    def __init__(self, answers: dict[str, Ended | Exception]) -> None:
        self.answers, self.exceptions = answers, self

    def init(self, **_: Any) -> None: ...

    def remote(self, *, max_retries: int) -> Any:
        assert max_retries == executor.RETRIES
        return lambda _: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda job, *_: job.model))

    def wait(self, references: list[str], num_returns: int) -> tuple[list[str], list[str]]:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: str) -> Ended:
        answer = self.answers[reference]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_what_fails_on_a_node_fails_one_job_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in(tmp_path / "node", "0" * 12)
    good = packed(tmp_path / "node")
    answers = {"other": Cluster.RayTaskError(), "lost": Cluster.RayError(), "cut": replace(good, sha256=""), "m": good}
    monkeypatch.setitem(sys.modules, "ray", Cluster(answers))  # type: ignore[arg-type]
    ends = {done.model: end for done, end in run_on_ray([job(name) for name in answers], tmp_path / "here", None)}
    assert ends.pop("m").rows() == [] and (tmp_path / "here" / "m" / ("0" * 12)).is_dir()
    said = {"other": "cannot do it .it has another version", "lost": "its node was lost", "cut": "not what it sent"}
    for name, end in ends.items():
        with pytest.raises(InputError, match=f"^{name}: .*{said[name]}"):
            end.rows()
        assert (end.code, end.runs) == (2, b"")


def test_a_job_without_rows_says_why() -> None:
    assert ended().rows() == []
    with pytest.raises(InputError, match="^the picture is broken$"):
        ended(code=2, stdout="", stderr="quant: left out\nquant: the picture is broken\n").rows()
    with pytest.raises(InputError, match="ended with code -9"):
        ended(code=-9, stdout="").rows()
    assert [ended(code=code).internal for code in (0, 1, 2, 70, -11)] == [False, False, False, True, True]


def test_a_node_with_another_version_does_nothing() -> None:
    with pytest.raises(RuntimeError, match="another version"):
        perform(job(), b"", "other code")


def test_a_job_is_the_command_of_its_model(tmp_path: Path) -> None:
    found = perform(ModelJob("eval", "m", ("PP-OCRv4_mobile_det", "--dry-run"), 1), b"", code_digest())
    assert (found.code, found.runs) == (2, b"")
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
    """One is skipped, one is broken, one crashes: the others' rows stand, and the code tells."""
    row = {"model": "x", "task": "t", "target": "paddle", "status": "skipped", "reason": "none", "fix": "get it"}
    names = ["PP-OCRv4_mobile_det", "PP-OCRv4_mobile_rec", "PP-OCRv4_server_det"]
    ends = [
        ended(stdout=json.dumps({"rows": [row]}), code=2),
        ended(stdout="", stderr="quant: broken"),
        ended(code=-11),
    ]

    def spread(jobs: list[ModelJob], *_: Any) -> Iterator[tuple[ModelJob, Ended]]:
        yield from reversed(list(zip(jobs, ends, strict=True)))

    monkeypatch.setattr(executor, "spread", spread)
    command = ["eval", *names, "--jobs", "2", "--json", "--quiet", "--out", str(tmp_path)]
    assert _guarded(command) == cli.INTERNAL_ERROR
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert rows[0]["model"] == "x" and {r["reason"] for r in rows if r["model"] == names[1]} == {"broken"}


# --- whole runs ------------------------------------------------------------------------------------


def tiny_jobs(place: Path, names: list[str], patch: pytest.MonkeyPatch) -> list[ModelJob]:
    recipes = make_models(place, names)
    patch.setenv("QUANT_MODEL_HOME", str(place / "models"))
    patch.setenv("QUANT_DATA_HOME", str(place / "data"))
    patch.setenv("QUANT_CACHE", str(place / "cache"))
    more = ("--target", "onnxruntime", "--threads", "1", "--quiet")
    return [ModelJob("run", name, (str(recipe), *more), 1) for name, recipe in zip(names, recipes, strict=True)]


@pytest.mark.slow
@pytest.mark.xdist_group("interruption")
def test_models_side_by_side_end_like_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = tiny_jobs(tmp_path, NAMES[:2], monkeypatch)
    for results, count in ((tmp_path / "alone", 1), (tmp_path / "beside", 2)):
        for done, end in run_locally(jobs, results, count):
            assert end.code == 0, end.stderr
            assert peak_of(done, results) == end.peak > 50 << 20
        monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "another-cache"))
    assert all(content(tmp_path / "alone", name) == content(tmp_path / "beside", name) for name in NAMES[:2])


@pytest.mark.slow
@pytest.mark.xdist_group("interruption")
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (the extra `ray`)")
def test_a_node_that_is_killed_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without work and two nodes on this machine; one is killed when the first model has come back."""
    import ray
    from ray.cluster_utils import Cluster

    jobs = tiny_jobs(tmp_path, NAMES, monkeypatch)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1, memory=4 * GIB) for _ in range(2)]
    try:
        done = []
        for finished, end in run_on_ray(jobs, tmp_path / "ray", cluster.address):
            assert end.code == 0, end.stderr
            done.append(finished)
            if len(done) == 1:
                cluster.remove_node(nodes[0], allow_graceful=False)
        assert sorted(one.model for one in done) == NAMES
        ray.shutdown()
        evaluations = [replace(one, action="eval") for one in jobs[:1]]
        (judged,) = (end for _, end in run_on_ray(evaluations, tmp_path / "ray", cluster.address))
        assert judged.rows()[0]["status"] == "judged"
    finally:
        ray.shutdown()
        cluster.shutdown()
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "another-cache"))
    for _, end in run_locally(jobs, tmp_path / "local", 2):
        assert end.code == 0, end.stderr
    assert all(content(tmp_path / "ray", name) == content(tmp_path / "local", name) for name in NAMES)
