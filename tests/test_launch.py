"""Training by several processes of Paddle's launcher: the steps are those of all their batches together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_plan import plan_of
from test_qat import feeds_of, settings
from test_reconstruction import coarse
from test_rungs import climbed, job_of
from tiny_models import TinyNet, run, small_detector

from quant.distillation import Teacher, aims, loss
from quant.errors import NotTrainable
from quant.launch import distil_together, places
from quant.plan import QuantPlan
from quant.qat import Evaluation
from quant.recipe import Training
from quant.runtime import Feed
from quant.sensitivity import output_error
from quant.simulation import simulated_session
from quant.student import KINDS, whole_student
from quant.training import Averaged, Schedule, Trainer, batches, load_checkpoint, shuffled

FEW: dict[str, Any] = {"iterations": 40, "evaluate_every": 5, "learned": [*KINDS], "batch": 1, "every": 0}


def held_out(net: TinyNet) -> list[Feed]:
    return [net.feed(seed) for seed in range(50, 53)]


def error_of(net: TinyNet, plan: QuantPlan) -> float:
    exact = [run(net.model(), feed) for feed in held_out(net)]
    return output_error(simulated_session(net.graph(), plan, 1), held_out(net), exact)


def stepped(net: TinyNet, plan: QuantPlan, chosen: Training, processes: int) -> list[float]:
    """Errors of a training in this process, each of whose steps takes the mean over several batches."""
    student, sought = whole_student(net.graph(), plan, chosen.learned, chosen.quantizers), aims(net.graph())
    teacher, inputs = Teacher(net.graph(), sought, 1), batches(net.graph(), feeds_of(net), chosen.batch)
    trainer = Trainer(student.parameters, Schedule(chosen.learning_rate, chosen.warm_up, chosen.iterations))
    order, errors = list(shuffled(len(inputs), processes * chosen.iterations, 0)), [error_of(net, plan)]
    averaged = Averaged(student.state(), chosen.average)
    for step in range(chosen.iterations):
        feeds = [inputs[number] for number in order[processes * step :][:processes]]
        found = [loss(sought, student.run(f, [aim.tensor for aim in sought]), teacher.answer(f)[0]) for f in feeds]
        trainer.step(step, sum(found) / processes)
        averaged.update(student.state())
        if (step + 1) % chosen.evaluate_every == 0:
            current = student.state()
            student.restore(averaged.state)
            errors.append(error_of(net, student.refined(plan)))
            student.restore(current)
    return errors


def trained(file: Path) -> tuple[QuantPlan, list[Evaluation]]:
    """By two processes of Paddle's launcher, on the processor."""
    net, chosen = small_detector(), settings(**FEW, processes=2)
    shared = (feeds_of(net), held_out(net), chosen)
    return distil_together(net.graph(), coarse(plan_of(net)), *shared, seed=0, threads=1, checkpoint=file)


def kill_training(file: Path) -> None:
    """Kill a run as soon as it has left a checkpoint; everything that it started ends with it."""
    code = "import sys; from pathlib import Path; from test_launch import trained; trained(Path(sys.argv[1]))"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = subprocess.Popen([sys.executable, "-c", code, str(file)], env={**os.environ, "PYTHONPATH": paths})
    while not file.exists():
        assert run.poll() is None, "it ended without a checkpoint"
        time.sleep(0.05)
    started = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    assert len(started) >= 3, "the launcher and two processes"
    assert psutil.wait_procs(started, timeout=60)[1] == []


@pytest.mark.slow
def test_two_processes_take_the_steps_of_both_their_batches(tmp_path: Path) -> None:
    """Killed and started again, their curve is that of one process that takes both batches itself."""
    net, file = small_detector(), tmp_path / "last"
    plan = coarse(plan_of(net))
    kill_training(file)
    saved = load_checkpoint(file)
    assert saved is not None and saved["curve"][-1]["iteration"] < FEW["iterations"]
    refined, curve = trained(file)
    assert [point.iteration for point in curve] == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    errors, expected = [point.error for point in curve], stepped(net, plan, settings(**FEW), 2)
    assert errors[:3] == pytest.approx(expected[:3], rel=1e-3)
    assert errors == pytest.approx(expected, rel=0.05)
    assert error_of(net, refined) == pytest.approx(min(errors), rel=1e-4) and min(errors) < 0.8 * errors[0]


@pytest.mark.slow
def test_what_is_wrong_in_a_process_is_said_by_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = TinyNet((1, 3, 4, 4))
    last = net.conv(net.op("Sin", net.conv("x", 3, 3), name="strange"), 3, 3)
    with pytest.raises(NotTrainable, match="'strange' is a Sin"):
        climbed(
            job_of("qat", tmp_path, monkeypatch, net, "qat.processes=2"),
            net,
            plan_of(net).with_only({last}, "kept"),
            0.0,
        )


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [
        (0, "", (["--nproc_per_node", "2", "--backend", "gloo"], {"CUDA_VISIBLE_DEVICES": ""})),
        (1, "", (["--nproc_per_node", "2", "--backend", "gloo"], {"CUDA_VISIBLE_DEVICES": ""})),
        (4, "", (["--devices", "0,1"], {})),
        (3, "5,6,7", (["--devices", "5,6"], {})),
    ],
    ids=["none", "too few", "all", "chosen ones"],
)
def test_each_process_has_a_gpu_or_none_has(
    gpus: int, visible: str, expected: tuple[list[str], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paddle.device.cuda.device_count", lambda: gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert places(2) == expected
