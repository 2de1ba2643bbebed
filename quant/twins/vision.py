"""Twin of PP-FormulaNet-L: a small vision transformer before the decoder of both twins (`decoder`).

As in the official graph (Vary's ViT-B), patches become tokens, every other layer attends inside of windows alone, and
what a place matches in another depends on how far away it is, down and along apart (Li et al. 2022). A neck of
convolutions joins places. A few convolutions stand in front and the patches are sixteen times as large, so that global
attention is over 144 places in place of 2304: on two cores those would take hours to train.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quant.twins.decoder import WIDTH, Schooling, described, teach, write_world
from quant.twins.training import train_as_asked, train_in_child

__all__ = ["MODEL", "SCHOOLING", "inference_yml", "train", "write_world"]

MODEL = "PP-FormulaNet-L"
SIDE = 768
PATCH = (128, 32)
"""Rows and columns of pixels of one place."""
WINDOW = 7
_GRAIN = 8  # pixels a side, of the first convolution
_ROWS, _COLUMNS = SIDE // PATCH[0], SIDE // PATCH[1]
_HEADS = 2
_DEEP = 2  # layers, the last of each two with attention to all places


def train(folder: Path, seed: int, minutes: float) -> None:
    """Write the twin into a folder; takes about `minutes`, in a process of its own."""
    train_in_child(__name__, folder, seed, minutes)


def inference_yml() -> dict[str, Any]:
    """What stands beside the twin's weights."""
    return described(MODEL)


def _encoder() -> Any:
    import paddle
    from paddle import nn
    from paddle.nn import functional

    zero = paddle.nn.initializer.Constant(0.0)
    each = WIDTH // _HEADS

    class Attention(nn.Layer):
        """Among all places of maps [N, rows, columns, WIDTH] of one size."""

        def __init__(self, rows: int, columns: int) -> None:
            super().__init__()
            self.rows, self.columns = rows, columns
            self.ask, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.down = self.create_parameter([2 * rows - 1, each], default_initializer=zero)
            self.along = self.create_parameter([2 * columns - 1, each], default_initializer=zero)

        def apart(self, count: int, table: Any) -> Any:
            """What a table says of each two of so many rows or columns, [count, count, each]."""
            steps: Any = paddle.arange(count)
            return table[steps.unsqueeze(1) - steps.unsqueeze(0) + (count - 1)]

        def forward(self, x: Any) -> Any:
            rows, columns = self.rows, self.columns
            places = rows * columns
            parts = self.ask(x).reshape([-1, places, 3, _HEADS, each]).transpose([2, 0, 3, 1, 4])
            queries, keys, values = parts.reshape([3, -1, places, each]).unbind(0)
            match = (queries * each**-0.5 @ keys.transpose([0, 2, 1])).reshape([-1, rows, columns, rows, columns])
            asked = queries.reshape([-1, rows, columns, each])
            down: Any = paddle.einsum("nyxc,yjc->nyxj", asked, self.apart(rows, self.down))
            along: Any = paddle.einsum("nyxc,xic->nyxi", asked, self.apart(columns, self.along))
            match = match + down.unsqueeze(-1) + along.unsqueeze(-2)
            seen = functional.softmax(match.reshape([-1, places, places])) @ values
            seen = seen.reshape([-1, _HEADS, rows, columns, each]).transpose([0, 2, 3, 1, 4])
            return self.out(seen.reshape([-1, rows, columns, WIDTH]))

    class Windows(nn.Layer):
        """Attention inside of windows, of which the last are filled up with nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention(WINDOW, WINDOW)

        def forward(self, x: Any) -> Any:
            down, along = -(-_ROWS // WINDOW), -(-_COLUMNS // WINDOW)
            x = functional.pad(x, [0, 0, 0, down * WINDOW - _ROWS, 0, along * WINDOW - _COLUMNS, 0, 0])
            x = x.reshape([-1, down, WINDOW, along, WINDOW, WIDTH]).transpose([0, 1, 3, 2, 4, 5])
            x = self.attention(x.reshape([-1, WINDOW, WINDOW, WIDTH]))
            x = x.reshape([-1, down, along, WINDOW, WINDOW, WIDTH]).transpose([0, 1, 3, 2, 4, 5])
            return x.reshape([-1, down * WINDOW, along * WINDOW, WIDTH])[:, :_ROWS, :_COLUMNS]

    class Layer(nn.Layer):
        def __init__(self, attention: Any) -> None:
            super().__init__()
            self.attention = attention
            self.norms = nn.LayerList([nn.LayerNorm(WIDTH, epsilon=1e-6) for _ in range(2)])
            self.rise, self.fall = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

        def forward(self, x: Any) -> Any:
            x = x + self.attention(self.norms[0](x))
            return x + self.fall(functional.gelu(self.rise(self.norms[1](x))))

    class ChannelNorm(nn.Layer):
        """LayerNorm over channels of maps [N, channels, rows, columns], written out as the official graph has it."""

        def __init__(self, channels: int) -> None:
            super().__init__()
            one = paddle.nn.initializer.Constant(1.0)
            self.scale = self.create_parameter([channels, 1, 1], default_initializer=one)
            self.shift = self.create_parameter([channels, 1, 1], default_initializer=zero)

        def forward(self, x: Any) -> Any:
            centred = x - x.mean(1, keepdim=True)
            spread = paddle.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
            return self.scale * (centred / spread) + self.shift

    class Encoder(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.grain = nn.Conv2D(3, 16, _GRAIN, _GRAIN)
            self.patches = nn.Sequential(
                nn.GELU(),
                nn.Conv2D(16, 32, 3, 2, 1),
                nn.GELU(),
                nn.Conv2D(32, WIDTH, (8, 2), (8, 2)),
            )
            self.places = self.create_parameter([1, _ROWS, _COLUMNS, WIDTH], default_initializer=zero)
            attentions = [Attention(_ROWS, _COLUMNS) if number % 2 else Windows() for number in range(_DEEP)]
            self.layers = nn.LayerList([Layer(attention) for attention in attentions])
            self.neck = nn.Sequential(
                nn.Conv2D(WIDTH, WIDTH, 1, bias_attr=False),
                ChannelNorm(WIDTH),
                nn.Conv2D(WIDTH, WIDTH, 3, padding=1, bias_attr=False),
                ChannelNorm(WIDTH),
                nn.Conv2D(WIDTH, WIDTH, 3, (2, 1), 1, bias_attr=False),
            )

        def coarse(self, x: Any) -> Any:
            """The first convolution, of three equal channels; in training of one, by the sum of its weights: faster."""
            if self.training:
                return functional.conv2d(x, self.grain.weight.sum(1, keepdim=True), self.grain.bias, stride=_GRAIN)
            return self.grain(paddle.repeat_interleave(x, 3, 1))

        def forward(self, x: Any) -> tuple[Any, Any]:
            """What stands in each column, for training alone; and all places, row by row."""
            x = self.patches(self.coarse(x)).transpose([0, 2, 3, 1]) + self.places
            for layer in self.layers:
                x = layer(x)
            maps = self.neck(x.transpose([0, 3, 1, 2]))
            return maps.max(2).transpose([0, 2, 1]), maps.flatten(2).transpose([0, 2, 1])

    return Encoder()


SCHOOLING = Schooling(MODEL, _encoder, side=SIDE, row_stride=None, steps=700, batch=8, rate=1.5e-3)


if __name__ == "__main__":
    train_as_asked(lambda folder, seed, minutes: teach(SCHOOLING, folder, seed, minutes))
