"""One step of `slim_training.py` in a process of its own: `python benchmarks/slim_training_worker.py TASK.json`.

What was timed goes to `TASK.events`, a JSON on each line, so that it is known of a process that was ended too. The
judgement goes to `TASK.result.json`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peer_quantizers import Inputs
from peer_worker import Task

from eval.dataset import pick
from eval.evaluation import readable
from eval.metric import make_metric
from eval.statistics import estimate_drop
from quant.job import fp32_folders
from quant.program import MODEL_FILE, PARAMS_FILE, import_paddle
from quant.runtime import Feed, open_session
from quant.sensitivity import relative_errors

OPERATORS = ["conv2d", "depthwise_conv2d", "conv2d_transpose", "matmul_v2"]
RATE = 1e-5
"""Of ACT's Adam."""


@dataclass(frozen=True)
class Events:
    """Tells what happened in a part, and when."""

    file: Path
    begin: float

    def tell(self, **event: Any) -> None:
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"at": round(time.perf_counter() - self.begin, 3), **event}) + "\n")


def main(file: Path) -> None:
    document = json.loads(file.read_text(encoding="utf-8"))
    task, part = Task(**document["task"]), document["part"]
    if part == "judge":
        found = judged(task)
        file.with_suffix(".result.json").write_text(json.dumps(found), encoding="utf-8")
        return
    paddle = import_paddle()
    # PaddleSlim imports its search server, which needs pyzmq; training never uses it.
    sys.modules.setdefault("zmq", types.ModuleType("zmq"))
    paddle.seed(0)
    events = Events(file.with_suffix(".events"), time.perf_counter())
    for mend in document["mends"]:
        MENDS[mend](paddle)
    _PARTS[part](paddle, task.inputs(), document, events)
    events.tell(event="saved")


# --- what PaddleSlim 2.6.0 needs on Paddle 3.2.2 -----------------------------------------------------


def mend_operators(paddle: Any) -> None:
    """`sigmoid` and `floor` of Paddle 3.2 take no variables of old-IR programs."""

    def of_program(kind: str) -> Callable[..., Any]:
        def write(x: Any, name: str | None = None) -> Any:
            helper = paddle.base.layer_helper.LayerHelper(kind)
            out = helper.create_variable_for_type_inference(dtype=x.dtype)
            helper.append_op(type=kind, inputs={"X": x}, outputs={"Out": out})
            return out

        return write

    paddle.nn.functional.sigmoid, paddle.floor = of_program("sigmoid"), of_program("floor")


def mend_names(paddle: Any) -> None:
    """Every program of Paddle 3.2 counts its own names; PaddleSlim copies variables between programs by them."""
    shared = paddle.base.unique_name.UniqueNameGenerator("recon_")
    build = paddle.static.Program.__init__

    def counted(self: Any) -> None:
        build(self)
        self._name_generator = shared

    paddle.static.Program.__init__ = counted


MENDS = {"operators": mend_operators, "names": mend_names}


# --- parts -----------------------------------------------------------------------------------------


def reconstruct(paddle: Any, inputs: Inputs, job: dict[str, Any], events: Events) -> None:
    """Layer-wise AdaRound, with QDrop's dropped quantizers where `job["qdrop"]` says so.

    After `job["train_seconds"]` of iterations no layer gets another one, and keeps what it has.
    """
    from paddleslim.quant import quant_recon_static
    from paddleslim.quant import reconstruction_quantization as slim

    feeds, layers = list(inputs.read_feeds(stop=job["pictures"])), [0]
    prepare, get_loss = slim.ReconstructionQuanter._preprocess, slim.ReconstructionQuanterLoss.get_loss
    end = float("inf")

    def prepared(self: Any) -> None:
        nonlocal end
        events.tell(event="calibrated", layers=len(self._regions))
        prepare(self)
        events.tell(event="prepared", layers=len(self._regions))
        end = time.perf_counter() + job["train_seconds"]

    def counted(self: Any, *arguments: Any) -> Any:
        layers[0] += 1
        return get_loss(self, *arguments)

    slim.ReconstructionQuanter._preprocess, slim.ReconstructionQuanterLoss.get_loss = prepared, counted

    def pictures() -> Iterator[Feed]:
        for feed in feeds:
            if time.perf_counter() < end:
                yield feed

    quant_recon_static(
        _timed_executor(paddle, events, lambda: layers[0], lambda options: options.get("return_numpy") is True),
        str(inputs.shipped),
        job["folder"],
        data_loader=pictures,
        model_filename=MODEL_FILE,
        params_filename=PARAMS_FILE,
        save_model_filename=MODEL_FILE,
        save_params_filename=PARAMS_FILE,
        batch_nums=len(feeds),
        algo="hist",
        recon_level="layer-wise",
        simulate_activation_quant=job["qdrop"],
        onnx_format=True,
        epochs=job["epochs"],
    )


