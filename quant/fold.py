"""Exact graph simplifications: affine operators go into the weights beside them, slow operators get a faster form.

PP-LCNetV3 carries a learnable `s*x + b` after each convolution and each activation. Left in the
graph they cost time and spoil activation ranges. Every pass keeps the outputs equal up to
float rounding; `quant.prepare` proves it on real inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, helper

from quant.graph import Graph, Shape, attribute

Pass = Callable[[Graph], int]

_LINEAR = ("Conv", "ConvTranspose", "MatMul")

_ACTIVATIONS = ("Relu", "Sigmoid")
"""Those that stand around upsamplings; they act on each value alone."""

_STILL = 1 / 64
"""Reach, relative to the largest, up to which a channel stays as it is. A factor without bound would leave so little of
the weights that read it that the steps of that convolution's integer bias could not hold the bias any more."""

_EVEN = 1.05
"""Ratio of the largest to the smallest reach of channels that counts as even; float rounding leaves less."""


@dataclass(frozen=True)
class Affine:
    """`y = scale * x + shift`, both of shape [1] or [C] along the channel axis of y."""

    scale: np.ndarray
    shift: np.ndarray


def fold(graph: Graph) -> dict[str, int]:
    """Apply all passes until none finds work.

    Returns:
        Number of changes by pass name.
    """
    folds: dict[str, Pass] = {
        "vain_reshape": name_vain_reshapes,
        "identity": remove_identities,
        "batch_norm": split_batch_norms,
        "affine_chain": merge_affine_chains,
        "affine_into_producer": fold_into_producers,
        "scale_into_consumer": fold_into_consumers,
    }
    rewrites: dict[str, Pass] = {
        "transposed_conv": rewrite_transposed_convs,
        "activation_before_upsampling": move_activations_before_upsampling,
        "upsampling_in_steps": join_upsamplings,
        "gate_of_residual": rewrite_gated_residuals,
        "uneven_channels": even_out_channels,
    }
    changes = dict.fromkeys([*folds, *rewrites], 0)
    # A rewrite may part what a fold would have joined, so rewrites wait until no fold finds work.
    while _apply(graph, folds, changes) or _apply(graph, rewrites, changes):
        pass
    graph.prune()
    return changes


def _apply(graph: Graph, passes: dict[str, Pass], changes: dict[str, int]) -> bool:
    """Run each pass once, add to the number of changes, and say whether there were any."""
    found = {name: apply(graph) for name, apply in passes.items()}
    for name, count in found.items():
        changes[name] += count
    return any(found.values())


def name_vain_reshapes(graph: Graph) -> int:
    """Make every Reshape to the shape that its input has an Identity: paddle2onnx writes one behind a `scale`."""
    count, producers = 0, graph.producers()
    for node in graph.nodes:
        wanted = producers.get(node.input[1]) if node.op_type == "Reshape" else None
        if wanted is None or wanted.op_type != "Shape" or wanted.attribute:  # of a part of the shape only
            continue
        if _has_shape_of(graph, node.input[0], wanted.input[0]):
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
            count += 1
    return count


def _has_shape_of(graph: Graph, tensor: str, other: str) -> bool:
    """Whether a tensor is `other`, or made of it by a number alone."""
    node = graph.producers().get(tensor)
    if tensor == other or node is None or node.op_type not in ("Add", "Mul"):
        return tensor == other
    rest = [name for name in node.input if name != other]
    number = graph.constants.get(rest[0]) if len(rest) == 1 else None
    return number is not None and number.size == 1 and number.ndim <= len(graph.shape(other) or ())


def remove_identities(graph: Graph) -> int:
    """Remove Identity and inference-time Dropout nodes."""
    count = 0
    for node in list(graph.nodes):
        if node.op_type not in ("Identity", "Dropout"):
            continue
        readers = graph.consumers()
        if any(mask in graph.outputs or readers[mask] for mask in node.output[1:]):
            continue
        if node.output[0] in graph.outputs:
            count += _write_output(graph, node)
            continue
        if graph.is_constant(node.input[0]):
            graph.constants[node.output[0]] = graph.constants[node.input[0]]
        else:
            graph.replace_uses(node.output[0], node.input[0])
        graph.remove(node)
        count += 1
    return count


