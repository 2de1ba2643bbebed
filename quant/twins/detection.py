"""Twin of PP-OCRv4_server_det: PPHGNet, the LK-PAN neck and the head of DB in small; its world is small notes.

What the network learns is the inner part of each box, of the size that PaddleX's post-processing widens to the box.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from calib_data.generator import write_notes
from eval.dataset import Box
from quant.recipe import load_recipe
from quant.twins.samples import written
from quant.twins.training import save_inference, train_as_asked, train_in_child, train_until

MODEL = "PP-OCRv4_server_det"
_NOTES, _BATCH, _STEPS, _RATE = 300, 4, 350, 4e-3
_CROP = 160  # pixels a side

Mask = npt.NDArray[np.float32]


def train(folder: Path, seed: int, minutes: float) -> None:
    """Write the twin into a folder; takes at most about `minutes`, in a process of its own."""
    train_in_child(__name__, folder, seed, minutes)


def write_world(folder: Path, count: int, seed: int) -> None:
    """Write labelled notes of the twin's world; seeds from 1000 on are never trained on."""
    write_notes(folder, count, seed)


def inner_margin(width: float, height: float, unclip_ratio: float) -> float:
    """How far inside of a box w x h the edges of its inner part lie, pixels, so that post-processing restores the box.

    DB's post-processing moves the edges of a region of area A and perimeter L outwards by A * unclip_ratio / L
    (Liao et al., Real-time Scene Text Detection with Differentiable Binarization, 2020).
    """
    low, high = 0.0, min(width, height) / 2
    for _ in range(30):
        middle = (low + high) / 2
        inner_width, inner_height = width - 2 * middle, height - 2 * middle
        widened = inner_width * inner_height * unclip_ratio / (2 * (inner_width + inner_height))
        low, high = (middle, high) if widened > middle else (low, middle)
    return low


def inner_parts(boxes: Sequence[Box], height: int, width: int, unclip_ratio: float) -> Mask:
    """1 in the inner part of each upright box, 0 elsewhere: [height, width]."""
    mask = np.zeros((height, width), np.float32)
    for box in boxes:
        (left, top), (right, bottom) = np.min(box.points, axis=0), np.max(box.points, axis=0)
        margin = inner_margin(right - left, bottom - top, unclip_ratio)
        rows, columns = (
            slice(round(low + margin), round(high - margin)) for low, high in ((top, bottom), (left, right))
        )
        mask[rows, columns] = 1
    return mask


