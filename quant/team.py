"""Processes that train one student together: each learns from batches of its own, and all take the same steps.

Paddle's launcher starts them and tells each its place (see `quant.launch`). The clock and the evaluations that count
are those of the first of them, so that no two decide differently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Team:
    """A process among those that train together; by default it is alone.

    Attributes:
        rank: its number, from 0.
        size: of them all.
    """

    rank: int = 0
    size: int = 1
    _asked: Iterator[int] = field(default_factory=count, compare=False, repr=False)

    @property
    def leads(self) -> bool:
        """Whether this process evaluates and writes."""
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[Any]) -> None:
        """Replace gradients by their mean over all processes."""
        if self.size > 1:
            from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

            average: Any = fused_allreduce_gradients
            average(list(parameters), None)

    def mean(self, value: float) -> float:
        """Over all processes."""
        return self._reduced([value], "SUM")[0] / self.size

    def largest(self, values: Sequence[float]) -> list[float]:
        """Each of some values, where it is largest."""
        return self._reduced(values, "MAX")

    def first(self, value: float) -> float:
        """What the process that leads gives."""
        if self.size == 1:
            return value
        from paddle import distributed

        shared = self._shared([value])
        distributed.broadcast(shared, 0)
        return float(shared)

    def led(self, work: Callable[[], float]) -> float:
        """What the process that leads works out while the others wait: gloo itself gives up after half a minute."""
        if self.size == 1:
            return work()
        from paddle.base import core

        store, name = core.create_or_get_global_tcp_store(), f"led/{next(self._asked)}"
        if self.leads:
            store.set(name, repr(work()))
        return float(store.get(name))

    def _reduced(self, values: Sequence[float], operation: str) -> list[float]:
        if self.size == 1 or not values:
            return [*values]
        from paddle import distributed

        shared = self._shared(values)
        distributed.all_reduce(shared, getattr(distributed.ReduceOp, operation))
        return list(map(float, shared.numpy()))

    def _shared(self, values: Sequence[float]) -> Any:
        from paddle import to_tensor

        return to_tensor(np.array(values, dtype=np.float64))


ALONE = Team()


def launched_team() -> Team:
    """The team that Paddle's launcher started this process for, which meets here."""
    from quant.program import import_paddle

    rank, size = (int(os.environ[f"PADDLE_{name}"]) for name in ("TRAINER_ID", "TRAINERS_NUM"))
    if size > 1:
        import_paddle().disable_static()
        from paddle import distributed

        distributed.init_parallel_env()
    return Team(rank, size)
