"""Twin of SLANet_plus: a small PP-LCNet and CSP-PAN, then the attention GRU that writes tokens in a loop.

Its world is narrow: ruled tables of few rows and columns, cells that span rows or columns now and then. The boxes of
the cells are not trained, since generated sets have none.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from calib_data.generator import write_tables
from calib_data.tables import TableWorld
from quant.recipe import load_recipe
from quant.twins.samples import written
from quant.twins.training import save_inference, train_as_asked, train_in_child, train_until

MODEL = "SLANet_plus"
WORLD = TableWorld(
    rows=(2, 4), columns=(2, 3), heads=1, spans=0.15, empty=0.05, rulings=("full",), sizes=(14, 20), chinese=0
)
_HARDNESS = 0.3
_TABLES, _BATCH, _STEPS, _RATE = 500, 8, 320, 3e-3
_NOTHING = -1  # where a table has no more tokens
_MOST_STEPS = 500
_TAG = re.compile(r"</?(?:thead|tbody|tr)>|<td[^>]*>")
_SPAN = re.compile(r' (?:row|col)span="\d+"')


def train(folder: Path, seed: int, minutes: float) -> None:
    """Write the twin into a folder; takes about `minutes`, in a process of its own."""
    train_in_child(__name__, folder, seed, minutes)


def write_world(folder: Path, count: int, seed: int) -> None:
    """Write labelled tables of the twin's world; seeds from 1000 on are never trained on."""
    write_tables(folder, count, seed, world=WORLD, hardness=_HARDNESS)


def structure_tokens(html: str) -> list[str]:
    """The tokens that SLANet writes for a table."""
    tokens = []
    for tag in _TAG.findall(html):
        spans = _SPAN.findall(tag)
        if tag.startswith("<td"):
            tokens += ["<td", *spans, ">", "</td>"] if spans else ["<td></td>"]
        else:
            tokens.append(tag)
    return tokens


def vocabulary(inference_yml: dict[str, Any]) -> list[str]:
    """The classes of the model, in their order, as PaddleX's decoder makes them of the file."""
    listed = [token for token in inference_yml["PostProcess"]["character_dict"] if token != "<td>"]
    return ["sos", *listed, "<td></td>", "eos"]


