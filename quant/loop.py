"""Models that write their output step by step, in a loop: their ONNX form, and whether a runtime computes it rightly.

A loop feeds its own choices back, so that one wrong value changes every step behind it, and what a loop carries from
step to step (caches of a decoder) can be carried from call to call by mistake. So outputs of such models are compared
step by step over several calls in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from onnx import GraphProto, ModelProto

from quant.errors import InputError, Unavailable
from quant.graph import Graph, bodies
from quant.runtime import Feed, Session, onnx_session, open_session
from quant.target import TargetName

CALLS = 2
"""How often every picture is computed, one after the other in one session."""


def has_loop(graph: Graph) -> bool:
    return any(node.op_type == "Loop" for node in graph.nodes)


def with_clean_bodies(model: ModelProto) -> ModelProto:
    """The model with what paddle2onnx writes wrong in inner graphs put right; it computes the same.

    * Fresh names for what a body is given, where names from around it are reused: ONNX wants a name to stand for one
      value everywhere. onnxruntime does not mind; OpenVINO takes such an input for the value around the loop.
    * No sizes for what a body gives back: some of those written are wrong, and they can be inferred.
    """
    result = ModelProto()
    result.CopyFrom(model)
    known = set(_names(result.graph))
    for node in result.graph.node:
        for body in bodies([node]):
            _clean(body, known)
    return result


def _clean(body: GraphProto, known: set[str]) -> None:
    del body.value_info[:]
    for info in body.output:
        info.type.tensor_type.ClearField("shape")
    clashes = [info.name for info in body.input if info.name in known]
    fresh = {name: _fresh(f"{name}.carried", known) for name in clashes}
    for info in body.input:
        info.name = fresh.get(info.name, info.name)
    known.update(_names(body))
    _rename_uses(body, fresh)
    for node in body.node:
        for inner in bodies([node]):
            _clean(inner, known)


def _rename_uses(graph: GraphProto, fresh: dict[str, str]) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = fresh.get(name, name)
        for inner in bodies([node]):
            given = {info.name for info in inner.input}
            _rename_uses(inner, {old: new for old, new in fresh.items() if old not in given})
    for info in graph.output:
        info.name = fresh.get(info.name, info.name)


def _fresh(stem: str, known: set[str]) -> str:
    name, number = stem, 1
    while name in known:
        number += 1
        name = f"{stem}.{number}"
    known.add(name)
    return name


def _names(graph: GraphProto) -> Iterator[str]:
    yield from (info.name for info in (*graph.input, *graph.initializer))
    yield from (name for node in graph.node for name in node.output)


def check_calls(
    session: Session, feeds: Sequence[Feed], reference: Sequence[Sequence[np.ndarray]], tolerance: float, what: str
) -> None:
    """Run every picture several times in a row in one session, and compare each step with what it should be.

    Args:
        reference: the right outputs of each picture, steps along the second axis.
        tolerance: largest difference of a number allowed; token ids have to be equal.
        what: is compared, and with what, for the message.

    Raises:
        InputError: a step differs, or there are more or fewer steps; names the first one.
    """
    calls = [(feed, outputs) for _ in range(CALLS) for feed, outputs in zip(feeds, reference, strict=True)]
    for number, (feed, outputs) in enumerate(calls, start=1):
        apart = first_step_apart(session.run(feed), outputs, tolerance)
        if apart is not None:
            before = "1 call" if number == 2 else f"{number - 1} calls"
            later = "" if number == 1 else f", after {before} without a difference"
            raise InputError(
                f"{what} in call {number}{later}, from step {apart} on: a model with a loop has to give the same steps "
                "in every call, so nothing is quantized or judged on this form of it"
            )


def check_runtime(target: TargetName, folder: Path, feeds: Sequence[Feed], tolerance: float, threads: int) -> None:
    """See whether a target's runtime computes an FP32 ONNX model with a loop as onnxruntime does, call after call.

    Raises:
        Unavailable: it does not; FP32 and INT8 would be judged on a model that is not the one meant.
    """
    exact = onnx_session(folder / "inference.onnx", threads)
    reference = [exact.run(feed) for feed in feeds]
    try:
        session = open_session(target, folder, threads)
        check_calls(session, feeds, reference, tolerance, f"FP32 on {target} differs from onnxruntime")
    except InputError as error:
        raise Unavailable(str(error), "Use this model on another target, for example --target onnxruntime") from error


def check_repeats(target: TargetName, folder: Path, feeds: Sequence[Feed], tolerance: float, threads: int) -> None:
    """See whether an artifact with a loop gives in later calls what it gives in the first one of a fresh session.

    Raises:
        InputError: it does not: something is carried from call to call.
    """
    reference = [open_session(target, folder, threads).run(feed) for feed in feeds]
    session = open_session(target, folder, threads)
    check_calls(session, feeds, reference, tolerance, f"the artifact for {target} differs from its own first call")


def first_step_apart(found: Iterable[np.ndarray], expected: Iterable[np.ndarray], tolerance: float) -> int | None:
    """The first step, counted from 1, at which any output differs; None where all are equal.

    Args:
        found, expected: arrays [1, steps, ...]; of token ids or of floats.
    """
    apart: list[int] = []
    for one, other in zip(found, expected, strict=True):
        if one.ndim < 2 or one.ndim != other.ndim or one.shape[2:] != other.shape[2:]:
            return 1
        steps = min(one.shape[1], other.shape[1])
        difference = np.abs(one[:, :steps].astype(np.float64) - other[:, :steps])
        allowed = tolerance if np.issubdtype(other.dtype, np.floating) else 0.0
        wrong = ~(difference <= allowed)  # NaN is wrong, too
        places = np.flatnonzero(wrong.reshape(one.shape[0], steps, -1).any(axis=(0, 2)))
        if places.size:
            apart.append(int(places[0]) + 1)
        elif one.shape[1] != other.shape[1]:
            apart.append(steps + 1)
    return min(apart, default=None)
