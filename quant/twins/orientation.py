"""Twin of PP-LCNet_x1_0_doc_ori: PP-LCNet in small; its world is notes of a few lines, turned by right angles."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np

from calib_data.generator import write_notes
from quant.recipe import Rotations, load_recipe
from quant.twins.samples import written
from quant.twins.training import save_inference, train_as_asked, train_in_child, train_until

MODEL = "PP-LCNet_x1_0_doc_ori"
_NOTES, _BATCH, _STEPS, _RATE = 300, 16, 150, 4e-3
_MOST_SHIFT = 16  # pixels


def train(folder: Path, seed: int, minutes: float) -> None:
    """Write the twin into a folder; takes at most about `minutes`, in a process of its own."""
    train_in_child(__name__, folder, seed, minutes)


def write_world(folder: Path, count: int, seed: int) -> None:
    """Write upright notes of the twin's world, which are turned later; seeds from 1000 on are never trained on."""
    write_notes(folder, count, seed)


def network(classes: int) -> Any:
    """Input [N, 3, 224, 224], output [N, classes], softmax; `logits` gives what is before it."""
    from paddle import nn
    from paddle.nn import functional

    from quant.twins.lcnet import conv, separable

    class Twin(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                conv(3, 8, 3, 2), separable(8, 16),
                separable(16, 24, stride=2), separable(24, 24),
                separable(24, 40, stride=2), separable(40, 40),
                separable(40, 64, stride=2), separable(64, 64, 5), separable(64, 64, 5),
                separable(64, 96, 5, stride=2, gate=True), separable(96, 96, 5, gate=True),
                nn.AdaptiveAvgPool2D(1),
            )  # fmt: skip
            self.widen = nn.Sequential(nn.Conv2D(96, 192, 1, bias_attr=False), nn.Hardswish(), nn.Dropout(0.2))
            self.classes = nn.Linear(192, classes)

        def logits(self, x: Any) -> Any:
            return self.classes(self.widen(self.body(x)).flatten(1))

        def forward(self, x: Any) -> Any:
            return functional.softmax(self.logits(x), axis=-1)

    return Twin()


def _train(folder: Path, seed: int, minutes: float) -> None:
    import paddle
    from paddle.nn import functional

    end = time.monotonic() + 60 * minutes
    paddle.seed(seed)
    recipe = load_recipe(MODEL)
    document, rotations = recipe.inference, cast(Rotations, recipe.data.rotations)
    with TemporaryDirectory() as place:
        write_world(Path(place), _NOTES, seed)
        samples = written(Path(place), MODEL, document)
    net, order = network(len(rotations.angles)), np.random.default_rng(seed)

    def turned(index: int, label: int) -> Any:
        # The square in the middle of a turned page is the turned square.
        return np.rot90(samples[index][0], -rotations.angles[label] // 90, axes=(1, 2))

    def batch_loss() -> Any:
        chosen = order.choice(len(samples), _BATCH, replace=False)
        labels = order.permutation(np.arange(_BATCH) % len(rotations.angles))
        pictures = np.stack([turned(index, label) for index, label in zip(chosen, labels, strict=True)])
        shift = tuple(int(pixels) for pixels in order.integers(-_MOST_SHIFT, _MOST_SHIFT + 1, 2))
        batch = np.roll(pictures, shift, axis=(2, 3))
        return functional.cross_entropy(net.logits(paddle.to_tensor(batch)), paddle.to_tensor(labels))

    train_until(end, net.parameters(), _RATE, batch_loss, _STEPS)
    save_inference(net, {"x": [None, 3, 224, 224]}, document, folder)


if __name__ == "__main__":
    train_as_asked(_train)
