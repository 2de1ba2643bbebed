"""Where FP32 models come from: found, downloaded or shipped, and checked before anything is done with them."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from quant.archive import Progress, file_sha256, install, install_files
from quant.document import MOST_JSON, MOST_YAML, DocumentError, parse_json, parse_yaml, read_bounded
from quant.errors import InputError, Unavailable
from quant.pir import all_kinds, check_pir, parameter_shapes
from quant.recipe import Archive, PackageFile, Recipe

ModelFormat = Literal["paddle", "pir"]

SHIPPED_FILES: dict[ModelFormat, tuple[str, str]] = {
    "paddle": ("inference.pdmodel", "inference.pdiparams"),
    "pir": ("inference.json", "inference.pdiparams"),
}
"""Files of the graph and of the weights by the format of an original model."""

TWIN_KEY = "twin"
"""Key of `Global` in inference.yml that marks a twin (see `quant.twins`)."""

_ORIGIN = "origin.json"
_WEIGHTS = ".pdiparams"
_LOD_TENSOR = 7
_EXPECTED = "expected inference.pdmodel or inference.json with inference.pdiparams beside it"
_PARTS = {"Global": dict, "PreProcess": dict, "PostProcess": dict}
_DETECTOR_PARTS = {"Global": dict, "Preprocess": list, "label_list": list}
"""Sections of inference.yml and their kinds; PaddleDetection, which detectors are exported by, has its own."""

_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What a damaged file makes its parsers raise."""

_UNSAFE = {
    *("load", "load_combine", "save", "save_combine"),
    *("py_func", "py_layer", "pylayer", "run_program", "listen_and_serv", "read_file"),
    *("recv", "recv_v2", "send", "send_v2", "p_recv", "p_send", "partial_recv", "partial_send"),
    *("c_gen_nccl_id", "c_gen_bkcl_id", "gen_nccl_id", "gen_bkcl_id", "tensorrt_engine", "custom_engine"),
}
"""Operators of Paddle with effects beside their outputs."""

_MOST_DIMS = 64

_MOST_PROGRAM = 64 << 20
"""Bytes of a ProgramDesc, which holds no weights: those of real models have a few millions."""

_ITEM_BYTES = {0: 1, 1: 2, 2: 4, 3: 8, 4: 2, 5: 4, 6: 8, 20: 1, 21: 1, 22: 2, 23: 8, 24: 16}
"""Bytes of one number, by Paddle's VarType.Type: bool, int16..int64, fp16..fp64, uint8, int8, bf16, complex."""


@dataclass(frozen=True)
class ModelFiles:
    """An FP32 model on disk.

    Attributes:
        folder: the folder of the files.
        format: paddle = program description (.pdmodel), pir = inference.json.
        model: the file of the graph.
        params: the file of the weights.
        inference_yml: PaddleX's description of pre- and post-processing.
        source: says in words where the model was found.
        sha256: of `model` and `params`, by file name.
    """

    folder: Path
    format: ModelFormat
    model: Path
    params: Path
    inference_yml: dict[str, Any]
    source: str
    sha256: dict[str, str]

    @property
    def twin(self) -> bool:
        """Whether this is a small stand-in and not the official model."""
        return bool(self.inference_yml.get("Global", {}).get(TWIN_KEY))