def network() -> Any:
    """Input [N, 3, H, W], H and W multiples of 32, output [N, 1, H, W] in 0..1, the mean of what `maps` gives."""
    import paddle
    from paddle import nn
    from paddle.nn import functional

    from quant.twins.hgnet import Block, halved, normed

    class Strips(nn.Layer):
        """A neighbourhood seen as a square, a column and a row, in three sizes, one behind the other."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            inner = channels // 2
            self.down, self.up = nn.Conv2D(channels, inner, 1), nn.Conv2D(inner, channels, 1)
            self.sizes = nn.LayerList()
            for size in (7, 5, 3):
                shapes = [(size, size), (size, 1), (1, size)]
                self.sizes.append(nn.LayerList([nn.Conv2D(inner, inner, s, 1, (s[0] // 2, s[1] // 2)) for s in shapes]))
            self.norm = nn.BatchNorm2D(channels)

        def forward(self, x: Any) -> Any:
            y = self.down(x)
            for shapes in self.sizes:
                square, column, row = cast(Any, shapes)
                y = square(y) + column(y) + row(y)
            return x + functional.relu(self.norm(self.up(y)))

    def doubled(x: Any, times: int = 2) -> Any:
        return functional.interpolate(x, scale_factor=times, mode="nearest")

    def plain(inputs: int, outputs: int, size: int, stride: int = 1) -> Any:
        return nn.Conv2D(inputs, outputs, size, stride, size // 2, bias_attr=False)

    class Neck(nn.Layer):
        """Features of four scales, joined from coarse to fine and back, then laid over one another."""

        def __init__(self, inputs: tuple[int, ...], width: int, part: int) -> None:
            super().__init__()
            self.even = nn.LayerList([plain(count, width, 1) for count in inputs])
            self.large = nn.LayerList([plain(width, part, 9) for _ in inputs])
            self.fall = nn.LayerList([plain(part, part, 3, 2) for _ in inputs[1:]])
            self.last = nn.LayerList([plain(part, part, 9) for _ in inputs])
            self.strips = nn.LayerList([Strips(part) for _ in inputs])

        def forward(self, *features: Any) -> Any:
            rows = [self.even[place](x) for place, x in enumerate(features)]
            for place in (2, 1, 0):
                rows[place] = rows[place] + doubled(rows[place + 1])
            rows = [self.large[place](x) for place, x in enumerate(rows)]
            for place in (1, 2, 3):
                rows[place] = rows[place] + self.fall[place - 1](rows[place - 1])
            rows = [self.strips[place](self.last[place](x)) for place, x in enumerate(rows)]
            return paddle.concat([doubled(x, 2**place) if place else x for place, x in enumerate(rows)][::-1], 1)

    class Twin(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(normed(3, 12, 3, 2), normed(12, 16, 3), nn.MaxPool2D(3, 2, 1))
            self.levels = nn.LayerList(
                [
                    Block(16, 12, 24),
                    nn.Sequential(halved(24, 2), Block(24, 16, 40)),
                    nn.Sequential(halved(40, 2), Block(40, 20, 56), Block(56, 20, 56, shortcut=True)),
                    nn.Sequential(halved(56, 2), Block(56, 24, 72)),
                ]
            )
            self.neck = Neck((24, 40, 56, 72), width=24, part=8)
            self.gather = normed(32, 16, 3)
            self.finer = nn.Sequential(nn.Conv2DTranspose(16, 8, 2, 2), nn.BatchNorm2D(8), nn.ReLU())
            self.coarse = nn.Conv2DTranspose(8, 1, 2, 2)
            self.local = nn.Sequential(normed(9, 8, 3), nn.Conv2D(8, 1, 1))

        def maps(self, x: Any) -> tuple[Any, Any]:
            """The map of the head, and the one that is refined next to it, both [N, 1, H, W]."""
            features = [self.stem(x)]
            for level in self.levels:
                features.append(level(features[-1]))
            fine = self.finer(self.gather(self.neck(*features[1:])))
            coarse = functional.sigmoid(self.coarse(fine))
            return coarse, functional.sigmoid(self.local(paddle.concat([coarse, doubled(fine)], 1)))

        def forward(self, x: Any) -> Any:
            coarse, local = self.maps(x)
            return 0.5 * (coarse + local)

    return Twin()


def _train(folder: Path, seed: int, minutes: float) -> None:
    import paddle
    from paddle.nn import functional

    end = time.monotonic() + 60 * minutes
    paddle.seed(seed)
    document = load_recipe(MODEL).inference
    ratio = float(document["PostProcess"]["unclip_ratio"])
    with TemporaryDirectory() as place:
        write_world(Path(place), _NOTES, seed)
        samples = written(Path(place), MODEL, document)
    masks = [
        inner_parts(cast(Sequence[Box], boxes), inputs.shape[1], inputs.shape[2], ratio) for inputs, boxes in samples
    ]
    net, order = network(), np.random.default_rng(seed)

    def crop(index: int) -> tuple[Any, Any]:
        inputs, mask = samples[index][0], masks[index]
        top, left = (int(order.integers(side - _CROP + 1)) for side in mask.shape)
        part = slice(top, top + _CROP), slice(left, left + _CROP)
        return inputs[:, part[0], part[1]], mask[None, part[0], part[1]]

    def loss(found: Any, wanted: Any) -> Any:
        dice = 1 - 2 * (found * wanted).sum() / ((found + wanted).sum() + 1)
        return dice + functional.binary_cross_entropy(found, wanted)

    def batch_loss() -> Any:
        chosen = order.choice(len(samples), _BATCH, replace=False)
        pictures, wanted = (paddle.to_tensor(np.stack(part)) for part in zip(*map(crop, chosen), strict=True))
        coarse, local = net.maps(pictures)
        return loss(coarse, wanted) + loss(local, wanted)

    train_until(end, net.parameters(), _RATE, batch_loss, _STEPS)
    save_inference(net, {"x": [None, 3, None, None]}, document, folder)


if __name__ == "__main__":
    train_as_asked(_train)
