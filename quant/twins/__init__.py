"""Twins: small networks with the inputs, outputs and operators of official models, trained on generated data.

They stand in where the official weights cannot be had: their metric means something on a small generated world of
their own, and they take every step of the way that the official model takes. Each module has two functions:

* `train(folder, seed, minutes)` writes an inference folder in the official layout and takes at most about `minutes`;
* `write_world(folder, count, seed)` writes labelled pictures of the twin's world, in the format of its task.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import yaml

from calib_data.registry import GENERATED, cached_dir
from quant.archive import Progress, staged
from quant.errors import InputError, Unavailable
from quant.recipe import Recipe, recipe_names
from quant.source import TWIN_KEY, cache_dir
from quant.stage import digest

MODULES = {
    "PP-LCNet_x1_0_doc_ori": "orientation",
    "PP-OCRv4_server_det": "detection",
    "PP-OCRv4_server_rec": "recognition",
    "PP-DocLayout-L": "deformable",
    "PP-DocLayout-S": "layout",
    "SLANet_plus": "table",
    "PP-FormulaNet-S": "formula",
    "PP-FormulaNet-L": "vision",
}
"""Module of each model's twin, in this package; imported when it is asked for."""

MINUTES = 15.0
"""The most that a training may take; on two idle cores each ends before."""
LEAST_MINUTES = 0.1

WORLD_SEED = 1000
"""Of the pictures that a twin is calibrated and judged on; trainings take seeds below."""


class TwinModule(Protocol):
    """What a module of this package offers."""

    def train(self, folder: Path, seed: int, minutes: float) -> None: ...
    def write_world(self, folder: Path, count: int, seed: int) -> None: ...


@dataclass(frozen=True)
class Twin:
    """A trained twin. Attributes: folder: its model, in the official layout; world: labelled pictures."""

    folder: Path
    world: Path


def twin_names() -> list[str]:
    """Models that have a recipe and a twin, sorted."""
    return [name for name in recipe_names() if name in MODULES]


def hint(model: str, command: str) -> str:
    """The end of a sentence that says how to do without a model's weights; empty where it has no twin."""
    return f"; or take its twin, a small stand-in: `{command}`" if model in MODULES else ""


def load_module(model: str) -> TwinModule:
    """The module of a model's twin.

    Raises:
        InputError: the model has none.
    """
    check_known(model)
    return cast(TwinModule, importlib.import_module(f"{__name__}.{MODULES[model]}"))


def check_known(model: str) -> None:
    """Raise what `load_module` does, without importing anything."""
    if model not in MODULES:
        raise InputError(f"{model} has no twin; models with one: {', '.join(twin_names())}")


def checked_module(model: str, seed: int, minutes: float) -> TwinModule:
    """The module of a model's twin, if that can be trained as it is asked for.

    Raises:
        InputError: the model has no twin, the seed is one of the worlds', or the time is none.
    """
    module = load_module(model)
    if not 0 <= seed < WORLD_SEED:
        raise InputError(f"--seed {seed}: must be at least 0 and below {WORLD_SEED}, from where on worlds are judged")
    if not LEAST_MINUTES <= minutes < math.inf:
        raise InputError(f"--minutes {minutes:g}: must be at least {LEAST_MINUTES:g}")
    return module


def train_twin(recipe: Recipe, folder: Path, seed: int, minutes: float) -> None:
    """Train the twin of a recipe's model and mark its inference.yml; the folder appears complete or not at all.

    Raises:
        InputError: the model has no twin, an argument is out of range, or the training failed.
    """
    module = checked_module(recipe.name, seed, minutes)
    with staged(folder) as temporary:
        module.train(temporary, seed, minutes)
        _mark(temporary)


def _mark(folder: Path) -> None:
    """Say in inference.yml that this is a twin, so that neither it nor its artifacts pass for the official model."""
    from quant.export import write_inference_yml

    document: dict[str, Any] = yaml.safe_load((folder / "inference.yml").read_text(encoding="utf-8"))
    document["Global"] = {**document["Global"], TWIN_KEY: True}
    write_inference_yml(document, folder)


def ready_twin(recipe: Recipe, progress: Progress, seed: int = 0, minutes: float = MINUTES) -> Twin:
    """The twin of a recipe's model and pictures of its world, from the cache or made now.

    Raises:
        InputError: see `train_twin`.
    """
    checked_module(recipe.name, seed, minutes)
    twin = _places(recipe, seed, minutes)
    if not twin.folder.is_dir():
        progress(f"{recipe.name}: training its twin", 0, 1)
        train_twin(recipe, twin.folder, seed, minutes)
        progress(f"{recipe.name}: training its twin", 1, 1)
    if not twin.world.is_dir():
        _write_world(recipe, twin.world)
    return twin


def find_twin(recipe: Recipe) -> Twin:
    """The twin as `ready_twin` leaves it, without making anything.

    Raises:
        Unavailable: it is not there yet.
    """
    twin = _places(recipe, 0, MINUTES)
    if not twin.folder.is_dir() or not twin.world.is_dir():
        raise Unavailable("its twin is not trained yet", f"Run `quant run --twins {recipe.name}`")
    return twin


def _places(recipe: Recipe, seed: int, minutes: float) -> Twin:
    """Where in the cache: other code, fonts or arguments give other folders."""
    model, count = recipe.name, recipe.data.generated.samples
    folder = cache_dir() / "twins" / f"{model}-{_fingerprint(model, [seed, minutes])}"
    return Twin(folder, cached_dir(f"{GENERATED}twin-{_fingerprint(model, [count])}"))


def _write_world(recipe: Recipe, world: Path) -> None:
    with staged(world) as temporary:
        load_module(recipe.name).write_world(temporary, recipe.data.generated.samples, WORLD_SEED)


def _fingerprint(model: str, facts: Sequence[float]) -> str:
    """12 digits for facts, and for the code that trains a model's twin and generates its world."""
    from calib_data.generator import find_fonts, fonts_fingerprint

    here, others = Path(__file__).parent, {name for twin, name in MODULES.items() if twin != model}
    files = [path for path in sorted(here.glob("*.py")) if path.stem not in others - {MODULES.get(model)}]
    files += sorted((here.parents[1] / "calib_data").glob("*.py"))
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files if path.name != "__init__.py"))
    return digest(json.dumps([model, *facts, code.hexdigest(), fonts_fingerprint(find_fonts())]))[:12]
