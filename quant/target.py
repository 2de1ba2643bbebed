"""Targets as data: what each runtime rewards in a quantized model, and what it cannot do.

Measured on the versions in `constraints.txt`; `docs/targets.md` shows the measurements. Recipes choose within these
limits, and get the first of what they leave open; exporters, the checks of artifacts and judging go by the flags.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TargetName = Literal["onnxruntime", "openvino", "paddle", "tensorrt"]
ArtifactFormat = Literal["onnx", "paddle"]
ActivationType = Literal["uint8", "int8"]
Placement = Literal["inputs", "outputs"]
EqualizationScope = Literal["none", "depthwise", "all"]


@dataclass(frozen=True)
class Target:
    """One runtime.

    Attributes:
        format: of the artifact.
        activations: types that its kernels compute rightly, the best first; uint8 is asymmetric, int8 symmetric.
        placements: where Q/DQ may stand, the best first. inputs: on what a convolution reads; outputs: on what it
            writes as well, because the integer kernel is only taken when values stay integers behind it.
        equalizations: scopes of channel equalization that it computes rightly.
        fuses, cannot: a note on what it merges into one kernel, and on what it does not do: why the choices above are
            what they are. No code reads them.
        signed_behind_concat: false where S8 behind a Concat is computed wrongly (`docs/openvino-s8.md`).
        shared_without_bias: false where a convolution without bias is computed wrongly if its output is read twice
            (`docs/openvino-bias.md`).
        side_by_side: sessions of one thread each, run at the same time, are the fastest way to judge many pictures.
        executed: false where no runtime is at hand: the artifact's structure is checked instead.
    """

    format: ArtifactFormat
    activations: tuple[ActivationType, ...]
    placements: tuple[Placement, ...]
    equalizations: tuple[EqualizationScope, ...]
    fuses: tuple[str, ...]
    cannot: tuple[str, ...]
    signed_behind_concat: bool = True
    shared_without_bias: bool = True
    side_by_side: bool = False
    executed: bool = True


TARGETS: dict[TargetName, Target] = {
    "onnxruntime": Target(
        format="onnx",
        activations=("uint8", "int8"),
        placements=("outputs", "inputs"),
        equalizations=("none", "depthwise", "all"),
        fuses=("DQ + Conv + Q", "DQ + Mul + Q", "DQ + Add + Q", "DQ + MatMul", "Relu into Q"),
        cannot=(
            "a convolution without a quantized output runs in floats, slower than in FP32",
            "ConvTranspose and HardSwish have no integer kernel",
        ),
        side_by_side=True,
    ),
    "openvino": Target(
        format="onnx",
        activations=("uint8", "int8"),
        placements=("inputs",),
        # A Mul between a dense convolution and its quantizer is moved into the wrong place.
        equalizations=("none", "depthwise"),
        fuses=("Conv + HardSwish + Add + Mul + Q", "Conv + residual Add", "SE product into Q"),
        cannot=(
            "depthwise convolutions gain nothing from INT8",
            "a ConvTranspose whose input has a zero point runs in floats",
        ),
        signed_behind_concat=False,
        shared_without_bias=False,
    ),
    "paddle": Target(
        format="paddle",
        activations=("int8",),
        placements=("inputs",),
        equalizations=("none", "depthwise", "all"),
        fuses=("Conv + activation in FP32",),
        cannot=("INT8 programs of Paddle 3.2 run slower than FP32 on a CPU", "asymmetric activations"),
    ),
    "tensorrt": Target(
        format="onnx",
        activations=("int8",),
        placements=("inputs",),
        equalizations=("none", "depthwise", "all"),
        fuses=("Conv + BatchNorm + activation", "Conv + residual Add", "pointwise chains"),
        cannot=("asymmetric activations, zero points, INT32 biases behind DQ",),
        executed=False,
    ),
}
