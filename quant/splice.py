"""Splicing: a Paddle program of which the first part is new and the rest is the original's.

Some operators have no counterpart in what `quant.program` writes: detections picked by NMS, generation in a loop. They
come last and stay in FP32, so the original's own operators serve: they are put behind the new program and read the
tensors at the cut under the same names. Done on the messages that Paddle stores (framework.proto).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

_MARK = "original."
_ENDS = ("feed", "fetch")


@dataclass(frozen=True)
class Spliced:
    """Attributes: program: as Paddle stores it, without feeds; weights: names of the original's that it needs."""

    program: bytes
    weights: list[str]


def splice(head: bytes, original: bytes, cut: Collection[str]) -> Spliced:
    """The new program, and what the original computes from the tensors at the cut to its outputs.

    Args:
        head: a program of one block that computes the tensors at the cut from inputs of the original.
        original: an inference program.
        cut: tensors that mean the same in both.

    Raises:
        ValueError: the head holds loops or branches.
    """
    result, source = _read(head), _read(original)
    if len(result.blocks) != 1:
        raise ValueError("only a program without loops and branches can be continued")
    block, old = result.blocks[0], source.blocks[0]
    tail = _tail(old.ops, cut)
    weights = sorted({name for op in tail for name in _arguments(op.inputs)} & _stored(old))
    inputs = {name for op in old.ops if op.type == "feed" for name in _arguments(op.outputs)}
    kept = {*cut, *weights, *inputs}
    kept |= {name for op in old.ops if op.type == "fetch" for name in _arguments(op.inputs)}

    def renamed(name: str) -> str:
        return name if name in kept else f"{_MARK}{name}"

    head_ops = [op for op in block.ops if op.type not in _ENDS]
    del block.ops[:]
    block.ops.extend(head_ops)
    known = {variable.name for variable in block.vars}
    for op in tail:
        block.ops.add().CopyFrom(op)
        _rename(block.ops[-1], renamed)
    _copy_variables(old, block, renamed, known)
    for body in source.blocks[1:]:
        result.blocks.add().CopyFrom(body)
        del result.blocks[-1].vars[:]
        for op in result.blocks[-1].ops:
            _rename(op, renamed)
        _copy_variables(body, result.blocks[-1], renamed, set())
    return Spliced(result.SerializeToString(deterministic=True), weights)


def cut_of(original: bytes, available: Collection[str]) -> list[str]:
    """The tensors among the available ones that the original's outputs can be computed from, with as little as can be.

    Args:
        original: an inference program.
    """
    block = _read(original).blocks[0]
    ends = {name for op in block.ops if op.type == "fetch" for name in _arguments(op.inputs)}
    read = {name for op in _tail(block.ops, available) for name in _arguments(op.inputs)}
    return sorted((read | ends) & set(available))


def _read(program: bytes) -> Any:
    """A program as a protobuf message."""
    from paddle.base.proto import framework_pb2

    return framework_pb2.ProgramDesc.FromString(program)  # type: ignore[attr-defined]


def _tail(operators: Iterable[Any], cut: Collection[str]) -> list[Any]:
    """The operators that outputs depend on, back to the cut, in their order.

    A loop writes into what was computed before it, so whatever writes a tensor is needed, not only the last.
    """
    needed: set[str] = set()
    kept = []
    for op in reversed(list(operators)):
        wanted = op.type == "fetch" or needed.intersection(_arguments(op.outputs))
        if wanted:
            needed |= _arguments(op.inputs) - set(cut)
        if wanted and op.type not in _ENDS:
            kept.append(op)
    return kept[::-1]


def _arguments(slots: Iterable[Any]) -> set[str]:
    return {name for slot in slots for name in slot.arguments}


def _stored(block: Any) -> set[str]:
    return {variable.name for variable in block.vars if variable.persistable}


def _rename(operator: Any, renamed: Callable[[str], str]) -> None:
    for slot in (*operator.inputs, *operator.outputs):
        slot.arguments[:] = [renamed(name) for name in slot.arguments]


def _copy_variables(source: Any, block: Any, renamed: Callable[[str], str], known: set[str]) -> None:
    used = {name for op in block.ops for name in _arguments((*op.inputs, *op.outputs))}
    for variable in source.vars:
        name = renamed(variable.name)
        if name in used and name not in known:
            block.vars.add().CopyFrom(variable)
            block.vars[-1].name = name
