"""Pictures judged in several processes side by side, each with a share of them.

For runtimes of which one process holds one model at a time, on pictures so small that a second thread helps little: a
text line of a new width costs Paddle more time to prepare kernels, on one core, than to compute.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.dataset import Sample
from eval.evaluation import Outcomes, compare, load_outcomes
from eval.metric import make_metric
from quant.child import answer, child_command, child_environment, ending, raise_answer
from quant.runtime import Session, open_session
from quant.storage import scratch
from quant.target import TargetName
from quant.task import make_task

LEAST_SAMPLES = 40
"""Fewer for each process are judged before it has started."""

_SHARE, _OUTCOMES, _LOG = "share.pickle", "outcomes.npz", "log.txt"


@dataclass(frozen=True)
class Share:
    """What one process judges.

    Attributes:
        fp32, int8: folders of the two models.
        threads: of each session.
        workers: pairs of sessions side by side.
    """

    target: TargetName
    fp32: Path
    int8: Path
    threads: int
    task: str
    inference_yml: dict[str, Any]
    model: str
    metric: str
    samples: Sequence[Sample]
    workers: int = 1

    def sessions(self) -> tuple[Session, Session]:
        """Both models, loaded."""
        fp32, int8 = (open_session(self.target, folder, self.threads) for folder in (self.fp32, self.int8))
        return fp32, int8

    def judged(self, advance: Callable[[], None]) -> Outcomes:
        """The outcomes, in this process."""
        adapter = make_task(self.task, self.inference_yml, self.model)
        return compare(self.sessions, self.samples, adapter, make_metric(self.metric), self.workers, advance)


def judged_in_processes(whole: Share, count: int, advance: Callable[[], None]) -> Outcomes:
    """The outcomes of all samples, in their order, judged in `count` processes; here, where they are few.

    Raises:
        InputError: as `Share.judged` says it.
        OSError: there is no room for the outcomes.
        RuntimeError: a process failed otherwise; names the last line of its log.
    """
    if len(whole.samples) < LEAST_SAMPLES * count or count == 1:
        return whole.judged(advance)
    lock = threading.Lock()

    def step() -> None:
        with lock:
            advance()

    with scratch() as place, ThreadPoolExecutor(count) as pool:
        folders = [place / str(index) for index in range(count)]
        children = [_started(replace(whole, samples=whole.samples[k::count]), folders[k]) for k in range(count)]
        try:
            for future in as_completed([pool.submit(_follow, child, step) for child in children]):
                future.result()
            parts = [_result(child, folder) for child, folder in zip(children, folders, strict=True)]
        except BaseException:
            for child in children:
                child.kill()
            raise
    return _in_order(parts, whole.samples)


def apart(share: Share, folder: Path) -> tuple[list[str], Path]:
    """The command that judges a share in a process of its own, with a folder to work in, and the outcomes' file."""
    (folder / _SHARE).write_bytes(pickle.dumps(share))
    return child_command("quant.shares", folder), folder / _OUTCOMES


def _started(share: Share, folder: Path) -> subprocess.Popen[str]:
    folder.mkdir()
    command, _ = apart(share, folder)
    with (folder / _LOG).open("wb") as log:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=child_environment(), text=True)


def _follow(child: subprocess.Popen[str], step: Callable[[], None]) -> None:
    with child:
        for _ in child.stdout or ():
            step()


def _result(child: subprocess.Popen[str], folder: Path) -> Outcomes:
    if child.returncode == 0:
        return load_outcomes(folder / _OUTCOMES)
    raise_answer(folder, child.returncode)
    raise RuntimeError(
        f"a process that judges ended with {child.returncode}: {ending(child.returncode, folder / _LOG)}"
    )


def _in_order(parts: Sequence[Outcomes], samples: Sequence[Sample]) -> Outcomes:
    """Parts as one, in the order of the samples; pictures that could not be read are missing in all of them."""
    places = {(sample.dataset, sample.id): index for index, sample in enumerate(samples)}
    ids = [name for part in parts for name in part.ids]
    datasets = [name for part in parts for name in part.datasets]
    order = np.argsort([places[key] for key in zip(datasets, ids, strict=True)], kind="stable")
    fp32, int8 = (np.concatenate([getattr(part, name) for part in parts])[order] for name in ("fp32", "int8"))
    broken = [sentence for part in parts for sentence in part.broken]
    return Outcomes([ids[i] for i in order], [datasets[i] for i in order], fp32, int8, broken)


def main(folder: Path) -> None:
    """What a process does; a line on stdout for each picture. The pickle is one that this program has just written."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    share: Share = pickle.loads((folder / _SHARE).read_bytes())
    share.judged(lambda: print(file=channel, flush=True)).save(folder / _OUTCOMES)


if __name__ == "__main__":
    answer(Path(sys.argv[1]), lambda: main(Path(sys.argv[1])))
