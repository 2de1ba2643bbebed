"""One finished run of a tiny network that really reads, on all targets, for every test that looks at a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from test_pipeline import LINES, RECIPE, SETS, Place, colour_reader, write_lines, write_model

from quant.pipeline import Finished, run_model
from quant.recipe import load_recipe


@dataclass(frozen=True)
class TinyRun:
    """The run, and the place with its recipe, model and data."""

    place: Place
    finished: Finished

    @property
    def folder(self) -> Path:
        return self.finished.folder

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.place.root)


def environment(root: Path) -> dict[str, str]:
    """A home, a cache and data of its own."""
    places = {"HOME": "home", "QUANT_CACHE": "cache", "QUANT_DATA_HOME": "data", "QUANT_MODEL_HOME": "models"}
    return {name: str(root / folder) for name, folder in places.items()}


def tiny_run(root: Path) -> TinyRun:
    """Write model, recipe and data below `root`, and run."""
    for seed, (name, letters) in enumerate(SETS.items()):
        write_lines(root / "data" / name, LINES, letters, seed)
    write_model(root / "model", colour_reader())
    (root / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(root).items():
            patch.setenv(name, value)
        place = Place(root, load_recipe(str(root / "recipe.yaml")))
        return TinyRun(place, run_model(place.recipe, place.options()))