def calibrate(paddle: Any, inputs: Inputs, job: dict[str, Any], events: Events) -> None:
    """PTQ on the same pictures: what reconstruction begins with."""
    from paddleslim.quant import quant_post_static

    feeds = list(inputs.read_feeds(stop=job["pictures"]))
    quant_post_static(
        paddle.static.Executor(paddle.CPUPlace()),
        str(inputs.shipped),
        job["folder"],
        data_loader=lambda: iter(feeds),
        model_filename=MODEL_FILE,
        params_filename=PARAMS_FILE,
        save_model_filename=MODEL_FILE,
        save_params_filename=PARAMS_FILE,
        batch_size=1,
        batch_nums=len(feeds),
        algo="hist",
        onnx_format=True,
    )


def train(paddle: Any, inputs: Inputs, job: dict[str, Any], events: Events) -> None:
    """ACT's QuantAware and Distillation on the output of the last operator with weights, one picture a step."""
    from paddleslim.auto_compression import AutoCompression

    feeds, source = list(inputs.read_feeds(stop=job["pictures"])), Path(job["folder"]).with_name("source")
    source.mkdir()
    for name in (MODEL_FILE, PARAMS_FILE):  # it writes the program that it is given anew
        shutil.copy(inputs.shipped / name, source)
    count = [0]
    executor = type(_timed_executor(paddle, events, lambda: count[0], lambda options: "feed" in options))
    paddle.static.Executor = executor
    AutoCompression(
        model_dir=str(source),
        model_filename=MODEL_FILE,
        params_filename=PARAMS_FILE,
        save_dir=job["folder"],
        config={
            "QuantAware": {"onnx_format": True, "quantize_op_types": OPERATORS},
            "Distillation": {"loss": "l2", "alpha": 1.0},
            "TrainConfig": {
                "epochs": job["iterations"],
                "train_iter": job["iterations"],
                "eval_iter": job["iterations"] + 1,
                "learning_rate": RATE,
                "optimizer_builder": {"optimizer": {"type": "Adam"}},
            },
        },
        train_dataloader=lambda: iter(feeds),
    ).compress()


def _timed_executor(
    paddle: Any, events: Events, layer: Callable[[], int], trains: Callable[[dict[str, Any]], bool]
) -> Any:
    """An executor that tells of every iteration of a training."""

    class Timed(paddle.static.Executor):  # type: ignore[misc]  # Paddle has no types
        def run(self, *arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            found = super().run(*arguments, **options)
            if trains(options):
                seconds = round(time.perf_counter() - begin, 4)
                loss = float(np.asarray(found[0]).mean())
                events.tell(event="iteration", layer=layer(), seconds=seconds, loss=loss)
            return found

    return Timed(paddle.CPUPlace())


_PARTS = {"recon": reconstruct, "ptq": calibrate, "act": train}


# --- judging ---------------------------------------------------------------------------------------


def judged(task: Task) -> dict[str, Any]:
    """The program beside FP32 on pictures of the report split: the recipe's metric, and the error of the outputs."""
    job = task.inputs().job()
    metric, adapter, recipe = make_metric(job.recipe.metric), job.adapter, job.recipe
    sessions = [open_session("paddle", folder, task.threads) for folder in _folders(task)]
    counts: list[list[Any]] = [[], []]
    errors: list[float] = []
    for sample, prepared in readable(pick(job.selection.report, task.report or 1, recipe.seed), adapter, []):
        exact, found = (session.run(prepared.inputs) for session in sessions)
        errors += relative_errors([found], [exact])
        for kept, outputs in zip(counts, (exact, found), strict=True):
            kept.append(metric.score(adapter.postprocess(outputs, prepared.context), sample.label))
    estimate = estimate_drop(metric, *map(np.array, counts), seed=recipe.seed)
    return {
        "samples": len(errors),
        "fp32": estimate.fp32,
        "int8": estimate.int8,
        "drop": estimate.drop,
        "drop_upper95": estimate.drop_upper95,
        "output_error": float(np.mean(errors)),
    }


def _folders(task: Task) -> tuple[Path, Path]:
    return fp32_folders(task.inputs().job(), "paddle")["fp32"], Path(task.folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
