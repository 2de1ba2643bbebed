"""Twin of PP-FormulaNet-L: a small vision transformer before the decoder of both twins (`decoder`).

As in the official graph (Vary's ViT-B), patches become tokens, every other layer attends inside of windows alone, and
what a place matches in another depends on how far away it is, down and along apart (Li et al. 2022). A neck of
convolutions joins places. A few convolutions stand in front and the patches are sixteen times as large, so that global
attention is over 144 places in place of 2304: on two cores those would take hours to train.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.twins.decoder import WIDTH, Schooling, described, teach, write_world
from quant.twins.training import train_as_asked, train_in_child

__all__ = ["MODEL", "SCHOOLING", "inference_yml", "train", "write_world"]

MODEL = "PP-FormulaNet-L"
SIDE = 768
_GRAIN = 8  # pixels a side, of the first convolution


@dataclass(frozen=True)
class Sizes:
    """Of the encoder; those of the twin where nothing else is said.

    Attributes:
        patch: rows and columns of pixels of one place, multiples of 16.
        window: places a side that attend to one another in most layers.
        width, heads, layers, rise: of the transformer; the inner of its linear layers is `rise` times as wide.
        every: of so many layers the last attends to all places.
        out: width of what the decoder sees.
    """

    patch: tuple[int, int] = (128, 32)
    window: int = 7
    width: int = WIDTH
    heads: int = 2
    layers: int = 2
    rise: int = 2
    every: int = 2
    out: int = WIDTH


def train(folder: Path, seed: int, minutes: float) -> None:
    """Write the twin into a folder; takes about `minutes`, in a process of its own."""
    train_in_child(__name__, folder, seed, minutes)


def inference_yml() -> dict[str, Any]:
    """What stands beside the twin's weights."""
    return described(MODEL)


def encoder(sizes: Sizes = Sizes()) -> Any:
    """The layer that `decoder.Schooling` asks for."""
    import paddle
    from paddle import nn
    from paddle.nn import functional

    zero = paddle.nn.initializer.Constant(0.0)
    width, heads, window = sizes.width, sizes.heads, sizes.window
    all_rows, all_columns = SIDE // sizes.patch[0], SIDE // sizes.patch[1]
    each = width // heads

    class Attention(nn.Layer):
        """Among all places of maps [N, rows, columns, width] of one size."""

        def __init__(self, rows: int, columns: int) -> None:
            super().__init__()
            self.rows, self.columns = rows, columns
            self.ask, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.down = self.create_parameter([2 * rows - 1, each], default_initializer=zero)
            self.along = self.create_parameter([2 * columns - 1, each], default_initializer=zero)

        def apart(self, count: int, table: Any) -> Any:
            """What a table says of each two of so many rows or columns, [count, count, each]."""
            steps: Any = paddle.arange(count)
            return table[steps.unsqueeze(1) - steps.unsqueeze(0) + (count - 1)]

        def forward(self, x: Any) -> Any:
            rows, columns = self.rows, self.columns
            places = rows * columns
            parts = self.ask(x).reshape([-1, places, 3, heads, each]).transpose([2, 0, 3, 1, 4])
            queries, keys, values = parts.reshape([3, -1, places, each]).unbind(0)
            match = (queries * each**-0.5 @ keys.transpose([0, 2, 1])).reshape([-1, rows, columns, rows, columns])
            asked = queries.reshape([-1, rows, columns, each])
            down: Any = paddle.einsum("nyxc,yjc->nyxj", asked, self.apart(rows, self.down))
            along: Any = paddle.einsum("nyxc,xic->nyxi", asked, self.apart(columns, self.along))
            match = match + down.unsqueeze(-1) + along.unsqueeze(-2)
            seen = functional.softmax(match.reshape([-1, places, places])) @ values
            seen = seen.reshape([-1, heads, rows, columns, each]).transpose([0, 2, 3, 1, 4])
            return self.out(seen.reshape([-1, rows, columns, width]))

    class Windows(nn.Layer):
        """Attention inside of windows, of which the last are filled up with nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention(window, window)

        def forward(self, x: Any) -> Any:
            down, along = -(-all_rows // window), -(-all_columns // window)
            x = functional.pad(x, [0, 0, 0, down * window - all_rows, 0, along * window - all_columns, 0, 0])
            x = x.reshape([-1, down, window, along, window, width]).transpose([0, 1, 3, 2, 4, 5])
            x = self.attention(x.reshape([-1, window, window, width]))
            x = x.reshape([-1, down, along, window, window, width]).transpose([0, 1, 3, 2, 4, 5])
            return x.reshape([-1, down * window, along * window, width])[:, :all_rows, :all_columns]

    class Layer(nn.Layer):
        def __init__(self, attention: Any) -> None:
            super().__init__()
            self.attention = attention
            self.norms = nn.LayerList([nn.LayerNorm(width, epsilon=1e-6) for _ in range(2)])
            self.rise, self.fall = nn.Linear(width, sizes.rise * width), nn.Linear(sizes.rise * width, width)

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
            last = (sizes.patch[0] // (2 * _GRAIN), sizes.patch[1] // (2 * _GRAIN))
            self.grain = nn.Conv2D(3, 16, _GRAIN, _GRAIN)
            self.patches = nn.Sequential(
                nn.GELU(),
                nn.Conv2D(16, 32, 3, 2, 1),
                nn.GELU(),
                nn.Conv2D(32, width, last, last),
            )
            self.places = self.create_parameter([1, all_rows, all_columns, width], default_initializer=zero)
            whole = [number % sizes.every == sizes.every - 1 for number in range(sizes.layers)]
            attentions = [Attention(all_rows, all_columns) if one else Windows() for one in whole]
            self.layers = nn.LayerList([Layer(attention) for attention in attentions])
            out = sizes.out
            self.neck = nn.Sequential(
                nn.Conv2D(width, out, 1, bias_attr=False),
                ChannelNorm(out),
                nn.Conv2D(out, out, 3, padding=1, bias_attr=False),
                ChannelNorm(out),
                nn.Conv2D(out, out, 3, (2, 1), 1, bias_attr=False),
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


SCHOOLING = Schooling(MODEL, encoder, side=SIDE, row_stride=None, steps=700, batch=8, rate=1.5e-3)


if __name__ == "__main__":
    train_as_asked(lambda folder, seed, minutes: teach(SCHOOLING, folder, seed, minutes))