def _write_output(graph: Graph, node: NodeProto) -> bool:
    """Let the node before an Identity write the graph's output itself, where that is possible."""
    source, output = node.input[0], node.output[0]
    before = graph.producers().get(source)
    if before is None or source in graph.outputs:
        return False
    graph.remove(node)
    before.output[:] = [output if name == source else name for name in before.output]
    graph.replace_uses(source, output)
    return True


def split_batch_norms(graph: Graph) -> int:
    """Write every BatchNormalization whose input's rank is known as Mul and Add per channel.

    y = g * (x - mean) / sqrt(var + eps) + b (Ioffe and Szegedy, 2015).
    """
    count = 0
    for node in list(graph.nodes):
        if node.op_type != "BatchNormalization" or not all(map(graph.is_constant, node.input[1:])):
            continue
        if len(graph.shape(node.input[0]) or ()) < 2:
            continue
        gamma, beta, mean, var = (graph.constants[n].astype(np.float64) for n in node.input[1:5])
        scale = gamma / np.sqrt(var + attribute(node, "epsilon", 1e-5))
        _replace_by_affine(graph, node, Affine(scale, beta - scale * mean))
        count += 1
    return count


def merge_affine_chains(graph: Graph) -> int:
    """Merge an affine operator into the affine operator that alone feeds it."""
    count = 0
    for node in list(graph.nodes):
        affine = read_affine(graph, node)
        data = _data_input(graph, node) if affine else None
        before = graph.producers().get(data) if data else None
        first = read_affine(graph, before) if before is not None else None
        if before is None or affine is None or first is None or not _only_use(graph, before.output[0]):
            continue
        if (node.op_type, before.op_type) == ("Add", "Mul"):
            continue  # already in the normal form: Mul, then Add
        merged = Affine(first.scale * affine.scale, first.shift * affine.scale + affine.shift)
        data_before = _data_input(graph, before)
        assert data_before is not None
        node_input = list(node.input)
        node_input[node_input.index(data)] = data_before
        node.input[:] = node_input
        graph.remove(before)
        _replace_by_affine(graph, node, merged)
        count += 1
    return count


def fold_into_producers(graph: Graph) -> int:
    """Fold `s*x + b` after Conv, ConvTranspose or MatMul into its weights and bias."""
    count = 0
    for node in list(graph.nodes):
        affine = read_affine(graph, node)
        data = _data_input(graph, node) if affine else None
        producer = graph.producers().get(data) if data else None
        if producer is None or affine is None or not _foldable_producer(graph, producer):
            continue
        if not _only_use(graph, producer.output[0]):
            continue
        if producer.op_type == "MatMul" and (np.any(affine.shift) or affine.scale.size > 1):
            continue  # a MatMul has no bias of its own, and its columns are not the channel axis
        _scale_outputs(graph, producer, affine)
        producer.output[0] = node.output[0]
        graph.remove(node)
        count += 1
    return count


def fold_into_consumers(graph: Graph) -> int:
    """Move a scalar factor, and where borders allow a shift, into the convolutions behind it.

    `conv(s*x + b) = conv'(x + b/s)` with weights scaled by s, exact with zero padding only for
    the factor: a padded border would see 0 instead of b. The rest of the shift stays as Add.
    """
    count = 0
    for node in list(graph.nodes):
        affine = read_affine(graph, node)
        data = _data_input(graph, node) if affine else None
        if affine is None or data is None or node.output[0] in graph.outputs:
            continue
        readers = graph.consumers()[node.output[0]]
        if not readers or not all(_foldable_consumer(graph, r, node.output[0]) for r in readers):
            continue
        if node.op_type == "Add":
            count += _fold_shift(graph, node, data, affine, readers)
        elif node.op_type == "Mul" and affine.scale.size == 1:
            count += _fold_factor(graph, node, data, float(affine.scale[0]), readers)
    for node in list(graph.nodes):
        count += _fold_factor_under_shift(graph, node)
    return count