def cache_dir() -> Path:
    """The folder for everything that is downloaded or generated: QUANT_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("QUANT_CACHE"):
        return Path(chosen).expanduser().absolute()
    from platformdirs import user_cache_path  # a dependency of pooch

    return user_cache_path("paddle-quant", appauthor=False)


def search_path(variable: str) -> list[Path]:
    """The folders that an environment variable like QUANT_MODEL_HOME lists."""
    parts = os.environ.get(variable, "").split(os.pathsep)
    return [Path(part).expanduser().absolute() for part in parts if part]


def without_places(text: str) -> str:
    """A sentence without the paths of this machine: what is written down may be shared."""
    for variable in ("QUANT_MODEL_HOME", "QUANT_DATA_HOME"):
        for folder in search_path(variable):
            text = text.replace(str(folder), f"${variable}")
    return text.replace(str(cache_dir()), "$QUANT_CACHE")


def resolve_model(recipe: Recipe, model_dir: Path | None = None, progress: Progress | None = None) -> ModelFiles:
    """Find the FP32 model of a recipe: the first source that has it wins, and a broken one is an error.

    The order is `model_dir`, QUANT_MODEL_HOME, the cache, the official archives, an installed package.

    Raises:
        InputError: a source has files for the model, but they are broken or not the expected ones.
        Unavailable: no source has it; the reason lists them all.
    """
    if model_dir is not None:
        return read_model(recipe, model_dir, f"--model-dir ({model_dir.absolute().name})")
    tried: list[str] = []
    for home in search_path("QUANT_MODEL_HOME"):
        if (home / recipe.name).is_dir():
            return read_model(recipe, home / recipe.name, f"QUANT_MODEL_HOME ({home})")
        tried.append(f"QUANT_MODEL_HOME: no folder {home / recipe.name}")
    try:
        return install_model(recipe, progress)
    except Unavailable as error:
        tried.append(error.reason)
    if shipped := _shipped_dir(recipe):
        return read_model(recipe, shipped, f"the installed package {_package(recipe)}")
    if recipe.model.wheel:
        tried.append(f"the package {_package(recipe)} is not installed")
    from quant.twins import hint  # not above: twins are made with what this module knows

    reason = f"the FP32 model {recipe.name} cannot be had: {'; '.join(tried)}"
    fix = f"Give its folder with --model-dir, or put it in a folder {recipe.name} in QUANT_MODEL_HOME"
    raise Unavailable(reason, fix + hint(recipe.name, f"quant run --twins {recipe.name}"))


def install_model(recipe: Recipe, progress: Progress | None = None) -> ModelFiles:
    """Bring the first official archive that can be had into the cache; nothing is done when one is there.

    Raises:
        InputError: an archive arrived, but is unsafe, damaged or not the expected one.
        Unavailable: none arrived; the reason lists every address.
    """
    if cached_dir(recipe).is_dir():
        return _read_cached(recipe)
    tried: list[str] = []
    for archive in recipe.model.archives:
        try:
            _install(recipe, archive, progress)
            files = _read_cached(recipe)
            source = f"the official archive {archive.url}{_edition(recipe, files.sha256, archive.url)}"
            return replace(files, source=source)
        except Unavailable as error:
            tried.append(error.reason)
    reason = "; ".join(dict.fromkeys(tried)) or f"the recipe {recipe.name} names no archive"
    fix = f"Check the network, then run `quant models fetch {recipe.name}`, or give a folder with --model-dir"
    raise Unavailable(reason, fix)


def local_source(recipe: Recipe) -> str | None:
    """Where the model lies on this machine, in words, without any download; None where it does not."""
    folder = _local_dir(recipe)
    if folder is None:
        return None
    return f"package {_package(recipe)}" if folder == _shipped_dir(recipe) else str(folder)


def is_twin(recipe: Recipe, model_dir: Path | None) -> bool:
    """Whether the model that lies on this machine is a twin; False where none can be read, which `read_model` says."""
    folder = model_dir or _local_dir(recipe)
    try:
        document = _read_yaml(folder / "inference.yml") if folder else None
    except (OSError, ValueError):
        return False
    section = document.get("Global") if isinstance(document, dict) else None
    return isinstance(section, dict) and bool(section.get(TWIN_KEY))


def local_format(recipe: Recipe) -> ModelFormat | None:
    """Format of the model that lies on this machine, None where none does.

    Raises:
        InputError: there is a folder for it, but no model in it.
    """
    model = local_program(recipe)
    return None if model is None else _format(model)


def local_program(recipe: Recipe) -> Path | None:
    """The file of the graph of the model that lies on this machine; raises InputError as `local_format` does."""
    folder = _local_dir(recipe)
    return None if folder is None else _locate(folder)[0]


def _local_dir(recipe: Recipe) -> Path | None:
    folders = [home / recipe.name for home in search_path("QUANT_MODEL_HOME")] + [cached_dir(recipe)]
    return next((folder for folder in folders if folder.is_dir()), _shipped_dir(recipe))


def _format(model: Path) -> ModelFormat:
    return "pir" if model.suffix == ".json" else "paddle"


def cached_dir(recipe: Recipe) -> Path:
    """The folder of a model in the cache."""
    return cache_dir() / "models" / recipe.name


def _install(recipe: Recipe, archive: Archive, progress: Progress | None) -> None:
    def finish(folder: Path) -> None:
        files = read_model(recipe, folder, archive.url, archive.files)
        if files.format != archive.format:
            raise InputError(f"{archive.url} holds the format {files.format}, not {archive.format} as in the recipe")
        (folder / _ORIGIN).write_text(json.dumps({"url": archive.url}) + "\n", encoding="utf-8")

    folder, downloads = cached_dir(recipe), cache_dir() / "downloads"
    if archive.packed:
        install(archive.url, archive.sha256, folder, downloads, finish, progress)
    else:
        install_files(_addresses(archive), folder, downloads, finish, progress)


def _addresses(archive: Archive) -> dict[str, tuple[str, str | None]]:
    """Address and known sha256 of each file of a model that is published as a folder."""
    names = (*SHIPPED_FILES[archive.format], "inference.yml")
    return {name: (f"{archive.url.rstrip('/')}/{name}", archive.files.get(name)) for name in names}


def _read_cached(recipe: Recipe) -> ModelFiles:
    folder = cached_dir(recipe)
    url = _origin(folder)
    expected = next((archive.files for archive in recipe.model.archives if archive.url == url), {})
    source = f"the cache {folder}" + (f", from {url}" if url else "")
    try:
        return read_model(recipe, folder, source, expected)
    except InputError as error:
        raise InputError(f"{error}; to fetch it again, delete {folder}") from error


def _origin(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _package(recipe: Recipe) -> str:
    return recipe.model.wheel.package if recipe.model.wheel else ""


def _shipped_dir(recipe: Recipe) -> Path | None:
    wheel = recipe.model.wheel
    package = _package_dir(wheel.package) if wheel else None
    return package / wheel.folder if wheel and package else None


def _package_dir(package: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def read_model(recipe: Recipe, folder: Path, source: str, expected: Mapping[str, str] | None = None) -> ModelFiles:
    """Read and check the model in a folder.

    Args:
        recipe: says which model it should be.
        folder: where the files are.
        source: says in words where that is.
        expected: sha256 of files in the folder, where they are known.

    Raises:
        InputError: files are missing, cut off, foreign, or not those expected.
    """
    try:
        model, params = _locate(folder)
        _check_content(model, params)
        sha256 = {path.name: file_sha256(path) for path in (model, params)}
        for name, known in (expected or {}).items():
            if (sha256.get(name) or file_sha256(folder / name)) != known:
                raise InputError(f"{folder / name} has a wrong checksum: its sha256 is not {known} as the recipe says")
        inference_yml = _inference_yml(recipe, folder)
    except OSError as error:
        raise InputError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from error
    kind = _format(model)
    source += _edition(recipe, sha256, _origin(folder))
    return ModelFiles(folder, kind, model, params, inference_yml, source, sha256)


@contextmanager
def unchanged(files: ModelFiles) -> Iterator[None]:
    """Make sure that a model's files are still those that were found, whatever happens in the block.

    Raises:
        InputError: they changed, or vanished.
    """
    try:
        yield
    finally:
        for path in (files.model, files.params):
            if not path.is_file() or file_sha256(path) != files.sha256[path.name]:
                raise InputError(f"{path} changed while it was being read; run the command again when it is at rest")


def published(recipe: Recipe, sha256: Mapping[str, str], url: str | None = None) -> Archive | None:
    """The official archive that a model's files are from: by known hashes, else by its address; None for none."""
    archives = recipe.model.archives
    known = (archive for archive in archives if archive.files and archive.files.items() <= sha256.items())
    named = (archive for archive in archives if archive.url == url)
    return next(known, next(named, None))


