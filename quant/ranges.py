"""Ranges chosen tensor by tensor: of several methods the one whose rounding the tensor's readers feel least.

What a range costs shows in the outputs of the operators that read the tensor, not in the tensor itself: a value that
is clipped may meet small weights only. So each candidate is tried: beside every reader stands a copy that reads the
tensor rounded by the candidate, with its weights as the plan rounds them, and the squared distance of the two outputs
counts (Wu et al., "EasyQuant", 2020, judge scales by a layer's output too, by its cosine distance).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import NodeProto, helper

from quant.calibration import Statistics
from quant.flow import Chain, relu_alone
from quant.graph import Graph
from quant.observer import RangeMethod
from quant.placement import active_chains, numbers_of
from quant.plan import ActivationQuantizer, QuantPlan, dequantize_weight
from quant.ptq import chain_twin, read_activations, stored_outputs
from quant.runtime import Feed, onnx_session
from quant.simulation import FloatWriter

Quantizers = dict[str, ActivationQuantizer]
Numbers = tuple[float, int, str]


@dataclass(frozen=True)
class PerTensor:
    """Of several methods the best for each tensor; of equally good ones the first."""

    candidates: tuple[RangeMethod, ...]

    def refine(
        self,
        graph: Graph,
        plan: QuantPlan,
        statistics: Statistics,
        outputs: Mapping[str, str],
        feeds: Sequence[Feed],
        threads: int,
    ) -> QuantPlan:
        """The plan with the best candidate's quantizer for each activation and each stored output.

        Args:
            graph: the graph that the plan was made on; exact values enter every reader.
            outputs: what was observed for stored outputs, from `quant.ptq.observed_outputs`.
            feeds: calibration pictures.
        """
        dtype = next((quantizer.dtype for quantizer in plan.activations.values()), "uint8")
        offers = [
            read_activations(plan.operators, statistics, method, dtype)
            | stored_outputs(outputs, statistics, method, dtype)
            for method in self.candidates
        ]
        errors = range_errors(graph, plan, offers, feeds, threads)
        best = {name: int(np.argmin(found)) for name, found in errors.items()}
        activations = {name: offers[best.get(name, 0)][name] for name in plan.activations}
        stored = {name: offers[best.get(name, 0)][name] for name in plan.outputs}
        counts = Counter(best.values())
        chosen = [f"{self.candidates[index]} for {counts[index]}" for index in sorted(counts)]
        notes = [*plan.notes, f"ranges chosen per tensor: {', '.join(chosen)}"]
        return replace(plan, activations=activations, outputs=stored, notes=notes)


def range_errors(
    graph: Graph,
    plan: QuantPlan,
    offers: Sequence[Quantizers],
    feeds: Sequence[Feed],
    threads: int,
) -> dict[str, np.ndarray]:
    """Squared output error of the readers of each tensor, for each offer, summed over readers and pictures.

    A stored output is read by what stands behind it: the convolution at the end of its chain, with all roundings in
    between, or else every operator that reads it. The runtime takes the sums, so no picture's values are kept.

    Args:
        offers: quantizers of the plan's activations and stored outputs.

    Returns:
        float64[offers] by tensor name, equal for equal quantizers; only tensors that the offers differ on.
    """
    distinct = {}
    for name in [*plan.activations, *plan.outputs]:
        quantizers = {numbers_of(offer[name]): offer[name] for offer in offers}
        if len(quantizers) > 1:
            distinct[name] = quantizers
    bench = _Bench.of(graph, plan)
    readers = {name: bench.readers(name) for name in distinct}
    trials = {
        (name, numbers): bench.add_trial(name, readers[name], quantizer)
        for name in graph.last_first(distinct)
        if readers[name]
        for numbers, quantizer in distinct[name].items()
    }
    sums = bench.measure(feeds, threads)
    errors = {trial: sum(sums[key] for key in distances) for trial, distances in trials.items()}
    return {
        name: np.array([errors[name, numbers_of(offer[name])] for offer in offers])
        for name in dict.fromkeys(name for name, _ in errors)
    }


@dataclass
class _Bench:
    """A graph in which rounded copies of operators stand beside the exact ones.

    Attributes:
        consumers: nodes by the tensor that they read, in the graph without copies.
        chains: by the names of the stored outputs inside.
        weights: rounded ones by the name of the exact.
        distances: tensors with the squared distance of a copy from its operator, summed over all values.
    """

    graph: Graph
    plan: QuantPlan
    consumers: Mapping[str, list[NodeProto]]
    chains: Mapping[str, Chain]
    weights: dict[str, str] = field(default_factory=dict)
    distances: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, graph: Graph, plan: QuantPlan) -> _Bench:
        """A bench without a trial."""
        copied = graph.copy()
        active = active_chains(copied, plan).values()
        chains = {name: chain for chain in active for name in (chain.writer, chain.product) if name in plan.outputs}
        return cls(copied, plan, copied.consumers(), chains)

    def readers(self, name: str) -> list[NodeProto]:
        """The operators whose outputs show what rounding a tensor costs, in graph order."""
        quantized = self.plan.quantized()
        if chain := self.chains.get(name):
            return [node for node in self.consumers[chain.result] if node.output[0] == chain.reader]
        nodes = self.consumers[self._read_as(name)]
        if name in self.plan.outputs:
            return [node for node in nodes if node.op_type != "Shape"]
        return [node for node in nodes if node.output[0] in quantized and name in quantized[node.output[0]].activations]

    def add_trial(self, name: str, nodes: Sequence[NodeProto], quantizer: ActivationQuantizer) -> list[str]:
        """Copies of a tensor's readers for one quantizer; returns their distances."""
        source = read = self._read_as(name)
        if chain := self.chains.get(name):
            plan = replace(self.plan, outputs=self.plan.outputs | {name: quantizer})
            source, read = chain_twin(self.graph, nodes[0], plan, chain), chain.result
            quantizer = self.plan.activations[read]
        rounded = FloatWriter().rounded(self.graph, nodes[0], source, *numbers_of(quantizer))
        found = [distance for node in nodes for distance in self._add_copy(node, read, rounded)]
        self.distances += found
        return found

    def _read_as(self, name: str) -> str:
        """Of a stored output what Relu gives on."""
        return (relu_alone(self.consumers[name]) if name in self.plan.outputs else None) or name

    def _add_copy(self, node: NodeProto, read: str, rounded: str) -> list[str]:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.output[:] = [self.graph.fresh_name(f"{name}_copy") for name in node.output]
        copy.name = copy.output[0]
        operator = self.plan.quantized().get(node.output[0])
        weight = operator.weight if operator is not None else None
        copy.input[:] = [
            rounded if key == read else self._rounded_weight(key) if key == weight else key for key in node.input
        ]
        self.graph.insert_before(node, copy)
        return [self._add_distance(*pair) for pair in zip(node.output, copy.output, strict=True)]

    def _rounded_weight(self, name: str) -> str:
        if name not in self.weights:
            values = dequantize_weight(self.plan.integers[name], self.plan.weights[name].axis)
            self.weights[name] = self.graph.add_constant(f"{name}_rounded", values)
        return self.weights[name]

    def _add_distance(self, exact: str, copy: str) -> str:
        difference, square = (self.graph.fresh_name(f"{copy}_{what}") for what in ("difference", "square"))
        self.graph.nodes += [
            helper.make_node("Sub", [exact, copy], [difference], name=difference),
            helper.make_node("ReduceSumSquare", [difference], [square], name=square, keepdims=0),
        ]
        return square

    def measure(self, feeds: Sequence[Feed], threads: int) -> dict[str, float]:
        """Every distance, summed over the pictures."""
        if not self.distances:
            return {}
        model = self.graph.to_light_model(self.distances)
        session = onnx_session(model, threads, integers=False, plan_buffers=False)
        total = np.zeros(len(self.distances))
        for feed in feeds:
            total += np.array(session.run(feed, self.distances), dtype=np.float64)
        return dict(zip(self.distances, total.tolist(), strict=True))
