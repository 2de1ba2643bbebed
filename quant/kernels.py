"""ONNX operators as differentiable Paddle calls: what a student computes with (see `quant.student`).

Sizes and indices stay arrays of the host: where all that a node reads are such arrays, ONNX's own reference computes
it. Weights, biases and activations are Paddle tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, helper
from onnx.reference import ReferenceEvaluator

from quant.errors import NotTrainable
from quant.graph import attribute, bodies

Array = np.ndarray[Any, Any]
Value = Any
"""An `Array` of the host or a Paddle tensor."""

Kernel = Callable[[NodeProto, Sequence[Value]], Value]


def compute(node: NodeProto, inputs: Sequence[Value]) -> list[Value]:
    """What one node writes.

    Args:
        inputs: in the node's order; None for one that is left out.

    Raises:
        NotTrainable: the operator, or a mode of it, has no differentiable counterpart here.
    """
    if node.op_type == "Shape":
        return [np.asarray(inputs[0].shape, dtype=np.int64)]
    if not any(True for _ in bodies([node])) and all(
        value is None or isinstance(value, np.ndarray) for value in inputs
    ):
        feed = {name: value for name, value in zip(node.input, inputs, strict=True) if name}
        return list(ReferenceEvaluator(node).run(None, feed))
    if node.op_type not in KERNELS:
        raise NotTrainable(
            f"operator '{node.output[0]}' is a {node.op_type}, which cannot be trained here; known: "
            f"{', '.join(sorted(KERNELS))}. Take --method ptq"
        )
    found = KERNELS[node.op_type](node, inputs)
    return list(found) if isinstance(found, list | tuple) else [found]


def tensor(value: Value) -> Any:
    """A Paddle tensor of a float array; what is a tensor already stays as it is."""
    import paddle

    return paddle.to_tensor(value) if isinstance(value, np.ndarray) else value


def straight_round(values: Any) -> Any:
    """Rounded values whose gradient is that of the values themselves."""
    import paddle

    return values + (paddle.round(values) - values).detach()


def _conv(node: NodeProto, inputs: Sequence[Value]) -> Value:
    from paddle.nn import functional

    bias = inputs[2] if len(inputs) > 2 else None
    strides, dilations = attribute(node, "strides", [1, 1]), attribute(node, "dilations", [1, 1])
    settings = (list(strides), _padding(node), list(dilations), attribute(node, "group", 1))
    return functional.conv2d(tensor(inputs[0]), tensor(inputs[1]), tensor(bias), *settings)


def _conv_transpose(node: NodeProto, inputs: Sequence[Value]) -> Value:
    from paddle.nn import functional

    return functional.conv2d_transpose(
        tensor(inputs[0]),
        tensor(inputs[1]),
        tensor(inputs[2]) if len(inputs) > 2 else None,
        stride=list(attribute(node, "strides", [1, 1])),
        padding=_padding(node),
        output_padding=list(attribute(node, "output_padding", [0, 0])),
        groups=attribute(node, "group", 1),
        dilation=list(attribute(node, "dilations", [1, 1])),
    )


def _padding(node: NodeProto) -> list[int]:
    """Paddle's order: top, bottom, left, right."""
    _refuse(node, attribute(node, "auto_pad", "NOTSET") != "NOTSET", "auto_pad")
    top, left, bottom, right = attribute(node, "pads", [0, 0, 0, 0])
    return [top, bottom, left, right]


def _average_pool(node: NodeProto, inputs: Sequence[Value]) -> Value:
    from paddle.nn import functional

    sizes, strides = list(attribute(node, "kernel_shape")), list(attribute(node, "strides", [1, 1]))
    rounded_up, counted = bool(attribute(node, "ceil_mode", 0)), bool(attribute(node, "count_include_pad", 0))
    return functional.avg_pool2d(inputs[0], sizes, strides, _padding(node), rounded_up, not counted)


