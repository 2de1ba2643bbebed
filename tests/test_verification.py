"""`quant verify`: every change of a file is named, cards for people are left alone, foreign folders are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from test_manifest import manifest

from quant.cli import _guarded
from quant.errors import InputError
from quant.stage import file_digests
from quant.verification import seal, verify, verify_all


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "model_onnxruntime_int8"
    folder.mkdir()
    (folder / "inference.onnx").write_bytes(b"model")
    (folder / "inference.yml").write_bytes(b"Global: {}")
    seal(folder, "model", "0123456789ab", "onnxruntime")
    return folder


def piped(file: Path) -> None:
    """A pipe in the place of a file: who opens it to read waits for ever."""
    file.unlink()
    os.mkfifo(file)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of before other files than artifacts were listed."""
    artifact = tmp_path / "run" / "paddle"
    artifact.mkdir(parents=True)
    (artifact / "inference.pdmodel").write_bytes(b"program")
    (tmp_path / "run" / "plan.json").write_bytes(b"{}")
    manifest(artifacts={"paddle": file_digests(artifact)}).save(tmp_path / "run")
    return tmp_path / "run"


def test_what_was_exported_is_good_with_a_card_beside_it(exported: Path) -> None:
    (exported / "README.md").write_text("# Card", encoding="utf-8")
    found = verify(exported)
    assert (found.good, found.kind, found.run, found.checked) == (True, "export", "0123456789ab", 2)


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (lambda folder: (folder / "inference.onnx").write_bytes(b"mode1"), ["changed: inference.onnx"]),
        (lambda folder: (folder / "inference.onnx").unlink(), ["missing: inference.onnx"]),
        (lambda folder: (folder / "more.bin").write_bytes(b""), ["added: more.bin"]),
        (lambda folder: (folder / "more").symlink_to("inference.onnx"), ["added: more"]),
        (lambda folder: os.mkfifo(folder / "pipe"), ["added: pipe"]),
        (lambda folder: piped(folder / "inference.onnx"), ["changed: inference.onnx"]),
        (lambda f: (f / "inference.yml").rename(f / "x.yml"), ["missing: inference.yml", "added: x.yml"]),
    ],
)
def test_every_change_is_named(exported: Path, change: Callable[[Path], object], problems: list[str]) -> None:
    change(exported)
    assert verify(exported).problems == problems


def test_a_link_to_the_same_content_is_another_file(exported: Path, tmp_path: Path) -> None:
    (exported / "inference.onnx").rename(tmp_path / "elsewhere")
    (exported / "inference.onnx").symlink_to(tmp_path / "elsewhere")
    assert verify(exported).problems == ["changed: inference.onnx"]


def test_a_run_and_an_artifact_in_it(run: Path) -> None:
    assert [verify(folder).kind for folder in (run, run / "paddle")] == ["run", "artifact"]
    (run / "paddle" / "inference.pdmodel").write_bytes(b"changed")
    (run / "paddle" / "new").write_bytes(b"")
    assert verify(run).problems == ["changed: paddle/inference.pdmodel", "added: paddle/new"]
    assert verify(run / "paddle").problems == ["changed: inference.pdmodel", "added: new"]


def test_folders_that_are_none(run: Path, tmp_path: Path) -> None:
    (run / "plans").mkdir()
    for folder, said in (
        (tmp_path / "nothing", "there is no folder"),
        (tmp_path, "no manifest.json in it or above it"),
        (run / "plans", "lists no artifact plans"),
    ):
        with pytest.raises(InputError, match=said):
            verify(folder)


def test_a_folder_of_several_is_each_of_them(run: Path, exported: Path, tmp_path: Path) -> None:
    """A line each, also for what lost its manifest; what is inside of a run, hidden, or no model is none of them."""
    (run / "paddle" / "inference.yml").write_bytes(b"")
    (tmp_path / ".half.part" / "run").mkdir(parents=True)
    (tmp_path / ".half.part" / "run" / "manifest.json").write_bytes(b"")
    (tmp_path / "report").mkdir()
    whole, changed = verify_all(tmp_path)
    assert (whole.kind, whole.folder, whole.good) == ("export", str(exported), True)
    assert (changed.kind, changed.folder, changed.problems) == ("run", str(run), ["added: paddle/inference.yml"])
    (run / "manifest.json").write_bytes(b"{")
    (exported / "manifest.json").unlink()
    lost, damaged = verify_all(tmp_path)
    assert (lost.kind, damaged.kind) == ("unknown", "unknown")
    assert "there is no manifest.json" in lost.problems[0] and "not a manifest of this program" in damaged.problems[0]
    for folder, said in ((tmp_path / "report", "no manifest.json in it or above it"), (run, "not a manifest")):
        with pytest.raises(InputError, match=said):
            verify_all(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", ""])
def test_a_manifest_cannot_point_out_of_its_folder(exported: Path, name: str) -> None:
    document = json.loads((exported / "manifest.json").read_text(encoding="utf-8"))
    document["files"] = {name: "0" * 64}
    (exported / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(InputError, match="not a manifest of this program"):
        verify(exported)


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b'{"schema": 1, "files": {"a": 1}}', b"\xff"])
def test_a_damaged_manifest_is_an_input_error(exported: Path, content: bytes) -> None:
    (exported / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match="not a manifest of this program"):
        verify(exported)


def test_the_worst_of_several_decides(exported: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    above = exported.parent
    assert _guarded(["verify", str(above)]) == 0
    assert [line.partition(": ")[2][:12] for line in capsys.readouterr().out.splitlines()] == [
        "good, 2 file",
        "good, 1 file",
    ]
    (exported / "manifest.json").unlink()
    assert _guarded(["verify", str(above), "--json"]) == 2
    assert [found["good"] for found in json.loads(capsys.readouterr().out)] == [False, True]
    assert _guarded(["verify", str(above)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{exported}: not what was written" and lines[2].startswith(f"{run}: good")


def test_the_command(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _guarded(["verify", str(exported)]) == 0
    assert f"{exported}: good, 2 files" in capsys.readouterr().out
    (exported / "inference.onnx").unlink()
    assert _guarded(["verify", str(exported), "--json"]) == 2
    (document,) = json.loads(capsys.readouterr().out)
    assert (document["good"], document["missing"]) == (False, ["inference.onnx"])
    assert _guarded(["verify", str(exported)]) == 2
    assert "  missing: inference.onnx" in capsys.readouterr().out
