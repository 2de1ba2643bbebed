"""Twin of PP-FormulaNet-S: a small convolutional encoder, and a decoder of two layers that writes tokens greedily.

The decoder keeps keys and values of the steps before in caches that grow in the loop. Its world is narrow: sums
and differences of two letters, digits or powers.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from calib_data.formulas import FormulaWorld
from calib_data.generator import write_formulas
from eval.formula_metric import latex_tokens
from quant.recipe import load_recipe
from quant.twins.samples import written
from quant.twins.training import save_inference, train_as_asked, train_in_child, train_until

MODEL = "PP-FormulaNet-S"
WORLD = FormulaWorld(
    letters=tuple("abxy"),
    signs=("+", "-"),
    structures=("power",),
    depth=1,
    terms=(2, 2),
    relation=0.0,
    fonts=("cm",),
    sizes=(28, 36),
)
_HARDNESS = 0.2
_FORMULAS, _BATCH, _STEPS, _RATE = 1000, 16, 700, 3e-3
_MARGIN, _ROW_STRIDE = 16, 32  # pixels; the encoder makes one row of this many
_MOST_STEPS = 64
_START, _PAD, _END = 0, 1, 2
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
VOCABULARY = (*_SPECIAL, *WORLD.letters, *map(str, range(1, 10)), *WORLD.signs, "^", "{", "}")
_DRAWN = [token not in (*_SPECIAL, "^", "{", "}") for token in VOCABULARY]


def train(folder: Path, seed: int, minutes: float) -> None:
    """Write the twin into a folder; takes about `minutes`, in a process of its own."""
    train_in_child(__name__, folder, seed, minutes)


def write_world(folder: Path, count: int, seed: int) -> None:
    """Write labelled formulas of the twin's world; seeds from 1000 on are never trained on."""
    write_formulas(folder, count, seed, world=WORLD, hardness=_HARDNESS)


def inference_yml() -> dict[str, Any]:
    """The recipe's description with a tokenizer of the twin's own, where the official file has one of 50,000 tokens."""
    document = copy.deepcopy(load_recipe(MODEL).inference)
    document["PostProcess"]["character_dict"] = {"fast_tokenizer_file": _tokenizer(), "tokenizer_config_file": {}}
    return document


def _tokenizer() -> dict[str, Any]:
    """Words by their number, in the format of the library tokenizers."""
    plain = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": number, "content": word, **plain} for number, word in enumerate(_SPECIAL)]
    model = {"type": "WordLevel", "vocab": {word: n for n, word in enumerate(VOCABULARY)}, "unk_token": "<unk>"}
    none = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", "added_tokens": added, **none, "model": model}


