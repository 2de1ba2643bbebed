"""Written worlds, read and pre-processed as the recipe of their model does it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calib_data.registry import resolve_dataset
from eval.dataset import Label, read_dataset, read_sample
from quant.recipe import load_recipe
from quant.task import INPUT_NAME, make_task


def written(folder: Path, model: str, inference_yml: Mapping[str, Any]) -> list[tuple[npt.NDArray[np.float32], Label]]:
    """Each picture as the model's input [3, H, W], and its label as it is written: pictures are not turned."""
    return list(one_by_one(folder, model, inference_yml))


def one_by_one(
    folder: Path, model: str, inference_yml: Mapping[str, Any]
) -> Iterator[tuple[npt.NDArray[np.float32], Label]]:
    """As `written`, for pictures that are too large to be kept."""
    recipe = load_recipe(model)
    rotations = recipe.data.rotations
    dataset = read_dataset(resolve_dataset(folder, recipe.task, upright=rotations.of if rotations else None))
    adapter = make_task(recipe.task, inference_yml, model)
    for sample in dataset.samples:
        yield adapter.preprocess(read_sample(sample)).inputs[INPUT_NAME][0], sample.label