def rewrite_transposed_convs(graph: Graph) -> int:
    """Write a ConvTranspose to one channel whose windows do not overlap as a 1x1 Conv and DepthToSpace.

    With kernel = stride = k, every input pixel makes a k x k block of its own, by as many products as a
    1x1 Conv with k * k outputs needs (Shi et al., "Real-Time Single Image and Video Super-Resolution Using
    an Efficient Sub-Pixel Convolutional Neural Network", 2016). OpenVINO has a fast kernel for that Conv,
    in integers too, where it runs a ConvTranspose to one channel in floats. With more channels nothing is gained.
    """
    count = 0
    for node in list(graph.nodes):
        if node.op_type != "ConvTranspose" or not _makes_blocks_of_one_channel(graph, node):
            continue
        size, output = graph.constants[node.input[1]].shape[2], node.output[0]
        constants = zip(node.input[1:], _blocks_of(graph, node), strict=True)
        inputs = [node.input[0], *(graph.add_constant(f"{name}_pixels", values) for name, values in constants)]
        blocks = graph.fresh_name(f"{output}_pixels")
        conv = helper.make_node("Conv", inputs, [blocks], name=blocks, kernel_shape=[1, 1])
        graph.insert_before(node, conv)
        upsampling = helper.make_node("DepthToSpace", [blocks], [output], name=output, blocksize=size, mode="CRD")
        graph.insert_before(node, upsampling)
        graph.remove(node)
        count += 1
    return count


def move_activations_before_upsampling(graph: Graph) -> int:
    """Let an activation behind DepthToSpace act before it: there it joins the Conv, and no pass over pixels is left."""
    count = 0
    for node in list(graph.nodes):
        upsampling = graph.producers().get(node.input[0]) if node.op_type in _ACTIVATIONS else None
        if upsampling is None or upsampling.op_type != "DepthToSpace" or not _only_use(graph, node.input[0]):
            continue
        data = upsampling.input[0]
        active = graph.fresh_name(f"{node.output[0]}_pixels")
        graph.insert_before(upsampling, helper.make_node(node.op_type, [data], [active], name=active))
        graph.copy_shape(data, active)
        # Under its old output name would now stand other values: it writes the activation's.
        upsampling.input[0], upsampling.output[0], upsampling.name = active, node.output[0], node.output[0]
        graph.remove(node)
        count += 1
    return count


def join_upsamplings(graph: Graph) -> int:
    """Let all that stands between two upsamplings work on the small map: ConvTranspose, activation, 1x1 Conv, blocks.

    With kernel = stride = k the first makes k x k pixels of each one, and the 1x1 Conv treats them alike. So both are
    1x1 convolutions of the small map, the second with the same weights for each of the k x k pixels and 0 elsewhere,
    and one DepthToSpace writes the blocks of the blocks. OpenVINO and onnxruntime have fast kernels for these, in
    integers too; onnxruntime has none for a ConvTranspose.
    """
    count = 0
    for upsampling in list(graph.nodes):
        path = _upsampling_in_steps(graph, upsampling) if upsampling.op_type == "DepthToSpace" else []
        if not path:
            continue
        first, last = path[0], next(node for node in path if node.op_type == "Conv")
        size, blocks = graph.constants[first.input[1]].shape[2], attribute(upsampling, "blocksize", 0)
        wide = {first.output[0]: _blocks_of(graph, first), last.output[0]: _same_in_blocks(graph, last, size, blocks)}
        data = first.input[0]
        for node in path:
            constants = zip(node.input[1:], wide.get(node.output[0], []), strict=True)
            inputs = [data, *(graph.add_constant(f"{name}_blocks", values) for name, values in constants)]
            kind = "Conv" if node is first else node.op_type
            data = graph.fresh_name(f"{node.output[0]}_blocks")
            graph.insert_before(upsampling, helper.make_node(kind, inputs, [data], name=data))
            graph.remove(node)
        output = upsampling.output[0]
        joined = helper.make_node("DepthToSpace", [data], [output], name=output, blocksize=size * blocks, mode="CRD")
        graph.insert_before(upsampling, joined)
        graph.remove(upsampling)
        count += 1
    return count


