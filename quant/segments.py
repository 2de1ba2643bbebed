"""A graph cut behind chosen tensors, to be run piece by piece on many pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from onnx import NodeProto, helper
from onnx.helper import make_tensor_value_info, np_dtype_to_tensor_dtype

from quant.conversion import OPSET
from quant.graph import Graph, LightModel, light_initializers, reads
from quant.runtime import Session, onnx_session

Array = np.ndarray
IR_VERSION = 8


@dataclass(frozen=True)
class Segment:
    """Some consecutive nodes of a graph.

    Attributes:
        end: the convolution behind which it is cut, None for the rest of the graph.
        reads: tensors that they read and do not write.
        leaves: tensors that later nodes, or the caller, read: written here or before.
    """

    end: str | None
    nodes: list[NodeProto]
    constants: dict[str, Array]
    reads: list[str]
    leaves: list[str]

    @cached_property
    def digest(self) -> bytes:
        """Of what it computes."""
        parts = [node.SerializeToString(deterministic=True) for node in self.nodes]
        parts += [
            f"{name} {value.dtype} {value.shape}".encode() + value.tobytes() for name, value in self.constants.items()
        ]
        return hashlib.sha256(b"\0".join([*parts, *(name.encode() for name in self.leaves)])).digest()

    def session(self, kept: Mapping[str, Array], threads: int) -> Session:
        """Ready to run on values of the types of those given."""
        inputs = [make_tensor_value_info(n, np_dtype_to_tensor_dtype(kept[n].dtype), None) for n in self.reads]
        outputs = [onnx.ValueInfoProto(name=name) for name in self._computed]
        constants, weights = light_initializers(self.constants)
        body = helper.make_graph(self.nodes, "segment", inputs, outputs, constants)
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)])
        model.ir_version = IR_VERSION
        return onnx_session(LightModel(model, weights), threads, integers=False)

    def run(self, values: list[dict[str, Array]], session: Session) -> None:
        """Put what later nodes read in the place of what earlier nodes left, picture by picture to spare memory."""
        computed = self._computed
        for index, kept in enumerate(values):
            found = dict(zip(computed, session.run({n: kept[n] for n in self.reads}, computed), strict=True))
            values[index] = {name: found[name] if name in found else kept[name] for name in self.leaves}

    @property
    def _computed(self) -> list[str]:
        written = {name for node in self.nodes for name in node.output}
        return [name for name in self.leaves if name in written]


def segments_of(graph: Graph, names: Collection[str]) -> Iterator[Segment]:
    """The graph cut behind each named tensor, and what is left behind the last one."""
    ends = {name: index for index, node in enumerate(graph.nodes, start=1) for name in node.output}
    start, available = 0, set(graph.inputs)
    for name in (*sorted(names, key=lambda name: ends[name]), None):
        end = len(graph.nodes) if name is None else ends[name]
        nodes, later = graph.nodes[start:end], graph.nodes[end:]
        written = {output for node in nodes for output in node.output}
        read = dict.fromkeys(key for node in nodes for key in reads(node) if key)
        wanted = {key for node in later for key in reads(node)} | {*graph.outputs, *([name] if name else [])}
        available |= written
        yield Segment(
            name,
            nodes,
            {key: graph.constants[key] for key in read if graph.is_constant(key)},
            [key for key in read if key in available - written],
            sorted(wanted & available),
        )
        start = end
