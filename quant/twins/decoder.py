"""What the twins of both PP-FormulaNet share: a decoder that writes tokens greedily, their world, their training.

The decoder has two layers, and keeps keys and values of the steps before in caches that grow in the loop. The world is
narrow: sums and differences of two letters, small numbers or powers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from calib_data.formulas import FormulaWorld
from calib_data.generator import write_formulas
from eval.formula_metric import latex_tokens
from quant.recipe import load_recipe
from quant.twins.samples import one_by_one
from quant.twins.training import save_inference, train_until

WORLD = FormulaWorld(
    letters=tuple("abxy"),
    signs=("+", "-"),
    largest=4,
    structures=("power",),
    depth=1,
    terms=(2, 2),
    relation=0.0,
    fonts=("cm",),
    sizes=(28, 36),
)
WIDTH, HEADS = 64, 4
"""Of the twins' decoder."""

_HARDNESS = 0.2
_FORMULAS = 1000
_MARGIN = 16  # pixels
_MOST_STEPS = 64
_START, _PAD, _END = 0, 1, 2
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
VOCABULARY = (*_SPECIAL, *WORLD.letters, *map(str, range(1, WORLD.largest + 1)), *WORLD.signs, "^", "{", "}")
_DRAWN = [token not in (*_SPECIAL, "^", "{", "}") for token in VOCABULARY]

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Schooling:
    """How a twin learns.

    Args:
        model: of the recipe.
        encoder: makes the layer that turns pictures into what stands in each column, [N, columns, WIDTH], and what
            the decoder sees of it, [N, places, WIDTH].
        side: of the model's square input, in pixels.
        row_stride: the encoder makes one row of this many pixels, and empty rows change nothing elsewhere; None where
            they do.
        steps, batch, rate: of the training.
    """

    model: str
    encoder: Callable[[], Any]
    side: int
    row_stride: int | None
    steps: int
    batch: int
    rate: float


def write_world(folder: Path, count: int, seed: int) -> None:
    """Write labelled formulas of the twins' world; seeds from 1000 on are never trained on."""
    write_formulas(folder, count, seed, world=WORLD, hardness=_HARDNESS)


def described(model: str) -> dict[str, Any]:
    """The recipe's description with a tokenizer of the twin's own, where the official file has one of 50,000 tokens."""
    document = copy.deepcopy(load_recipe(model).inference)
    document["PostProcess"]["character_dict"] = {"fast_tokenizer_file": _tokenizer(), "tokenizer_config_file": {}}
    return document


def _tokenizer() -> dict[str, Any]:
    """Words by their number, in the format of the library tokenizers."""
    plain = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": number, "content": word, **plain} for number, word in enumerate(_SPECIAL)]
    model = {"type": "WordLevel", "vocab": {word: n for n, word in enumerate(VOCABULARY)}, "unk_token": "<unk>"}
    none = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": added, **none, "model": model}