def rewrite_gated_residuals(graph: Graph) -> int:
    """Write `x + x * gate` as `x * (gate + 1)`: the addition costs one number per channel, not per pixel."""
    count = 0
    for node in list(graph.nodes):
        found = _gated_residual(graph, node)
        if found is None:
            continue
        data, gate, product = found
        one = graph.add_constant(f"{gate}_one", np.ones(1, dtype=np.float32))
        raised = graph.fresh_name(f"{gate}_raised")
        graph.insert_before(product, helper.make_node("Add", [gate, one], [raised], name=raised))
        graph.copy_shape(gate, raised)
        output = node.output[0]
        graph.insert_before(node, helper.make_node("Mul", [data, raised], [output], name=output))
        graph.remove(product)
        graph.remove(node)
        count += 1
    return count


def even_out_channels(graph: Graph) -> int:
    """Bring the channels between a Conv and the depthwise Conv that alone reads it to one reach.

    Both have a weight scale for each channel, so the factors cost nothing in either, and what is stored between them
    fits one scale (Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019,
    section 4.1). A channel's reach is bounded by `sum|w| + |b|` for inputs of at most 1. In PP-LCNetV3, where this
    pair stands behind the picture, these factors are within 1.4 times of those of the largest values seen.
    """
    count = 0
    for node in list(graph.nodes):
        writer = evened_writer(graph, node)
        if writer is None:
            continue
        weight = np.abs(graph.constants[writer.input[1]].astype(np.float64))
        bias = graph.constants[writer.input[2]] if len(writer.input) > 2 else np.zeros(len(weight))
        reach = weight.reshape(len(weight), -1).sum(axis=1) + np.abs(bias)
        alive = reach > _STILL * reach.max()
        if not alive.any() or reach.max() < _EVEN * reach[alive].min():
            continue
        factor = np.where(alive, reach / np.exp(np.log(reach[alive]).mean()), 1.0)
        _scale_outputs(graph, writer, Affine(1 / factor, np.zeros(1)))
        reading = graph.constants[node.input[1]].astype(np.float64) * factor.reshape(-1, 1, 1, 1)
        _set_weight(graph, node, reading)
        writer.output[0] = node.input[0] = graph.fresh_name(f"{writer.output[0]}_even")
        count += 1
    return count


def evened_writer(graph: Graph, node: NodeProto) -> NodeProto | None:
    """The Conv that a depthwise Conv reads and nothing else does, if both have constant weights."""
    if not is_depthwise(graph, node):
        return None
    writer = graph.producers().get(node.input[0])
    if writer is None or writer.op_type != "Conv" or not _foldable_producer(graph, writer):
        return None
    return writer if _only_use(graph, node.input[0]) else None


def is_depthwise(graph: Graph, node: NodeProto) -> bool:
    """Whether a node is a Conv over two axes with constant weights, one channel out for each channel in."""
    if node.op_type != "Conv" or not _foldable_producer(graph, node):
        return False
    shape = graph.constants[node.input[1]].shape
    return bool(len(shape) == 4 and shape[1] == 1 and 1 < attribute(node, "group", 1) == shape[0])