def _max_pool(node: NodeProto, inputs: Sequence[Value]) -> Value:
    from paddle.nn import functional

    _refuse(node, any(size != 1 for size in attribute(node, "dilations", [])), "dilations")
    sizes, strides = list(attribute(node, "kernel_shape")), list(attribute(node, "strides", [1, 1]))
    return functional.max_pool2d(
        inputs[0], sizes, strides, _padding(node), ceil_mode=bool(attribute(node, "ceil_mode", 0))
    )


_REPEATING = [("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "round_prefer_ceil")]
"""Places and rounding with which `nearest` repeats each pixel, whatever the whole factor."""


def _resize(node: NodeProto, inputs: Sequence[Value]) -> Value:
    """Pixels repeated; other ways to enlarge are not in use behind quantized operators."""
    mode = attribute(node, "mode", "nearest")
    _refuse(node, mode != "nearest", f"mode {mode}")
    places = attribute(node, "coordinate_transformation_mode", "half_pixel")
    rounding = attribute(node, "nearest_mode", "round_prefer_floor")
    _refuse(node, (places, rounding) not in _REPEATING, f"{places} and {rounding}")
    sizes = list(inputs[3]) if len(inputs) > 3 else [s * f for s, f in zip(inputs[0].shape, inputs[2], strict=True)]
    factors = [size / old for size, old in zip(sizes, inputs[0].shape, strict=True)]
    whole = all(factor % 1 == 0 for factor in factors) or (places, rounding) == _REPEATING[0]
    _refuse(node, not whole or min(factors) < 1, f"factors {factors}")
    result = inputs[0]
    for axis, (factor, size) in enumerate(zip(factors, sizes, strict=True)):
        if factor % 1:
            result = result.index_select(tensor(np.arange(size) * result.shape[axis] // int(size)), axis)
        elif factor > 1:
            result = result.repeat_interleave(int(factor), axis)
    return result


def _depth_to_space(node: NodeProto, inputs: Sequence[Value]) -> Value:
    from paddle.nn import functional

    _refuse(node, attribute(node, "mode", "DCR") != "CRD", "mode DCR")
    return functional.pixel_shuffle(inputs[0], attribute(node, "blocksize"))


def _slice(node: NodeProto, inputs: Sequence[Value]) -> Value:
    starts, ends = (list(map(int, part)) for part in inputs[1:3])
    axes = list(map(int, inputs[3])) if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
    steps = list(map(int, inputs[4])) if len(inputs) > 4 else [1] * len(starts)
    _refuse(node, min(steps) < 1, "a negative step")
    places = [slice(None)] * inputs[0].ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = inputs[0].shape[axis]
        places[axis] = slice(*slice(start, end, step).indices(size))
    return inputs[0][tuple(places)]


def _reshape(node: NodeProto, inputs: Sequence[Value]) -> Value:
    sizes = [inputs[0].shape[axis] if size == 0 else int(size) for axis, size in enumerate(inputs[1])]
    return inputs[0].reshape(sizes)


def _flatten(node: NodeProto, inputs: Sequence[Value]) -> Value:
    return inputs[0].reshape([int(np.prod(inputs[0].shape[: attribute(node, "axis", 1)])), -1])


def _axes(node: NodeProto, inputs: Sequence[Value]) -> list[int]:
    """Axes as an attribute, or as a second input in newer operator sets."""
    if len(inputs) > 1 and inputs[1] is not None:
        return list(map(int, inputs[1]))
    return list(attribute(node, "axes", []))


def _reduce_mean(node: NodeProto, inputs: Sequence[Value]) -> Value:
    return inputs[0].mean(_axes(node, inputs) or None, keepdim=bool(attribute(node, "keepdims", 1)))


def _squeeze(node: NodeProto, inputs: Sequence[Value]) -> Value:
    return inputs[0].squeeze(_axes(node, inputs) or None)


def _split(node: NodeProto, inputs: Sequence[Value]) -> Value:
    import paddle

    axis = attribute(node, "axis", 0)
    sizes = inputs[1] if len(inputs) > 1 else attribute(node, "split", [])
    return list(paddle.split(inputs[0], list(map(int, sizes)) or len(node.output), axis))


def _layer_normalization(node: NodeProto, inputs: Sequence[Value]) -> Value:
    from paddle.nn import functional

    _refuse(node, attribute(node, "axis", -1) not in (-1, inputs[0].ndim - 1), "an inner axis")
    bias = tensor(inputs[2]) if len(inputs) > 2 else None
    return functional.layer_norm(
        tensor(inputs[0]), inputs[0].shape[-1:], tensor(inputs[1]), bias, attribute(node, "epsilon", 1e-5)
    )


def _softmax(node: NodeProto, inputs: Sequence[Value]) -> Value:
    from paddle.nn import functional

    return functional.softmax(inputs[0], attribute(node, "axis", -1))


def _hard_sigmoid(node: NodeProto, inputs: Sequence[Value]) -> Value:
    return (inputs[0] * attribute(node, "alpha", 0.2) + attribute(node, "beta", 0.5)).clip(0.0, 1.0)


def _hard_swish(node: NodeProto, inputs: Sequence[Value]) -> Value:
    from paddle.nn import functional

    return functional.hardswish(inputs[0])


def _clip(node: NodeProto, inputs: Sequence[Value]) -> Value:
    low, high = (float(v) if v is not None else None for v in [*inputs[1:3], None, None][:2])
    return inputs[0].clip(low, high)


def _concat(node: NodeProto, inputs: Sequence[Value]) -> Value:
    import paddle

    return paddle.concat(list(map(tensor, inputs)), attribute(node, "axis"))


def _cast(node: NodeProto, inputs: Sequence[Value]) -> Value:
    return inputs[0].astype(helper.tensor_dtype_to_np_dtype(attribute(node, "to")).name)


def _maximum(node: NodeProto, inputs: Sequence[Value]) -> Value:
    import paddle

    largest: Any = paddle.maximum
    return largest(*map(tensor, inputs))


def _where(node: NodeProto, inputs: Sequence[Value]) -> Value:
    import paddle

    return paddle.where(*map(tensor, inputs))


def _pairwise(name: str) -> Kernel:
    def apply(node: NodeProto, inputs: Sequence[Value]) -> Value:
        one, other = map(tensor, inputs)
        return getattr(one, name)(other)

    return apply


def _alone(name: str) -> Kernel:
    def apply(node: NodeProto, inputs: Sequence[Value]) -> Value:
        from paddle.nn import functional

        return getattr(functional, name)(inputs[0])

    return apply


def _refuse(node: NodeProto, refused: bool, what: str) -> None:
    if refused:
        raise NotTrainable(
            f"operator '{node.output[0]}': {node.op_type} with {what} cannot be trained; take --method ptq"
        )


KERNELS: dict[str, Kernel] = {
    "Add": _pairwise("__add__"),
    "AveragePool": _average_pool,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "Div": _pairwise("__truediv__"),
    "Erf": lambda node, inputs: inputs[0].erf(),
    "Flatten": _flatten,
    "GlobalAveragePool": lambda node, inputs: inputs[0].mean([2, 3], keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Identity": lambda node, inputs: inputs[0],
    "LayerNormalization": _layer_normalization,
    "MatMul": _pairwise("matmul"),
    "Max": _maximum,
    "MaxPool": _max_pool,
    "Mul": _pairwise("__mul__"),
    "ReduceMean": _reduce_mean,
    "Relu": _alone("relu"),
    "Reshape": _reshape,
    "Resize": _resize,
    "Round": lambda node, inputs: straight_round(inputs[0]),
    "Sigmoid": _alone("sigmoid"),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": lambda node, inputs: inputs[0].sqrt(),
    "Squeeze": _squeeze,
    "Sub": _pairwise("__sub__"),
    "Tanh": _alone("tanh"),
    "Transpose": lambda node, inputs: inputs[0].transpose(list(attribute(node, "perm"))),
    "Unsqueeze": lambda node, inputs: inputs[0].unsqueeze(_axes(node, inputs)),
    "Where": _where,
}
