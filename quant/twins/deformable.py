"""Twin of PP-DocLayout-L: a small RT-DETR with the inputs, outputs and operators of the official graph.

A convolutional network, attention among the places of the coarsest scale, a neck over three scales. The places whose
features look most like a region become queries; two decoder layers let them attend to one another and, by deformable
attention (Zhu et al. 2021), to points near themselves, and move their boxes. There is no NMS: each region is taught to
one query alone (Carion et al. 2020), the others learn to be silent. Which one is not found by matching, as for the
official model, but follows from the place that a query comes from: that is learnt in hundreds of steps, not thousands.
Its world is that of the twin of PP-DocLayout-S.
"""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calib_data.layouts import write_plain_layout_pages
from quant.recipe import class_labels, load_recipe
from quant.twins.pages import BATCH, FloatArray, Page, batches, drawn_pages, overlaps
from quant.twins.training import save_inference, train_as_asked, train_in_child, train_until

MODEL = "PP-DocLayout-L"
SIZE = 640
STRIDES = (16, 32, 64)
QUERIES = 60
_SIDES = (80.0, 170.0)
"""Root of the area, in pixels, up to which regions belong to the first and to the second scale."""

_ANCHORS = ((0.2, 0.05), (0.3, 0.12), (0.4, 0.24))
"""Usual width and height of regions of each scale, of the picture's size."""

_WIDTH, _HEADS, _POINTS, _LAYERS = 64, 4, 4, 2
_RATE = 5e-3
_PAGES_A_MINUTE = 60
_MOST_STEPS = 700
_LEAST_QUALITY = 0.5  # what is in its place is taught as found long before its box fits

IntArray = npt.NDArray[np.int64]


def train(folder: Path, seed: int, minutes: float) -> None:
    """Write the twin into a folder; takes about `minutes`, in a process of its own."""
    train_in_child(__name__, folder, seed, minutes)


def write_world(folder: Path, count: int, seed: int) -> None:
    """Write labelled pages of the twin's world; seeds from 1000 on are never trained on."""
    write_plain_layout_pages(folder, count, seed)


