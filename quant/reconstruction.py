"""Reconstruction: part after part, a student learns to give what FP32 gives from what the parts before it really give.

A part is some consecutive operators from which one tensor is read later. Its input comes from the quantized parts
before it, already trained; its aim is the FP32 value of what it ends in (Nagel et al., "Up or Down? Adaptive Rounding
for Post-Training Quantization", 2020, section 3.3, with the asymmetric objective; Li et al., "BRECQ", 2021, for parts
of several operators). Integers, biases and scales learn together, straight through the rounding, so that what is
measured is what will be exported; a part that ends no better on pictures that were held back keeps its plan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto

from quant.errors import NotTrainable
from quant.graph import Graph, reads
from quant.kernels import Array, Value
from quant.least_squares import HELD_BACK, PartResult
from quant.plan import QuantPlan
from quant.recipe import Reconstruction
from quant.runtime import Feed, onnx_session
from quant.student import Kind, Student, Traced, trace
from quant.training import Schedule, Trainer, batches, relative_square, shuffled

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Consecutive nodes of a traced plan.

    Attributes:
        aim: the tensor that is compared with FP32.
        leaves: tensors that later parts read: written here or before.
    """

    nodes: list[NodeProto]
    aim: str
    leaves: list[str]


def reconstruct(
    prepared: Graph,
    plan: QuantPlan,
    feeds: Sequence[Feed],
    settings: Reconstruction,
    *,
    seed: int,
    threads: int,
    advance: Callable[[], None] = lambda: None,
    expired: Callable[[], bool] = lambda: False,
) -> tuple[QuantPlan, list[PartResult]]:
    """The plan with every part trained in turn.

    Args:
        feeds: calibration pictures; the values at one cut of all of them are kept in memory.
        advance: called after each part.
        expired: whether time is up; parts not reached by then keep their plan.

    Raises:
        NotTrainable: not one part can be trained; where a later one cannot, the parts before it are the result.
    """
    traced, (inputs, learned_from) = trace(prepared, plan), _split(prepared, feeds, settings.batch)
    names = {name for node in prepared.nodes for name in node.output}
    values: list[dict[str, Value]] = [dict(feed) for feed in inputs]
    refined, results, learned = plan, list[PartResult](), dict[tuple[Kind, str], Any]()
    for part in parts(traced, plan, names, settings.operators):
        if expired():
            break
        exact = _exact(prepared, part.aim, traced, inputs, threads)
        student = Student(plan, traced, part.nodes, settings.learned, learned)
        try:
            results.append(_trained(student, part, values, exact, learned_from, settings, seed))
        except NotTrainable as error:
            if not results:
                raise
            log.warning("reconstruction ends after %d parts: %s", len(results), error)
            break
        refined, learned = student.refined(refined), student.learned()
        values = [_host(_without_gradient(student, kept, part.leaves)) for kept in values]
        advance()
    return refined, results


def _split(prepared: Graph, feeds: Sequence[Feed], size: int) -> tuple[list[Feed], int]:
    """Batches to learn from, then those that were held back, and how many are learned from."""
    if len(feeds) < 2:
        raise NotTrainable("reconstruction takes at least two calibration pictures, one of them to judge by")
    kept = [feed for index, feed in enumerate(feeds) if index % HELD_BACK]
    found = batches(prepared, kept, size)
    return [*found, *batches(prepared, feeds[::HELD_BACK], size)], len(found)


def parts(traced: Traced, plan: QuantPlan, names: set[str], operators: int) -> Iterator[Part]:
    """The traced nodes, cut where one tensor alone of those before the cut is new to what follows.

    Args:
        names: tensors that FP32 computes too.
        operators: with constant weights, in a part; more where it cannot be cut.
    """
    weighted = {op.name for op in plan.quantized().values() if op.weight is not None}
    sizes = _sizes(traced.nodes)
    later = _read_later(traced)
    start, known = 0, set(traced.inputs)
    for end, node in enumerate(traced.nodes, start=1):
        written = {name for part in traced.nodes[start:end] for name in part.output}
        trained = [name for name in weighted if name in written]
        left = [name for name in written & later[end] if name not in sizes]
        last = end == len(traced.nodes)
        if not last and (len(trained) < operators or left != [node.output[0]] or left[0] not in names):
            continue
        known |= written
        if trained:
            aim = left[0] if not last else max(trained, key=lambda name: _position(traced, name))
            yield Part(traced.nodes[start:end], aim, [] if last else sorted(known & later[end]))
            start = end


def _read_later(traced: Traced) -> list[set[str]]:
    """Tensors that the nodes from each place on read, and the outputs."""
    found = [set(traced.outputs)]
    for node in reversed(traced.nodes):
        found.append(found[-1] | set(reads(node)))
    return found[::-1]


def _sizes(nodes: Sequence[NodeProto]) -> set[str]:
    """Tensors that hang on sizes of other tensors alone."""
    sizes: set[str] = set()
    for node in nodes:
        if node.op_type == "Shape" or sizes.intersection(node.input[:1]):
            sizes.update(node.output)
    return sizes


def _position(traced: Traced, name: str) -> int:
    return next(index for index, node in enumerate(traced.nodes) if name in node.output)


def _exact(prepared: Graph, aim: str, traced: Traced, inputs: Sequence[Feed], threads: int) -> list[Array]:
    """What FP32 computes for a tensor, times the factor that the plan's convolution writes it with."""
    session = onnx_session(prepared.ending_at([aim]).to_light_model(), threads)
    factor = traced.factors.get(aim, np.ones(1, dtype=np.float32))
    shape = (1, -1, 1, 1) if aim in traced.factors else (1,)
    return [session.run(feed, [aim])[0] * factor.reshape(shape) for feed in inputs]


def _trained(
    student: Student,
    part: Part,
    values: Sequence[Mapping[str, Value]],
    exact: Sequence[Array],
    count: int,
    settings: Reconstruction,
    seed: int,
) -> PartResult:
    """Train one part on the first `count` batches; where it ends no better on the others it is put back."""
    held = values[count:], exact[count:]
    start, before = student.state(), _mean_loss(student, part, *held)
    if not student.parameters:
        return PartResult(part.aim, before, before)
    trainer = Trainer(student.parameters, Schedule(settings.learning_rate, settings.warm_up, settings.iterations))
    for number, chosen in enumerate(shuffled(count, settings.iterations, seed)):
        found = student.run(values[chosen], [part.aim])[part.aim]
        trainer.step(number, relative_square(found, exact[chosen]))
    after = _mean_loss(student, part, *held)
    if not after < before:
        student.restore(start)
    return PartResult(part.aim, before, min(after, before))


def _mean_loss(student: Student, part: Part, values: Sequence[Mapping[str, Value]], exact: Sequence[Array]) -> float:
    found = (_without_gradient(student, kept, [part.aim])[part.aim] for kept in values)
    return float(np.mean([float(relative_square(one, other)) for one, other in zip(found, exact, strict=True)]))


def _without_gradient(student: Student, values: Mapping[str, Value], keep: Sequence[str]) -> dict[str, Value]:
    import paddle

    with paddle.no_grad():
        return student.run(values, keep)


def _host(values: Mapping[str, Value]) -> dict[str, Value]:
    """Values as arrays of the host."""
    return {name: np.asarray(value) for name, value in values.items()}
