"""Data sets by name: one YAML per public set in this folder, folders of the user's own, the generated sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from eval.gate import POOLED
from quant.archive import Progress, install
from quant.document import DocumentError, parse_yaml
from quant.errors import InputError, Unavailable
from quant.recipe import Sha256, Task
from quant.source import cache_dir, search_path
from quant.stage import holds, sealed

LabelFormat = Literal["det_label", "rec_label", "cls_label", "coco", "table_label", "latex_lines"]
GeneratedKind = Literal["text_lines", "text_pages", "document_pages", "layout_pages", "tables", "formulas"]

GENERATED = "generated-"
"""What the names of generated sets begin with."""

_GENERATOR, _NO_TERMS = "the built-in generator", "generated, no terms"

FORMATS: dict[Task, LabelFormat] = {
    "text_detection": "det_label",
    "text_recognition": "rec_label",
    "image_classification": "cls_label",
    "layout_detection": "coco",
    "table_structure": "table_label",
    "formula_recognition": "rec_label",
}
"""The label format of each task: det_label = image TAB JSON, rec_label = image TAB text, cls_label = image SPACE index.

A folder in cls_label has PaddleX's layout: train.txt and val.txt list pictures, label.txt the classes (`index name`).
One in coco has `instances.json`, or PaddleX's layout: `images` and `annotations/instance_{train,val}.json`.
table_label = a JSON object in each line of label.jsonl, or of PaddleX's train.txt and val.txt: `filename` and `html`,
as text or, as in PubTabNet, as the tokens of structure and cells. latex_lines = UniMER-Test: line k of NAME.txt is the
LaTeX of the k-th picture, by name, in the folder NAME.
"""

PADDLEX_COCO = ("annotations/instance_train.json", "annotations/instance_val.json")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataArchive(_Part):
    """The public archive of a set."""

    url: str = Field(pattern=r"^https?://")
    sha256: Sha256 | None = Field(None, description="without it: trust on first use")


def _relative(path: str) -> str:
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise ValueError("must be a path inside the folder of the set")
    return path


RelativePath = Annotated[str, AfterValidator(_relative)]


class DatasetEntry(_Part):
    """What is known about a public set."""

    schema_: Literal[1] = Field(alias="schema")
    name: str = Field(pattern=r"^[a-z0-9_]+$")
    task: Task
    description: str
    format: LabelFormat
    label_files: list[RelativePath] = Field(min_length=1)
    images: RelativePath = Field(".", description="folder that the paths in the label files start from")
    homepage: str = Field(pattern=r"^https?://")
    licence: str
    language: list[str] = Field(description="codes; empty: not stated")
    classes: list[str] = Field(default_factory=list, description="of cls_label, in the order of their index")
    mapping: dict[str, list[str]] = Field(
        default_factory=dict,
        description="of coco: each class of the set, and the model's classes that count as it, the first names it; "
        "an empty list: not judged; no mapping: the names are the model's",
    )
    archive: DataArchive | None = Field(description="null: not open, or only after registration at the homepage")
    note: str = ""

    @model_validator(mode="after")
    def _classes_named(self) -> DatasetEntry:
        if (self.format == "cls_label") != bool(self.classes):
            raise ValueError("classes must be named for the format cls_label, and for no other")
        if self.mapping and self.format != "coco":
            raise ValueError("mapping is for the format coco")
        return self


@dataclass(frozen=True)
class DatasetFolder:
    """A data set on disk.

    Attributes:
        name: the registered name, the folder's name, or generated-<kind>.
        folder: where it is.
        label_files: what lists its pictures and labels.
        images: the folder that the paths in the label files start from.
        format: how a label is written.
        source: says in words where the set was found.
        licence: its terms.
        classes: names of the classes of cls_label where they are known, in the order of their index.
        mapping: of coco: the model's classes that count as each class of the set; empty: the names are the model's.
    """

    name: str
    folder: Path
    label_files: tuple[Path, ...]
    images: Path
    format: LabelFormat
    source: str
    licence: str
    classes: tuple[str, ...] = ()
    mapping: Mapping[str, Sequence[str]] = field(default_factory=dict)


def dataset_names(task: Task | None = None) -> list[str]:
    """Names of the registered sets, sorted; of one task if given."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))
    return [name for name in names if task is None or load_entry(name).task == task]


def load_entry(name: str) -> DatasetEntry:
    """Read and check the YAML of a registered set.

    Raises:
        InputError: no such set, or its file is wrong.
    """
    path = Path(__file__).parent / f"{name}.yaml"
    if Path(name).name != name or not path.is_file():
        raise InputError(f"no data set '{name}'. Known sets: {', '.join(dataset_names())}; or give a folder")
    try:
        return DatasetEntry.model_validate(parse_yaml(path.read_text(encoding="utf-8")))
    except DocumentError as error:
        raise InputError(f"{path.name}: no YAML: {error}") from error
    except ValidationError as error:
        details = [f"{path.name}: {_key(detail)} = {detail['input']!r}: {detail['msg']}" for detail in error.errors()]
        raise InputError("\n".join(details)) from error


