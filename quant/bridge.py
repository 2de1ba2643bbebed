"""The bridge: a PIR model as an equal old-IR program, which Paddle's older tools know.

PaddleSlim quantizes and trains old-IR programs alone. The bridge lowers a PIR program operator by operator
(`quant.lowering`), gives it the weights by their names, and proves it: both programs compute the same outputs,
without graph optimizations and oneDNN on either side, which act differently in the two forms.

Paddle's flags act once in a process, so the work is done in one of its own: `python -m quant.bridge JOB.json`.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quant.archive import file_sha256
from quant.child import (
    LimitExceeded,
    answer_job,
    child_command,
    child_environment,
    ending,
    model_limits,
    raise_answer,
    run_child,
)
from quant.conversion import load_feeds, save_feeds
from quant.document import MOST_JSON, parse_json, read_bounded
from quant.errors import InputError, Unavailable
from quant.lowering import Lowering
from quant.pir import kind_of, written_operators
from quant.program import MODEL_FILE, PARAMS_FILE, import_paddle, serialize_program
from quant.runtime import Feed
from quant.source import ModelFiles

LOG_FILE = "bridge.log"
_SECONDS = 1800.0


class NotCarried(InputError):
    """A model that the bridge cannot write; whoever tries again on another day hears the same."""


@dataclass(frozen=True)
class Bridged:
    """A PIR model in old-IR form.

    Attributes:
        files: the old-IR program; names, weights and PaddleX's description are those of the original.
        difference: largest absolute difference of an output from the original's on the feeds; 0 means bit for bit.
    """

    files: ModelFiles
    difference: float


def bridge(files: ModelFiles, feeds: list[Feed], folder: Path, threads: int = 1) -> Bridged:
    """Write `inference.pdmodel` and `inference.pdiparams` that compute what a PIR model computes.

    Args:
        feeds: inputs on which both are compared; at least one.
        folder: made if it is missing; also receives `bridge.log`.

    Raises:
        NotCarried: an operator that the bridge does not carry, or a model that Paddle does not load.
        InputError: a limit was exceeded.
        OSError: the disk is full, or cannot be written.
    """
    save_feeds(folder, feeds)
    job: dict[str, Any] = {
        "model": str(files.model),
        "params": str(files.params),
        "folder": str(folder),
        "feeds": len(feeds),
    }
    job["threads"] = threads
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    _run_child(files, folder)
    difference = json.loads((folder / "proof.json").read_text(encoding="utf-8"))["difference"]
    for path in (*folder.glob("feed*.npz"), folder / "job.json", folder / "proof.json"):
        path.unlink()
    model, params = folder / MODEL_FILE, folder / PARAMS_FILE
    digests = {path.name: file_sha256(path) for path in (model, params)}
    old = ModelFiles(folder, "paddle", model, params, files.inference_yml, files.source, digests)
    return Bridged(old, difference)


def _run_child(files: ModelFiles, folder: Path) -> None:
    log = folder / LOG_FILE
    environment = child_environment(FLAGS_enable_pir_api="0", GLOG_minloglevel="2")
    command, cannot = child_command("quant.bridge", folder / "job.json"), "it cannot be written as an old-IR program"
    try:
        code = run_child(command, log, environment, model_limits([files.model, files.params], _SECONDS))
    except LimitExceeded as error:
        raise InputError(f"{files.model.name}: {cannot}: that {error}") from error
    if not code:
        return
    try:
        raise_answer(folder, code)
    except Unavailable:
        raise
    except InputError as error:
        raise NotCarried(f"{files.model.name}: {cannot}: {error}") from error
    kind = InputError if code == -signal.SIGKILL else NotCarried  # killed from outside, for want of memory as a rule
    raise kind(f"{files.model.name}: {cannot}: {ending(code, log)}")


def _child(job: dict[str, Any]) -> None:
    folder = Path(job["folder"])
    document = parse_json(read_bounded(Path(job["model"]), MOST_JSON))
    paddle = import_paddle()
    program = paddle.static.Program()
    with paddle.static.program_guard(program), paddle.utils.unique_name.guard():
        lowering = Lowering(paddle, program, document)
        lowering.run()
    names = sorted(operator["A"][3] for operator in written_operators(document) if kind_of(operator) == "p")
    _load_weights(paddle, program, names, job["params"])
    model, params = serialize_program(paddle, program, lowering.feeds, lowering.fetches)
    (folder / MODEL_FILE).write_bytes(model)
    (folder / PARAMS_FILE).write_bytes(params)
    del model, params
    difference = _largest_difference(job, folder)
    (folder / "proof.json").write_text(json.dumps({"difference": difference}), encoding="utf-8")


def _load_weights(paddle: Any, program: Any, names: list[str], file: str) -> None:
    """Fill the scope with the weights, which stand in the file in the sorted order of their names."""
    loader = paddle.static.Program()
    block = loader.global_block()
    for name in names:
        weight = program.global_block().var(name)
        block.create_var(name=name, shape=weight.shape, dtype=weight.dtype, persistable=True)
    block.append_op(type="load_combine", outputs={"Out": names}, attrs={"file_path": file})
    paddle.static.Executor(paddle.CPUPlace()).run(loader)


def _largest_difference(job: dict[str, Any], folder: Path) -> float:
    """Run both programs on all feeds, operator by operator as written."""
    feeds = load_feeds(folder, job["feeds"])
    expected = _original_outputs(job["model"], job["params"], feeds, job["threads"])
    found = _bridged_outputs(folder, feeds, job["threads"])
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if one.size and not np.array_equal(one, other):
            worst = max(worst, float(np.nan_to_num(np.abs(one.astype(np.float64) - other), nan=np.inf).max()))
    return worst


def _original_outputs(model: str, params: str, feeds: list[Feed], threads: int) -> list[np.ndarray]:
    from paddle import inference

    config = inference.Config(model, params)
    config.disable_gpu()
    config.disable_glog_info()
    config.switch_ir_optim(False)
    config.disable_mkldnn()  # on by default
    config.set_cpu_math_library_num_threads(threads)
    predictor = inference.create_predictor(config)
    results = []
    for feed in feeds:
        for name, values in feed.items():
            predictor.get_input_handle(name).copy_from_cpu(values)
        predictor.run()
        results += [predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()]
    return results


def _bridged_outputs(folder: Path, feeds: list[Feed], threads: int) -> list[np.ndarray]:
    """By the executor, since the predictor keeps every tensor of an old-IR program that it does not optimize.

    Of PP-FormulaNet-L in full size that was 14 GB; the executor needs 2.
    """
    paddle = import_paddle()
    paddle.base.core.set_num_threads(threads)
    with paddle.static.scope_guard(paddle.static.Scope()):
        executor = paddle.static.Executor(paddle.CPUPlace())
        program, _, fetches = paddle.static.load_inference_model(
            str(folder), executor, model_filename=MODEL_FILE, params_filename=PARAMS_FILE
        )
        return [output for feed in feeds for output in executor.run(program, feed=feed, fetch_list=fetches)]


if __name__ == "__main__":
    answer_job(_child)
