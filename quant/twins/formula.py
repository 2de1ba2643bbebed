"""Twin of PP-FormulaNet-S: a small convolutional encoder before the decoder of both twins (`decoder`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quant.twins.decoder import WIDTH, Schooling, described, teach, write_world
from quant.twins.training import train_as_asked, train_in_child

__all__ = ["MODEL", "SCHOOLING", "inference_yml", "train", "write_world"]

MODEL = "PP-FormulaNet-S"
_COLUMNS = 48


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

    def conv(inputs: int, outputs: int, size: int, stride: Any = 1, groups: int = 1) -> Any:
        return nn.Sequential(
            nn.Conv2D(inputs, outputs, size, stride, size // 2, groups=groups, bias_attr=False),
            nn.BatchNorm2D(outputs),
            nn.ReLU(),
        )

    class Encoder(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                conv(1, 12, 5, 4),
                conv(12, 32, 3, 2),
                conv(32, 32, 3, 1, 32),
                conv(32, 48, 3, (2, 1)),
                conv(48, 64, 3, (2, 1)),
                conv(64, WIDTH, 3, 1),
            )
            self.columns = nn.Embedding(_COLUMNS, WIDTH)
            self.near = nn.Conv1D(WIDTH, WIDTH, 5, padding=2)

        def forward(self, x: Any) -> tuple[Any, Any]:
            """What stands in each column, without and with its place."""
            features = functional.relu(self.near(self.layers(x).max(2))).transpose([0, 2, 1])
            return features, features + self.columns(paddle.arange(_COLUMNS, dtype="int64"))

    return Encoder()


SCHOOLING = Schooling(MODEL, _encoder, side=384, row_stride=32, steps=700, batch=16, rate=3e-3)


if __name__ == "__main__":
    train_as_asked(lambda folder, seed, minutes: teach(SCHOOLING, folder, seed, minutes))
