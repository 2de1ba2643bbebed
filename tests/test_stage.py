"""Stages: done once, never half, and redone when anything they depend on has changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from quant import stage
from quant.stage import SEAL, StageStore, code_digest, digest, file_digests, holds


def write(text: str) -> stage.Callable[[Path], None]:
    return lambda folder: (folder / "result.txt").write_text(text) and None


def never(folder: Path) -> None:
    raise AssertionError("this result was there already")


def test_a_result_is_made_once(tmp_path: Path) -> None:
    store = StageStore(tmp_path / "stages")
    first = store.result("plan", {"a": 1, "b": [2]}, write("one"))
    assert (first / "result.txt").read_text() == "one"
    assert store.result("plan", {"b": [2], "a": 1}, never) == first


@pytest.mark.parametrize("inputs", [{"a": 2}, {"a": "1"}, {"a": 1, "b": None}, {}])
def test_other_inputs_are_another_result(tmp_path: Path, inputs: dict[str, object]) -> None:
    store = StageStore(tmp_path)
    assert store.result("plan", {"a": 1}, write("one")) != store.result("plan", inputs, write("two"))


def test_another_stage_or_other_code_is_another_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StageStore(tmp_path)
    folders = {store.result("plan", {}, write("1")), store.result("artifact", {}, write("2"))}
    monkeypatch.setattr(stage, "code_digest", lambda: "other code")
    folders.add(store.result("plan", {}, write("3")))
    assert len(folders) == 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_nothing_half_done_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    store = StageStore(tmp_path)

    def build(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise error

    with pytest.raises(error):
        store.result("plan", {}, build)
    assert list(tmp_path.iterdir()) == []
    assert (store.result("plan", {}, write("whole")) / "result.txt").read_text() == "whole"


def test_a_result_that_another_process_finished_meanwhile_is_kept(tmp_path: Path) -> None:
    store = StageStore(tmp_path)

    def build(folder: Path) -> None:
        store.result("plan", {}, write("theirs"))
        write("ours")(folder)

    assert (store.result("plan", {}, build) / "result.txt").read_text() == "theirs"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "other", "gone", "added", "no seal", "cut seal", "deep seal"])
def test_a_damaged_result_is_made_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the start of a run, and in the middle of one that has used it before."""
    store = StageStore(tmp_path)

    def build(folder: Path) -> None:
        (folder / "below").mkdir()
        (folder / "below" / "deep.txt").write_text("whole", encoding="utf-8")

    for known in (True, False):
        folder = store.result("plan", {}, build)
        file, seal = folder / "below" / "deep.txt", folder / SEAL
        store.result("plan", {}, never)
        if not known:
            stage._CHECKED.clear()
        harm: dict[str, stage.Callable[[], object]] = {
            "cut": lambda file=file: file.write_text("who", encoding="utf-8"),
            "other": lambda file=file: file.write_text("other", encoding="utf-8"),
            "gone": file.unlink,
            "added": lambda file=file: (file.parent / "more.txt").touch(),
            "no seal": seal.unlink,
            "cut seal": lambda seal=seal: seal.write_text("{", encoding="utf-8"),
            "deep seal": lambda seal=seal: seal.write_text("[" * 100_000, encoding="utf-8"),
        }
        harm[damage]()
        assert not holds(folder) and not folder.exists()
        assert store.result("plan", {}, build) == folder and file.read_text(encoding="utf-8") == "whole"
        assert f"{folder} is not as it was written; it is made again" in caplog.text
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
        caplog.clear()


def test_files_are_read_once_and_again_when_they_were_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = stage.file_sha256
    monkeypatch.setattr(stage, "file_sha256", lambda path: read.append(path.name) or original(path))
    folder = StageStore(tmp_path).result("plan", {}, write("whole"))
    read.clear()
    for _ in range(3):
        assert holds(folder)
    assert read == ["result.txt"]
    os.utime(folder / "result.txt", (0, 0))
    assert holds(folder) and read == 2 * ["result.txt"]


def test_a_seal_is_no_part_of_a_result(tmp_path: Path) -> None:
    folder = StageStore(tmp_path).result("plan", {}, write("whole"))
    assert file_digests(folder).keys() == {"result.txt"} and (folder / SEAL).is_file()


def test_digests(tmp_path: Path) -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    assert digest([1, 2]) != digest([2, 1])
    (tmp_path / "b.bin").write_bytes(b"content")
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    assert file_digests(tmp_path) == {
        "a.bin": hashlib.sha256(b"").hexdigest(),
        "b.bin": hashlib.sha256(b"content").hexdigest(),
    }
    assert len(code_digest()) == 64
