"""Manifests: what is written can be read, damage is noticed, the newest run is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quant.archive import file_sha256
from quant.errors import InputError
from quant.manifest import (
    DataRecord,
    Manifest,
    load_manifest,
    newest_run,
    newest_runs,
    now,
    processor,
    products_saturate,
    versions,
)
from quant.stage import file_digests


def manifest(**changes: Any) -> Manifest:
    facts: dict[str, Any] = {
        "model": "m",
        "run": "0" * 12,
        "created": "2026-01-01T00:00:00+00:00",
        "recipe": {"name": "m"},
        "recipe_sha256": "a",
        "source": "一个来源",
        "model_sha256": {"inference.pdmodel": "b"},
        "data": {
            "set": DataRecord(source="s", licence="l", calibration=1, search=2, report=3, broken=["one"]),
        },
        "unavailable": {"other": "no network"},
        "calibration_ids": ["c"],
        "search_ids": ["s"],
        "report_ids": ["r"],
        "proof": {"max_difference": 0.0},
        "ladder": {"onnxruntime": []},
        "artifacts": {},
        "seed": 0,
        "threads": 1,
        "code_sha256": "d",
        "versions": {},
        "processor": {},
    }
    return Manifest(**(facts | changes))


def run_in(results: Path, name: str, created: str) -> Path:
    folder = results / "m" / name
    folder.mkdir(parents=True)
    manifest(run=name, created=created).save(folder)
    return folder


def test_round_trip(tmp_path: Path) -> None:
    manifest().save(tmp_path)
    assert load_manifest(tmp_path) == manifest()
    document = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert document["schema"] == 1
    assert "一个来源" in (tmp_path / "manifest.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"\xff", b'{"schema": 1, "model": "m"}'])
def test_a_missing_or_foreign_file_is_an_input_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest.json.*quant run"):
        load_manifest(tmp_path)


def test_damaged_missing_and_added_artifact_files_are_noticed(tmp_path: Path) -> None:
    place = tmp_path / "onnxruntime"
    place.mkdir()
    (place / "inference.onnx").write_bytes(b"model")
    (place / "inference.yml").write_bytes(b"yml")
    noted = manifest(artifacts={"onnxruntime": file_digests(place)})
    assert noted.intact(tmp_path)
    (place / "inference.onnx").write_bytes(b"mode1")
    assert not noted.intact(tmp_path)
    (place / "inference.onnx").write_bytes(b"model")
    (place / "extra").touch()
    assert not noted.intact(tmp_path)
    (place / "extra").unlink()
    assert noted.intact(tmp_path)
    (place / "inference.yml").unlink()
    assert not noted.intact(tmp_path)
    assert not manifest(artifacts={"openvino": {}}).intact(tmp_path)
    (tmp_path / "metrics.json").write_text("{}", encoding="utf-8")
    other = manifest(artifacts={}, files={"metrics.json": file_sha256(tmp_path / "metrics.json")})
    assert other.intact(tmp_path)
    (tmp_path / "metrics.json").write_text("{ }", encoding="utf-8")
    assert not other.intact(tmp_path)
    assert not manifest(artifacts={}, files={"m" * 300: "0"}).intact(tmp_path), "no file system takes the name"


def test_the_newest_run_is_the_one_that_was_made_last(tmp_path: Path) -> None:
    assert newest_run(tmp_path, "m") is None
    run_in(tmp_path, "ffff", "2026-01-01T00:00:00+00:00")
    newest = run_in(tmp_path, "aaaa", "2026-03-01T00:00:00+00:00")
    run_in(tmp_path, "eeee", "2026-02-01T00:00:00+00:00")
    (tmp_path / "m" / "half").mkdir()
    assert newest_run(tmp_path, "m") == newest
    assert newest_run(tmp_path, "other") is None
    assert newest_runs(tmp_path) == [newest]


def test_a_damaged_run_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = run_in(tmp_path, "aaaa", "2026-03-01T00:00:00+00:00")
    (tmp_path / "m" / "bbbb").mkdir()
    (tmp_path / "m" / "bbbb" / "manifest.json").write_text("{}", encoding="utf-8")
    assert newest_run(tmp_path, "m") == good
    assert "bbbb" in caplog.text


def test_facts_of_this_machine() -> None:
    assert {"python", "numpy", "onnx", "paddlepaddle"} <= set(versions())
    assert processor()["cores"] >= 1
    assert now() >= "2024"


@pytest.mark.parametrize(
    ("features", "saturate"),
    [(["avx2"], True), (["avx2", "avx512f"], True), (["avx2", "avx_vnni"], False), (["asimddp"], False), ([], False)],
)
def test_products_saturate_on_x86_before_vnni(
    monkeypatch: pytest.MonkeyPatch, features: list[str], saturate: bool
) -> None:
    monkeypatch.setattr("quant.manifest.processor", lambda: {"features": features})
    assert products_saturate() == saturate
