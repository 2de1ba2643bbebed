"""Twin of PP-DocLayout-S: a small PicoDet with the inputs, outputs and operators of the official graph.

PP-LCNet, a path aggregation neck and a head whose classes and edges share their convolutions: a score is the square
root of class times alignment, an edge is the mean of a distribution over eight distances (generalized focal loss, Li
et al. 2020), and NMS is the last operator of the graph. Its world is narrow: small, clean sheets with five classes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calib_data.layouts import write_plain_layout_pages
from quant.recipe import class_labels, load_recipe
from quant.twins.pages import BATCH, FloatArray, batches, drawn_pages, overlaps
from quant.twins.training import save_inference, train_as_asked, train_in_child, train_until

MODEL = "PP-DocLayout-S"
SIZE = 480
STRIDES = (8, 16, 32, 64)
_BINS = 8  # distances 0..7, in strides
_RATE = 8e-3
_PAGES_A_MINUTE = 80
_MOST_STEPS = 600
_NMS = (0.025, 1000, 100, 0.6, True, 1.0, -1)
"""Of the official graph: least score, boxes before and after, IoU, normalized, eta, class of the background."""


def train(folder: Path, seed: int, minutes: float) -> None:
    """Write the twin into a folder; takes about `minutes`, in a process of its own."""
    train_in_child(__name__, folder, seed, minutes)


def write_world(folder: Path, count: int, seed: int) -> None:
    """Write labelled pages of the twin's world; seeds from 1000 on are never trained on."""
    write_plain_layout_pages(folder, count, seed)


def points() -> tuple[FloatArray, FloatArray]:
    """Middle [places, 2] as x and y, and stride [places, 1], of every place of every level, in pixels of the input."""
    middles, strides = [], []
    for stride in STRIDES:
        side = -(-SIZE // stride)
        along = (np.arange(side, dtype=np.float32) + 0.5) * stride
        x, y = np.meshgrid(along, along)
        middles.append(np.stack([x.ravel(), y.ravel()], axis=1))
        strides.append(np.full((side * side, 1), stride, np.float32))
    return np.concatenate(middles), np.concatenate(strides)


@dataclass(frozen=True)
class Targets:
    """What a page teaches.

    Attributes:
        places: indexes of places that answer for a region.
        classes: of these regions.
        boxes: [n, 4] x and y of two corners in pixels of the input.
    """

    places: npt.NDArray[np.int64]
    classes: npt.NDArray[np.int64]
    boxes: FloatArray


def assigned(boxes: FloatArray, classes: npt.NDArray[np.int64]) -> Targets:
    """Places near the middle of each region, on the finest level whose distances reach its edges.

    Where regions share a place the smaller one has it; a region without a place inside of it takes the nearest one.
    """
    middles, strides = points()
    reach = (_BINS - 1) * strides[:, 0]
    owner = np.full(len(middles), -1)
    largest_first = np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(axis=1), kind="stable")
    for number in largest_first:
        low, high = boxes[number, :2], boxes[number, 2:]
        apart = np.abs(middles - (low + high) / 2)
        inside = ((middles > low) & (middles < high)).all(axis=1)
        reached = np.maximum(middles - low, high - middles).max(axis=1) < reach
        near = inside & reached & (apart < 1.5 * strides).all(axis=1)
        if near.any():
            owner[near & (strides[:, 0] == strides[near, 0].min())] = number
        else:
            side = float((high - low).max())
            level = next((stride for stride in STRIDES if side / 2 < (_BINS - 2) * stride), STRIDES[-1])
            distance = np.where(strides[:, 0] == level, apart.sum(axis=1), np.inf)
            owner[int(distance.argmin())] = number
    places = np.flatnonzero(owner >= 0)
    return Targets(places, classes[owner[places]], boxes[owner[places]])