def _key(detail: Any) -> str:
    return ".".join(str(part) for part in detail["loc"]) or "(file)"


def resolve_dataset(
    name_or_dir: str | Path, task: Task, progress: Progress | None = None, upright: Task | None = None
) -> DatasetFolder:
    """Find a data set: a registered name, or a folder in the documented label format.

    A registered name wins over a folder of the same name, so that a recipe means the same set
    wherever it runs; write ./NAME for the folder. Registered sets are searched in QUANT_DATA_HOME,
    the cache, the public archive.

    Args:
        upright: a second task whose sets will do, for classifiers of orientation: their pictures are turned later.

    Raises:
        InputError: neither a known set nor a folder; a set of another task; a folder without labels.
        Unavailable: a known set that no source has.
    """
    name = str(name_or_dir)
    tasks = [task] if upright is None else [task, upright]
    if name in dataset_names():
        return _resolve_entry(load_entry(name), tasks, progress)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(_own(folder.absolute(), tasks))
    raise InputError(f"'{name}' is neither a folder nor a data set for {task}. Known sets: {_known(tasks)}")


def _known(tasks: list[Task]) -> str:
    return ", ".join(name for task in tasks for name in dataset_names(task))


def _own(folder: Path, tasks: list[Task]) -> DatasetFolder:
    labels: tuple[Path, ...] = (folder / "label.txt",)
    images = folder
    classes: tuple[str, ...] = ()
    label_format = FORMATS[tasks[-1]]
    if label_format == "coco":
        labels = (folder / "instances.json",)
        if not labels[0].is_file() and (folder / "annotations").is_dir():
            labels, images = tuple(folder / name for name in PADDLEX_COCO), folder / "images"
    elif label_format == "table_label":
        lists = tuple(folder / name for name in ("train.txt", "val.txt") if (folder / name).is_file())
        labels = (folder / "label.jsonl",) if not lists or (folder / "label.jsonl").is_file() else lists
    elif "cls_label" in (FORMATS[task] for task in tasks):
        lists = tuple(folder / name for name in ("train.txt", "val.txt") if (folder / name).is_file())
        if lists:
            label_format, labels, classes = "cls_label", lists, _class_names(folder / "label.txt")
        elif label_format == "cls_label":
            labels = (folder / "train.txt",)
    source, licence = f"the folder {folder.absolute().name}", "the user's own"
    name = folder.name
    if folder == cached_dir(name) and name.startswith(GENERATED):
        source, licence = _GENERATOR, _NO_TERMS
    elif name == POOLED or name.startswith(GENERATED):  # these words mean something in the diff table
        name = f"folder-{name}"
    return DatasetFolder(name, folder, labels, images, label_format, source, licence, classes)


