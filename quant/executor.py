"""Many models: each one's command in a process of its own, on this machine or, by Ray, on the nodes of a cluster.

A job is the command line that a user would give for that model alone, so nothing is done differently here. Where an
evaluation has many samples, the job offers it and ends; the shards are work like the jobs, and when all are judged the
job is started again and goes on from there. On this machine as much is done at a time as cores and memory allow, by
the peaks that were measured before; for clusters see `quant.cluster`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from quant.archive import Progress
from quant.errors import InputError
from quant.parcel import receive_runs
from quant.shards import Offer, joined
from quant.work import Attempt, Ended, ModelJob, Shard, Task, attempt_job, failed, judge_shard, note_peak, peak_of

log = logging.getLogger(__name__)

ExecutorName = Literal["local", "ray"]
Finished = Iterator[tuple[ModelJob, Ended]]

_MEMORY_SHARE = 0.8


class Pool(Protocol):
    """Places where work is done."""

    def submit(self, task: Task) -> None: ...

    def next_ended(self) -> tuple[Task, Ended]:
        """Wait for the next piece of work that ends."""
        ...

    def __enter__(self) -> Pool: ...

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        """End what is still being done."""
        ...


@dataclass
class _Gathering:
    """Outcomes of what an attempt has offered, as they arrive."""

    attempt: Attempt
    offers: Sequence[Offer]
    node: str
    parts: dict[tuple[str, int], Ended] = field(default_factory=dict)

    @cached_property
    def shards(self) -> list[Shard]:
        job = self.attempt.job
        return [Shard(job, offer, number, self.node) for offer in self.offers for number in range(len(offer.pieces))]

    def take(self, shard: Shard, ended: Ended) -> bool:
        """Note how a shard ended; whether it was the last one."""
        self.parts[shard.offer.stage, shard.number] = ended
        return len(self.parts) == len(self.shards)

    def outcomes(self, offer: Offer) -> bytes:
        """Those of an offer's samples, as one file.

        Raises:
            InputError: some were not judged, or did not arrive as they were sent.
        """
        parts = [self.parts[offer.stage, number] for number in range(len(offer.pieces))]
        if bad := next((part for part in parts if part.code), None):
            raise InputError(bad.said)
        return joined(part.checked_parcel() for part in parts)

    def next_attempt(self) -> Attempt:
        """The job again, with what was judged for it; alone, where a shard failed."""
        try:
            new = {offer.stage: self.outcomes(offer) for offer in self.offers}
        except InputError as error:
            model = self.attempt.model
            log.warning("%s: a shard of its evaluation failed (%s); it judges all samples itself", model, error)
            return replace(self.attempt, shard_samples=0, node=self.node, begun=True)
        return replace(self.attempt, outcomes={**self.attempt.outcomes, **new}, node=self.node, begun=True)


def spread(
    jobs: Sequence[ModelJob],
    results: Path,
    executor: ExecutorName,
    count: int | None,
    address: str | None,
    shard_samples: int = 0,
    progress: Progress | None = None,
) -> Finished:
    """Do all jobs; each is given as it ends.

    Args:
        count: most at a time on this machine; None: as many as cores and memory allow.
        address: of a Ray cluster; None: RAY_ADDRESS, else a new one on this machine.
        shard_samples: evaluations of more samples are judged in shards of at most so many; 0: none.
        progress: is told how far the models of this machine have come.

    Raises:
        InputError: the cluster cannot do the jobs.
        Unavailable: Ray is not installed, or no cluster answers.
    """
    if executor == "ray":
        from quant.cluster import RayPool

        return finish(jobs, results, RayPool(jobs, results, address), shard_samples)
    return finish(jobs, results, LocalPool(results, count, progress), shard_samples)


def finish(jobs: Sequence[ModelJob], results: Path, pool: Pool, shard_samples: int) -> Finished:
    """Do all jobs in a pool; each is given as it ends, its runs having arrived in the results."""
    different = dict.fromkeys(jobs)
    left = len(different)
    gathering: dict[ModelJob, _Gathering] = {}
    with pool:
        for job in different:
            pool.submit(Attempt(job, shard_samples))
        while left:
            if done := _step(pool, gathering, results):
                left -= 1
                yield done


def _step(pool: Pool, gathering: dict[ModelJob, _Gathering], results: Path) -> tuple[ModelJob, Ended] | None:
    """Take what ends next, and give what follows from it to the pool; a job that is done, and how it ended.

    What belongs to a finished evaluation, all its pictures among it, goes with the frame of this function.
    """
    task, ended = pool.next_ended()
    note_peak(task, results, ended)
    if isinstance(task, Shard):
        if gathering[task.job].take(task, ended):
            pool.submit(gathering.pop(task.job).next_attempt())
    elif offers := [offer for offer in ended.offers if offer.stage not in task.outcomes]:
        gathering[task.job] = _Gathering(task, offers, ended.node)
        for shard in gathering[task.job].shards:
            pool.submit(shard)
    elif ended.offers:  # by a node that cannot use what another kind of machine has judged
        pool.submit(replace(task, shard_samples=0, begun=True))
    else:
        return task.job, _received(task, ended, results)
    return None


def _received(attempt: Attempt, ended: Ended, results: Path) -> Ended:
    """The end of a job whose runs are in the results, or what is wrong with them."""
    try:
        if parcel := ended.checked_parcel():
            receive_runs(parcel, results)
    except InputError as error:
        return failed(f"{attempt.model}: {error}")
    return ended


class LocalPool:
    """Processes of this machine."""

    def __init__(self, results: Path, count: int | None, progress: Progress | None = None) -> None:
        """Args: count: most at a time; None: as many as cores and memory allow."""
        import psutil

        self._results, self._count, self._progress = results, count, progress
        self._cores = os.cpu_count() or 1
        self._room = int(_MEMORY_SHARE * psutil.virtual_memory().available)
        self._waiting: deque[Task] = deque()
        self._running: dict[Future[Ended], Task] = {}
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(count or self._cores)

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stop.set()
        self._threads.shutdown()

    def submit(self, task: Task) -> None:
        """Work on something; what belongs to a job that was begun goes first."""
        if isinstance(task, Shard) or task.begun:
            self._waiting.appendleft(task)
        else:
            self._waiting.append(task)

    def next_ended(self) -> tuple[Task, Ended]:
        self._start()
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        future = done.pop()
        return self._running.pop(future), future.result()

    def _start(self) -> None:
        while self._waiting:
            others = {task: peak_of(task, self._results) for task in self._running.values()}
            task = self._waiting[0]
            peaks = {**others, task: peak_of(task, self._results)}
            if not fits(task, list(others), self._count, self._cores, self._room, peaks):
                return
            self._running[self._threads.submit(self._done, self._waiting.popleft())] = task

    def _done(self, task: Task) -> Ended:
        if isinstance(task, Shard):
            return judge_shard(task.share, self._stop)
        return attempt_job(task, self._results, self._stop, self._progress)


def fits(
    task: Task, running: Sequence[Task], count: int | None, cores: int, room: int, peaks: Mapping[Task, int]
) -> bool:
    """Whether work can be started beside what is being done; the first one always can."""
    if not running:
        return True
    if count is not None and len(running) >= count:
        return False
    if count is None and sum(other.threads for other in running) + task.threads > cores:
        return False
    return sum(peaks[other] for other in running) + peaks[task] <= room