def _edition(recipe: Recipe, sha256: Mapping[str, str], url: str | None) -> str:
    archive = published(recipe, sha256, url)
    return f", {archive.edition}" if archive and archive.edition else ""


def _locate(folder: Path) -> tuple[Path, Path]:
    """The graph and the weights in a folder; inference.json wins, as it does in PaddleX."""
    if not folder.is_dir():
        raise InputError(f"there is no model folder {folder}; {_EXPECTED}")
    programs = sorted(path for path in folder.glob("*.pdmodel") if not path.name.startswith("."))
    named = [folder / name for name in ("inference.json", "inference.pdmodel", "model.pdmodel")]
    candidates = [path for path in named if path.is_file()] or programs
    if not candidates:
        raise InputError(f"there is no model in {folder}; {_EXPECTED}")
    if len(programs) > 1 and candidates is programs:
        names = ", ".join(path.name for path in programs)
        raise InputError(f"{folder} holds several models ({names}); keep one of them there")
    model = candidates[0]
    params = model.with_suffix(_WEIGHTS)
    if not params.is_file():
        raise InputError(f"{params} is missing: the weights of {model.name}; copy the whole model folder")
    return model, params


def _inference_yml(recipe: Recipe, folder: Path) -> dict[str, Any]:
    path = folder / "inference.yml"
    if not path.is_file():
        return _described(recipe)
    try:
        document = _read_yaml(path)
    except ValueError as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    parts = _DETECTOR_PARTS if recipe.task == "layout_detection" else _PARTS
    if not isinstance(document, dict) or not all(isinstance(document.get(part), kind) for part, kind in parts.items()):
        raise InputError(f"{path} is not PaddleX's description of a model; expected the sections {', '.join(parts)}")
    name = document["Global"].get("model_name")
    if name != recipe.name:
        raise InputError(f"{path} is of model {name}, not {recipe.name}: give the folder of that model")
    if recipe.task == "text_recognition" and not document["PostProcess"].get("character_dict"):
        raise InputError(f"{path} lists no characters: PostProcess.character_dict is missing")
    return document


