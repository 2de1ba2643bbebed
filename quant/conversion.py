"""Import of a Paddle inference model to ONNX, in a process of its own.

Paddle's flags, prints and crashes stay in the child: `python -m quant.conversion JOB.json`.
The child also runs the original model, so that the import can be proven equal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quant.arrays import write_arrays
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
from quant.errors import InputError, Unavailable
from quant.pir import with_fetches
from quant.runtime import Feed, writes_in_steps
from quant.source import ModelFiles

OPSET = 17
_SECONDS = 900.0
# Operators, by their old-IR or PIR names, that the import carries over one to one and in order: anchors to find
# where two graphs part.
ANCHORS = {
    "conv2d": "Conv",
    "depthwise_conv2d": "Conv",
    "conv2d_transpose": "ConvTranspose",
    "matmul_v2": "MatMul",
    "matmul": "MatMul",
    "hard_swish": "HardSwish",
    "hardswish": "HardSwish",
    "softmax": "Softmax",
    "hard_sigmoid": "HardSigmoid",
    "hardsigmoid": "HardSigmoid",
    "relu": "Relu",
}


@dataclass(frozen=True)
class Imported:
    """An imported model: the ONNX file, the names and the outputs of the original."""

    onnx: Path
    inputs: list[str]
    outputs: list[str]
    reference: list[list[np.ndarray]]


def import_model(files: ModelFiles, feeds: list[Feed], folder: Path) -> Imported:
    """Convert a model to ONNX (opset 17) and run the original on feeds.

    Args:
        folder: receives `imported.onnx`, the exchange files and `conversion.log`.

    Raises:
        InputError: Paddle cannot load or convert the model.
        Unavailable: Paddle is not installed.
    """
    save_feeds(folder, feeds)
    _run_child(files, folder, {"kind": "import", "feeds": len(feeds)})
    names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
    reference = [_load_arrays(folder / f"output{i}.npz") for i in range(len(feeds))]
    return Imported(folder / "imported.onnx", names["inputs"], names["outputs"], reference)


def reference_outputs(folder: Path) -> list[np.ndarray]:
    """What the original wrote for the first feed, from the folder that `import_model` filled."""
    return _load_arrays(folder / "output0.npz")


def trace_anchors(files: ModelFiles, feed: Feed, folder: Path) -> list[tuple[str, str, np.ndarray]]:
    """(operator type, name, value) of the anchor operators of a program, in order.

    The name is that of the tensor; values of a PIR program have numbers and, mostly, a place in the network's code.
    """
    save_feeds(folder, [feed])
    _run_child(files, folder, {"kind": "trace", "feeds": 1})
    listed = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
    arrays = _load_arrays(folder / "trace.npz")
    return [(kind, name, value) for (kind, name), value in zip(listed, arrays, strict=True)]


def _run_child(files: ModelFiles, folder: Path, job: dict[str, Any]) -> None:
    job |= {"model": str(files.model), "params": str(files.params), "folder": str(folder)}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    log = folder / "conversion.log"
    environment = child_environment(FLAGS_enable_pir_api="0", GLOG_minloglevel="2", PYTHONWARNINGS="ignore")
    command = child_command("quant.conversion", folder / "job.json")
    try:
        code = run_child(command, log, environment, model_limits([files.model, files.params], _SECONDS))
    except LimitExceeded as error:
        raise InputError(f"{files.model}: loading it in Paddle {error}; it is damaged, or too large") from error
    if code:
        raise_answer(folder, code)
        raise InputError(
            f"{files.model}: Paddle cannot load or convert this model ({ending(code, log)[:200]}). "
            "It is damaged, or of another kind than the recipe's; fetch it again with `quant models fetch`"
        )


def save_feeds(folder: Path, feeds: Sequence[Feed], stem: str = "feed") -> None:
    """Write feeds for a child, each as `STEM` and its number."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, feed in enumerate(feeds):
        write_arrays(folder / f"{stem}{index}.npz", **feed)


