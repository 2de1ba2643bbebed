"""Layers of PP-LCNet, of which the small models for orientation, layout and tables are made."""

from __future__ import annotations

from typing import Any

from paddle import nn
from paddle.nn import functional


def conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> Any:
    """Convolution without bias, batch norm, hard-swish; the size of the picture follows from the stride alone."""
    plain = nn.Conv2D(inputs, outputs, size, stride, size // 2, groups=groups, bias_attr=False)
    return nn.Sequential(plain, nn.BatchNorm2D(outputs), nn.Hardswish())


class Gate(nn.Layer):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2D(1)
        self.down, self.up = nn.Conv2D(channels, channels // 4, 1), nn.Conv2D(channels // 4, channels, 1)

    def forward(self, x: Any) -> Any:
        return x * functional.hardsigmoid(self.up(functional.relu(self.down(self.pool(x)))))


def separable(inputs: int, outputs: int, size: int = 3, stride: int = 1, gate: bool = False) -> Any:
    """A depthwise convolution, perhaps a gate, and one of single places."""
    gates = [Gate(inputs)] if gate else []
    return nn.Sequential(conv(inputs, inputs, size, stride, inputs), *gates, conv(inputs, outputs, 1))
