"""Work for other processes: a model's command, or a shard of its evaluation; how it ended, and what memory it took."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from quant.archive import Progress, staged, told_progress
from quant.child import child_command, child_environment, family_memory, kill_family, raise_answer, signal_name
from quant.document import DocumentError, parse_json
from quant.errors import HANDED_OVER, INPUT_ERROR, InputError
from quant.parcel import sha256_of
from quant.shards import Offer, offered, take_outcomes
from quant.shares import Share, apart

Action = Literal["run", "eval"]

USUAL_PEAK = 3 << 30
"""Bytes that work is taken to need before any of its kind was measured on its model."""

_DONE = (0, 1, HANDED_OVER)  # codes of work that was done, whether the gate let it pass or not
_PEAKS = "peaks.json"
_WATCH_SECONDS = 0.25
_INTERNAL = 70


@dataclass(frozen=True)
class ModelJob:
    """One model's command.

    Attributes:
        model: name of the model, as in results.
        arguments: of the command, without --out and --json.
        twins: whether its twin's runs are concerned too.
    """

    action: Action
    model: str
    arguments: tuple[str, ...]
    threads: int
    twins: bool = False

    @property
    def kind(self) -> str:
        """What its memory is like that of."""
        return f"{self.action}-twin" if self.twins else self.action


@dataclass(frozen=True, eq=False)
class Attempt:
    """A job as it is given to a process: once, or again as soon as others have judged what it offered.

    Attributes:
        shard_samples: evaluations of more samples are offered; 0: it judges them itself.
        outcomes: what was judged of its offers, by the name of the stage.
        node: of a cluster that made the last attempt, and has the finished steps.
        begun: whether there was an attempt before; then all but its evaluation is done.
    """

    job: ModelJob
    shard_samples: int = 0
    outcomes: Mapping[str, bytes] = field(default_factory=dict)
    node: str = ""
    begun: bool = False

    @property
    def model(self) -> str:
        return self.job.model

    @property
    def kind(self) -> str:
        return self.job.kind

    @property
    def threads(self) -> int:
        return self.job.threads


@dataclass(frozen=True, eq=False)
class Shard:
    """Some samples of an evaluation that a job has offered.

    Attributes:
        number: of the samples among the pieces of the offer.
        home: node that has offered them, which can judge them if others cannot.
    """

    job: ModelJob
    offer: Offer
    number: int
    home: str = ""

    @property
    def model(self) -> str:
        return self.job.model

    @property
    def kind(self) -> str:
        return "shard"

    @property
    def share(self) -> Share:
        return self.offer.pieces[self.number]

    @property
    def threads(self) -> int:
        return self.share.workers * self.share.threads


Task = Attempt | Shard
Work = ModelJob | Task


@dataclass(frozen=True)
class Ended:
    """How work ended.

    Attributes:
        peak: the most memory that it had, in bytes.
        parcel: what came of it elsewhere: the runs it made as a zip, or the outcomes of a shard; with its hash.
        offers: what others shall judge before the job can go on.
        node: where it was done.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak: int
    parcel: bytes = b""
    sha256: str = ""
    offers: tuple[Offer, ...] = ()
    node: str = ""

    def rows(self) -> list[dict[str, Any]]:
        """The rows that it printed.

        Raises:
            InputError: it printed none; says what it said instead.
        """
        try:
            return list(parse_json(self.stdout)["rows"])
        except (DocumentError, KeyError, TypeError) as error:
            raise InputError(self.said) from error

    @property
    def said(self) -> str:
        """Its last words, or how it was ended without any."""
        if self.killed:
            cause = "as by a system that is short of memory"
            return f"it was killed ({signal_name(-self.code)}), {cause}; free some, or give --jobs 1, and run it again"
        if self.code < 0:
            return f"it crashed ({signal_name(-self.code)})"
        said = [line for line in self.stderr.splitlines() if line.strip()] or [f"it ended with code {self.code}"]
        return said[-1].removeprefix("quant: ")

    @property
    def warnings(self) -> list[str]:
        """What it said on the way."""
        return [line for line in self.stderr.splitlines() if line.startswith("quant: ")]

    @property
    def killed(self) -> bool:
        """Whether it was ended from outside, as where a machine goes down or has no memory left."""
        return -self.code in (signal.SIGTERM, signal.SIGKILL)

    @property
    def internal(self) -> bool:
        """Whether it ended by an error of ours, or crashed."""
        return self.code == _INTERNAL or (self.code < 0 and not self.killed)

    def checked_parcel(self) -> bytes:
        """The parcel, if it is what was sent.

        Raises:
            InputError: it is not.
        """
        if self.parcel and sha256_of(self.parcel) != self.sha256:
            raise InputError("what arrived from a node is not what it sent; start the command again")
        return self.parcel