def read_affine(graph: Graph, node: NodeProto | None) -> Affine | None:
    """The affine map of a Mul, Add, Sub or Div by a constant scalar or per-channel vector, else None."""
    if node is None or node.op_type not in ("Mul", "Add", "Sub", "Div"):
        return None
    data = _data_input(graph, node)
    if data is None or (node.op_type in ("Sub", "Div") and node.input[0] != data):
        return None
    other = node.input[1] if node.input[0] == data else node.input[0]
    value = _channel_vector(graph, data, graph.constants[other])
    if value is None or value.dtype.kind != "f":
        return None
    value = value.astype(np.float64)
    one, zero = np.ones(1), np.zeros(1)
    if node.op_type == "Mul":
        return Affine(value, zero)
    if node.op_type == "Div":
        return Affine(1.0 / value, zero)
    return Affine(one, value if node.op_type == "Add" else -value)


def _channel_vector(graph: Graph, data: str, value: np.ndarray) -> np.ndarray | None:
    """A constant as [1] or, where it runs along axis 1 of the data alone, as [C]; None for other broadcasts.

    A constant of higher rank than the data, or with more channels, would change the output's shape.
    """
    shape = graph.shape(data)
    rank = 1 if shape is None else len(shape)
    if value.size == 1:
        return value.reshape(1) if max(1, value.ndim) <= rank else None
    if shape is None or rank < 2 or value.ndim > rank:
        return None
    return value.reshape(-1) if (1,) * (rank - value.ndim) + value.shape == _channel_shape(shape) else None


def _channel_shape(shape: Shape) -> Shape:
    """Shape of a per-channel constant beside data of a given shape."""
    return (1, shape[1], *[1] * (len(shape) - 2))


def _data_input(graph: Graph, node: NodeProto) -> str | None:
    """The one input that is no constant, or None."""
    data = [name for name in node.input if not graph.is_constant(name)]
    return data[0] if len(data) == 1 and len(node.input) == 2 else None


def _only_use(graph: Graph, tensor: str) -> bool:
    return tensor not in graph.outputs and len(graph.consumers()[tensor]) == 1


def _replace_by_affine(graph: Graph, node: NodeProto, affine: Affine) -> None:
    """Replace a node by Mul and Add (each only where it does something); the output name stays."""
    data = next(name for name in node.input if not graph.is_constant(name))
    output = node.output[0]
    steps = []
    if np.any(affine.scale != 1) or not np.any(affine.shift):
        steps.append(("Mul", affine.scale))
    if np.any(affine.shift):
        steps.append(("Add", affine.shift))
    for index, (kind, value) in enumerate(steps):
        constant = graph.add_constant(f"{output}_{kind.lower()}", _beside(graph, data, value))
        last = index == len(steps) - 1
        result = output if last else graph.fresh_name(f"{output}_scaled")
        new = helper.make_node(kind, [data, constant], [result], name=result)
        graph.insert_before(node, new)
        graph.copy_shape(data, result)
        data = result
    graph.remove(node)


def _upsampling_in_steps(graph: Graph, upsampling: NodeProto) -> list[NodeProto]:
    """ConvTranspose, 1x1 Conv and activations in front of a DepthToSpace to one channel; [] if others stand there."""
    path: list[NodeProto] = []
    convolutions, data = 0, upsampling.input[0]
    while _only_use(graph, data) and (node := graph.producers().get(data)) is not None:
        path.insert(0, node)
        if node.op_type == "ConvTranspose":
            return path if convolutions == 1 and _makes_blocks(graph, node) else []
        if node.op_type == "Conv" and _is_pointwise(graph, node, attribute(upsampling, "blocksize", 0) ** 2):
            convolutions += 1
        elif node.op_type not in _ACTIVATIONS:
            return []
        data = node.input[0]
    return []


def _is_pointwise(graph: Graph, node: NodeProto, outputs: int) -> bool:
    """Whether a Conv is a 1x1 one with constant weights and so many outputs."""
    if not _foldable_producer(graph, node) or _padded(node) or attribute(node, "group", 1) != 1:
        return False
    shape = graph.constants[node.input[1]].shape
    return shape[2:] == (1, 1) and shape[0] == outputs and all(step == 1 for step in attribute(node, "strides", []))


