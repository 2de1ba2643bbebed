"""The manifest of a run: everything that made it what it is."""

from __future__ import annotations

import json
import logging
import platform
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from quant.archive import file_sha256, staged
from quant.errors import InputError
from quant.ladder import Rung
from quant.record import read_record
from quant.stage import file_digests
from quant.storage import is_file
from quant.target import TargetName

log = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
PACKAGES = (
    "paddlepaddle",
    "paddleslim",
    "paddleocr",
    "paddlex",
    "paddle2onnx",
    "onnx",
    "onnxruntime",
    "onnxsim",
    "openvino",
    "numpy",
    "opencv-contrib-python",
)
CARD = "README.md"
"""The model card in an artifact's folder: for people, no part of the model."""

EXHIBITS = "exhibits"
"""Folder of a run with a folder per target: pictures on which FP32 and INT8 differ (see `eval.exhibits`)."""

_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp")


class DataRecord(BaseModel):
    """Where a data set came from and how many of its samples served what."""

    source: str
    licence: str
    calibration: int
    search: int
    report: int
    broken: list[str]


class Manifest(BaseModel):
    """results/<model>/<run>/manifest.json."""

    model_config = ConfigDict(protected_namespaces=(), populate_by_name=True)

    schema_: int = Field(default=1, alias="schema")
    model: str
    run: str
    created: str = Field(description="UTC, ISO 8601")
    asked: str = Field(default="", description="when a finished run was asked for again, after another had been made")
    recipe: dict[str, Any]
    recipe_sha256: str
    source: str = Field(description="where the FP32 model came from")
    model_sha256: dict[str, str]
    data: dict[str, DataRecord]
    unavailable: dict[str, str] = Field(description="data sets that could not be had, and why")
    calibration_ids: list[str]
    search_ids: list[str]
    report_ids: list[str]
    proof: dict[str, Any]
    ladder: dict[TargetName, list[Rung]]
    artifacts: dict[TargetName, dict[str, str]] = Field(description="target -> file -> sha256")
    files: dict[str, str] = Field(default_factory=dict, description="every other file of the run -> sha256")
    seed: int
    threads: int
    code_sha256: str
    versions: dict[str, str]
    processor: dict[str, Any]

    def save(self, folder: Path) -> None:
        text = json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, sort_keys=True, ensure_ascii=False)
        with staged(folder / MANIFEST_FILE) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def intact(self, folder: Path) -> bool:
        """Whether every file in the run's folder still has the hash that was noted."""
        if any(not is_file(folder / name) or file_sha256(folder / name) != it for name, it in self.files.items()):
            return False
        for target, files in self.artifacts.items():
            place = folder / target
            if not place.is_dir() or artifact_digests(place) != files:
                return False
        return True


def artifact_digests(folder: Path) -> dict[str, str]:
    """Hex sha256 of the model files of an artifact, by name; its card is none of them."""
    return {name: sha256 for name, sha256 in file_digests(folder).items() if name != CARD}


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a run.

    Raises:
        InputError: missing or not readable.
    """
    file = folder / MANIFEST_FILE
    try:
        return read_record(file, Manifest)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        hint = "delete the folder and run `quant run`"
        raise InputError(f"{file}: damaged, or not a manifest of this program ({why}); {hint}") from error


def newest_run(results: Path, model: str) -> Path | None:
    """Folder of the complete run of a model that was made or asked for last, or None; damaged ones are left out."""
    times = {}
    for path in sorted((results / model).glob("*/manifest.json")):
        try:
            manifest = load_manifest(path.parent)
        except InputError as error:
            log.warning("left out: %s", error)
            continue
        times[path.parent] = max(manifest.created, manifest.asked)
    return max(times, key=lambda folder: times[folder], default=None)


def make_newest(folder: Path) -> None:
    """A run that is asked for again is the one that evaluation and export take."""
    if newest_run(folder.parent.parent, folder.parent.name) != folder:
        load_manifest(folder).model_copy(update={"asked": now()}).save(folder)


def newest_runs(results: Path) -> list[Path]:
    """The newest complete run of every model in a results folder, by model."""
    models = sorted({path.parent.parent.name for path in results.glob("*/*/manifest.json")})
    return [folder for model in models if (folder := newest_run(results, model))]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")  # the newest of two runs in a second must be told


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


_WIDE_PRODUCTS = {"avx512_vnni", "avx512vnni", "avx_vnni", "amx_int8"}


def products_saturate() -> bool:
    """Whether this processor adds products of U8 and S8 in 16 bits, where large ones saturate: x86 before VNNI."""
    features = set(processor()["features"])
    return "avx2" in features and not features & _WIDE_PRODUCTS


@cache
def processor() -> dict[str, Any]:
    """Name, cores and the vector extensions that matter for INT8."""
    import os

    import cpuinfo

    info = cpuinfo.get_cpu_info()
    flags = set(info.get("flags", []))
    return {
        "name": info.get("brand_raw", platform.processor()),
        "cores": os.cpu_count(),
        "features": [feature for feature in _FEATURES if feature in flags],
    }