def _read_yaml(path: Path) -> Any:
    return parse_yaml(read_bounded(path, MOST_YAML).decode("utf-8"))


def _described(recipe: Recipe) -> dict[str, Any]:
    """The recipe's own inference.yml, for sources that ship none."""
    document = copy.deepcopy(recipe.inference)
    document.setdefault("Global", {})["model_name"] = recipe.name
    if recipe.task == "text_recognition" and recipe.model.character_dict:
        document.setdefault("PostProcess", {})["character_dict"] = _characters(recipe.model.character_dict)
    return document


def _characters(source: PackageFile) -> list[str]:
    package = _package_dir(source.package)
    if package is None:
        reason = f"the list of characters that the package {source.package} ships is missing, as it is not installed"
        raise Unavailable(reason, "Install it, or use a model folder that has an inference.yml")
    # Lines end with a newline only: a dictionary may hold characters that str.splitlines() splits at.
    with (package / source.path).open(encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


def _check_content(model: Path, params: Path) -> None:
    """Find a cut off or foreign file in milliseconds, without Paddle, which loads some of them silently."""
    for path in (model, params):
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty; fetch the model again")
    try:
        if model.suffix == ".json":
            document = parse_json(read_bounded(model, MOST_JSON))
            check_pir(document)
            shapes, kinds = sorted(parameter_shapes(document).values()), all_kinds(document)
        else:
            program = read_bounded(model, _MOST_PROGRAM)
            shapes, kinds = sorted(_program_shapes(program)), _program_kinds(program)
    except _MALFORMED as error:
        reason = f" ({error})" if isinstance(error, DocumentError) else ""
        raise InputError(f"{model} is cut off, or no Paddle model{reason}; fetch the model again") from error
    if unsafe := sorted(kinds & _UNSAFE):
        raise InputError(
            f"{model} holds the operator '{unsafe[0]}', which reads or writes files, or runs code: no inference model "
            "needs that, so this one is not loaded; get it from its maker"
        )
    try:
        with params.open("rb") as file:
            stored = sorted(_stored_shapes(file, params.stat().st_size))
    except (*_MALFORMED, struct.error) as error:
        raise InputError(f"{params} is cut off, or no file of Paddle weights; fetch the model again") from error
    if shapes != stored:
        raise InputError(f"{params} holds the weights of another model than {model.name}; fetch both again")


def _program_shapes(data: bytes) -> list[tuple[int, ...]]:
    """Shapes of the weights that a ProgramDesc declares."""
    blocks = [value for field, value in _fields(data) if field == 1 and isinstance(value, bytes)]
    if not blocks:
        raise ValueError("no block")
    variables = [dict(_fields(value)) for block in blocks for field, value in _fields(block) if field == 3]
    tensors = [variable for variable in variables if variable.get(3) and _variable_type(variable)[1] == _LOD_TENSOR]
    # By name: the body of a loop may declare a weight of the outer block again.
    types = {tensor[1]: _variable_type(tensor) for tensor in tensors}
    return [_dims(dict(_fields(kind[3]))[1]) for kind in types.values()]


def _program_kinds(data: bytes) -> set[str]:
    """The kinds of all operators of a ProgramDesc."""
    blocks = [value for field, value in _fields(data) if field == 1 and isinstance(value, bytes)]
    operators = [value for block in blocks for field, value in _fields(block) if field == 4]
    return {dict(_fields(operator))[3].decode("utf-8", "replace") for operator in operators}


def _variable_type(variable: dict[int, Any]) -> dict[int, Any]:
    return dict(_fields(variable[2]))


def _dims(tensor: bytes) -> tuple[int, ...]:
    """The repeated field 2 of a TensorDesc, packed or not."""
    dims: list[int] = []
    for field, value in _fields(tensor):
        if field == 2:
            dims.extend(islice(_varints(value), _MOST_DIMS + 1) if isinstance(value, bytes) else [value])
        if len(dims) > _MOST_DIMS:
            raise ValueError("no tensor")
    return tuple(dims)


def _stored_shapes(file: IO[bytes], size: int) -> Iterator[tuple[int, ...]]:
    """Shapes of the tensors in a file that save_combine wrote."""
    while file.tell() < size:
        version, levels = struct.unpack("<IQ", file.read(12))
        if version != 0 or levels > 8:
            raise ValueError("no tensor")
        for _ in range(levels):
            file.seek(struct.unpack("<Q", file.read(8))[0], os.SEEK_CUR)
        version, length = struct.unpack("<Ii", file.read(8))
        if version != 0 or not 0 < length <= 1 << 12:
            raise ValueError("no tensor")
        description = file.read(length)
        shape = _dims(description)
        end = file.tell() + math.prod(shape) * _ITEM_BYTES[dict(_fields(description))[1]]
        if end > size:
            raise ValueError("cut off")
        file.seek(end)
        yield shape


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message; raises where it is cut off."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value: Any
            value, place = _varint(data, place)
        elif kind in (1, 2, 5):
            length = {1: 8, 5: 4}.get(kind, 0)
            if kind == 2:
                length, place = _varint(data, place)
            value, place = data[place : place + length], place + length
        else:
            raise ValueError("no protobuf message")
        if place > len(data):
            raise ValueError("cut off")
        yield key >> 3, value


def _varints(data: bytes) -> Iterator[int]:
    place = 0
    while place < len(data):
        value, place = _varint(data, place)
        yield value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("no number")
