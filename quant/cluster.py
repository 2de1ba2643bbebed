"""Ray: models, and shards of large evaluations, as tasks on the nodes of a cluster.

A task gets what it needs as bytes, and what comes of it is bytes with their hash: runs as a zip, outcomes as a file.
What is lost with a node is done again, on another one where there is one: Ray by itself may choose the same again, and
repeats for ever what a node has no memory for. Ray also waits for ever for a node that is large enough; here it
is said at once what is asked for and what there is.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import socket
import tempfile
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from quant.archive import file_sha256
from quant.child import child_environment
from quant.errors import InputError, Unavailable
from quant.job import TWINS
from quant.manifest import newest_run
from quant.parcel import packed_runs, run_folders, sha256_of, unpacked
from quant.recipe import recipes_dir
from quant.shards import arrived, for_others, machine, named_as_there
from quant.shares import Share
from quant.stage import digest
from quant.work import USUAL_PEAK, Attempt, Ended, ModelJob, Shard, Task, attempt_job, failed, judge_shard, known_peak

RETRIES = 3

_GIB = 1 << 30
_STORE = 1 << 30
"""Bytes of shared memory for parcels, where the cluster is started here; Ray writes more of them to the disk."""

_CONNECT_SECONDS = 5.0
_LOOK_SECONDS = 10.0  # between two looks at the nodes while nothing ends
_KEPT = ("PYTHONPATH", "QUANT_MODEL_HOME", "QUANT_DATA_HOME", "QUANT_CACHE", "QUANT_CHILD_GIB")


@dataclass(frozen=True)
class Needs:
    """What a task asks a node for, or what a node has in all."""

    cores: int
    memory: int

    def within(self, other: Needs) -> bool:
        return self.cores <= other.cores and self.memory <= other.memory

    def __str__(self) -> str:
        return f"{self.cores} {'core' if self.cores == 1 else 'cores'} and {self.memory / _GIB:.1f} GiB"


class Unfit(RuntimeError):
    """A node may not do a task, since something else would come of it there."""


class Interrupted(RuntimeError):
    """What a node did was ended from outside, as where the node goes down before Ray knows of it; names the node."""


@dataclass(frozen=True)
class _Given:
    """A task that the cluster was given.

    Attributes:
        lost_by: ids of the nodes that it was given to before; "" where Ray does not say which that was.
    """

    task: Task
    lost_by: tuple[str, ...] = ()


class RayPool:
    """The nodes of a Ray cluster.

    Models and data have to be found on every node as they are here: by the same paths, or in its own cache; shards
    bring theirs along. A node that is lost, cannot do a task, or sends something else than it should, fails that task
    alone; a shard that a node may not judge is judged on the one that has offered it.
    """

    def __init__(self, jobs: Sequence[ModelJob], results: Path, address: str | None) -> None:
        """Connect to a cluster.

        Args:
            jobs: that are going to be submitted.
            address: of the cluster; None: RAY_ADDRESS, else a new one on this machine.

        Raises:
            InputError: no node is large enough for a job.
            Unavailable: Ray is not installed, or no cluster answers.
        """
        self._ray, self._own = _connected(address)
        self._perform, self._perform_shard = map(self._ray.remote, (perform, perform_shard))
        self._results = results
        self._waiting: dict[Any, _Given] = {}
        self._failed: list[tuple[Task, Ended]] = []
        self._asked: dict[tuple[str, str], Needs] = {}
        try:
            self._given = contents({word for job in jobs for word in job.arguments})
            nodes = self._nodes()
            if small := [said for job in jobs if (said := too_large(job.model, self._needs(job), nodes.values()))]:
                raise InputError(small[0])
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for reference in self._waiting:
            self._ray.cancel(reference, force=True)
        self._waiting.clear()
        if self._own:
            self._ray.shutdown()

    def submit(self, task: Task) -> None:
        # A job goes on where its finished steps lie.
        self._start(_Given(task), task.node if isinstance(task, Attempt) else "")

    def _start(self, given: _Given, node: str) -> None:
        """Give a task to a node, if that lives, else to any."""
        task, needs = given.task, self._needs(given.task)
        options: dict[str, Any] = {"num_cpus": needs.cores, "memory": needs.memory, "max_retries": 0}
        if given.lost_by:
            options["scheduling_strategy"] = "SPREAD"
        if node:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
        if isinstance(task, Shard):
            offer = task.offer
            files = (offer.models, offer.pictures[task.number])
            reference = self._perform_shard.options(**options).remote(
                task.share, *files, program_digest(), offer.machine
            )
        else:
            known = newest_runs_of(task.job, self._results) if task.job.action == "eval" else b""
            paths = {word: self._given[word] for word in task.job.arguments if word in self._given}
            reference = self._perform.options(**options).remote(task, known, program_digest(), paths)
        self._waiting[reference] = given

    def next_ended(self) -> tuple[Task, Ended]:
        while True:
            if self._failed:
                return self._failed.pop()
            ready, _ = self._ray.wait(list(self._waiting), num_returns=1, timeout=_LOOK_SECONDS)
            if ready:
                given = self._waiting.pop(ready[0])
                if ended := self._ended(given, ready[0]):
                    return given.task, ended
                continue
            self._give_up_too_large()

    def _ended(self, given: _Given, reference: Any) -> Ended | None:
        """How a task has ended; None: it was begun anew."""
        errors, task = self._ray.exceptions, given.task
        try:
            return self._kept(self._ray.get(reference))
        except errors.RayTaskError as error:
            if isinstance(error.cause, Interrupted):
                return self._again(given, str(error.cause), "ended from outside")
            if isinstance(error.cause, Unfit) and isinstance(task, Shard) and task.home:
                self._start(replace(given, task=replace(task, home="")), task.home)
                return None
            return failed(f"{task.model}: a node cannot do it ({error.cause})")
        except errors.RayError as error:
            return self._again(given, self._node_in(str(error)), type(error).__name__)

    def _again(self, given: _Given, node: str, why: str) -> Ended | None:
        """Give a task that a node has lost to another one, unless too many have."""
        lost = replace(given, lost_by=(*given.lost_by, node))
        if len(lost.lost_by) > RETRIES:
            return failed(f"{given.task.model}: its node was lost, and {RETRIES} times another one ({why})")
        needs = self._needs(given.task)
        others = [name for name, has in self._nodes().items() if name not in lost.lost_by and needs.within(has)]
        # Not always the first: a node that goes down loses many tasks at once.
        self._start(lost, random.choice(others) if others and node else "")
        return None

    def _node_in(self, message: str) -> str:
        """The node that Ray names in a message, if it names one."""
        return next((node["NodeID"] for node in self._ray.nodes() if node["NodeID"] in message), "")

    def _kept(self, ended: Ended) -> Ended:
        """The same, with the files of its offers in the cluster's memory, each once, while a task needs them."""
        files = {id(data): data for offer in ended.offers for data in (offer.models, *offer.pictures)}
        kept = {key: self._ray.put(data) for key, data in files.items()}
        offers = (
            replace(offer, models=kept[id(offer.models)], pictures=tuple(kept[id(data)] for data in offer.pictures))
            for offer in ended.offers
        )
        return replace(ended, offers=tuple(offers))

    def _needs(self, task: Task | ModelJob) -> Needs:
        """Its threads and its measured peak; what is only assumed is no more than the largest node has.

        What is measured meanwhile counts the next time: what has begun on a node may go on there.
        """
        asked = self._asked.get((task.model, task.kind))
        if asked is None:
            nodes = self._nodes().values()
            large = max((node.memory for node in nodes if node.cores >= task.threads), default=USUAL_PEAK)
            asked = Needs(task.threads, known_peak(task, self._results) or min(USUAL_PEAK, large))
            self._asked[task.model, task.kind] = asked
        return asked

    def _nodes(self) -> dict[str, Needs]:
        """What the nodes that live have in all, by their ids."""
        found = {node["NodeID"]: node.get("Resources", {}) for node in self._ray.nodes() if node["Alive"]}
        return {name: Needs(int(has.get("CPU", 0)), int(has.get("memory", 0))) for name, has in found.items()}

    def _give_up_too_large(self) -> None:
        """Tasks that wait for a node that was lost, when no other one is large enough."""
        nodes = self._nodes().values()
        for reference, given in list(self._waiting.items()):
            if said := too_large(given.task.model, self._needs(given.task), nodes):
                self._ray.cancel(reference, force=True)
                del self._waiting[reference]
                self._failed.append((given.task, failed(said)))