def _class_names(file: Path) -> tuple[str, ...]:
    """The names in a label.txt of PaddleX, `index name` in each line; none where there is no such file."""
    if not file.is_file():
        return ()
    try:
        lines = [line.split(maxsplit=1) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        names = {int(index): name.strip() for index, name in lines}
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is no list of classes; expected lines like 0 0_degree") from error
    if sorted(names) != list(range(len(names))):
        raise InputError(f"{file} must number the classes from 0 without a gap, not {sorted(names)}")
    return tuple(names[index] for index in range(len(names)))


def _resolve_entry(entry: DatasetEntry, tasks: list[Task], progress: Progress | None) -> DatasetFolder:
    if entry.task not in tasks:
        raise InputError(
            f"the data set {entry.name} is for {entry.task}, not {tasks[0]}. Sets for {tasks[0]}: {_known(tasks)}"
        )
    tried: list[str] = []
    for home in search_path("QUANT_DATA_HOME"):
        if (home / entry.name).is_dir():
            return _checked(_folder(entry, home / entry.name, f"QUANT_DATA_HOME ({home})"))
        tried.append(f"QUANT_DATA_HOME: no folder {home / entry.name}")
    try:
        return install_dataset(entry.name, progress)
    except Unavailable as error:
        tried.append(error.reason)
        place = f"put it in a folder {entry.name} in QUANT_DATA_HOME"
        fix = f"Get the set from {entry.homepage} ({entry.licence}) and {place}"
        raise Unavailable(f"the data set {entry.name} cannot be had: {'; '.join(tried)}", fix) from error


def install_dataset(name: str, progress: Progress | None = None) -> DatasetFolder:
    """Bring the public archive of a registered set into the cache; nothing is done when it is there.

    Raises:
        InputError: no such set; or the archive arrived, but is unsafe, damaged or not the expected one.
        Unavailable: the set has no open address, or it cannot be reached.
    """
    entry = load_entry(name)
    folder = cached_dir(name)
    if folder.is_dir():
        return _checked(_folder(entry, folder, f"the cache {folder}"))
    if entry.archive is None:
        raise Unavailable(f"{name} has no open address", f"Register at {entry.homepage}")

    def finish(unpacked: Path) -> None:
        _checked(_folder(entry, unpacked, ""))

    install(entry.archive.url, entry.archive.sha256, folder, cache_dir() / "downloads", finish, progress)
    return _folder(entry, folder, f"the public archive {entry.archive.url}")


def cached_dir(name: str) -> Path:
    """The folder of a set in the cache."""
    return cache_dir() / "data" / name


def _folder(entry: DatasetEntry, folder: Path, source: str) -> DatasetFolder:
    labels = tuple(folder / file for file in entry.label_files)
    images, classes = folder / entry.images, tuple(entry.classes)
    return DatasetFolder(
        entry.name, folder, labels, images, entry.format, source, entry.licence, classes, entry.mapping
    )


def _checked(data: DatasetFolder) -> DatasetFolder:
    for path in data.label_files:
        if not path.is_file():
            raise InputError(f"{path} is missing; expected a file with {example_of(data.format)}")
    return data


EXAMPLES: dict[LabelFormat, str] = {
    "det_label": 'images/1.jpg<TAB>[{"transcription": "text", "points": [[0, 0], [9, 0], [9, 5], [0, 5]]}]',
    "rec_label": "images/1.jpg<TAB>text",
    "cls_label": "images/1.jpg 0",
    "coco": '{"images": [{"id": 1, "file_name": "images/1.jpg"}], "categories": [{"id": 1, "name": "text"}], '
    '"annotations": [{"image_id": 1, "category_id": 1, "bbox": [x, y, width, height]}]}',
    "table_label": '{"filename": "images/1.jpg", "html": "<table><tr><td>text</td></tr></table>"}',
    "latex_lines": "\\frac{a}{b}",
}
"""One line of a label file, for messages; a whole file where labels are not in lines."""


def example_of(label_format: LabelFormat) -> str:
    """What a label file holds, in words."""
    return f"{'JSON' if label_format == 'coco' else 'lines'} like {EXAMPLES[label_format]}"


GENERATED_SETS: dict[GeneratedKind, tuple[str, LabelFormat, str]] = {
    "text_lines": ("calib_data.generator", "rec_label", "label.txt"),
    "text_pages": ("calib_data.generator", "det_label", "label.txt"),
    "document_pages": ("calib_data.generator", "det_label", "label.txt"),
    "layout_pages": ("calib_data.layouts", "coco", "instances.json"),
    "tables": ("calib_data.generator", "table_label", "label.jsonl"),
    "formulas": ("calib_data.generator", "rec_label", "label.txt"),
}
"""The module that makes each kind of generated set, the format of its labels, and the label file."""


def generated_folder(kind: GeneratedKind, samples: int, seed: int) -> Path:
    """Where in the cache the built-in set lies, once it was made: named by arguments, fonts and generator."""
    generator = import_module(GENERATED_SETS[kind][0])
    fonts = generator.fonts_fingerprint(generator.find_fonts())
    facts = [kind, samples, seed, generator.GENERATOR_VERSION, fonts]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return cached_dir(f"{GENERATED}{kind}-{digest}")


def generated_dataset(kind: GeneratedKind, samples: int, seed: int, progress: Progress | None = None) -> DatasetFolder:
    """The built-in set, from the cache or made now; the same for the same arguments, fonts and generator.

    Raises:
        Unavailable: the cache cannot be written.
    """
    module, label_format, labels = GENERATED_SETS[kind]
    folder = generated_folder(kind, samples, seed)
    if not holds(folder):
        write = getattr(import_module(module), f"write_{kind}")
        what = f"generating {kind.replace('_', ' ')}"

        def step(done: int) -> None:
            if progress:
                progress(what, done, samples)

        try:
            with sealed(folder) as temporary:
                write(temporary, samples, seed, step)
        except OSError as error:
            reason = f"the generated data cannot be written to {folder}: {error.strerror or error}"
            raise Unavailable(reason, "Free some space, or set QUANT_CACHE to a folder that can be written") from error
    source = f"{_GENERATOR} (seed {seed})"
    return DatasetFolder(f"{GENERATED}{kind}", folder, (folder / labels,), folder, label_format, source, _NO_TERMS)
