"""Quantization-aware training of the whole network: a student of the plan learns from the FP32 network.

Where operators cannot be trained (TopK, loops, NMS), what comes before them learns, and they keep their plan.

It starts as the plan, not as a network with fresh quantizers, and trains what the plan can hold: when it stops, at any
step, what was measured is what is exported. The best state by the error on pictures that it never trained on is kept;
where none is better than the plan, the plan itself is the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from quant.bias import corrected_operators, sequential_biases
from quant.distillation import Aim, Teacher, aims, loss
from quant.errors import NotTrainable
from quant.graph import Graph, reads
from quant.plan import QuantPlan
from quant.recipe import Training
from quant.runtime import Feed
from quant.student import ROUNDED, Reach, Student, leading_to, whole_student
from quant.team import ALONE, Team
from quant.training import Averaged, Schedule, Trainer, batches, load_checkpoint, save_checkpoint, shuffled


@dataclass(frozen=True)
class Evaluation:
    """A point of the learning curve.

    Attributes:
        iteration: steps done.
        loss: mean over the steps since the last point; None before the first step.
        error: of the plan's outputs on held-out pictures.
    """

    iteration: int
    loss: float | None
    error: float


@dataclass
class _Progress:
    """Where a training stands: all that a checkpoint holds beside weights and moments."""

    curve: list[Evaluation]
    best: dict[str, Any]
    seconds: float = 0.0

    @property
    def done(self) -> int:
        return self.curve[-1].iteration

    def best_error(self) -> float:
        return min(point.error for point in self.curve)

    def over(self, settings: Training) -> bool:
        """Whether time or patience is up."""
        return self.seconds > 60 * settings.minutes or self.stale() >= settings.patience

    def stale(self) -> int:
        """Evaluations since the best one."""
        errors = [point.error for point in self.curve]
        return len(errors) - 1 - errors.index(min(errors))


def check_trainable(prepared: Graph, plan: QuantPlan, settings: Training, feed: Feed) -> str:
    """Raise what `distil` would raise for an operator or a node, before anything else takes minutes.

    Returns:
        What is left out of training, in words; empty where nothing is.
    """
    return _trainable(prepared, plan, settings, feed).left_out


@dataclass(frozen=True)
class _Trainable:
    """A student of what can be trained, the tensors that it learns to give, and what is left out, in words."""

    student: Student
    sought: list[Aim]
    left_out: str


def _trainable(prepared: Graph, plan: QuantPlan, settings: Training, feed: Feed) -> _Trainable:
    """All of a plan, or what comes before operators that cannot be trained: there it learns what these read."""
    whole = whole_student(prepared, plan, settings.learned, settings.quantizers)
    reach = whole.reach(feed)
    if reach.refusal is None:
        student, ends, left_out = whole, prepared.outputs, ""
    else:
        ends = _ends(prepared, whole, reach)
        if not ends:
            raise reach.refusal
        nodes = leading_to(reach.trained, whole.nodes)
        student = Student(plan, whole.traced, nodes, settings.learned, quantizers=settings.quantizers)
        left_out = (
            f"{_share(plan, reach):.0%} of the multiply-accumulates in INT8 are trained; "
            f"{str(reach.refusal).partition(';')[0]}"
        )
    sought = aims(
        prepared,
        [*settings.nodes, *_spread(student, settings)],
        outputs=settings.outputs,
        nodes_weight=settings.nodes_weight,
        ends=ends,
        within=reach.computed,
    )
    if reach.refusal and (behind := [aim.tensor for aim in sought if aim.tensor not in reach.computed]):
        raise NotTrainable(f"qat.nodes: '{behind[0]}' comes behind what can be trained; {reach.refusal}")
    _check_nodes(sought, student)
    return _Trainable(student, sought, left_out)


def _ends(prepared: Graph, student: Student, reach: Reach) -> list[str]:
    """FP32 tensors that weights lead to and that the rest of the network, or its caller, reads."""
    rest = [node for node in student.nodes if not reach.computed.issuperset(node.output)]
    wanted = dict.fromkeys([*(name for node in rest for name in reads(node)), *prepared.outputs])
    read_by = {node.output[0]: node.input[0] for node in student.nodes if node.op_type == ROUNDED}
    known = _whole(student).intersection(prepared.producers())
    sources = dict.fromkeys(read_by.get(name, name) for name in wanted if name in reach.trained)
    return [name for name in sources if name in known]


def _share(plan: QuantPlan, reach: Reach) -> float:
    """Of the work in INT8, the part that is trained."""
    macs = {name: op.macs for name, op in plan.quantized().items()}
    return sum(count for name, count in macs.items() if name in reach.trained) / max(sum(macs.values()), 1)


def distil(
    prepared: Graph,
    plan: QuantPlan,
    feeds: Sequence[Feed],
    settings: Training,
    evaluate: Callable[[QuantPlan], float],
    *,
    seed: int,
    threads: int,
    bias_pictures: int = 0,
    checkpoint: Path | None = None,
    advance: Callable[[], None] = lambda: None,
    team: Team = ALONE,
) -> tuple[QuantPlan, list[Evaluation]]:
    """The best plan seen, and the learning curve.

    Args:
        feeds: calibration pictures.
        evaluate: error of a plan on pictures that are not among them.
        bias_pictures: calibration pictures that biases which do not learn are corrected on.
        checkpoint: file to go on from where it exists, written at every evaluation.
        advance: called after each iteration.
        team: of processes that train together; each calls this with the same arguments.

    Raises:
        NotTrainable: an operator has no differentiable counterpart, or a tensor of `nodes` is not in this plan.
        InputError: a tensor of `nodes` is not there.
    """

    inputs = batches(prepared, feeds, settings.batch)
    trainable = _trainable(prepared, plan, settings, inputs[0])
    student, sought = trainable.student, trainable.sought
    follow = bias_pictures > 0 and "biases" not in settings.learned
    corrected = [name for name in corrected_operators(plan) if name in _written(student)] if follow else []
    teacher = Teacher(prepared, sought, threads, corrected)
    trainer = Trainer(student.parameters, Schedule(settings.learning_rate, settings.warm_up, settings.iterations))
    averaged = Averaged(student.state(), settings.average)

    def refined() -> QuantPlan:
        found = student.refined(plan)
        if trainable.left_out:
            found.notes.append(f"QAT: {trainable.left_out}")
        if not follow:
            return found
        return replace(found, bias_shifts=sequential_biases(prepared, found, feeds[:bias_pictures], threads))

    progress = _Progress([Evaluation(0, None, team.led(lambda: evaluate(plan)))], student.state())
    if checkpoint is not None and (saved := load_checkpoint(checkpoint)) is not None:
        progress = _Progress([Evaluation(**point) for point in saved["curve"]], saved["best"], saved["seconds"])
        student.restore(saved["student"])
        averaged.state = saved["averaged"]
        trainer.restore(saved["trainer"])
    begun, losses = time.monotonic() - progress.seconds, list[float]()
    mine = islice(shuffled(len(inputs), settings.iterations * team.size, seed), team.rank, None, team.size)
    for step, chosen in enumerate(mine):
        if step < progress.done:
            continue
        if progress.over(settings):  # perhaps it was so already when the checkpoint was written
            break
        answer, means = teacher.answer(inputs[chosen])
        found = student.run(inputs[chosen], [aim.tensor for aim in sought], means)
        losses.append(trainer.step(step, loss(sought, found, answer), team))
        student.follow(settings.momentum, team)
        averaged.update(student.state())
        advance()
        late = team.first(time.monotonic() - begun) > 60 * settings.minutes
        if (step + 1) % settings.evaluate_every and step + 1 < settings.iterations and not late:
            continue
        current = student.state()
        student.restore(averaged.state)
        error = team.led(lambda: evaluate(refined()))
        student.restore(current)
        if error < progress.best_error():
            progress.best = averaged.state
        progress.curve.append(Evaluation(step + 1, math.fsum(losses) / len(losses), error))
        progress.seconds, losses = team.first(time.monotonic() - begun), []
        if checkpoint is not None and team.leads:
            save_checkpoint(checkpoint, _document(progress, current, averaged.state, trainer.state()))
    student.restore(progress.best)
    return (refined() if progress.stale() < len(progress.curve) - 1 else plan), progress.curve


def _check_nodes(sought: Sequence[Aim], student: Student) -> None:
    """Raise NotTrainable for a tensor that stands inside of an integer chain, where it is scaled or not computed."""
    whole = _whole(student)
    if lost := [aim.tensor for aim in sought if aim.tensor not in whole]:
        raise NotTrainable(f"qat.nodes: '{lost[0]}' flows in integers in this plan; name a tensor before or after it")


def _spread(student: Student, settings: Training) -> list[str]:
    """What every `settings.every`-th operator with weights writes, of those that write what FP32 writes."""
    if not settings.every:
        return []
    whole = _whole(student)
    written = [op.name for op in student.plan.quantized().values() if op.weight is not None and op.name in whole]
    return written[settings.every - 1 :: settings.every]


def _whole(student: Student) -> set[str]:
    """Tensors of the student that stand for FP32's of the same name: those inside of an integer chain are scaled."""
    return _written(student) - set(student.traced.factors)


def _written(student: Student) -> set[str]:
    return {name for node in student.nodes for name in node.output}


def _document(
    progress: _Progress, student: dict[str, Any], averaged: dict[str, Any], trainer: dict[str, Any]
) -> dict[str, Any]:
    curve = [asdict(point) for point in progress.curve]
    return {
        "curve": curve,
        "best": progress.best,
        "seconds": progress.seconds,
        "student": student,
        "averaged": averaged,
        "trainer": trainer,
    }