def _blocks_of(graph: Graph, node: NodeProto) -> list[np.ndarray]:
    """Weights [k * k * C, inputs, 1, 1] and bias, if any, of the 1x1 Conv that a ConvTranspose is, pixel by pixel."""
    weight, *bias = (graph.constants[name] for name in node.input[1:])
    pixels = weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0], 1, 1)
    return [np.ascontiguousarray(pixels), *(np.tile(values, weight[0, 0].size) for values in bias)]


def _same_in_blocks(graph: Graph, node: NodeProto, k: int, b: int) -> list[np.ndarray]:
    """Weights [k * b * k * b, k * k * C, 1, 1] and bias, if any, of a 1x1 Conv to b x b blocks for k x k pixels."""
    weight, *bias = (graph.constants[name] for name in node.input[1:])
    wide = np.zeros((k, b, k, b, k, k, weight.shape[1]), dtype=np.float32)
    for row, column in np.ndindex(k, k):
        wide[row, :, column, :, row, column] = weight.reshape(b, b, -1)
    return [
        wide.reshape((k * b) ** 2, -1, 1, 1),
        *(np.tile(values.reshape(b, b), (k, k)).reshape(-1) for values in bias),
    ]


def _makes_blocks_of_one_channel(graph: Graph, node: NodeProto) -> bool:
    return _makes_blocks(graph, node) and graph.constants[node.input[1]].shape[1] == 1


def _makes_blocks(graph: Graph, node: NodeProto) -> bool:
    """Whether a ConvTranspose makes a square block from each pixel, and nothing else."""
    if not _foldable_producer(graph, node) or _padded(node):
        return False
    shape = graph.constants[node.input[1]].shape
    if len(shape) != 4 or shape[2] != shape[3] or shape[2] == 1:
        return False
    widened = any(attribute(node, "output_padding", [])) or attribute(node, "output_shape") is not None
    dense = all(step == 1 for step in attribute(node, "dilations", []))
    return not widened and dense and tuple(attribute(node, "strides", [1, 1])) == shape[2:]


def _gated_residual(graph: Graph, node: NodeProto) -> tuple[str, str, NodeProto] | None:
    """x, the gate [N, C, 1, 1] and the Mul of `x + x * gate`, if nothing else reads the product."""
    for product in map(graph.producers().get, node.input if node.op_type == "Add" else ()):
        if product is None or product.op_type != "Mul" or not _only_use(graph, product.output[0]):
            continue
        (data,) = set(node.input) - {product.output[0]} or {""}
        if data not in product.input or any(map(graph.is_constant, product.input)):
            continue  # an affine operator, which the folds keep as Mul and Add
        gate = product.input[1 - list(product.input).index(data)]
        shape = graph.shape(gate)
        if shape is not None and len(shape) == 4 and shape[2:] == (1, 1):
            return data, gate, product
    return None


def _beside(graph: Graph, data: str, value: np.ndarray) -> np.ndarray:
    """A scalar or per-channel vector in the shape in which it broadcasts to the data."""
    rank = len(graph.shape(data) or ())
    return value.astype(np.float32).reshape((1, -1, *[1] * (rank - 2)) if value.size > 1 else (1,))


def _foldable_producer(graph: Graph, node: NodeProto) -> bool:
    return (
        node.op_type in _LINEAR
        and graph.is_constant(node.input[1])
        and (len(node.input) < 3 or graph.is_constant(node.input[2]))
        and (node.op_type != "MatMul" or graph.constants[node.input[1]].ndim == 2)
        and not (node.op_type == "ConvTranspose" and attribute(node, "group", 1) != 1)
    )


def _foldable_consumer(graph: Graph, node: NodeProto, tensor: str) -> bool:
    first = node.op_type in _LINEAR and node.input[0] == tensor and node.input[1] != tensor
    return first and _foldable_producer(graph, node)


def _output_axis(node: NodeProto) -> int:
    """Axis of the weight that runs over output channels."""
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}[node.op_type]


