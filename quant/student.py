"""The student: a plan's quantized network as trainable Paddle operators, from the plan and back into it.

It is the graph that simulation and export write too (`quant.placement`), with quantizers as nodes of their own.
Rounding passes gradients straight through where nothing was clipped; scales of weights learn from what they round and
clip, those of activations as `quant.quantizer` says. Everything trained is counted in units that fit every layer, so
that one learning rate does:

* weights in integer steps, from the exact value, or its mirror image where the plan did not round to the nearest;
* biases in steps of the integer accumulator times its reach;
* scales of weights and of activations as logarithms. Zero points stay: 0 has to be an integer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from onnx import NodeProto, helper

from quant.errors import NotTrainable
from quant.flow import GATE_READ_SCALE, GATE_SCALE, GATE_ZERO
from quant.graph import Graph, reads
from quant.kernels import Array, Value, compute, straight_round, tensor
from quant.placement import place, written_chains
from quant.plan import ActivationQuantizer, IntegerWeight, QuantPlan, corrected_graph
from quant.program import import_paddle
from quant.quantizer import ROUNDINGS, followed, spanning_step
from quant.recipe import Quantizers
from quant.runtime import Feed
from quant.simulation import FloatWriter, integer_limits
from quant.team import ALONE, Team

Kind = Literal["weights", "biases", "scales", "ranges"]
KINDS: tuple[Kind, ...] = ("weights", "biases", "scales", "ranges")
"""What can be trained: integers, biases, scales of weights, scales of activations."""

ROUNDED = "Rounded"
"""Kind of the nodes that stand for quantizers of activations."""

_GATE, _WEIGHT = "Gate", "IntegerWeight"
_EDGE = 0.499
"""Farthest that a weight begins from the plan's integer, in steps; at half a step it would be another one."""


@dataclass
class _TrainableWriter(FloatWriter):
    """Leaves quantizers whole; placement hands over numbers, so a quantizer's scale is its place in a list."""

    weights: dict[str, IntegerWeight] = field(default_factory=dict)

    def rounded(self, graph: Graph, before: NodeProto, tensor: str, scale: float, zero_point: int, dtype: str) -> str:
        name = graph.fresh_name(f"{tensor}_rounded")
        graph.insert_before(before, helper.make_node(ROUNDED, [tensor], [name], name=name, quantizer=int(scale)))
        return name

    def gate(self, graph: Graph, before: NodeProto, tensor: str) -> str:
        name = graph.fresh_name(f"{tensor}_gate")
        graph.insert_before(before, helper.make_node(_GATE, [tensor], [name], name=name))
        return name

    def weight(self, graph: Graph, before: NodeProto, name: str, weight: IntegerWeight, axis: int) -> str:
        self.weights[name] = weight
        read = graph.fresh_name(f"{name}_trained")
        graph.insert_before(before, helper.make_node(_WEIGHT, [], [read], name=read, weight=name, axis=axis))
        return read

    def bias(self, graph: Graph, before: NodeProto, name: str, scale: Array) -> str:
        self.bias_steps[before.output[0]] = scale
        return name


@dataclass(frozen=True)
class Traced:
    """A plan's network with whole quantizers.

    Attributes:
        nodes, constants, inputs, outputs: of the placed graph.
        quantizers: by the number that a node names: key in the plan, and the quantizer.
        weights: integers with the scales that the network computes with.
        exact: float weights that the integers stand for; those inside loops, which cannot be trained, are not here.
        factors: of convolutions that write `factor * x`.
        integer_biases: convolutions whose biases kernels store as integers.
    """

    nodes: list[NodeProto]
    constants: dict[str, Array]
    inputs: list[str]
    outputs: list[str]
    quantizers: list[tuple[str, str, ActivationQuantizer]]
    weights: dict[str, IntegerWeight]
    exact: dict[str, Array]
    factors: dict[str, Array]
    integer_biases: frozenset[str]