def _network(classes: int) -> Any:
    paddle: Any = import_module("paddle")
    from paddle import nn
    from paddle.nn import functional

    from quant.twins.lcnet import Gate, conv, separable

    class Neck(nn.Layer):
        """Features of three scales joined from coarse to fine and back, and a fourth, coarser one."""

        def __init__(self, inputs: tuple[int, int, int], channels: int) -> None:
            super().__init__()
            self.even = nn.LayerList([conv(count, channels, 1) for count in inputs])
            self.rise = nn.LayerList([separable(2 * channels, channels) for _ in range(2)])
            self.fall = nn.LayerList([separable(channels, channels, 3, 2) for _ in range(2)])
            self.join = nn.LayerList([separable(2 * channels, channels, 5) for _ in range(2)])
            self.top = nn.LayerList([separable(channels, channels, 5, 2) for _ in range(2)])

        def forward(self, features: list[Any]) -> list[Any]:
            fine, middle, coarse = [even(features[level]) for level, even in enumerate(self.even)]
            highest = self.top[0](coarse)
            middle = self.rise[0](paddle.concat([self._up(coarse), middle], 1))
            fine = self.rise[1](paddle.concat([self._up(middle), fine], 1))
            middle = self.join[0](paddle.concat([self.fall[0](fine), middle], 1))
            coarse = self.join[1](paddle.concat([self.fall[1](middle), coarse], 1))
            return [fine, middle, coarse, highest + self.top[1](coarse)]

        def _up(self, x: Any) -> Any:
            return functional.interpolate(x, scale_factor=2, mode="nearest")

    class Head(nn.Layer):
        """Scores [N, classes, places] and logits of distances [N, places, 4 * bins] of one level."""

        def __init__(self, channels: int, places: int) -> None:
            super().__init__()
            self.places = places
            self.shared = separable(channels, channels)
            self.pool = nn.AdaptiveAvgPool2D(1)
            self.gate = nn.Conv2D(channels, channels, 1)
            self.mix = conv(channels, channels, 1)
            rare = paddle.nn.initializer.Constant(-4.0)  # few places hold anything
            self.classify = nn.Conv2D(channels, classes, 1, bias_attr=paddle.ParamAttr(initializer=rare))
            self.measure = nn.Conv2D(channels, 4 * _BINS, 1)
            self.align = nn.Sequential(conv(channels, 1, 3), nn.Conv2D(1, 1, 1))

        def forward(self, x: Any) -> tuple[Any, Any]:
            x = self.shared(x)
            gated = self.mix(x * functional.sigmoid(self.gate(self.pool(x))))
            aligned = functional.sigmoid(self.align(x))
            scores = paddle.sqrt(functional.sigmoid(self.classify(gated)) * aligned + 1e-9)
            logits = self.measure(gated).transpose([0, 2, 3, 1])
            return scores.reshape([-1, classes, self.places]), logits.reshape([-1, self.places, 4 * _BINS])

    class Twin(nn.Layer):
        def __init__(self, channels: int = 28) -> None:
            super().__init__()
            self.stem = nn.Sequential(conv(3, 8, 3, 2), separable(8, 12, 3, 2), separable(12, 16))
            self.fine = nn.Sequential(separable(16, 32, 3, 2), separable(32, 32))
            self.middle = nn.Sequential(separable(32, 64, 3, 2), separable(64, 64, 5), separable(64, 64, 5))
            self.coarse = nn.Sequential(separable(64, 96, 5, 2), Gate(96), separable(96, 96, 5))
            self.neck = Neck((32, 64, 96), channels)
            self.heads = nn.LayerList([Head(channels, (-(-SIZE // stride)) ** 2) for stride in STRIDES])
            middles, strides = points()
            self.register_buffer("distances", paddle.arange(_BINS, dtype="float32"))
            self.register_buffer("middles", paddle.to_tensor(middles / strides))
            self.register_buffer("strides", paddle.to_tensor(strides))

        def levels(self, image: Any) -> list[Any]:
            """Scores and logits of each level, see `Head`."""
            fine = self.fine(self.stem(image))
            middle = self.middle(fine)
            features = self.neck([fine, middle, self.coarse(middle)])
            return [head(features[level]) for level, head in enumerate(self.heads)]

        def boxes(self, logits: list[Any]) -> Any:
            """Corners [N, places, 4] in pixels of the input, from the logits of each level."""
            means = [paddle.matmul(functional.softmax(x.reshape([-1, _BINS]), axis=1), self.distances) for x in logits]
            edges = [mean.reshape([-1, self.heads[level].places, 4]) for level, mean in enumerate(means)]
            before, behind = paddle.split(paddle.concat(edges, 1), 2, axis=-1)
            corners = paddle.concat([before * -1.0 + self.middles, behind + self.middles], -1)
            return corners * self.strides

        def forward(self, image: Any, scale_factor: Any) -> tuple[Any, Any]:
            found = self.levels(image)
            scores = paddle.concat([level[0] for level in found], -1)
            boxes = self.boxes([level[1] for level in found])
            down, along = paddle.split(scale_factor, 2, axis=1)
            scale = paddle.concat([along, down, along, down], -1).reshape([-1, 1, 4])
            detections, _, counts = paddle._C_ops.multiclass_nms3(boxes / scale, scores, None, *_NMS)
            return detections, counts

    return Twin()


def _loss(net: Any, images: FloatArray, targets: list[Targets]) -> Any:
    """Quality focal loss of scores; where there is a region, GIoU and the likelihood of both nearest distances, too."""
    paddle: Any = import_module("paddle")
    from paddle.nn import functional

    found = net.levels(paddle.to_tensor(images))
    scores = paddle.concat([level[0] for level in found], -1)
    logits = paddle.concat([level[1] for level in found], 1).reshape([len(images), -1, 4, _BINS])
    boxes = net.boxes([level[1] for level in found])
    middles, strides = points()
    pages = np.concatenate([np.full(len(t.places), page) for page, t in enumerate(targets)])
    places, classes = (np.concatenate([getattr(t, name) for t in targets]) for name in ("places", "classes"))
    truth = np.concatenate([t.boxes for t in targets])
    chosen = paddle.to_tensor(np.stack([pages, places], axis=1))
    overlap, generalized = overlaps(paddle.gather_nd(boxes, chosen), paddle.to_tensor(truth))
    quality = np.zeros(scores.shape, np.float32)
    quality[pages, classes, places] = overlap.numpy().clip(0.05, 1)
    wanted = paddle.to_tensor(quality)
    weight = (scores.detach() - wanted).abs() ** 2
    entropy = functional.binary_cross_entropy(scores.clip(1e-6, 1 - 1e-6), wanted, weight, reduction="sum")
    edges = np.concatenate([middles[places] - truth[:, :2], truth[:, 2:] - middles[places]], axis=1)
    steps = (edges / strides[places]).clip(0, _BINS - 1.001)
    sharp = functional.log_softmax(paddle.gather_nd(logits, chosen), axis=-1)
    near = np.zeros((*steps.shape, _BINS), np.float32)
    below = steps.astype(np.int64)
    np.put_along_axis(near, below[..., None], (1 - (steps - below))[..., None].astype(np.float32), axis=-1)
    np.put_along_axis(near, below[..., None] + 1, (steps - below)[..., None].astype(np.float32), axis=-1)
    spread = -(sharp * paddle.to_tensor(near)).sum(-1).mean(-1)
    return (entropy + (2 * (1 - generalized) + 0.25 * spread).sum()) / max(1, len(places))


def _train(folder: Path, seed: int, minutes: float) -> None:
    paddle: Any = import_module("paddle")

    start = time.monotonic()
    paddle.seed(seed)
    recipe = load_recipe(MODEL)
    pages = drawn_pages(MODEL, recipe.inference, _PAGES_A_MINUTE * minutes, seed)
    images, targets = [page.image for page in pages], [assigned(page.boxes, page.classes) for page in pages]
    net = _network(len(class_labels(recipe)))
    order = batches(len(images), BATCH, seed)

    def batch_loss() -> Any:
        chosen = next(order)
        return _loss(net, np.stack([images[index] for index in chosen]), [targets[index] for index in chosen])

    train_until(start + 60 * minutes, net.parameters(), _RATE, batch_loss, _MOST_STEPS)
    inputs = {"image": [None, 3, SIZE, SIZE], "scale_factor": [None, 2]}
    save_inference(net, inputs, recipe.inference, folder)


if __name__ == "__main__":
    train_as_asked(_train)
