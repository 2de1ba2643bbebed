"""What all twins share: a process of their own, a training that ends on time, the official layout of the result."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quant.child import answer, child_command, child_environment, raise_answer
from quant.errors import InputError
from quant.export import write_inference_yml

_WARM_UP = 20  # steps


def train_in_child(module: str, folder: Path, seed: int, minutes: float) -> None:
    """Run `python -m MODULE FOLDER SEED MINUTES`: PIR programs are written under a flag that counts once a process.

    Raises:
        InputError: the training failed; its last line is named.
        OSError: there is no room for the twin.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = {"FLAGS_enable_pir_api": "1", "GLOG_minloglevel": "2", "PYTHONWARNINGS": "ignore"}
    command, environment = child_command(module, folder, seed, minutes), child_environment(**flags)
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        raise_answer(folder, child.returncode)
        last = (child.stderr.strip().splitlines() or [f"the process ended with {child.returncode}"])[-1]
        raise InputError(f"the twin in {folder} was not trained: {last}")


def train_as_asked(train: Callable[[Path, int, float], None]) -> None:
    """The main of a module that `train_in_child` runs."""
    folder = Path(sys.argv[1])
    answer(folder, lambda: train(folder, int(sys.argv[2]), float(sys.argv[3])))


def train_until(
    end: float,
    parameters: Sequence[Any],
    rate: float,
    batch_loss: Callable[[], Any],
    steps: int | None = None,
) -> int:
    """AdamW with a learning rate that falls from `rate` to nearly 0 along a cosine, over time; returns the steps.

    Args:
        end: by `time.monotonic`, when to stop.
        batch_loss: the loss of the next batch.
        steps: the most steps, over which the rate falls instead if they end before the time: same steps, same weights.
    """
    import paddle

    optimizer = paddle.optimizer.AdamW(
        rate, parameters=list(parameters), weight_decay=0.01, grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0)
    )
    start, done = time.monotonic(), 0
    while time.monotonic() < end and (steps is None or done < steps):
        passed = (time.monotonic() - start) / (end - start)
        progress = max(passed, done / steps) if steps else passed
        warm = min(1.0, (done + 1) / _WARM_UP)
        optimizer.set_lr(rate * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2))
        batch_loss().backward()
        optimizer.step()
        optimizer.clear_grad()
        done += 1
    return done


def save_inference(
    net: Any, inputs: Mapping[str, Sequence[int | None]], inference_yml: Mapping[str, Any], folder: Path
) -> None:
    """Write a network as PaddleX wants it: inference.json, inference.pdiparams, inference.yml.

    Args:
        net: a layer.
        inputs: of its `forward`, by name and in their order: shapes, None for an open size.
    """
    import paddle

    folder.mkdir(parents=True, exist_ok=True)
    net.eval()
    specs = [paddle.static.InputSpec(list(shape), "float32", name) for name, shape in inputs.items()]
    paddle.jit.save(net, str(folder / "inference"), input_spec=specs)
    write_inference_yml(inference_yml, folder)