def too_large(model: str, needs: Needs, nodes: Collection[Needs]) -> str:
    """Why no node can do a task, and how to mend it; empty where one can."""
    if any(needs.within(node) for node in nodes):
        return ""
    largest = max(nodes, key=lambda node: (node.cores, node.memory), default=Needs(0, 0))
    start = f"start a node with `ray start --num-cpus {needs.cores} --memory {needs.memory}`"
    if needs.cores > largest.cores:
        start = f"give --threads {max(1, largest.cores)} or fewer, or {start}"
    return (
        f"{model}: no node of the cluster is large enough: it asks for {needs}, the largest node has {largest}; {start}"
    )


def newest_runs_of(job: ModelJob, results: Path) -> bytes:
    """The newest run of a job's model as a zip, and with twins that of the twin."""
    places = [results, results / TWINS] if job.twins else [results]
    folders = [folder for place in places if (folder := newest_run(place, job.model))]
    return packed_runs(results, folders) if folders else b""


# --- on a node -------------------------------------------------------------------------------------


def perform(attempt: Attempt, known: bytes, code: str, given: Mapping[str, str]) -> Ended:
    """What a node does for a job: the command, in a results folder of its own, and the runs or offers that came of it.

    Args:
        known: zip of the runs that an evaluation looks at.
        code: digest of the program that asks.
        given: paths among the arguments of the command, with their content where it was given.
    """
    _check_code(code)
    _check_given(given)
    with tempfile.TemporaryDirectory(prefix="quant-node-") as place:
        results = Path(place) / "results"
        if known:
            unpacked(known, results)
        results.mkdir(exist_ok=True)
        ended = _whole(attempt_job(attempt, results, threading.Event()))
        if ended.offers:
            return replace(ended, offers=for_others(ended.offers), node=_node())
        parcel = packed_runs(results, run_folders(results)) if attempt.job.action == "run" else b""
    return replace(ended, parcel=parcel, sha256=sha256_of(parcel))


