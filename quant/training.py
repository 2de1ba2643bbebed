"""What every training of a student shares: batches, steps of Adam, a rate that warms up and falls, checkpoints."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quant.graph import Graph
from quant.kernels import Array
from quant.runtime import Feed
from quant.student import Kind
from quant.team import ALONE, Team

RATES: dict[Kind, float] = {"weights": 1.0, "biases": 0.03, "scales": 0.01, "ranges": 0.01}
"""Rates beside one another, in the units of `quant.student`: while an integer goes one step, a bias goes
0.03 of its unit and a scale 1 %."""

LOWEST = 0.05
"""Share of the rate that is left in the end."""


@dataclass(frozen=True)
class Schedule:
    """A learning rate that rises to `rate` over `warm_up` steps and falls along a cosine until `steps`."""

    rate: float
    warm_up: int
    steps: int

    def at(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        progress = min((step - self.warm_up) / max(self.steps - self.warm_up, 1), 1.0)
        return self.rate * (LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * progress)) / 2)


class Trainer:
    """Adam over what a student learns."""

    def __init__(self, parameters: Mapping[tuple[Kind, str], Any], schedule: Schedule) -> None:
        from paddle import nn, optimizer

        groups: list[Any] = [
            {"params": members, "learning_rate": RATES[kind]}
            for kind in RATES
            if (members := [value for (other, _), value in parameters.items() if other == kind])
        ]
        clip = nn.ClipGradByGlobalNorm(1.0)
        self._adam = optimizer.Adam(schedule.rate, beta2=0.99, parameters=groups, grad_clip=clip)
        self._schedule, self._parameters = schedule, [*parameters.values()]

    def step(self, number: int, loss: Any, team: Team = ALONE) -> float:
        """One step, counted from 0, by the mean of what a team found; returns the loss before it."""
        from paddle.utils import unique_name

        self._adam.set_lr(self._schedule.at(number))
        loss.backward()
        team.average_gradients(self._parameters)
        with unique_name.guard():  # its moments are named by what they belong to alone, in every process
            self._adam.step()
        self._adam.clear_grad()
        return team.mean(float(loss))

    def state(self) -> dict[str, Any]:
        return dict(self._adam.state_dict())

    def restore(self, state: Mapping[str, Any]) -> None:
        self._adam.set_state_dict(dict(state))


class Averaged:
    """A moving average of states, in which what goes to and fro at each step cancels.

    Source: Tarvainen and Valpola, "Mean teachers are better role models", 2017, section 2.
    """

    def __init__(self, state: Mapping[str, Array], kept: float) -> None:
        self.state, self._kept = dict(state), kept

    def update(self, state: Mapping[str, Array]) -> None:
        """Take in the state after a step."""
        self.state = {name: self._kept * self.state[name] + (1 - self._kept) * now for name, now in state.items()}


def batches(prepared: Graph, feeds: Sequence[Feed], size: int) -> list[Feed]:
    """Pictures of equal shapes side by side, at most `size`; alone where the model takes one, or more than pictures."""
    fixed = any((shape := prepared.shape(name)) is not None and shape[0] is not None for name in prepared.inputs)
    groups: dict[tuple[Any, ...], list[Feed]] = defaultdict(list)
    for feed in feeds:
        groups[tuple((name, values.shape) for name, values in feed.items())].append(feed)
    found = []
    for group in groups.values():
        step = 1 if fixed or len(group[0]) > 1 else size
        for start in range(0, len(group), step):
            part = group[start : start + step]
            found.append({name: np.concatenate([feed[name] for feed in part]) for name in part[0]})
    return found


def shuffled(count: int, steps: int, seed: int) -> Iterator[int]:
    """Which batch each step takes: all of them in a new order, again and again; the same for the same seed."""
    order: list[int] = []
    for step in range(steps):
        if step % count == 0:
            order = np.random.default_rng([seed, step // count]).permutation(count).tolist()
        yield order[step % count]


def relative_square(found: Any, exact: Array) -> Any:
    """Squared distance from what is exact, in units of its variance."""
    from quant.kernels import tensor

    difference = found - tensor(exact)
    return (difference * difference).mean() / max(float(exact.var()), 1e-12)


def save_checkpoint(file: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint as a whole or not at all."""
    import paddle

    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.new")
    paddle.save(dict(state), str(temporary))
    temporary.replace(file)


def load_checkpoint(file: Path) -> dict[str, Any] | None:
    """What was saved, or None where there is none or it cannot be read."""
    import paddle

    try:
        return dict(paddle.load(str(file))) if file.is_file() else None
    except (OSError, ValueError, EOFError, RuntimeError):
        return None
