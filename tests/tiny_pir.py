"""A tiny PIR model, written by Paddle itself, and official PIR graphs filled with made-up weights."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quant.pir import parameter_shapes
from quant.runtime import Feed
from quant.source import ModelFiles, file_sha256

Array = np.ndarray[Any, Any]
SHAPE = (1, 3, 8, 16)
_FP32 = 5  # VarType.Type of Paddle's framework.proto

_WRITER = """
import sys
import paddle
from paddle import nn

class Tiny(nn.Layer):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2D(3, 4, 3, padding=1, bias_attr=False)
        self.norm = nn.BatchNorm2D(4)
        self.deep = nn.Conv2D(4, 4, 3, padding="SAME", groups=4)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        y = nn.functional.hardswish(self.norm(self.stem(x)))
        y = nn.functional.relu(self.deep(y)).mean([2, 3])
        return nn.functional.softmax(self.last(y))

paddle.seed(0)
net = Tiny()
net.eval()
paddle.jit.save(net, sys.argv[1], input_spec=[paddle.static.InputSpec([None, 3, 8, 16], "float32", "x")])
"""

_LOOP_WRITER = """
import sys
import paddle
from paddle import nn

class Tiny(nn.Layer):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2D(3, 8, 3, 2, padding=1)
        self.words, self.places = nn.Embedding(6, 8), nn.Embedding(12, 8)
        self.cell = nn.GRUCell(16, 8)
        self.last = nn.Linear(8, 6)

    def forward(self, x):
        seen = nn.functional.adaptive_max_pool2d(8 * (self.stem(x) - 1.5), 1).flatten(1)
        count = paddle.shape(x)[0]
        nothing = paddle.zeros([1], "int64")[0]
        state = paddle.zeros([count, 8])
        token = paddle.zeros([count], "int64")
        written = paddle.full([count, nothing + 1], 0, "int64")
        kept = paddle.zeros([count, nothing, 8])
        place = paddle.zeros([], "int64")
        goes_on = paddle.ones([], "bool")
        while place < 12 and goes_on:
            kept = paddle.concat([kept, state.unsqueeze(1)], 1)
            state, _ = self.cell(paddle.concat([4 * (self.words(token) + self.places(place)), seen], 1), kept.max(1))
            token = (5 * self.last(state)).argmax(-1)
            written = paddle.concat([written, token.unsqueeze(1)], 1)
            goes_on = paddle.logical_not((token == 5).all())
            place = place + 1
        return written

paddle.seed(3)
net = Tiny()
net.eval()
paddle.jit.save(net, sys.argv[1], input_spec=[paddle.static.InputSpec([None, 3, 8, 16], "float32", "x")])
"""


def write_tiny_pir(folder: Path) -> ModelFiles:
    """Convolution, batch norm, HardSwish, depthwise convolution, mean, linear, softmax; two classes."""
    return _written(folder, _WRITER)


def write_tiny_loop(folder: Path) -> ModelFiles:
    """Convolution, mean, and a loop that writes token ids, int64 [N, steps], until it chooses token 5."""
    return _written(folder, _LOOP_WRITER)


def _written(folder: Path, code: str) -> ModelFiles:
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"FLAGS_enable_pir_api": "1"}  # in a process of its own: the flag counts once
    script = folder / "writer.py"  # Paddle reads the source of what it traces
    script.write_text(code, encoding="utf-8")
    command = [sys.executable, str(script), str(folder / "inference")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return pir_files(folder)


def pir_files(folder: Path) -> ModelFiles:
    model, params = folder / "inference.json", folder / "inference.pdiparams"
    digests = {path.name: file_sha256(path) for path in (model, params)}
    return ModelFiles(folder, "pir", model, params, {}, "test", digests)


def tiny_feeds(count: int = 2, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[Feed]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.uniform(-2, 2, shape).astype(np.float32)} for _ in range(count)]


def fill_graph(graph: Path, folder: Path, seed: int = 0) -> ModelFiles:
    """An official `inference.json` with weights of the right shapes that keep its values in a sane range."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(graph, folder / "inference.json")
    shapes = parameter_shapes(json.loads(graph.read_text(encoding="utf-8")))
    rng = np.random.default_rng(seed)
    biased = {_layer(name) for name in shapes if ".b_0" in name and "norm" not in name}
    weights = {name: _made_up(rng, name, shape, _layer(name) in biased) for name, shape in shapes.items()}
    write_weights(folder / "inference.pdiparams", weights)
    return pir_files(folder)


def _layer(name: str) -> str:
    return name.partition(".")[0]


def _made_up(rng: np.random.Generator, name: str, shape: tuple[int, ...], biased: bool) -> Array:
    """Kernels that keep the variance; of batch norm a scale and variance near 1, a mean and shift near 0.

    A layer with a bias of its own has mostly no activation behind it, which would take half of the variance. Sums of
    such convolutions would grow from sum to sum, so that they give half of what they read.
    """
    if len(shape) > 1:
        inputs = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
        gain = 2.0 if not biased else 1.0 if len(shape) == 2 else 0.5
        return rng.standard_normal(shape) * np.sqrt(gain / inputs)
    near_one = "norm" in name and (".w_0" in name or ".w_2" in name)
    return rng.uniform(0.8, 1.2, shape) if near_one else rng.normal(0, 0.1, shape)


def write_weights(file: Path, tensors: Mapping[str, Array]) -> None:
    """Write float32 tensors as Paddle's `save_combine` does: one after another, in the sorted order of their names."""
    with file.open("wb") as stream:
        for name in sorted(tensors):
            value = np.ascontiguousarray(tensors[name], dtype="<f4")
            description = bytes([0x08, _FP32]) + b"".join(b"\x10" + _varint(size) for size in value.shape)
            stream.write(struct.pack("<IQ", 0, 0))  # version of the tensor, no levels of detail
            stream.write(struct.pack("<Ii", 0, len(description)))  # version of the description, its length
            stream.write(description + value.tobytes())


def _varint(number: int) -> bytes:
    groups = []
    while number >= 0x80:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])
