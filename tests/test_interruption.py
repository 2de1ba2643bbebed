"""Runs that are killed, run side by side, or lose the ground under them: one sentence, nothing lost, the same bytes."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from interruptions import TinyJob, content, kill_and_resume, make_job, run_folder
from small_run import MODEL, write_small_run
from tried import RecordProperty, tried

from quant.archive import discard, staged, sweep
from quant.verification import verify

slow = pytest.mark.slow
KILLS = int(os.environ.get("QUANT_TEST_KILLS", "4"))  # 50 in benchmarks/interruption.py


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def calm(job: TinyJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a run that nobody disturbed."""
    results = tmp_path_factory.mktemp("calm")
    code, said = job.run(results / "cache", results)
    assert code == 0, said
    return results


@pytest.mark.parametrize(
    ("file", "old", "new", "timed"),
    [
        ("manifest.json", '"seconds": 60.0', '"seconds": 61.0', True),
        ("manifest.json", '"created": "', '"created": "1', True),
        ("manifest.json", '"error": 0.05', '"error": 0.06', False),
        ("manifest.json", '"run": "', '"run": "1', False),
        ("onnxruntime/README.md", "41.2 ms", "41.3 ms", True),
        ("onnxruntime/README.md", "2.00x", "2.10x", True),
        ("onnxruntime/README.md", "58.53", "58.54", False),
        ("metrics.json", '"int8": 58', '"int8": 57', False),
        ("onnxruntime/inference.onnx", "model", "Model", False),
    ],
)
def test_only_what_a_clock_said_is_left_out_of_a_comparison(
    file: str, old: str, new: str, timed: bool, tmp_path: Path
) -> None:
    folder = write_small_run(tmp_path)
    shutil.rmtree(tmp_path / MODEL / "sensitivity")
    card = "| 58.53 |\n\n* Speed at 1x3x48x320: 41.2 ms\n* reader: INT8 is NOT faster here (2.00x of the best FP32)\n"
    (folder / "onnxruntime" / "README.md").write_text(card, encoding="utf-8")
    before, text = content(tmp_path, MODEL), (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    assert (content(tmp_path, MODEL) == before) is timed


@slow
@pytest.mark.xdist_group("interruption")
def test_killed_runs_go_on_and_end_with_the_same_bytes(
    job: TinyJob, tmp_path: Path, record_property: RecordProperty
) -> None:
    outcome = kill_and_resume(job, tmp_path, KILLS, seed=1)
    tried(record_property, "kills with SIGKILL", "quant run", outcome.kills)
    assert outcome.kills == KILLS and outcome.runs >= 1
    assert (outcome.different, outcome.damaged, outcome.survivors) == (0, 0, 0)


@slow
@pytest.mark.xdist_group("interruption")
def test_two_runs_at_once_do_not_disturb_each_other(job: TinyJob, calm: Path, tmp_path: Path) -> None:
    runs = [job.started(tmp_path / "cache", tmp_path / "results") for _ in range(2)]
    ends = [process.communicate(timeout=900) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], [said for _, said in ends]
    assert content(tmp_path / "results") == content(calm)
    assert verify(run_folder(tmp_path / "results")).good


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


@slow
@pytest.mark.xdist_group("interruption")
def test_a_full_disk_is_named_and_nothing_is_lost(job: TinyJob, calm: Path, small_disk: Path, tmp_path: Path) -> None:
    small_disk.joinpath("taken").write_bytes(b"x" * (2024 << 10))
    code, said = job.run(small_disk / "cache", tmp_path / "results")
    (sentence,) = [line for line in said.splitlines() if line.startswith("quant: ")]
    assert code == 2 and os.strerror(errno.ENOSPC) in sentence and "Traceback" not in said, said
    assert not list((tmp_path / "results").rglob("manifest.json"))
    remount(small_disk, "size=200m")
    code, said = job.run(small_disk / "cache", tmp_path / "results")
    assert code == 0, said
    assert content(tmp_path / "results") == content(calm)


@slow
@pytest.mark.xdist_group("interruption")
def test_a_read_only_folder_is_named(job: TinyJob, calm: Path, small_disk: Path) -> None:
    remount(small_disk, "ro")
    code, said = job.run(calm / "cache", small_disk / "results")
    (sentence,) = [line for line in said.splitlines() if line.startswith("quant: ")]
    assert code == 2 and str(small_disk) in sentence and os.strerror(errno.EROFS) in sentence, said


@slow
@pytest.mark.xdist_group("interruption")
def test_a_model_that_changes_under_a_run_is_named(job: TinyJob, calm: Path, tmp_path: Path) -> None:
    weights = job.root / "model" / "inference.pdiparams"
    kept = weights.read_bytes()
    code, said = job.disturbed(tmp_path / "cache", tmp_path / "results", 0, lambda: weights.write_bytes(kept + b"0"))
    weights.write_bytes(kept)
    assert code == 2 and f"{weights} changed while it was being read" in said and "Traceback" not in said, said
    assert not list((tmp_path / "results").rglob("manifest.json"))
    code, said = job.run(tmp_path / "cache", tmp_path / "results")
    assert code == 0, said
    assert content(tmp_path / "results") == content(calm)


@slow
@pytest.mark.xdist_group("interruption")
@pytest.mark.parametrize("steps", [1, 7])
def test_a_cache_that_is_cleared_under_a_run_is_named(job: TinyJob, calm: Path, steps: int, tmp_path: Path) -> None:
    """Unless the run needs nothing of it any more; in both cases what stands in the results is whole."""
    cache = tmp_path / "cache"
    code, said = job.disturbed(cache, tmp_path / "results", steps, lambda: shutil.rmtree(cache, ignore_errors=True))
    assert code in (0, 2) and "Traceback" not in said, said
    assert code == 0 or str(cache) in said, said
    code, said = job.run(cache, tmp_path / "results")
    assert code == 0, said
    assert content(tmp_path / "results") == content(calm)


@slow
@pytest.mark.xdist_group("interruption")
def test_a_cache_with_damaged_files_is_mended(job: TinyJob, calm: Path, tmp_path: Path) -> None:
    """A file of every step is cut off, as where the power failed, or gone, as where old files are cleared away."""
    cache = Path(shutil.copytree(calm / "cache", tmp_path / "cache"))
    stages = sorted((cache / "stages").iterdir())
    for index, stage in enumerate(stages):
        file = max((path for path in stage.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        content_before = file.read_bytes()
        file.unlink()
        if index % 2:
            file.write_bytes(content_before[: len(content_before) // 2])
    code, said = job.run(cache, tmp_path / "results")
    assert code == 0, said
    assert said.count("is not as it was written; it is made again") == len(stages) > 5, said
    assert content(tmp_path / "results") == content(calm)


def test_fifty_kills_were_tried_and_nothing_was_lost() -> None:
    """What `benchmarks/interruption.py` wrote last."""
    page = (Path(__file__).parents[1] / "results" / "interruption.md").read_text(encoding="utf-8")
    found = {what: int(number) for what, number in re.findall(r"^\| (.*) \| (\d+) \|$", page, re.MULTILINE)}
    kills, early, latest, runs, *losses = found.values()
    assert kills >= 50 and early < 50 and latest > 1 and runs > 1 and losses == [0, 0, 0], found


def test_nobody_finds_half_of_what_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the process is killed before it has removed all."""
    folder = tmp_path / "run"
    (folder / "deep").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile.TemporaryDirectory, "__exit__", lambda *_: None)
        patch.setattr(tempfile.TemporaryDirectory, "_cleanup", lambda *_, **__: None)
        discard(folder)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".run-") and left.suffix == ".part" and (left / "run" / "deep").is_dir()
    os.utime(left, (0, 0))
    with staged(folder) as temporary:
        temporary.mkdir()
    assert list(tmp_path.iterdir()) == [folder]
    for _ in range(2):  # once more, as by another process that found it damaged too
        discard(folder)
        assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_up(tmp_path: Path) -> None:
    """Not what a living one works on, nor what is as young as one that has not locked it yet, nor of other targets."""
    old, young, other = (tmp_path / f".{name}.part" for name in ("plan-x", "plan-young", "other-x"))
    for folder in (old, young, other):
        (folder / "half").mkdir(parents=True)
    for folder in (old, other):
        os.utime(folder, (0, 0))
    with staged(tmp_path / "plan") as alive:
        os.utime(alive.parent, (0, 0))
        with staged(tmp_path / "plan") as temporary:
            temporary.mkdir()
        assert alive.parent.is_dir()
        alive.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other-x.part", ".plan-young.part", "plan"]
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".plan-young.part", "plan"]