def trace(prepared: Graph, plan: QuantPlan) -> Traced:
    """The placed graph of a plan, ready to be trained."""
    quantizers = [("activations", name, q) for name, q in plan.activations.items()]
    quantizers += [("outputs", name, q) for name, q in plan.outputs.items()]
    numbered = replace(plan, activations=dict(plan.activations), outputs=dict(plan.outputs))
    for number, (part, name, quantizer) in enumerate(quantizers, start=1):
        getattr(numbered, part)[name] = quantizer.model_copy(update={"scale": float(number)})
    writer = _TrainableWriter()
    graph = place(prepared, numbered, writer)
    plain = corrected_graph(prepared, plan)
    chains = [chain for chain in written_chains(plain, plan) if chain.factor is not None]
    return Traced(
        nodes=graph.nodes,
        constants=graph.constants,
        inputs=graph.inputs,
        outputs=graph.outputs,
        quantizers=quantizers,
        weights=writer.weights,
        exact={name: plain.constants[name] for name in writer.weights if name in plain.constants},
        factors={chain.writer: np.asarray(chain.factor) for chain in chains},
        integer_biases=frozenset(writer.bias_steps),
    )


@dataclass(frozen=True)
class Reach:
    """How far into a network training reaches.

    Attributes:
        computed: tensors that can be computed, the pictures among them.
        trained: those of them that operators with integer weights lead to; numbers that gradients can pass alone.
        refusal: of the first operator without a differentiable counterpart; None where all have one.
    """

    computed: frozenset[str]
    trained: frozenset[str]
    refusal: NotTrainable | None