def load_feeds(folder: Path, count: int, stem: str = "feed") -> list[Feed]:
    """Read what `save_feeds` wrote."""
    feeds = []
    for index in range(count):
        with np.load(folder / f"{stem}{index}.npz", allow_pickle=False) as stored:
            feeds.append({name: stored[name] for name in stored.files})
    return feeds


def _load_arrays(file: Path) -> list[np.ndarray]:
    with np.load(file, allow_pickle=False) as stored:
        return [stored[name] for name in stored.files]


def _child(job: dict[str, Any]) -> None:
    folder = Path(job["folder"])
    feeds = load_feeds(folder, job["feeds"])
    if job["kind"] == "trace":
        trace = _trace_pir if job["model"].endswith(".json") else _trace
        trace(job["model"], job["params"], feeds[0], folder)
        return
    _run_original(job["model"], job["params"], feeds, folder)
    import paddle2onnx

    # optimize_tool="None": its default would install packages at run time.
    paddle2onnx.export(
        job["model"], job["params"], str(folder / "imported.onnx"), opset_version=OPSET, optimize_tool="None"
    )


def _run_original(model: str, params: str, feeds: list[Feed], folder: Path) -> None:
    try:
        from paddle import inference
    except ImportError as error:
        fix = "Install paddle-quant with the extra 'cpu'"
        raise Unavailable(f"the package paddlepaddle is not installed ({error})", fix) from error

    config = inference.Config(model, params)
    config.disable_gpu()
    config.disable_glog_info()
    if writes_in_steps(Path(model)):
        config.disable_mkldnn()
    predictor = inference.create_predictor(config)
    inputs, outputs = predictor.get_input_names(), predictor.get_output_names()
    (folder / "names.json").write_text(json.dumps({"inputs": inputs, "outputs": outputs}), encoding="utf-8")
    for index, feed in enumerate(feeds):
        for name, values in feed.items():
            predictor.get_input_handle(name).copy_from_cpu(values)
        predictor.run()
        arrays = [predictor.get_output_handle(name).copy_to_cpu() for name in outputs]
        write_arrays(folder / f"output{index}.npz", *arrays)


def _trace(model: str, params: str, feed: Feed, folder: Path) -> None:
    import paddle

    paddle.enable_static()
    executor = paddle.static.Executor(paddle.CPUPlace())
    program, _, _ = paddle.static.load_inference_model(
        str(Path(model).parent), executor, model_filename=Path(model).name, params_filename=Path(params).name
    )
    anchors = [
        (op.type, op.output(op.output_names[0] if op.type != "conv2d" else "Output")[0])
        for op in program.global_block().ops
        if op.type in ANCHORS
    ]
    arrays = executor.run(program, feed=feed, fetch_list=[name for _, name in anchors])
    (folder / "trace.json").write_text(json.dumps(anchors), encoding="utf-8")
    write_arrays(folder / "trace.npz", *arrays)


def _trace_pir(model: str, params: str, feed: Feed, folder: Path) -> None:
    from paddle import inference

    document, operators = with_fetches(json.loads(Path(model).read_text(encoding="utf-8")), ANCHORS)
    traced = folder / "traced.json"
    traced.write_text(json.dumps(document), encoding="utf-8")
    config = inference.Config(str(traced), params)
    config.disable_gpu()
    config.disable_glog_info()
    config.switch_ir_optim(False)  # fused operators would take inner values away
    predictor = inference.create_predictor(config)
    for name, values in feed.items():
        predictor.get_input_handle(name).copy_from_cpu(values)
    predictor.run()
    names = predictor.get_output_names()[-len(operators) :]
    anchors = [(operator.kind, f"%{operator.result} {operator.place}".strip()) for operator in operators]
    (folder / "trace.json").write_text(json.dumps(anchors), encoding="utf-8")
    write_arrays(folder / "trace.npz", *(predictor.get_output_handle(name).copy_to_cpu() for name in names))


if __name__ == "__main__":
    answer_job(_child)
