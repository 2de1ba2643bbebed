"""An editable view of an ONNX graph: nodes in order, constants as arrays, producers and consumers.

Loops and branches are single nodes. What their bodies hold is left alone; tensors that a body reads from outside count
as read by the node.

A rule every pass keeps: a tensor name stands for one value. A pass that changes what a tensor
holds gives it a new name, so that equal names in two versions of a graph can be compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

Shape = tuple[int | None, ...]

LARGE = 2**20
"""Bytes from which on a constant is a weight that is worth not to be copied."""


@dataclass(frozen=True)
class LightModel:
    """A model in memory beside its large constants, which every copy and every protobuf would hold once more.

    Attributes:
        model: declares them as external data, at no place.
        weights: arrays by name, C-contiguous; shared with the graph.
    """

    model: ModelProto
    weights: dict[str, np.ndarray]


class Graph:
    """Mutable copy of a model's main graph.

    Attributes:
        nodes: operators in topological order.
        constants: initializers and Constant nodes by tensor name.
        inputs, outputs: names of the graph's inputs (without initializers) and outputs.
    """

    def __init__(self, model: ModelProto) -> None:
        self._model = _outline(model)
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        for tensor in model.graph.initializer:
            self.constants[tensor.name] = numpy_helper.to_array(tensor)
        for node in model.graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = constant_value(node)
            else:
                self.nodes.append(_copy(node))
        self.inputs = [i.name for i in model.graph.input if i.name not in self.constants]
        self.outputs = [o.name for o in model.graph.output]
        self._output_infos = [_copy_info(info) for info in model.graph.output]
        self._fresh = 0
        self._names = {*self.inputs, *self.outputs, *self.constants, *_all_written(self.nodes)}
        self._shapes: dict[str, Shape] | None = None

    def producers(self) -> dict[str, NodeProto]:
        """Map of tensor name to the node that writes it."""
        return {name: node for node in self.nodes for name in node.output}

    def consumers(self) -> dict[str, list[NodeProto]]:
        """Map of tensor name to the nodes that read it."""
        readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in reads(node):
                readers[name].append(node)
        return readers

    def last_first(self, tensors: Iterable[str]) -> list[str]:
        """Tensors, those that are written last first.

        The order in which to add nodes that tell something of them: onnxruntime begins with what the last node of a
        model needs and comes to the first one last, so the other way around all tensors would be held until the end.
        """
        places = {name: index for index, node in enumerate(self.nodes) for name in node.output}
        return sorted(tensors, key=lambda name: places.get(name, -1), reverse=True)

    def is_constant(self, name: str) -> bool:
        return name in self.constants

    def shape(self, tensor: str) -> Shape | None:
        """Sizes of a tensor as far as ONNX's shape inference knows them, or None."""
        if tensor in self.constants:
            return self.constants[tensor].shape
        if self._shapes is None:
            self._shapes = _inferred_shapes(self.to_light_model().model)
        return self._shapes.get(tensor)

    def copy_shape(self, source: str, tensor: str) -> None:
        """Note that a new tensor has the shape of `source`."""
        shape = self.shape(source)
        if shape is not None and self._shapes is not None:
            self._shapes[tensor] = shape

    def fresh_name(self, stem: str) -> str:
        """A tensor name that was never in use, derived from `stem`."""
        while True:
            self._fresh += 1
            name = f"{stem}_{self._fresh}"
            if name not in self._names and name not in self.constants:
                self._names.add(name)
                return name

    def add_constant(self, stem: str, value: np.ndarray) -> str:
        """Store a constant under a fresh name and return the name."""
        name = self.fresh_name(stem)
        self.constants[name] = value
        return name

    def replace_uses(self, old: str, new: str) -> None:
        """Let every node that reads `old` read `new`."""
        rename_reads(self.nodes, old, new)

    def insert_before(self, anchor: NodeProto, node: NodeProto) -> None:
        self.nodes.insert(self._position(anchor), node)
        self._names.update(node.output)

    def remove(self, node: NodeProto) -> None:
        del self.nodes[self._position(node)]

    def _position(self, node: NodeProto) -> int:
        return next(index for index, other in enumerate(self.nodes) if other is node)

    def prune(self) -> None:
        """Drop nodes and constants that no output depends on."""
        needed = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(reads(node))
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in needed}

    def to_model(self, extra_outputs: Iterable[str] = ()) -> ModelProto:
        """Write the graph back as a model of the same opset, optionally with more outputs."""
        return self._written(initializers(self.constants), extra_outputs)

    def to_light_model(self, extra_outputs: Iterable[str] = ()) -> LightModel:
        """The same for a session, which reads large constants where they are."""
        small, weights = light_initializers(self.constants)
        return LightModel(self._written(small, extra_outputs), weights)

    def _written(self, constants: list[TensorProto], extra_outputs: Iterable[str] = ()) -> ModelProto:
        inputs = [i for i in self._model.graph.input if i.name in self.inputs]
        outputs = list(self._output_infos)
        outputs += [onnx.ValueInfoProto(name=n) for n in extra_outputs if n not in self.outputs]
        graph = helper.make_graph(self.nodes, self._model.graph.name, inputs, outputs, constants)
        model = helper.make_model(graph, opset_imports=self._model.opset_import)
        model.ir_version = self._model.ir_version
        model.producer_name = "paddle-quant"
        return model

    def rename_output(self, old: str, new: str) -> None:
        """Rename a graph output (and its uses)."""
        for node in self.nodes:
            for index, name in enumerate(node.output):
                if name == old:
                    node.output[index] = new
        self.replace_uses(old, new)
        for info in self._output_infos:
            if info.name == old:
                info.name = new
        self._names.add(new)
        self._shapes = None
        self.outputs = [new if name == old else name for name in self.outputs]

    def ending_at(self, tensors: Sequence[str]) -> Graph:
        """A copy that computes some float tensors and nothing else."""
        part = self.copy()
        part.outputs = [*tensors]
        part._output_infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, self.shape(n)) for n in tensors]
        part.prune()
        return part

    def copy(self) -> Graph:
        """A graph to be changed; the arrays are the same, since nobody changes one in place."""
        copied = Graph(self._written([]))
        copied.constants = dict(self.constants)
        copied._names |= copied.constants.keys()
        return copied

    def body(self, loop: NodeProto) -> Graph:
        """A copy of what a loop holds, as a graph of its own; names made in it are new around it, too."""
        (body,) = bodies([loop])
        inner = Graph(helper.make_model(body, opset_imports=self._model.opset_import))
        inner._names |= self._names
        return inner

    def set_body(self, loop: NodeProto, body: Graph) -> None:
        """Let a loop hold what `body` gave, after changes."""
        next(bodies([loop])).CopyFrom(body.to_model().graph)
        self._names |= body._names


