"""Twin of PP-OCRv4_server_rec: PPHGNet, the SVTR neck and CTC in small; its world is short codes on plain ground."""

from __future__ import annotations

import copy
import itertools
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from calib_data.generator import write_codes
from calib_data.notes import CODE_LETTERS
from quant.recipe import load_recipe
from quant.twins.samples import written
from quant.twins.training import save_inference, train_as_asked, train_in_child, train_until

MODEL = "PP-OCRv4_server_rec"
_LEAST_WIDTH = 320  # what PaddleX pads shorter lines to
_LINES, _BATCH, _STEPS, _RATE = 1600, 16, 700, 3e-3
_GUIDED = 250  # steps that are told roughly where letters stand: CTC alone takes long to find out
_MARGIN = 16  # pixels behind the longest line of a batch


def train(folder: Path, seed: int, minutes: float) -> None:
    """Write the twin into a folder; takes at most about `minutes`, in a process of its own."""
    train_in_child(__name__, folder, seed, minutes)


def write_world(folder: Path, count: int, seed: int) -> None:
    """Write labelled lines of the twin's world; seeds from 1000 on are never trained on."""
    write_codes(folder, count, seed)


def network(classes: int, width: int = 48) -> Any:
    """Input [N, 3, 48, W], output [N, W / 8, classes], softmax; `logits` gives what is before it.

    Args:
        width: channels of the neck.
    """
    import paddle
    from paddle import nn
    from paddle.nn import functional

    from quant.twins.hgnet import Block, halved, normed

    class Attention(nn.Layer):
        def __init__(self, heads: int = 4) -> None:
            super().__init__()
            self.heads, self.scale = heads, (width // heads) ** -0.5
            self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x: Any) -> Any:
            parts = self.project(x).reshape([0, -1, 3, self.heads, width // self.heads]).transpose([2, 0, 3, 1, 4])
            query, key, value = parts[0] * self.scale, parts[1], parts[2]
            weights = functional.softmax(query @ key.transpose([0, 1, 3, 2]), axis=-1)
            mixed = functional.dropout(weights, 0.0, training=self.training) @ value
            return self.merge(mixed.transpose([0, 2, 1, 3]).reshape([0, -1, width]))

    class Mixer(nn.Layer):
        """A block of a transformer, normalized before each half."""

        def __init__(self) -> None:
            super().__init__()
            self.before, self.attention, self.between = nn.LayerNorm(width), Attention(), nn.LayerNorm(width)
            self.wide, self.narrow, self.drop = (
                nn.Linear(width, 2 * width),
                nn.Linear(2 * width, width),
                nn.Dropout(0.1),
            )

        def forward(self, x: Any) -> Any:
            x = x + self.drop(self.attention(self.before(x)))
            return x + self.drop(self.narrow(self.drop(functional.swish(self.wide(self.between(x))))))

    class Neck(nn.Layer):
        """SVTR: attention along the line, and its input beside what it gives."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            self.reduce = nn.Sequential(
                normed(channels, channels // 2, (1, 3), act=nn.Swish), normed(channels // 2, width, 1, act=nn.Swish)
            )
            self.mixers, self.norm = nn.Sequential(Mixer(), Mixer()), nn.LayerNorm(width)
            self.widen = normed(width, channels, 1, act=nn.Swish)
            self.join = nn.Sequential(
                normed(2 * channels, channels // 2, (1, 3), act=nn.Swish), normed(channels // 2, width, 1, act=nn.Swish)
            )

        def forward(self, x: Any) -> Any:
            reduced = self.reduce(x.clone())
            mixed = self.norm(self.mixers(reduced.flatten(2).transpose([0, 2, 1])))
            grid = mixed.reshape([0, 1, paddle.shape(reduced)[3], width]).transpose([0, 3, 1, 2])
            return self.join(paddle.concat([x, self.widen(grid)], 1)).squeeze(2).transpose([0, 2, 1])

    class Twin(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                normed(3, 8, 3, 2), normed(8, 16, 3),
                halved(16, (2, 1)), Block(16, 12, 24),
                halved(24, (1, 2)), Block(24, 16, 40),
                halved(40, (2, 1)), Block(40, 20, 56), Block(56, 20, 56, shortcut=True),
                halved(56, (2, 1)), Block(56, 24, 80),
                nn.AvgPool2D((3, 2), (3, 2)),
            )  # fmt: skip
            self.neck, self.letters = Neck(80), nn.Linear(width, classes)

        def logits(self, x: Any) -> Any:
            return self.letters(self.neck(self.body(x)))

        def forward(self, x: Any) -> Any:
            return functional.softmax(self.logits(x), axis=2)

    return Twin()


def rough_places(text: list[int], width: float, steps: int) -> npt.NDArray[np.int64]:
    """The letter that stands at each step of the output, as if all were equally wide; 0, the blank, behind the line.

    Args:
        text: indexes of the letters.
        width: of the line, in steps.
        steps: of the output.
    """
    places = (np.arange(steps) + 0.5) / width * len(text)
    return np.where(places < len(text), np.array([*text, 0])[np.minimum(places.astype(int), len(text))], 0)


def inference_yml() -> dict[str, Any]:
    """PaddleX's description of the twin: the official one with another list of characters."""
    recipe = load_recipe(MODEL)
    document = copy.deepcopy(recipe.inference)
    document["PostProcess"]["character_dict"] = list(CODE_LETTERS)
    return document


def _train(folder: Path, seed: int, minutes: float) -> None:
    import paddle
    from paddle.nn import functional

    end = time.monotonic() + 60 * minutes
    paddle.seed(seed)
    document = inference_yml()
    with TemporaryDirectory() as place:
        write_world(Path(place), _LINES, seed)
        samples = written(Path(place), MODEL, document)
    samples = [sample for sample in samples if sample[0].shape[2] == _LEAST_WIDTH]  # nearly all: one shape, no padding
    lines = np.stack([inputs for inputs, _ in samples])
    inked = [int(np.flatnonzero(line.any(axis=(0, 1)))[-1]) + 1 for line in lines]  # behind it PaddleX pads with 0
    by_width = np.argsort(inked)
    texts = [[CODE_LETTERS.index(letter) + 1 for letter in str(text)] for _, text in samples]
    net, order = network(len(CODE_LETTERS) + 2), np.random.default_rng(seed)
    done = itertools.count()

    def batch_loss() -> Any:
        # Lines of about one width, cut behind the longest of them, spare half of the work.
        start = int(order.integers(len(lines) - _BATCH + 1))
        chosen = by_width[start : start + _BATCH]
        width = min(_LEAST_WIDTH, inked[chosen[-1]] + _MARGIN)
        logits = net.logits(paddle.to_tensor(lines[chosen, :, :, :width]))
        steps = logits.shape[1]
        if next(done) < _GUIDED:
            places = [rough_places(texts[index], inked[index] * steps / width, steps) for index in chosen]
            return functional.cross_entropy(logits, paddle.to_tensor(np.stack(places)))
        lengths = [len(texts[index]) for index in chosen]
        padded = np.zeros((_BATCH, max(lengths)), np.int32)
        for row, index in enumerate(chosen):
            padded[row, : lengths[row]] = texts[index]
        counts = paddle.full([_BATCH], steps, "int64"), paddle.to_tensor(lengths, "int64")
        return functional.ctc_loss(logits.transpose([1, 0, 2]), paddle.to_tensor(padded), *counts)

    train_until(end, net.parameters(), _RATE, batch_loss, _STEPS)
    save_inference(net, {"x": [None, 3, 48, None]}, document, folder)


if __name__ == "__main__":
    train_as_asked(_train)
