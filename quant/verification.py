"""Whether a folder still holds what was written: a run, one of its artifacts, or what `quant export` copied out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from quant.archive import file_sha256
from quant.errors import InputError
from quant.manifest import CARD, MANIFEST_FILE, load_manifest
from quant.record import read_record

Kind = Literal["run", "artifact", "export", "unknown"]

_MODEL_FILE = "inference.yml"  # that every artifact has, whatever its format


class ExportManifest(BaseModel):
    """manifest.json of a folder that `quant export` wrote."""

    model_config = ConfigDict(protected_namespaces=(), populate_by_name=True, extra="forbid")

    schema_: Literal[1] = Field(default=1, alias="schema")
    model: str
    run: str
    target: str
    files: dict[str, str] = Field(description="file -> sha256")


@dataclass(frozen=True)
class Verification:
    """How a folder compares with its manifest.

    Attributes:
        checked: how many files the manifest lists.
        missing, changed: files that it lists.
        added: files that it does not list.
        damage: why there is nothing to compare with, in a sentence; the kind is unknown then.
    """

    folder: str
    kind: Kind
    model: str
    run: str
    checked: int
    missing: list[str]
    changed: list[str]
    added: list[str]
    damage: str = ""

    @property
    def good(self) -> bool:
        return not self.problems

    @property
    def problems(self) -> list[str]:
        groups = {"missing": self.missing, "changed": self.changed, "added": self.added}
        named = [f"{what}: {name}" for what, names in groups.items() for name in names]
        return [self.damage, *named] if self.damage else named

    @property
    def verdict(self) -> str:
        """In a line."""
        said = "good" if self.good else "not what was written"
        return said if self.damage else f"{said}, {self.checked} files of run {self.run} of {self.model}"

    def document(self) -> dict[str, Any]:
        return {"schema": 1, "good": self.good, **asdict(self)}


def seal(folder: Path, model: str, run: str, target: str) -> None:
    """Write a manifest into a folder that leaves its run, so that it can be verified on its own."""
    files = {name: file_sha256(path) for name, path in _files(folder).items() if _hashed(name)}
    manifest = ExportManifest(model=model, run=run, target=target, files=files)
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")


def verify_all(folder: Path) -> list[Verification]:
    """Compare a folder with its manifest, or, if it holds runs or exported folders instead, each of those with its own.

    Raises:
        InputError: it is or holds none of these, or its own manifest is damaged.
    """
    below = [] if (folder / MANIFEST_FILE).is_file() else _models_below(folder)
    return [_verified(place) for place in below] or [verify(folder)]


def verify(folder: Path) -> Verification:
    """Compare a run, an artifact inside of one, or an exported folder with its manifest.

    Raises:
        InputError: it is none of these, or its manifest is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give a run's, an artifact's or an exported folder")
    folder = folder.resolve()
    if not (folder / MANIFEST_FILE).is_file():
        return _verify_artifact(folder)
    exported = _export_manifest(folder / MANIFEST_FILE)
    if exported:
        return _compared(folder, "export", exported.model, exported.run, exported.files)
    manifest = load_manifest(folder)
    artifacts = {f"{t}/{name}": sha256 for t, files in manifest.artifacts.items() for name, sha256 in files.items()}
    found = _compared(folder, "run", manifest.model, manifest.run, {**manifest.files, **artifacts})
    if manifest.files:
        return found
    # Older runs list their artifacts alone: what else lies there is not known.
    added = [name for name in found.added if name.partition("/")[0] in manifest.artifacts]
    return Verification(**{**asdict(found), "added": added})


def _models_below(folder: Path) -> list[Path]:
    """Folders with a manifest, or with a model that should have one; none inside of another, none that is hidden."""
    found = []
    for name, folders, files in os.walk(folder):
        place = Path(name)
        if place != folder and {MANIFEST_FILE, _MODEL_FILE}.intersection(files):
            found.append(place)
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return found


def _verified(folder: Path) -> Verification:
    """One folder of several, where a damaged manifest is a finding and hides nothing of the others."""
    try:
        return verify(folder)
    except InputError as error:
        return Verification(str(folder.resolve()), "unknown", "", "", 0, [], [], [], str(error))


def _verify_artifact(folder: Path) -> Verification:
    if not (folder.parent / MANIFEST_FILE).is_file():
        raise InputError(
            f"{folder}: there is no {MANIFEST_FILE} in it or above it; give the folder of a run, one that "
            "`quant export` wrote, or one that holds such folders"
        )
    manifest = load_manifest(folder.parent)
    if folder.name not in manifest.artifacts:
        raise InputError(f"{folder.parent / MANIFEST_FILE} lists no artifact {folder.name}: it is not of this run")
    return _compared(folder, "artifact", manifest.model, manifest.run, manifest.artifacts[folder.name])


def _export_manifest(file: Path) -> ExportManifest | None:
    """The manifest of an exported folder, None where it is another kind's, or cannot be read."""
    try:
        return read_record(file, ExportManifest)
    except (OSError, ValueError):
        return None


def _compared(folder: Path, kind: Kind, model: str, run: str, listed: Mapping[str, str]) -> Verification:
    found = _files(folder)
    unsafe = [name for name in listed if not _inside(name)]
    if unsafe:
        raise InputError(f"{folder / MANIFEST_FILE}: not a manifest of this program: it lists {unsafe[0]!r}")
    missing = sorted(set(listed) - set(found))
    changed = sorted(n for n in set(listed) & set(found) if not _plain(found[n]) or file_sha256(found[n]) != listed[n])
    added = sorted(name for name in set(found) - set(listed) if _hashed(name))
    return Verification(str(folder), kind, model, run, len(listed), missing, changed, added)


def _files(folder: Path) -> dict[str, Path]:
    """All that stands in a folder and is none itself: links, pipes and sockets too."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _plain(path: Path) -> bool:
    """Whether it is a file of its own: no link, and no pipe, which would never end when it is read."""
    return path.is_file() and not path.is_symlink()


def _hashed(name: str) -> bool:
    """Manifests hold hashes and cannot be hashed by themselves; cards are text for people."""
    return name != MANIFEST_FILE and PurePosixPath(name).name != CARD


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and name.isprintable()