def perform_shard(share: Share, models: bytes, pictures: bytes, code: str, wanted: str) -> Ended:
    """What a node does for a shard.

    Args:
        models, pictures: zips of the files.
        wanted: machine on which outcomes are those of the job.
    """
    _check_code(code)
    if machine() != wanted:
        raise Unfit("it has another processor, or other versions of packages, than the node of the model")
    with tempfile.TemporaryDirectory(prefix="quant-node-") as place:
        here = arrived(share, models, pictures, Path(place))
        ended = _whole(judge_shard(here, threading.Event()))
    if ended.code:
        return ended
    parcel = named_as_there(ended.parcel, here, share)
    return replace(ended, parcel=parcel, sha256=sha256_of(parcel))


def _whole(ended: Ended) -> Ended:
    if ended.killed:
        raise Interrupted(_node())
    return ended


@cache
def program_digest() -> str:
    """Hex sha256 of what a job follows from on any machine: the code, also of twins and of data, and the recipes."""
    root = Path(__file__).parents[1]
    code = [root / "quant", root / "quant" / "twins", root / "eval", root / "calib_data"]
    files = [path for folder in code for path in folder.iterdir() if path.suffix in (".py", ".yaml")]
    files += recipes_dir().rglob("*.yaml")
    content = hashlib.sha256()
    # An installed package has its recipes in `_recipes`.
    for name, file in sorted((f"{path.parent.name.removeprefix('_')}/{path.name}", path) for path in files):
        content.update(name.encode() + b"\0" + file.read_bytes())
    return content.hexdigest()


def _check_code(code: str) -> None:
    if code != program_digest():
        raise Unfit("it has another version of paddle-quant; install the same one on all nodes")


def contents(words: Iterable[str]) -> dict[str, str]:
    """The whole paths among arguments, of recipes and of folders of data and models, and the content of each."""
    paths = {word: Path(word) for word in words}
    return {word: content_of(path) for word, path in paths.items() if path.is_absolute() and path.exists()}


def content_of(place: Path) -> str:
    """Hex sha256 of a file, or of the names and content of all files in a folder; of nothing, where nothing is."""
    if place.is_file():
        return file_sha256(place)
    files = sorted(path for path in place.rglob("*") if path.is_file())
    return digest([[path.relative_to(place).as_posix(), file_sha256(path)] for path in files])


def _check_given(given: Mapping[str, str]) -> None:
    for path, content in given.items():
        if content_of(Path(path)) != content:
            raise Unfit(f"{path} is missing there, or is not what it is here; copy it to all nodes, or share its disk")


def _node() -> str:
    """Id of the node that this process belongs to."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


# --- connecting ------------------------------------------------------------------------------------


def _connected(address: str | None) -> tuple[Any, bool]:
    """Ray, and whether it was connected here; a cluster that is started here reports nothing to anybody."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise Unavailable("Ray is not installed", "Install paddle-quant with the extra 'ray'") from error
    if ray.is_initialized():
        return ray, False
    place = address or os.environ.get("RAY_ADDRESS") or "local"
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "runtime_env": _environment()}
    if place == "local":  # a new one, also where Ray would find another on this machine
        settings |= {"include_dashboard": False, "object_store_memory": _STORE}
    else:
        _check_answers(place)
    try:
        ray.init(address=place, **settings)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:  # the last: as where it has no token
        raise _no_cluster(place, error) from error
    return ray, True


def _check_answers(address: str) -> None:
    """Ray itself asks an address that nobody answers at for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return  # `auto`: Ray looks for a cluster on this machine, and knows at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> Unavailable:
    why = " ".join(str(error).split())[:200]
    fix = "Start one with `ray start --head`, or correct --address, which is HOST:PORT (or RAY_ADDRESS)"
    return Unavailable(f"no Ray cluster at {address} ({why})", fix)


def _environment() -> dict[str, Any]:
    """What a node's processes need of this one's environment."""
    environment = child_environment()
    return {"env_vars": {name: environment[name] for name in _KEPT if name in environment}}