def _network() -> Any:
    import paddle
    from paddle import nn
    from paddle.nn import functional

    width, heads, classes = 64, 4, len(VOCABULARY)
    each = width // heads

    def conv(inputs: int, outputs: int, size: int, stride: Any = 1, groups: int = 1) -> Any:
        return nn.Sequential(
            nn.Conv2D(inputs, outputs, size, stride, size // 2, groups=groups, bias_attr=False),
            nn.BatchNorm2D(outputs),
            nn.ReLU(),
        )

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
            self.encoder = nn.Sequential(
                conv(1, 12, 5, 4),
                conv(12, 32, 3, 2),
                conv(32, 32, 3, 1, 32),
                conv(32, 48, 3, (2, 1)),
                conv(48, 64, 3, (2, 1)),
                conv(64, width, 3, 1),
            )
            self.columns = nn.Embedding(48, width)
            self.near = nn.Conv1D(width, width, 5, padding=2)
            self.tokens, self.places = nn.Embedding(classes, width), nn.Embedding(_MOST_STEPS + 1, width)
            self.first, self.second = Layer(), Layer()
            self.norm, self.vocabulary = nn.LayerNorm(width), nn.Linear(width, classes)
            self.drawn = nn.Linear(width, classes + 1)  # for training alone: what signs stand in the columns

        def features(self, x: Any) -> Any:
            """What stands in each of 48 columns, [N, 48, width]; the middle rows say what, all rows where."""
            maps = self.encoder(x)
            columns = maps.max(2)
            return functional.relu(self.near(columns)).transpose([0, 2, 1])

        def placed(self, features: Any) -> Any:
            return features + self.columns(paddle.arange(48, dtype="int64"))

        def taught(self, x: Any, tokens: Any) -> tuple[Any, Any]:
            """Logits [N, T, classes] where every step knows the right tokens before it; logits of signs [N, 48, ..]."""
            features = self.features(x)
            placed = self.placed(features)
            length = tokens.shape[1]
            mask = paddle.triu(paddle.full([length, length], -1e9), 1)
            y = self.tokens(tokens) + self.places(paddle.arange(length, dtype="int64"))
            for layer in (self.first, self.second):
                y = layer(y, *layer.own(y), *layer.picture(placed), mask)
            return self.vocabulary(self.norm(y)), self.drawn(features)

        def forward(self, x: Any) -> Any:
            placed = self.placed(self.features(x))
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


def _samples(folder: Path) -> tuple[np.ndarray, list[list[int]]]:
    """Each formula as the model's input, float32[samples, 1, 384, 384], and the numbers of its tokens."""
    inputs, labels = zip(*written(folder, MODEL, inference_yml()), strict=True)
    numbers = {word: number for number, word in enumerate(VOCABULARY)}
    tokens = [[_START, *(numbers[word] for word in latex_tokens(str(label))), _END] for label in labels]
    return np.stack(inputs), tokens


def _padded(rows: list[list[int]], filler: int) -> np.ndarray:
    result = np.full((len(rows), max(map(len, rows))), filler)
    for place, row in enumerate(rows):
        result[place, : len(row)] = row
    return result


def drawn_rows(pictures: np.ndarray) -> np.ndarray:
    """Pictures without rows that are empty in all of them: PaddleX pads formulas, which are wide, to black squares."""
    rows = np.flatnonzero((pictures > pictures.min()).any(axis=(0, 1, 3)))
    top = max(0, int(rows[0]) - _MARGIN) // _ROW_STRIDE * _ROW_STRIDE
    return pictures[:, :, top : int(rows[-1]) + 1 + _MARGIN]


def _loss(net: Any, pictures: np.ndarray, tokens: list[list[int]]) -> Any:
    """Of each token behind the right ones before it, and of the signs in their order along the columns.

    What stands where is learnt much faster from the signs than through the decoder alone.
    """
    import paddle
    from paddle.nn import functional

    padded = _padded(tokens, _PAD)
    logits, signs = net.taught(paddle.to_tensor(drawn_rows(pictures)), paddle.to_tensor(padded[:, :-1]))
    visible = [[number for number in row if _DRAWN[number]] for row in tokens]
    alignment = functional.ctc_loss(
        signs.transpose([1, 0, 2]),
        paddle.to_tensor(_padded(visible, 0).astype(np.int32)),
        paddle.full([len(tokens)], signs.shape[1], "int64"),
        paddle.to_tensor([len(row) for row in visible], dtype="int64"),
        blank=len(VOCABULARY),
    )
    return functional.cross_entropy(logits, paddle.to_tensor(padded[:, 1:]), ignore_index=_PAD) + 0.3 * alignment


def _train(folder: Path, seed: int, minutes: float) -> None:
    import paddle

    end = time.monotonic() + 60 * minutes
    paddle.seed(seed)
    with TemporaryDirectory() as place:
        write_world(Path(place), _FORMULAS, seed)
        pictures, tokens = _samples(Path(place))
    net = _network()
    order = np.random.default_rng(seed)

    def batch_loss() -> Any:
        chosen = order.choice(len(pictures), _BATCH, replace=False)
        return _loss(net, pictures[chosen], [tokens[index] for index in chosen])

    train_until(end, net.parameters(), _RATE, batch_loss, _STEPS)
    save_inference(net, {"x": [None, 1, 384, 384]}, inference_yml(), folder)


if __name__ == "__main__":
    train_as_asked(_train)