def _scale_outputs(graph: Graph, node: NodeProto, affine: Affine) -> None:
    weight = graph.constants[node.input[1]].astype(np.float64)
    axis = _output_axis(node)
    channels = weight.shape[axis]
    scale = np.broadcast_to(affine.scale, channels)
    shape = [1] * weight.ndim
    shape[axis] = channels
    _set_weight(graph, node, weight * scale.reshape(shape))
    if node.op_type == "MatMul":
        return
    bias = graph.constants[node.input[2]].astype(np.float64) if len(node.input) > 2 else np.zeros(channels)
    _set_bias(graph, node, bias * scale + np.broadcast_to(affine.shift, channels))


def _set_weight(graph: Graph, node: NodeProto, weight: np.ndarray) -> None:
    node.input[1] = graph.add_constant(_stem(node.input[1]), weight.astype(np.float32))


def _set_bias(graph: Graph, node: NodeProto, bias: np.ndarray) -> None:
    name = graph.add_constant(_stem(node.input[1]) + "_bias", bias.astype(np.float32))
    node.input[:] = [node.input[0], node.input[1], name]


def _stem(name: str) -> str:
    return name.split("_folded")[0] + "_folded"


def _padded(node: NodeProto) -> bool:
    auto = attribute(node, "auto_pad", "NOTSET")
    return auto not in ("NOTSET", "VALID") or any(attribute(node, "pads", []))


def _fold_factor(graph: Graph, node: NodeProto, data: str, factor: float, readers: list[NodeProto]) -> int:
    for reader in readers:
        _set_weight(graph, reader, graph.constants[reader.input[1]].astype(np.float64) * factor)
        reader.input[0] = data
    graph.remove(node)
    return 1


def _fold_shift(graph: Graph, node: NodeProto, data: str, affine: Affine, readers: list[NodeProto]) -> int:
    if not all(reader.op_type == "Conv" and not _padded(reader) for reader in readers):
        return 0
    for reader in readers:
        weight = graph.constants[reader.input[1]].astype(np.float64)
        group = attribute(reader, "group", 1)
        shift = np.broadcast_to(affine.shift, weight.shape[1] * group).reshape(group, -1)
        per_input = weight.sum(axis=tuple(range(2, weight.ndim))).reshape(group, -1, weight.shape[1])
        moved = np.einsum("goi,gi->go", per_input, shift).reshape(-1)
        bias = graph.constants[reader.input[2]].astype(np.float64) if len(reader.input) > 2 else 0.0
        _set_bias(graph, reader, bias + moved)
        reader.input[0] = data
    graph.remove(node)
    return 1


def _fold_factor_under_shift(graph: Graph, node: NodeProto) -> int:
    """`(x * s) + b` before convolutions becomes `x + b/s`, the factor s goes into their weights."""
    affine = read_affine(graph, node)
    data = _data_input(graph, node) if affine else None
    before = graph.producers().get(data) if data else None
    first = read_affine(graph, before)
    if affine is None or before is None or first is None or node.output[0] in graph.outputs:
        return 0
    if (before.op_type, node.op_type) != ("Mul", "Add") or first.scale.size > 1 or not first.scale[0]:
        return 0
    readers = graph.consumers()[node.output[0]]
    if not _only_use(graph, before.output[0]) or not readers:
        return 0
    if not all(_foldable_consumer(graph, reader, node.output[0]) for reader in readers):
        return 0
    source = _data_input(graph, before)
    assert source is not None
    shifted = graph.fresh_name(f"{node.output[0]}_shifted")
    shift = graph.add_constant(f"{shifted}_by", _beside(graph, source, affine.shift / first.scale))
    graph.insert_before(node, helper.make_node("Add", [source, shift], [shifted], name=shifted))
    graph.copy_shape(source, shifted)
    graph.remove(before)
    return _fold_factor(graph, node, shifted, float(first.scale[0]), readers)