def _network(classes: int, end: int) -> Any:
    import paddle
    from paddle import nn
    from paddle.nn import functional

    from quant.twins.lcnet import Gate, conv, separable

    class Neck(nn.Layer):
        """Features of three scales, joined from coarse to fine and back; the coarsest is what is read."""

        def __init__(self, inputs: tuple[int, int, int], channels: int) -> None:
            super().__init__()
            self.even = nn.LayerList([conv(count, channels, 1) for count in inputs])
            self.rise = nn.LayerList([separable(2 * channels, channels, 5) for _ in range(2)])
            self.fall = nn.LayerList([conv(channels, channels, 5, 2, channels) for _ in range(2)])
            self.join = nn.LayerList([separable(2 * channels, channels, 5) for _ in range(2)])

        def forward(self, fine: Any, middle: Any, coarse: Any) -> Any:
            fine, middle, coarse = self.even[0](fine), self.even[1](middle), self.even[2](coarse)
            middle = self.rise[0](paddle.concat([self._up(coarse, middle), middle], 1))
            fine = self.rise[1](paddle.concat([self._up(middle, fine), fine], 1))
            middle = self.join[0](paddle.concat([self.fall[0](fine), middle], 1))
            return self.join[1](paddle.concat([self.fall[1](middle), coarse], 1))

        def _up(self, x: Any, like: Any) -> Any:
            return functional.interpolate(x, size=like.shape[2:], mode="nearest")

    class Twin(nn.Layer):
        def __init__(self, channels: int = 48, hidden: int = 64) -> None:
            super().__init__()
            self.hidden, self.classes = hidden, classes
            self.stem = conv(3, 12, 5, 4)
            self.fine = nn.Sequential(separable(12, 24, 3, 2), separable(24, 24))
            self.middle = nn.Sequential(separable(24, 48, 5, 2), separable(48, 48, 5))
            self.coarse = nn.Sequential(separable(48, 96, 5, 2), Gate(96), separable(96, 96, 5))
            self.neck = Neck((24, 48, 96), channels)
            self.seen = nn.Linear(channels, hidden, bias_attr=False)
            self.held = nn.Linear(hidden, hidden)
            self.match = nn.Linear(hidden, 1, bias_attr=False)
            self.cell = nn.GRUCell(channels + classes, hidden)
            self.token = nn.Sequential(nn.Linear(hidden, hidden), nn.Linear(hidden, classes))
            self.box = nn.Sequential(nn.Linear(hidden, hidden), nn.Linear(hidden, 8))

        def features(self, x: Any) -> Any:
            """[N, places, channels]."""
            fine = self.fine(self.stem(x))
            middle = self.middle(fine)
            joined = self.neck(fine, middle, self.coarse(middle))
            return joined.flatten(2).transpose([0, 2, 1])

        def step(self, features: Any, seen: Any, state: Any, token: Any) -> tuple[Any, Any]:
            """The next state, and logits of the token behind `token`."""
            match = self.match(paddle.tanh(seen + self.held(state).unsqueeze(1)))
            weights = functional.softmax(match, axis=1).transpose([0, 2, 1])
            context = (weights @ features).squeeze(1)
            before = functional.one_hot(token, self.classes)
            state, _ = self.cell(paddle.concat([context, before], 1), state)
            return state, self.token(state)

        def taught(self, x: Any, tokens: Any) -> Any:
            """Logits [N, T, classes] where each step is told the right token before it, [N, T]."""
            features = self.features(x)
            seen, state = self.seen(features), paddle.zeros([x.shape[0], self.hidden])
            logits = []
            for place in range(tokens.shape[1]):
                state, next_logits = self.step(features, seen, state, tokens[:, place])
                logits.append(next_logits)
            return paddle.stack(logits, 1)

        def forward(self, x: Any) -> tuple[Any, Any]:
            features = self.features(x)
            count = paddle.shape(features)[0]
            state = paddle.zeros([count, self.hidden])
            boxes = paddle.zeros([count, _MOST_STEPS + 1, 8])
            structure = paddle.zeros([count, _MOST_STEPS + 1, self.classes])
            written = paddle.zeros([count, _MOST_STEPS + 1], "int32")
            token = paddle.zeros([count], "int32")
            place = paddle.zeros([], "int64")
            goes_on = paddle.ones([], "bool")
            while place < _MOST_STEPS + 1 and goes_on:
                state, logits = self.step(features, self.seen(features), state, token)
                token = logits.argmax(1, dtype="int32")
                structure[:, place, :] = logits
                boxes[:, place, :] = functional.sigmoid(self.box(state))
                written[:, place] = token
                goes_on = paddle.logical_not((written == end).any(-1).all())
                place = place + 1
            return boxes[:, :place, :], functional.softmax(structure[:, :place, :], axis=-1)

    return Twin()


def _samples(folder: Path, inference_yml: dict[str, Any]) -> tuple[list[np.ndarray], list[list[int]]]:
    """Each table as the model's input [3, 488, 488], and the numbers of its tokens."""
    numbers = {token: number for number, token in enumerate(vocabulary(inference_yml))}
    inputs, labels = zip(*written(folder, MODEL, inference_yml), strict=True)
    tokens = [[numbers[token] for token in ["sos", *structure_tokens(str(label)), "eos"]] for label in labels]
    return list(inputs), tokens


def _train(folder: Path, seed: int, minutes: float) -> None:
    import paddle
    from paddle.nn import functional

    end = time.monotonic() + 60 * minutes
    paddle.seed(seed)
    inference_yml = load_recipe(MODEL).inference
    with TemporaryDirectory() as place:
        write_world(Path(place), _TABLES, seed)
        inputs, tokens = _samples(Path(place), inference_yml)
    classes = vocabulary(inference_yml)
    net, order = _network(len(classes), classes.index("eos")), np.random.default_rng(seed)

    def batch_loss() -> Any:
        chosen = order.choice(len(inputs), _BATCH, replace=False)
        padded = np.full((_BATCH, max(len(tokens[index]) for index in chosen)), _NOTHING)
        for row, index in enumerate(chosen):
            padded[row, : len(tokens[index])] = tokens[index]
        given = paddle.to_tensor(np.maximum(padded[:, :-1], 0).astype(np.int32))
        logits = net.taught(paddle.to_tensor(np.stack([inputs[index] for index in chosen])), given)
        return functional.cross_entropy(logits, paddle.to_tensor(padded[:, 1:]), ignore_index=_NOTHING)

    train_until(end, net.parameters(), _RATE, batch_loss, _STEPS)
    save_inference(net, {"x": [None, 3, 488, 488]}, inference_yml, folder)


if __name__ == "__main__":
    train_as_asked(_train)