def anchors() -> FloatArray:
    """Middle x and y, width and height of the box that every place starts from, [places, 4], of the picture's size."""
    found = []
    for scale, stride in enumerate(STRIDES):
        along = (np.arange(SIZE // stride, dtype=np.float32) + 0.5) * stride / SIZE
        x, y = np.meshgrid(along, along)
        size = np.tile(np.array(_ANCHORS[scale], np.float32), (x.size, 1))
        found.append(np.column_stack([x.ravel(), y.ravel(), size]))
    return np.concatenate(found)


def places_of(page: Page) -> tuple[IntArray, list[IntArray]]:
    """The one place that answers for each region of a page, its own, and places near it that learn its box as well.

    Raises:
        ValueError: there are more regions than queries, of which each region needs one.
    """
    if len(page.boxes) > QUERIES:
        raise ValueError(f"a page has {len(page.boxes)} regions for {QUERIES} queries; draw fewer, or raise QUERIES")
    places = anchors()[:, :2] * SIZE
    scales = np.repeat(np.arange(len(STRIDES)), [(SIZE // stride) ** 2 for stride in STRIDES])
    middles, sides = (page.boxes[:, :2] + page.boxes[:, 2:]) / 2, page.boxes[:, 2:] - page.boxes[:, :2]
    own = np.searchsorted(_SIDES, np.sqrt(sides.prod(axis=1)))[:, None]
    apart = np.where(own == scales, np.abs(middles[:, None] - places).max(axis=2), np.inf)
    close = (apart < 1.6 * np.take(STRIDES, own)) & (apart == apart.min(axis=0, initial=np.inf))
    answering: list[int] = []
    for distances in apart:
        distances[answering] = np.inf
        answering.append(int(distances.argmin()))
    return np.array(answering, np.int64), [np.flatnonzero(row) for row in close]


def _network(classes: int) -> Any:
    paddle: Any = import_module("paddle")
    from paddle import nn
    from paddle.nn import functional

    from quant.twins.hgnet import normed

    def lean(inputs: int, outputs: int, stride: int = 1) -> Any:
        """A depthwise convolution and one of single places."""
        deep = nn.Conv2D(inputs, inputs, 3, stride, 1, groups=inputs, bias_attr=False)
        return nn.Sequential(deep, nn.BatchNorm2D(inputs), normed(inputs, outputs, 1))

    def logits(x: Any) -> Any:
        """The inverse of a sigmoid."""
        x = x.clip(1e-3, 1 - 1e-3)
        return paddle.log(x / (1 - x))

    def stacked(inputs: int, outputs: int) -> Any:
        return nn.Sequential(nn.Linear(inputs, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, outputs))

    def rare() -> Any:
        """Few places hold anything."""
        constant = paddle.nn.initializer.Constant(-4.0)
        return nn.Linear(_WIDTH, classes, bias_attr=paddle.ParamAttr(initializer=constant))

    def still() -> Any:
        """Boxes start where the anchors are."""
        last = nn.Linear(_WIDTH, 4, weight_attr=paddle.ParamAttr(initializer=paddle.nn.initializer.Constant(0.0)))
        return nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), last)

    class Attentive(nn.Layer):
        """Attention among the places of a map, then two linear layers; norms stand behind."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiHeadAttention(_WIDTH, _HEADS)
            self.norms = nn.LayerList([nn.LayerNorm(_WIDTH) for _ in range(2)])
            self.rise, self.fall = nn.Linear(_WIDTH, 2 * _WIDTH), nn.Linear(2 * _WIDTH, _WIDTH)
            side = SIZE // STRIDES[-1]
            self.places = self.create_parameter([1, side * side, _WIDTH])

        def forward(self, maps: Any) -> Any:
            x = maps.flatten(2).transpose([0, 2, 1])
            asked = x + self.places
            x = self.norms[0](x + self.attention(asked, asked, x))
            x = self.norms[1](x + self.fall(functional.gelu(self.rise(x))))
            side = SIZE // STRIDES[-1]
            return x.transpose([0, 2, 1]).reshape([-1, _WIDTH, side, side])

    class Deformable(nn.Layer):
        """Attention of queries to a few points of every scale, near the middle of their boxes."""

        def __init__(self) -> None:
            super().__init__()
            many = _HEADS * len(STRIDES) * _POINTS
            self.value, self.out = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WIDTH)
            nothing = paddle.ParamAttr(initializer=paddle.nn.initializer.Constant(0.0))
            spread = paddle.ParamAttr(initializer=paddle.nn.initializer.Uniform(-1.0, 1.0))
            self.offset = nn.Linear(_WIDTH, 2 * many, weight_attr=nothing, bias_attr=spread)
            self.weigh = nn.Linear(_WIDTH, many)

        def forward(self, queries: Any, boxes: Any, memory: Any) -> Any:
            each, scales = _WIDTH // _HEADS, len(STRIDES)
            offsets = self.offset(queries).reshape([-1, QUERIES, _HEADS, scales, _POINTS, 2])
            weights = functional.softmax(self.weigh(queries).reshape([-1, QUERIES, _HEADS, scales * _POINTS]))
            middle, size = boxes.reshape([-1, QUERIES, 1, 1, 1, 4]).split(2, axis=-1)
            grid = 2 * (middle + 0.5 * offsets * size) - 1
            sizes = [(SIZE // stride) ** 2 for stride in STRIDES]
            seen = []
            for scale, values in enumerate(self.value(memory).split(sizes, axis=1)):
                side = SIZE // STRIDES[scale]
                maps = values.transpose([0, 2, 1]).reshape([-1, each, side, side])
                points = grid[:, :, :, scale].transpose([0, 2, 1, 3, 4]).reshape([-1, QUERIES, _POINTS, 2])
                seen.append(functional.grid_sample(maps, points, align_corners=False))
            weights = weights.transpose([0, 2, 1, 3]).reshape([-1, 1, QUERIES, scales * _POINTS])
            mixed = (paddle.concat(seen, -1) * weights).sum(-1)
            return self.out(mixed.reshape([-1, _WIDTH, QUERIES]).transpose([0, 2, 1]))

    class Decoding(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.look = nn.MultiHeadAttention(_WIDTH, _HEADS), Deformable()
            self.norms = nn.LayerList([nn.LayerNorm(_WIDTH) for _ in range(3)])
            self.rise, self.fall = nn.Linear(_WIDTH, 2 * _WIDTH), nn.Linear(2 * _WIDTH, _WIDTH)
            self.move, self.classify = still(), nn.Linear(_WIDTH, classes)

        def forward(self, x: Any, place: Any, boxes: Any, memory: Any) -> tuple[Any, Any]:
            """Queries, and their boxes."""
            asked = x + place
            x = self.norms[0](x + self.attention(asked, asked, x))
            x = self.norms[1](x + self.look(x + place, boxes, memory))
            x = self.norms[2](x + self.fall(functional.relu(self.rise(x))))
            return x, functional.sigmoid(self.move(x) + logits(boxes))

    class Twin(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(normed(3, 12, 5, 4), lean(12, 24, 2), lean(24, 24))
            self.fine = nn.Sequential(lean(24, 48, 2), lean(48, 48), lean(48, 48))
            self.middle = nn.Sequential(lean(48, 64, 2), lean(64, 64), lean(64, 64))
            self.coarse = nn.Sequential(lean(64, 96, 2), lean(96, 96))
            self.even = nn.LayerList([normed(count, _WIDTH, 1, act=nn.Silu) for count in (48, 64, 96)])
            self.attentive = Attentive()
            self.rise = nn.LayerList([normed(2 * _WIDTH, _WIDTH, 1, act=nn.Silu) for _ in range(2)])
            self.smooth = nn.LayerList([lean(_WIDTH, _WIDTH) for _ in range(2)])
            self.project, self.norm = nn.Linear(_WIDTH, _WIDTH), nn.LayerNorm(_WIDTH)
            self.score, self.box = rare(), still()
            self.place = stacked(4, _WIDTH)
            self.layers = nn.LayerList([Decoding() for _ in range(_LAYERS)])
            self.register_buffer("anchors", logits(paddle.to_tensor(anchors())))

        def memory(self, image: Any) -> Any:
            """Features of all places, [N, places, width]."""
            fine = self.fine(self.stem(image))
            middle = self.middle(fine)
            found = (fine, middle, self.coarse(middle))
            maps = [even(found[level]) for level, even in enumerate(self.even)]
            maps[2] = self.attentive(maps[2])
            for level in (1, 0):
                higher = functional.interpolate(maps[level + 1], scale_factor=2, mode="nearest")
                maps[level] = self.smooth[level](self.rise[level](paddle.concat([higher, maps[level]], 1)))
            return paddle.concat([x.flatten(2) for x in maps], -1).transpose([0, 2, 1])

        def proposed(self, memory: Any) -> tuple[Any, Any, Any]:
            """Features, logits of classes and boxes of all places."""
            features = self.norm(self.project(memory))
            return features, self.score(features), functional.sigmoid(self.box(features) + self.anchors)

        def decoded(self, memory: Any, x: Any, scores: Any, boxes: Any) -> list[tuple[Any, Any]]:
            """Logits of classes and boxes of the queries behind each layer, from those of their places."""
            found = []
            for layer in self.layers:
                boxes = boxes.detach() if self.training else boxes  # each layer learns by its own boxes
                x, boxes = layer(x, self.place(boxes), boxes, memory)
                scores = scores + layer.classify(x)
                found.append((scores, boxes))
            return found

        def forward(self, im_shape: Any, image: Any, scale_factor: Any) -> tuple[Any, Any]:
            memory = self.memory(image)
            features, scores, boxes = self.proposed(memory)
            _, best = paddle.topk(scores.max(-1), QUERIES, axis=1)
            pages = paddle.arange(paddle.shape(image)[0], dtype=best.dtype).unsqueeze(-1).tile([1, QUERIES])
            chosen = paddle.stack([pages, best], axis=-1)
            logit, boxes = self.decoded(memory, *(paddle.gather_nd(x, chosen) for x in (features, scores, boxes)))[-1]
            size = paddle.floor(im_shape / scale_factor + 0.5).flip(1).tile([1, 2]).unsqueeze(1)
            corners = _corners(boxes) * size
            score, place = paddle.topk(functional.sigmoid(logit).flatten(1), QUERIES, axis=1)
            query = paddle.stack([pages, place // classes], axis=-1)
            parts = [
                (place % classes).unsqueeze(-1).astype("float32"),
                score.unsqueeze(-1),
                paddle.gather_nd(corners, query),
            ]
            count = paddle.to_tensor(QUERIES, "int32").tile([paddle.shape(image)[0]])
            return paddle.concat(parts, axis=-1).reshape([-1, 6]), count

    return Twin()


def _corners(boxes: Any) -> Any:
    """Two corners of boxes given by middle and size."""
    paddle: Any = import_module("paddle")

    middle, size = boxes[..., :2], boxes[..., 2:]
    return paddle.concat([middle - 0.5 * size, middle + 0.5 * size], axis=-1)


def _loss(net: Any, pages: list[Page]) -> Any:
    """Of all places, and of the queries behind each layer: a region has its place, and the query from there."""
    paddle: Any = import_module("paddle")

    memory = net.memory(paddle.to_tensor(np.stack([page.image for page in pages])))
    features, scores, boxes = net.proposed(memory)
    targets = [places_of(page) for page in pages]
    answering, regions = [places for places, _ in targets], [np.arange(len(page.boxes)) for page in pages]
    loss = _set_loss(scores, boxes, pages, answering, regions)
    close = [np.concatenate([*found, np.zeros(0, np.int64)]) for _, found in targets]
    owners = [np.repeat(np.arange(len(found)), [len(one) for one in found]) for _, found in targets]
    loss = loss + _box_loss(boxes, pages, close, owners)[0]
    best = scores.max(-1).numpy().argsort(axis=1)[:, ::-1]
    queries = np.stack([_with(places, order) for places, order in zip(answering, best, strict=True)])
    chosen = paddle.to_tensor(np.stack([np.repeat(np.arange(len(pages))[:, None], QUERIES, 1), queries], axis=-1))
    for logit, found in net.decoded(memory, *(paddle.gather_nd(x, chosen) for x in (features, scores, boxes))):
        loss = loss + _set_loss(logit, found, pages, regions, regions)
    return loss


def _with(places: IntArray, order: IntArray) -> IntArray:
    """As many places as there are queries: those that answer for a region, in their order, then the best others."""
    return np.array(list(dict.fromkeys([*places.tolist(), *order[: 2 * QUERIES].tolist()]))[:QUERIES])


def _box_loss(boxes: Any, pages: list[Page], places: list[IntArray], regions: list[IntArray]) -> tuple[Any, Any]:
    """Distance and generalized IoU of boxes and their regions, a mean; and the IoU of each pair."""
    paddle: Any = import_module("paddle")

    rows = np.concatenate([np.full(len(found), row) for row, found in enumerate(places)])
    chosen = paddle.to_tensor(np.stack([rows, np.concatenate(places)], axis=1).astype(np.int64))
    truth = np.concatenate([page.boxes[found] for page, found in zip(pages, regions, strict=True)]) / SIZE
    corners, wanted = _corners(paddle.gather_nd(boxes, chosen)), paddle.to_tensor(truth.astype(np.float32))
    overlap, generalized = overlaps(corners, wanted)
    distance = (corners - wanted).abs().sum(-1)
    return (5 * distance + 2 * (1 - generalized)).mean(), overlap


def _set_loss(scores: Any, boxes: Any, pages: list[Page], places: list[IntArray], regions: list[IntArray]) -> Any:
    """Varifocal loss of all scores (Zhang et al. 2021), whose target is how well the box fits, and the boxes' loss."""
    paddle: Any = import_module("paddle")
    from paddle.nn import functional

    moved, overlap = _box_loss(boxes, pages, places, regions)
    rows = np.concatenate([np.full(len(found), row) for row, found in enumerate(places)])
    classes = np.concatenate([page.classes[found] for page, found in zip(pages, regions, strict=True)])
    quality = np.zeros(scores.shape, np.float32)
    quality[rows, np.concatenate(places), classes] = overlap.numpy().clip(_LEAST_QUALITY, 1)
    wanted = paddle.to_tensor(quality)
    found = functional.sigmoid(scores).detach()
    weight = paddle.where(wanted > 0, wanted, 0.75 * found**2)
    entropy = functional.binary_cross_entropy_with_logits(scores, wanted, weight, reduction="sum")
    return entropy / max(1, len(rows)) + moved


def _train(folder: Path, seed: int, minutes: float) -> None:
    paddle: Any = import_module("paddle")

    start = time.monotonic()
    paddle.seed(seed)
    recipe = load_recipe(MODEL)
    pages = drawn_pages(MODEL, recipe.inference, _PAGES_A_MINUTE * minutes, seed)
    pages = [page for page in pages if len(page.boxes)]
    net, order = _network(len(class_labels(recipe))), batches(len(pages), BATCH, seed)

    def batch_loss() -> Any:
        return _loss(net, [pages[index] for index in next(order)])

    train_until(start + 60 * minutes, net.parameters(), _RATE, batch_loss, _MOST_STEPS)
    inputs = {"im_shape": [None, 2], "image": [None, 3, SIZE, SIZE], "scale_factor": [None, 2]}
    save_inference(net, inputs, recipe.inference, folder)


if __name__ == "__main__":
    train_as_asked(_train)
