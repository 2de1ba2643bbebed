"""Layers of PPHGNet, of which the server models for detection and recognition are made, in small."""

from __future__ import annotations

from typing import Any

from paddle import concat, nn

Stride = int | tuple[int, int]


def normed(inputs: int, outputs: int, size: int | tuple[int, int], stride: Stride = 1, act: Any = nn.ReLU) -> Any:
    """Convolution without bias, batch norm, activation; the size of the picture follows from the stride alone."""
    tall, wide = (size, size) if isinstance(size, int) else size
    conv = nn.Conv2D(inputs, outputs, (tall, wide), stride, (tall // 2, wide // 2), bias_attr=False)
    return nn.Sequential(conv, nn.BatchNorm2D(outputs), act())


def halved(channels: int, stride: Stride) -> Any:
    """Depthwise convolution that takes fewer places; no activation."""
    conv = nn.Conv2D(channels, channels, 3, stride, 1, groups=channels, bias_attr=False)
    return nn.Sequential(conv, nn.BatchNorm2D(channels))


class Gate(nn.Layer):
    """Channels weighed by their means (effective squeeze and excitation)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2D(1)
        self.weigh = nn.Conv2D(channels, channels, 1)

    def forward(self, x: Any) -> Any:
        return x * nn.functional.sigmoid(self.weigh(self.pool(x)))


class Block(nn.Layer):
    """Convolutions one behind the other, all of their outputs joined.

    Args:
        shortcut: the input is added; `inputs` and `outputs` must be equal.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, depth: int = 2, shortcut: bool = False) -> None:
        super().__init__()
        self.layers = nn.LayerList([normed(inner if place else inputs, inner, 3) for place in range(depth)])
        self.join = normed(inputs + depth * inner, outputs, 1)
        self.gate = Gate(outputs)
        self.shortcut = shortcut

    def forward(self, x: Any) -> Any:
        found = [x]
        for layer in self.layers:
            found.append(layer(found[-1]))
        y = self.gate(self.join(concat(found, 1)))
        return x + y if self.shortcut else y
