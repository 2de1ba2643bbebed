"""Stages: done once, never half, and redone when anything they depend on has changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from quant import stage
from quant.stage import StageStore, code_digest, digest, file_digests


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
