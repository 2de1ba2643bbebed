"""Latency and size of the newest run's artifacts: per target, batch and input shape, for `quant bench`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.benchmark import BenchRow, Cell, Timing, interleaved_latency
from eval.gate import SkippedRow
from quant.errors import Unavailable
from quant.graph import Shape
from quant.job import Job, Options, feed_of, fp32_folders, latency_feed, picture_input, prepared_graph
from quant.judging import find_evaluation, run_command, skipped_rows
from quant.loop import has_loop
from quant.recipe import Recipe
from quant.runtime import Feed, Precision, Session, model_bytes, open_session
from quant.target import TARGETS, TargetName

BATCHES = (1, 8)
_ONE_PICTURE = "a model with a loop is timed on one picture of the recipe's size: its length hangs on what is seen"

SECONDS = 15.0
"""Of one cell; slow ones (Paddle's INT8, eight large pages) get fewer runs."""


def bench_model(recipe: Recipe, options: Options) -> list[BenchRow | SkippedRow]:
    """Time FP32 as shipped, FP32 prepared and INT8 of the newest run on every target; what cannot be had is skipped.

    Raises:
        InputError: a file of the run or the model is broken.
    """
    try:
        found = find_evaluation(recipe, options)
    except Unavailable as error:
        return [*skipped_rows(recipe, list(recipe.targets), error.reason, error.fix)]
    rows: list[BenchRow | SkippedRow] = []
    for target in recipe.targets:
        try:
            if target not in found.manifest.artifacts:
                raise Unavailable("the newest run has no such target", f"Run `{run_command(recipe, options)}`")
            rows += bench_target(found.job, target, found.folder / target)
        except Unavailable as error:
            rows += skipped_rows(recipe, [target], error.reason, error.fix)
    return rows


def bench_target(job: Job, target: TargetName, artifact: Path) -> list[BenchRow]:
    """A row for every batch and input shape of one artifact.

    Raises:
        Unavailable: the target's runtime is not installed, or none of its kind runs here.
    """
    if not TARGETS[target].executed:
        raise Unavailable(f"no runtime of {target} here", f"Time its artifact on a machine with {target}")
    fp32, threads = fp32_folders(job, target), job.options.threads

    def open_all(precision: Precision) -> dict[str, Session]:
        folders = {**fp32, "int8": artifact}
        return {name: open_session(target, folder, threads, precision) for name, folder in folders.items()}

    facts: dict[str, Any] = {
        "model": job.recipe.name,
        "task": job.recipe.task,
        "target": target,
        "fp32_bytes": model_bytes(target, fp32["fp32"]),
        "int8_bytes": model_bytes(target, artifact),
    }
    return [BenchRow(**facts, **dict(turns.cell())) for turns in time_turns(job, target, open_all)]


@dataclass
class Turns:
    """Sessions that took turns at one input shape.

    Attributes:
        note: why none was timed.
        failed: by name of a session, why it was left out.
        ms: median milliseconds by name.
    """

    shape: list[int]
    note: str
    failed: dict[str, str] = field(default_factory=dict)
    ms: dict[Precision, dict[str, float]] = field(default_factory=dict)

    def cell(self, int8: str = "int8") -> Cell:
        """The two FP32 models beside the session of a name."""
        reasons = [self.failed[name] for name in ("fp32", "fp32_prepared", int8) if name in self.failed]
        timings = {precision: _timing(ms, int8) for precision, ms in self.ms.items()}
        note = self.note or next(iter(reasons), "")
        return Cell(shape=self.shape, ms=timings.get("f32"), default_ms=timings.get("default"), note=note)


def _timing(ms: Mapping[str, float], int8: str) -> Timing | None:
    if not {"fp32", int8} <= set(ms):
        return None
    return Timing(fp32=ms["fp32"], fp32_prepared=ms.get("fp32_prepared"), int8=ms[int8])


def time_turns(
    job: Job, target: TargetName, open_all: Callable[[Precision], Mapping[str, Session]], seconds: float = SECONDS
) -> list[Turns]:
    """Every batch of every shape of the recipe.

    Args:
        open_all: opens sessions by name, among them `fp32` and perhaps `fp32_prepared`; called once for each precision.
        seconds: time for one shape in one precision.
    """
    latency = job.recipe.latency
    shapes = [[batch, *shape[1:]] for batch in BATCHES for shape in (latency.shapes or [latency.shape])]
    declared = declared_picture(job)
    loop = has_loop(prepared_graph(job))
    found = [
        Turns(shape, _ONE_PICTURE if loop and shape != latency.shape else misfit(shape, declared)) for shape in shapes
    ]
    precisions: tuple[Precision, ...] = ("f32", "default") if target == "openvino" else ("f32",)
    for precision in precisions:
        # Held by nothing here: those of one precision are gone before the next are opened.
        _take_turns(job, open_all(precision), [turns for turns in found if not turns.note], loop, precision, seconds)
    return found


def _take_turns(
    job: Job, sessions: Mapping[str, Session], cells: list[Turns], loop: bool, precision: Precision, seconds: float
) -> None:
    for turns in cells:
        feed = latency_feed(job) if loop else feed_of(job, turns.shape)
        turns.failed |= _failing({name: sessions[name] for name in sessions if name not in turns.failed}, feed)
        ready = {name: session for name, session in sessions.items() if name not in turns.failed}
        turns.ms[precision] = interleaved_latency(ready, feed, job.recipe.latency.runs, seconds)


def _failing(sessions: Mapping[str, Session], feed: Feed) -> dict[str, str]:
    """Why sessions do not take an input, by name."""
    found = {}
    for name, session in sessions.items():
        try:
            session.run(feed)
        except Exception as error:  # every runtime has exceptions of its own for sizes that a graph cannot take
            lines = str(error).strip().splitlines()
            found[name] = f"the model does not run at this size: {lines[0][:120] if lines else type(error)}"
    return found


def declared_picture(job: Job) -> Shape:
    """Sizes of the picture that the graph reads, None where any will do."""
    graph = prepared_graph(job)
    return graph.shape(picture_input(latency_feed(job))) or ()


def misfit(shape: list[int], declared: Shape) -> str:
    """Why a model whose input is declared so does not take a shape; empty where it does."""
    pairs = list(zip(shape, declared, strict=False))
    if any(fixed not in (None, size) for size, fixed in pairs[:1]):
        return f"the model's batch is fixed at {declared[0]}"
    if any(fixed not in (None, size) for size, fixed in pairs):
        return f"the model's input is fixed at {'x'.join('any' if size is None else str(size) for size in declared)}"
    return ""