class Student:
    """Consecutive nodes of a traced plan, or all of them, with what is trained in them.

    Args:
        nodes: of the traced graph.
        kinds: what is trained; everything else keeps the plan's values.
        fixed: what students of other nodes learned, which holds here too and is not trained again.
        quantizers: how ranges move, where they are trained.
    """

    def __init__(
        self,
        plan: QuantPlan,
        traced: Traced,
        nodes: Sequence[NodeProto],
        kinds: Collection[Kind],
        fixed: Mapping[tuple[Kind, str], Any] | None = None,
        quantizers: Quantizers = "lsq",
    ) -> None:
        import_paddle().disable_static()
        self._quantizers = quantizers
        self._spanned: dict[int, float] = {}
        self._means: Mapping[str, Array] = {}
        self.plan, self.traced, self.nodes = plan, traced, nodes
        self._fixed = dict(fixed or {})
        self._writers = {node.output[0]: node for node in traced.nodes if node.op_type in (ROUNDED, _WEIGHT)}
        self._operators = {op.name: op for op in plan.quantized().values() if op.weight is not None}
        self.parameters: dict[tuple[Kind, str], Any] = {}
        self._start: dict[tuple[Kind, str], Array] = {}
        self._constants = {
            name: _host_or_tensor(traced.constants[name])
            for node in nodes
            for name in reads(node)
            if name in traced.constants
        }
        for node in nodes:
            self._add_parameters(node, kinds)

    def _add_parameters(self, node: NodeProto, kinds: Collection[Kind]) -> None:
        if node.op_type == ROUNDED and "ranges" in kinds:
            part, name, _ = self.traced.quantizers[_number(node) - 1]
            self._add("ranges", f"{part}:{name}", np.zeros(1), by_gradient=self._quantizers != "moving_average")
        elif node.op_type == _WEIGHT:
            name, weight = _weight_of(node), self.plan.integers[_weight_of(node)]
            if "weights" in kinds:
                self._add("weights", name, _latent(self.traced.exact[name], weight, _axis_of(node)))
            if "scales" in kinds:
                self._add("scales", name, np.zeros(len(weight.scale)))
        elif "biases" in kinds and (operator := self._operators.get(node.output[0])) and operator.op_type != "MatMul":
            assert operator.weight is not None
            self._add("biases", operator.name, np.zeros(len(self.traced.weights[operator.weight].scale)))

    def _add(self, kind: Kind, name: str, start: Array, *, by_gradient: bool = True) -> None:
        import paddle

        if (kind, name) in self._fixed:
            return
        self._start[kind, name] = start.astype(np.float32)
        begin = paddle.nn.initializer.Assign(self._start[kind, name])
        shape = list(start.shape)
        self.parameters[kind, name] = paddle.create_parameter(shape, "float32", default_initializer=begin)
        self.parameters[kind, name].name = f"{kind}:{name}"
        self.parameters[kind, name].stop_gradient = not by_gradient

    def _learned(self, kind: Kind, name: str) -> Any:
        """A parameter, of this student or of one before; None where it is not trained."""
        return self.parameters.get((kind, name), self._fixed.get((kind, name)))

    def learned(self) -> dict[tuple[Kind, str], Any]:
        """What holds after this student, for the `fixed` of the next."""
        return {**self._fixed, **{key: value.detach() for key, value in self.parameters.items()}}

    def run(
        self, values: Mapping[str, Value], keep: Collection[str], means: Mapping[str, Array] | None = None
    ) -> dict[str, Value]:
        """Compute the nodes that what is kept depends on.

        Args:
            values: what the nodes read and do not write.
            keep: names of tensors to give back, written here or given.
            means: that the channels of convolutions are moved to, as corrected biases will move them, float32[C].
        """
        self._spanned.clear()
        self._means = means or {}
        known: dict[str, Value] = {**self._constants, **values}
        nodes = leading_to(keep, self.nodes)
        last = {name: index for index, node in enumerate(nodes) for name in reads(node)}
        for index, node in enumerate(nodes):
            for name, value in zip(node.output, self._computed(node, known), strict=True):
                known[name] = value
            for name in reads(node):  # what nobody reads any more would fill the memory
                if last[name] == index and name not in keep:
                    known.pop(name, None)
        return {name: known[name] for name in keep}

    def reach(self, feed: Feed) -> Reach:
        """How far the nodes can be computed; without gradients."""
        import paddle

        known: dict[str, Value] = {**self._constants, **feed}
        last = {name: index for index, node in enumerate(self.nodes) for name in reads(node)}
        computed, trained, refusals = set(feed), set[str](), list[NotTrainable]()
        for index, node in enumerate(self.nodes):
            read = [name for name in reads(node) if name]
            if all(name in computed or name in known for name in read):
                try:
                    with paddle.no_grad():
                        known |= zip(node.output, self._computed(node, known), strict=True)
                    computed.update(node.output)
                    if node.output[0] in self._operators or trained.intersection(read):
                        trained |= {name for name in node.output if _differentiable(known[name])}
                except NotTrainable as error:
                    refusals.append(error)
            for name in read:
                if last[name] == index:
                    known.pop(name, None)
        return Reach(frozenset(computed), frozenset(trained), refusals[0] if refusals else None)

    def _computed(self, node: NodeProto, known: Mapping[str, Value]) -> list[Value]:
        if node.op_type == ROUNDED:
            return [self._rounded(_number(node), known[node.input[0]])]
        if node.op_type == _GATE:
            steps = (known[node.input[0]] / GATE_SCALE).clip(-float(GATE_ZERO), 255.0 - GATE_ZERO)
            return [(straight_round(steps) + float(GATE_ZERO)) * GATE_READ_SCALE]
        if node.op_type == _WEIGHT:
            return [self._weight(_weight_of(node), _axis_of(node))]
        inputs = [known[name] if name else None for name in node.input]
        shift = self._bias_shift(node.output[0])
        if shift is not None:
            inputs[2:] = [shift if len(inputs) < 3 else inputs[2] + shift]
        if node.output[0] in self.traced.integer_biases:
            inputs[2] = self._integer_bias(node, inputs[2])
        found = compute(node, inputs)
        return [self._moved(node.output[0], found[0])] if node.output[0] in self._means else found

    def _moved(self, name: str, values: Any) -> Any:
        """What a convolution writes, with the mean of each channel where it is to be."""
        sought = self._means[name] * self.traced.factors.get(name, np.ones(1))
        places = [1, -1, *(1 for _ in values.shape[2:])]
        off = tensor(sought.astype(np.float32)) - values.mean([0, *range(2, values.ndim)])
        return values + off.reshape(places)

    def _integer_bias(self, node: NodeProto, bias: Any) -> Any:
        """In steps of the accumulator, as integer kernels add it; these follow the scales that are learned."""
        read, weight = self._writers[node.input[0]], self._writers[node.input[1]]
        of_input = self._range(_number(read))
        step = (of_input.detach() if self._quantizers == "pact" else of_input) * self._scale(_weight_of(weight))
        return straight_round(tensor(bias) / step) * step

    def _rounded(self, number: int, values: Any) -> Any:
        _, _, quantizer = self.traced.quantizers[number - 1]
        smallest, largest = integer_limits(quantizer.dtype)
        low, high = float(smallest - quantizer.zero_point), float(largest - quantizer.zero_point)
        if self._quantizers == "moving_average":
            self._spanned[number] = spanning_step(tensor(values), low, high)
        return ROUNDINGS[self._quantizers](tensor(values), self._range(number), low, high)

    def _range(self, number: int) -> Any:
        """The step of a quantizer, float32[1], with what was learned."""
        part, name, quantizer = self.traced.quantizers[number - 1]
        return self._times_learned(np.array([quantizer.scale]), "ranges", f"{part}:{name}")

    def _scale(self, name: str) -> Any:
        """The steps of a weight, float32[C], with what was learned."""
        return self._times_learned(self.traced.weights[name].scale, "scales", name)

    def _times_learned(self, steps: Array, kind: Kind, name: str) -> Any:
        scale, learned = tensor(steps.astype(np.float32)), self._learned(kind, name)
        return scale if learned is None else scale * learned.exp()

    def _weight(self, name: str, axis: int) -> Any:
        weight = self.traced.weights[name]
        places = [1] * weight.values.ndim
        places[axis] = -1
        latent, scale = self._learned("weights", name), self._scale(name).reshape(places)
        if latent is None:
            return tensor(weight.values.astype(np.float32)) * scale
        limit = _largest(weight)
        return straight_round(latent.clip(-limit, limit)) * scale

    def _bias_shift(self, operator: str) -> Any:
        learned = self._learned("biases", operator)
        return None if learned is None else learned * tensor(self._bias_unit(operator).astype(np.float32))

    def _bias_unit(self, name: str) -> Array:
        """A step of the input at the largest weight, for each output channel."""
        operator = self._operators[name]
        assert operator.weight is not None
        weight = self.traced.weights[operator.weight]
        source = operator.activations[0]
        quantizer = self.plan.outputs.get(source) or self.plan.activations[source]
        return np.asarray(weight.scale * _largest(weight) * np.float32(quantizer.scale))

    def follow(self, momentum: float, team: Team = ALONE) -> None:
        """Let ranges that no gradient moves follow what the last run spanned; for steps of training alone."""
        largest = team.largest([*self._spanned.values()])
        for number, spanned in zip(self._spanned, largest, strict=True):
            part, name, quantizer = self.traced.quantizers[number - 1]
            if (parameter := self.parameters.get(("ranges", f"{part}:{name}"))) is not None:
                step = followed(quantizer.scale * math.exp(float(parameter)), spanned, momentum)
                parameter.set_value(np.array([math.log(step / quantizer.scale)], dtype=np.float32))

    def refined(self, plan: QuantPlan) -> QuantPlan:
        """A plan with what this student learned; what never moved stays as it is."""
        integers, shifts = dict(plan.integers), dict(plan.bias_shifts)
        activations, outputs = dict(plan.activations), dict(plan.outputs)
        for (kind, name), parameter in self.parameters.items():
            learned = parameter.numpy()
            if np.array_equal(learned, self._start[kind, name]):
                continue
            if kind == "weights":
                limit = _largest(integers[name])
                values = np.rint(np.clip(learned, -limit, limit)).astype(np.int8)
                integers[name] = replace(integers[name], values=values)
            elif kind == "scales":
                scale = (integers[name].scale * np.exp(learned)).astype(np.float32)
                integers[name] = replace(integers[name], scale=scale)
            elif kind == "biases":
                shift = learned * self._bias_unit(name) / self.traced.factors.get(name, np.ones(1))
                before = shifts.get(name, np.zeros_like(shift))
                shifts[name] = (before + shift).astype(np.float32)
            else:
                part, _, key = name.partition(":")
                place = activations if part == "activations" else outputs
                scale = float(np.float32(place[key].scale) * np.exp(learned[0]))
                place[key] = place[key].model_copy(update={"scale": scale})
        notes = list(plan.notes)
        return replace(
            plan, integers=integers, bias_shifts=shifts, activations=activations, outputs=outputs, notes=notes
        )

    def state(self) -> dict[str, Array]:
        """Everything trained, by `kind:name`."""
        return {f"{kind}:{name}": np.array(value.numpy()) for (kind, name), value in self.parameters.items()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over what `state` gave; raises KeyError where it is of another student."""
        for (kind, name), value in self.parameters.items():
            value.set_value(state[f"{kind}:{name}"])


def whole_student(prepared: Graph, plan: QuantPlan, kinds: Collection[Kind], quantizers: Quantizers = "lsq") -> Student:
    """The student of all of a plan."""
    traced = trace(prepared, plan)
    return Student(plan, traced, traced.nodes, kinds, quantizers=quantizers)


def student_outputs(student: Student, feed: Feed) -> list[Array]:
    """The outputs of a whole student for one picture, without gradients."""
    import paddle

    with paddle.no_grad():
        found = student.run(feed, student.traced.outputs)
    return [np.asarray(value) for value in found.values()]


def leading_to(names: Collection[str], nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """The nodes without which some tensors cannot be computed."""
    wanted, found = set(names), list[NodeProto]()
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(reads(node))
            found.append(node)
    return found[::-1]


def _differentiable(value: Value) -> bool:
    """Whether gradients can pass; they end where a value turns into integers, or into sizes."""
    return not isinstance(value, np.ndarray) and bool(value.is_floating_point())


def _host_or_tensor(value: Array) -> Value:
    return tensor(value) if value.dtype == np.float32 and value.size > 1 else value


def _latent(exact: Array, weight: IntegerWeight, axis: int) -> Array:
    """Exact weights in integer steps.

    Where the plan rounded one to the integer on the other side it begins on the plan's side, mirrored at the boundary
    between both: what is likely to change stays so, and no multitude of weights crosses at once.
    """
    places = [1] * exact.ndim
    places[axis] = -1
    values = weight.values.astype(np.float64)
    off = exact / weight.scale.reshape(places) - values
    mirrored = np.sign(off) * np.maximum(1 - np.abs(off), 0)
    return np.asarray(values + np.clip(np.where(np.abs(off) > 0.5, mirrored, off), -_EDGE, _EDGE), dtype=np.float32)


def _largest(weight: IntegerWeight) -> int:
    return max(int(np.abs(weight.values).max()), 1)


def _number(node: NodeProto) -> int:
    return int(helper.get_attribute_value(node.attribute[0]))


def _weight_of(node: NodeProto) -> str:
    return next(str(helper.get_attribute_value(a).decode()) for a in node.attribute if a.name == "weight")


def _axis_of(node: NodeProto) -> int:
    return next(int(helper.get_attribute_value(a)) for a in node.attribute if a.name == "axis")