def network(encoder: Callable[[], Any], width: int = WIDTH, heads: int = HEADS, classes: int = len(VOCABULARY)) -> Any:
    """An encoder, made by a function (see `Schooling`), and the decoder behind it, as wide as what it sees."""
    import paddle
    from paddle import nn
    from paddle.nn import functional

    each = width // heads

    def split(x: Any) -> Any:
        """[N, T, width] -> [N, heads, T, each]."""
        return x.reshape([0, -1, heads, each]).transpose([0, 2, 1, 3])

    def attend(queries: Any, keys: Any, values: Any, mask: Any = None) -> Any:
        """[N, heads, T, each] over [N, heads, S, each] -> [N, T, width]."""
        match = queries * each**-0.5 @ keys.transpose([0, 1, 3, 2])
        weights = functional.softmax(match if mask is None else match + mask, axis=-1)
        return (weights @ values).transpose([0, 2, 1, 3]).reshape([0, -1, width])

    class Layer(nn.Layer):
        """Attention to the tokens before, attention to the picture, two linear layers; norms stand in front."""

        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.LayerList([nn.LayerNorm(width) for _ in range(3)])
            self.ask, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
            self.ask_picture, self.picture_key, self.picture_value, self.picture_out = (
                nn.Linear(width, width) for _ in range(4)
            )
            self.rise, self.fall = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

        def own(self, x: Any) -> tuple[Any, Any]:
            """Keys and values of these tokens."""
            return split(self.key(self.norms[0](x))), split(self.value(self.norms[0](x)))

        def picture(self, features: Any) -> tuple[Any, Any]:
            return split(self.picture_key(features)), split(self.picture_value(features))

        def forward(self, x: Any, keys: Any, values: Any, seen: Any, shown: Any, mask: Any = None) -> Any:
            x = x + self.out(attend(split(self.ask(self.norms[0](x))), keys, values, mask))
            x = x + self.picture_out(attend(split(self.ask_picture(self.norms[1](x))), seen, shown))
            return x + self.fall(functional.gelu(self.rise(self.norms[2](x))))

    class Twin(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder()
            self.tokens, self.places = nn.Embedding(classes, width), nn.Embedding(_MOST_STEPS + 1, width)
            self.first, self.second = Layer(), Layer()
            self.norm, self.vocabulary = nn.LayerNorm(width), nn.Linear(width, classes)
            self.drawn = nn.Linear(width, classes + 1)  # for training alone: what signs stand in the columns

        def taught(self, x: Any, tokens: Any) -> tuple[Any, Any]:
            """Logits [N, T, classes] where every step knows the right tokens before it; of signs [N, columns, ..]."""
            features, placed = self.encoder(x)
            length = tokens.shape[1]
            mask = paddle.triu(paddle.full([length, length], -1e9), 1)
            y = self.tokens(tokens) + self.places(paddle.arange(length, dtype="int64"))
            for layer in (self.first, self.second):
                y = layer(y, *layer.own(y), *layer.picture(placed), mask)
            return self.vocabulary(self.norm(y)), self.drawn(features)

        def forward(self, x: Any) -> Any:
            _, placed = self.encoder(x)
            seen1, shown1 = self.first.picture(placed)
            seen2, shown2 = self.second.picture(placed)
            count = paddle.shape(x)[0]
            nothing = paddle.zeros([1], "int64")[0]  # caches begin empty; a tensor keeps their length open
            keys1 = paddle.zeros([count, heads, nothing, each])
            values1 = paddle.zeros([count, heads, nothing, each])
            keys2 = paddle.zeros([count, heads, nothing, each])
            values2 = paddle.zeros([count, heads, nothing, each])
            token = paddle.full([count, 1], _START, "int64")
            written = paddle.full([count, nothing + 1], _START, "int64")
            ended = paddle.zeros([count, 1], "bool")
            place = paddle.zeros([], "int64")
            goes_on = paddle.ones([], "bool")
            while place < _MOST_STEPS and goes_on:
                y = self.tokens(token) + self.places(place)
                key, value = self.first.own(y)
                keys1, values1 = paddle.concat([keys1, key], 2), paddle.concat([values1, value], 2)
                y = self.first(y, keys1, values1, seen1, shown1)
                key, value = self.second.own(y)
                keys2, values2 = paddle.concat([keys2, key], 2), paddle.concat([values2, value], 2)
                y = self.second(y, keys2, values2, seen2, shown2)
                token = self.vocabulary(self.norm(y)).argmax(-1)
                token = paddle.where(ended, paddle.full_like(token, _PAD), token)
                written = paddle.concat([written, token], 1)
                ended = paddle.logical_or(ended, token == _END)
                goes_on = paddle.logical_not(ended.all())
                place = place + 1
            return written

    return Twin()


@dataclass(frozen=True)
class Strip:
    """The rows of a picture that are drawn on; all others are empty. PaddleX pads formulas, which are wide, to squares.

    Attributes: top: the number of the first row; rows: float32[1, rows, side]; ground: what empty rows hold.
    """

    top: int
    rows: FloatArray
    ground: float


def strip(picture: FloatArray) -> Strip:
    """Of a picture [1, side, side]."""
    ground = float(picture.min())
    drawn = np.flatnonzero((picture > ground).any(axis=(0, 2)))
    return Strip(int(drawn[0]), picture[:, drawn[0] : drawn[-1] + 1].copy(), ground)


def stacked(strips: list[Strip], stride: int | None) -> FloatArray:
    """Pictures [N, 1, rows, side] again: those rows that are drawn on in any, or all where `stride` is None.

    Args:
        stride: the first row is a multiple of it.
    """
    side = strips[0].rows.shape[-1]
    top, bottom = 0, side
    if stride is not None:
        top = max(0, min(one.top for one in strips) - _MARGIN) // stride * stride
        bottom = min(side, max(one.top + one.rows.shape[1] for one in strips) + _MARGIN)
    pictures = np.full((len(strips), 1, bottom - top, side), min(one.ground for one in strips), np.float32)
    for picture, one in zip(pictures, strips, strict=True):
        picture[:, one.top - top : one.top - top + one.rows.shape[1]] = one.rows
    return pictures


def _samples(folder: Path, model: str) -> tuple[list[Strip], list[list[int]]]:
    """What is drawn of each formula as the model's input, and the numbers of its tokens."""
    numbers = {word: number for number, word in enumerate(VOCABULARY)}
    strips, tokens = [], []
    for picture, label in one_by_one(folder, model, described(model)):
        strips.append(strip(picture))
        tokens.append([_START, *(numbers[word] for word in latex_tokens(str(label))), _END])
    return strips, tokens


def _padded(rows: list[list[int]], filler: int) -> npt.NDArray[np.int64]:
    result = np.full((len(rows), max(map(len, rows))), filler)
    for place, row in enumerate(rows):
        result[place, : len(row)] = row
    return result


def _loss(net: Any, pictures: FloatArray, tokens: list[list[int]]) -> Any:
    """Of each token behind the right ones before it, and of the signs in their order along the columns.

    What stands where is learnt much faster from the signs than through the decoder alone.
    """
    import paddle
    from paddle.nn import functional

    padded = _padded(tokens, _PAD)
    logits, signs = net.taught(paddle.to_tensor(pictures), paddle.to_tensor(padded[:, :-1]))
    visible = [[number for number in row if _DRAWN[number]] for row in tokens]
    alignment = functional.ctc_loss(
        signs.transpose([1, 0, 2]),
        paddle.to_tensor(_padded(visible, 0).astype(np.int32)),
        paddle.full([len(tokens)], signs.shape[1], "int64"),
        paddle.to_tensor([len(row) for row in visible], dtype="int64"),
        blank=len(VOCABULARY),
    )
    return functional.cross_entropy(logits, paddle.to_tensor(padded[:, 1:]), ignore_index=_PAD) + 0.3 * alignment


def teach(schooling: Schooling, folder: Path, seed: int, minutes: float) -> None:
    """Train a twin and write it into a folder, in at most about `minutes`."""
    import paddle

    end = time.monotonic() + 60 * minutes
    paddle.seed(seed)
    with TemporaryDirectory() as place:
        write_world(Path(place), _FORMULAS, seed)
        strips, tokens = _samples(Path(place), schooling.model)
    net = network(schooling.encoder)
    order = np.random.default_rng(seed)

    def batch_loss() -> Any:
        chosen = order.choice(len(strips), schooling.batch, replace=False)
        pictures = stacked([strips[index] for index in chosen], schooling.row_stride)
        return _loss(net, pictures, [tokens[index] for index in chosen])

    train_until(end, net.parameters(), schooling.rate, batch_loss, schooling.steps)
    save_inference(net, {"x": [None, 1, schooling.side, schooling.side]}, described(schooling.model), folder)