def failed(sentence: str) -> Ended:
    """Work that did not come to its end, and why."""
    return Ended(INPUT_ERROR, "", " ".join(sentence.split()), 0.0, 0)


def attempt_job(attempt: Attempt, results: Path, stop: threading.Event, progress: Progress | None = None) -> Ended:
    """Run the command of a job; what it offers stands in its end, and `progress` is told how far it has come."""
    take_outcomes(attempt.outcomes)
    with tempfile.TemporaryDirectory(prefix="quant-offers-") as place:
        job, size = attempt.job, attempt.shard_samples
        asked = ["--offer", place, "--shard-samples", size] if size else []
        command = child_command("quant.cli", job.action, *job.arguments, "--out", results, "--json", *asked)
        ended = _watched(command, stop, progress)
        if ended.code != HANDED_OVER:
            return ended
        return replace(ended, offers=tuple(offered(Path(place), attempt.shard_samples)))


def judge_shard(share: Share, stop: threading.Event) -> Ended:
    """Judge some samples in a process of their own; the outcomes are its parcel."""
    with tempfile.TemporaryDirectory(prefix="quant-shard-") as place:
        command, outcomes = apart(share, Path(place))
        ended = _watched(command, stop)
        try:
            raise_answer(Path(place), ended.code)
        except (InputError, OSError) as error:
            return failed(str(error))
        parcel = outcomes.read_bytes() if ended.code == 0 else b""
    return replace(ended, parcel=parcel, sha256=sha256_of(parcel))


def peak_of(work: Work, results: Path) -> int:
    """Bytes that work is likely to need: the most that was measured, `USUAL_PEAK` before."""
    return known_peak(work, results) or USUAL_PEAK


def known_peak(work: Work, results: Path) -> int | None:
    """The most that work of this kind was measured to take, None before."""
    return _known_peaks(work, results).get(work.kind)


def note_peak(work: Work, results: Path, ended: Ended) -> None:
    """Keep the most that work of this kind took; one that found its work done takes little, a failed one any amount."""
    known = _known_peaks(work, results)
    if ended.code not in _DONE or ended.peak <= known.get(work.kind, 0):
        return
    # It only helps the next time, and is not worth an error where results cannot be written.
    with suppress(OSError), staged(results / work.model / _PEAKS) as temporary:
        temporary.write_text(json.dumps({**known, work.kind: ended.peak}, sort_keys=True) + "\n", encoding="utf-8")


def _known_peaks(work: Work, results: Path) -> dict[str, int]:
    """What was measured on a model, by the kind of work."""
    try:
        known = dict(parse_json((results / work.model / _PEAKS).read_bytes()))
    except (OSError, DocumentError, TypeError, ValueError):
        return {}
    return {kind: peak for kind, peak in known.items() if isinstance(peak, int)}


def _watched(command: Sequence[str], stop: threading.Event, progress: Progress | None = None) -> Ended:
    """Run a command; its most memory is measured meanwhile, and it is ended when `stop` is set."""
    start, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=said, env=child_environment())
        heard = 0
        try:
            while child.poll() is None and not stop.wait(_WATCH_SECONDS):
                peak = max(peak, family_memory(child.pid))
                heard = _passed_on(said, heard, progress) if progress else 0
        finally:
            if child.poll() is None:
                kill_family(child.pid)
            child.wait()
        out.seek(0)
        said.seek(0)
        texts = [stream.read().decode("utf-8", "replace") for stream in (out, said)]
    return Ended(child.returncode, texts[0], texts[1], time.monotonic() - start, peak)


def _passed_on(said: IO[bytes], heard: int, progress: Progress) -> int:
    """Tell of the progress in what a command has said behind the first `heard` bytes; how many were heard then."""
    new = os.pread(said.fileno(), os.fstat(said.fileno()).st_size - heard, heard)
    whole = new[: new.rfind(b"\n") + 1]
    for line in whole.decode("utf-8", "replace").splitlines():
        if told := told_progress(line):
            progress(*told)
    return heard + len(whole)