def _outline(model: ModelProto) -> ModelProto:
    """Version, operator sets, name and inputs: whoever keeps the model would keep all weights twice."""
    outline = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    outline.graph.name = model.graph.name
    outline.graph.input.extend(model.graph.input)
    return outline


def initializers(constants: Mapping[str, np.ndarray]) -> list[TensorProto]:
    """Constants as a model holds them."""
    return [numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in constants.items()]


def light_initializers(constants: Mapping[str, np.ndarray]) -> tuple[list[TensorProto], dict[str, np.ndarray]]:
    """Constants as a `LightModel` holds them: all as its model does, and the large ones."""
    weights = {name: np.asarray(value, order="C") for name, value in constants.items() if value.nbytes >= LARGE}
    small = {name: value for name, value in constants.items() if name not in weights}
    return [*initializers(small), *(_declared(name, value) for name, value in weights.items())], weights


def _declared(name: str, value: np.ndarray) -> TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=value.shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="memory")
    return tensor


def reads(node: NodeProto) -> list[str]:
    """Tensors that a node reads, each once; of a loop or a branch also those that its bodies read from outside."""
    names = [*node.input]
    for body in bodies([node]):
        outside = [*(name for inner in body.node for name in reads(inner)), *(output.name for output in body.output)]
        own = own_names(body)
        names += [name for name in outside if name not in own]
    return list(dict.fromkeys(names))


def rename_reads(nodes: Sequence[NodeProto], old: str, new: str) -> None:
    """Let nodes, and what their bodies hold, read `new` in the place of `old`."""
    for node in nodes:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new
    for body in bodies(nodes):
        if old in own_names(body):
            continue  # paddle2onnx gives inputs of a body the names of outer tensors
        rename_reads(body.node, old, new)
        for output in body.output:  # a body may hand on what it did not compute
            if output.name == old:
                output.name = new


def own_names(body: GraphProto) -> set[str]:
    """Tensors that a body is given or computes."""
    given = {info.name for info in body.input} | {tensor.name for tensor in body.initializer}
    return given | {name for node in body.node for name in node.output}


def bodies(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    """The graphs inside of loops and branches among the nodes."""
    for node in nodes:
        for attr in node.attribute:
            yield from [attr.g] if attr.HasField("g") else attr.graphs


def all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Nodes, and those inside of loops and branches among them."""
    for node in nodes:
        yield node
        for body in bodies([node]):
            yield from all_nodes(body.node)


def _all_written(nodes: Sequence[NodeProto]) -> Iterator[str]:
    """Tensors that nodes write, and those inside of loops and branches."""
    for node in nodes:
        yield from node.output
    for body in bodies(nodes):
        yield from own_names(body)
        yield from _all_written(body.node)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Value of a node attribute, or `default` where it is not set."""
    for attr in node.attribute:
        if attr.name == name:
            value = helper.get_attribute_value(attr)
            return value.decode() if isinstance(value, bytes) else value
    return default


def constant_value(node: NodeProto) -> np.ndarray:
    """What a Constant node holds."""
    for attr in node.attribute:
        value = helper.get_attribute_value(attr)
        if attr.name == "value":
            return numpy_helper.to_array(value)
        if attr.name in ("value_float", "value_floats"):
            return np.asarray(value, dtype=np.float32)
        if attr.name in ("value_int", "value_ints"):
            return np.asarray(value, dtype=np.int64)
    raise ValueError(f"Constant node {node.name} holds no numeric value")


def _copy(node: NodeProto) -> NodeProto:
    clone = NodeProto()
    clone.CopyFrom(node)
    return clone


def _copy_info(info: ValueInfoProto) -> ValueInfoProto:
    clone = ValueInfoProto()
    clone.CopyFrom(info)
    return clone


def _inferred_shapes(model: ModelProto) -> dict[str, Shape]:
    """Sizes by tensor name; None for an open size."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {
        info.name: tuple(d.dim_value if d.HasField("dim_value") else None for d in info.type.tensor_type.shape.dim)
        for info in [*graph.input, *graph.value_info, *graph.output]
        if info.type.tensor_type.HasField("shape")
    }
