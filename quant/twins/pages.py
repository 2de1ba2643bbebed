"""Pages for the layout twins: pictures with the boxes and classes of their regions, batches, and how boxes overlap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from calib_data.layouts import write_plain_layout_pages
from calib_data.registry import resolve_dataset
from eval.dataset import in_model_words, read_dataset, read_sample
from eval.layouts import Layout
from quant.task import make_task

BATCH = 4
_MOST_PAGES = 240

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Page:
    """Attributes: image: the model's input [3, H, W]; boxes: [n, 4] corners in pixels of it; classes: of the boxes."""

    image: FloatArray
    boxes: FloatArray
    classes: npt.NDArray[np.int64]


def drawn_pages(model: str, inference_yml: dict[str, Any], wanted: float, seed: int) -> list[Page]:
    """About as many new pages of the twins' world as are wanted: two batches at least, no more than fit a training."""
    with TemporaryDirectory() as place:
        write_plain_layout_pages(Path(place), min(_MOST_PAGES, max(2 * BATCH, round(wanted))), seed)
        return read_pages(Path(place), model, inference_yml)


def read_pages(folder: Path, model: str, inference_yml: dict[str, Any]) -> list[Page]:
    """The pages of a folder, as a model of the task sees them."""
    adapter = make_task("layout_detection", inference_yml, model)
    labels = [str(name) for name in inference_yml["label_list"]]
    pages = []
    for sample in in_model_words(read_dataset(resolve_dataset(folder, "layout_detection")), labels).samples:
        inputs = adapter.preprocess(read_sample(sample)).inputs
        assert isinstance(sample.label, Layout)
        regions = [region for region in sample.label.regions if region.name is not None]
        x, y, width, height = np.array([region.box for region in regions], dtype=np.float32).reshape(-1, 4).T
        down, along = inputs["scale_factor"][0]
        boxes = np.stack([x * along, y * down, (x + width) * along, (y + height) * down], axis=1)
        classes = np.array([labels.index(str(region.name)) for region in regions], np.int64)
        pages.append(Page(inputs["image"][0], boxes, classes))
    return pages


def batches(count: int, size: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Indexes of pages, each page once before any is seen again."""
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def overlaps(found: Any, truth: Any) -> tuple[Any, Any]:
    """IoU and generalized IoU (Rezatofighi et al. 2019) of pairs of boxes, [n] each."""
    paddle: Any = import_module("paddle")

    low, high = paddle.maximum(found[:, :2], truth[:, :2]), paddle.minimum(found[:, 2:], truth[:, 2:])
    shared = (high - low).clip(min=0).prod(-1)
    union = (found[:, 2:] - found[:, :2]).prod(-1) + (truth[:, 2:] - truth[:, :2]).prod(-1) - shared
    outer = paddle.maximum(found[:, 2:], truth[:, 2:]) - paddle.minimum(found[:, :2], truth[:, :2])
    hull = outer.prod(-1)
    overlap = shared / (union + 1e-6)
    return overlap, overlap - (hull - union) / (hull + 1e-6)
