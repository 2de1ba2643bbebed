"""A full disk is an error that names the place, whatever is written; nothing else is printed, and bytes stay the same."""

from __future__ import annotations

import errno
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_models import small_detector

from eval.evaluation import Outcomes
from quant import cli, slim
from quant.archive import staged
from quant.arrays import write_array, write_arrays
from quant.calibration import collect_statistics, save_statistics
from quant.conversion import save_feeds
from quant.equalization import save_equalizers
from quant.plan import QuantPlan
from quant.slim import SlimScales
from quant.storage import scratch, write_bytes
from quant.twins.training import train_in_child

FULL = Path("/dev/full")  # where every write fails as on a full disk
ARRAY = np.arange(5, dtype=np.float32)
ROWS = np.ones((1, 1))

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")


def _statistics(folder: Path) -> None:
    net = small_detector()
    save_statistics(collect_statistics(net.graph(), ["x"], [net.feed()], 1), folder / "statistics.npz")


def _plan(folder: Path) -> None:
    facts = {"model": "m", "target": "onnxruntime", "method": "ptq", "prepared_sha256": ""}
    QuantPlan(**facts, operators=[], activations={}, weights={}, integers={}, bias_shifts={}, notes=[]).save(folder)


WRITERS: dict[str, Callable[[Path], object]] = {
    "any.npy": lambda folder: write_array(folder / "any.npy", ARRAY),
    "any.npz": lambda folder: write_arrays(folder / "any.npz", ARRAY),
    "feed0.npz": lambda folder: save_feeds(folder, [{"x": ARRAY}]),
    "outcomes.npz": lambda folder: Outcomes(["a"], ["s"], ROWS, ROWS, []).save(folder / "outcomes.npz"),
    "statistics.npz": _statistics,
    "scales.npz": lambda folder: SlimScales({}, {"w": ARRAY}, {}, ()).save(folder),
    "plan.safetensors": _plan,
    "equalizers.safetensors": lambda folder: save_equalizers({}, folder),
}


def full(error: pytest.ExceptionInfo[OSError], place: Path) -> bool:
    return (error.value.errno, error.value.filename) == (errno.ENOSPC, str(place))


@pytest.mark.parametrize("name", WRITERS)
def test_what_does_not_fit_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no object that is left behind prints a traceback of its own."""
    (tmp_path / name).symlink_to(FULL)
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with pytest.raises(OSError) as caught:
        WRITERS[name](tmp_path)
    assert full(caught, tmp_path / name)
    assert ignored == []


def test_the_command_says_it_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "any.npz").symlink_to(FULL)
    monkeypatch.setattr(cli, "app", lambda **_: write_arrays(tmp_path / "any.npz", ARRAY))
    assert cli._guarded([]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"quant: {tmp_path / 'any.npz'}: No space left on device") and said.count("\n") == 1


def test_a_step_or_a_temporary_folder_is_named_where_the_writer_names_nothing(tmp_path: Path) -> None:
    def write(file: Path) -> None:
        file.symlink_to(FULL)
        file.write_text("more than there is room for", encoding="utf-8")

    with pytest.raises(OSError) as caught, staged(tmp_path / "step") as temporary:
        write(temporary)
    assert full(caught, tmp_path / "step")
    with pytest.raises(OSError) as caught, scratch() as place:
        write(place / "file")
    assert full(caught, place) and not place.exists()


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, staged(tmp_path / "step"):
        write_bytes(tmp_path / "nowhere" / "file", b"")
    assert caught.value.filename == str(tmp_path / "nowhere" / "file")
    with pytest.raises(ConnectionError) as lost, staged(tmp_path / "step"):
        raise ConnectionError(errno.ECONNRESET, "Connection reset by peer")
    assert lost.value.filename is None


def test_files_are_those_of_numpy(tmp_path: Path) -> None:
    write_arrays(tmp_path / "ours.npz", ARRAY, ROWS, named=ARRAY)
    np.savez(tmp_path / "theirs.npz", ARRAY, ROWS, named=ARRAY)
    assert (tmp_path / "ours.npz").read_bytes() == (tmp_path / "theirs.npz").read_bytes()
    write_array(tmp_path / "ours.npy", ARRAY)
    np.save(content := io.BytesIO(), ARRAY)
    assert (tmp_path / "ours.npy").read_bytes() == content.getvalue()


def test_the_child_of_paddleslim_names_what_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "fp32").mkdir()
    (tmp_path / "fp32" / "inference.pdiparams").write_bytes(b"")
    (tmp_path / "job.json").write_text(json.dumps({"algo": "avg", "samples": 1}), encoding="utf-8")
    (tmp_path / "progress.txt").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        slim._run_child(tmp_path, lambda done, total: None)
    assert caught.value.filename == str(tmp_path / "progress.txt")


def test_the_child_that_trains_a_twin_names_what_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = """
from quant.twins.training import train_as_asked

def train(folder, seed, minutes):
    (folder / "inference.json").symlink_to("/dev/full")
    (folder / "inference.json").write_text("a program")

train_as_asked(train)
"""
    (tmp_path / "endless.py").write_text(module, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(OSError) as caught:
        train_in_child("endless", tmp_path / "twin", 0, 1)
    assert full(caught, tmp_path / "twin")
