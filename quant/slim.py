"""PaddleSlim's post-training quantization as a method: its scales, read into a plan.

`quant_post_static` runs in a process of its own (`python -m quant.slim FOLDER`): Paddle's flags,
static mode, prints and memory stay there. The two processes exchange npz and json files.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from quant.arrays import write_arrays
from quant.child import (
    LimitExceeded,
    answer,
    child_command,
    child_environment,
    ending,
    model_limits,
    raise_answer,
    run_child,
)
from quant.errors import InputError, Unavailable
from quant.graph import Graph
from quant.plan import (
    ActivationQuantizer,
    IntegerWeight,
    Operator,
    QuantPlan,
    WeightQuantizer,
    quantizable_operators,
    weight_axis,
)
from quant.program import MODEL_FILE, PARAMS_FILE, import_paddle, unwritten, writable_part, write_program
from quant.recipe import PaddleSlim

LOG_FILE = "paddleslim.log"
_PROGRESS_FILE = "progress.txt"
SCALES_FILE = "scales.json"
WEIGHTS_FILE = "scales.npz"

# As in `quant.plan.quantize_weight`.
SMALLEST_SCALE = np.float32(1e-12 / 127)

_SECONDS = 6 * 3600.0

_OPERATORS = ["conv2d", "depthwise_conv2d", "conv2d_transpose", "matmul_v2"]

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SlimScales:
    """What PaddleSlim chose, by tensor name of the graph.

    Args:
        activations: real units per integer step, S8 symmetric.
        weights: float32 [channels], real units per integer step.
        integers: int8 weights as PaddleSlim rounded them.
        skipped: inputs and weights of Conv, ConvTranspose and MatMul that it saw and did not quantize.
        unseen: operators that were not in its program, and the first operator before each that kept them out, in words.
    """

    activations: dict[str, float]
    weights: dict[str, Array]
    integers: dict[str, Array]
    skipped: tuple[str, ...]
    unseen: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write scales.json and scales.npz, the same bytes for the same scales."""
        document = {"activations": self.activations, "skipped": self.skipped, "unseen": self.unseen}
        (folder / SCALES_FILE).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        arrays = {f"scale:{name}": self.weights[name] for name in sorted(self.weights)}
        arrays |= {f"values:{name}": self.integers[name] for name in sorted(self.integers)}
        write_arrays(folder / WEIGHTS_FILE, **arrays)


def load_scales(folder: Path) -> SlimScales:
    """Read what `SlimScales.save` wrote."""
    document = json.loads((folder / SCALES_FILE).read_text(encoding="utf-8"))
    with np.load(folder / WEIGHTS_FILE) as stored:
        arrays = {name: stored[name] for name in stored.files}
    weights = {name.removeprefix("scale:"): value for name, value in arrays.items() if name.startswith("scale:")}
    integers = {name.removeprefix("values:"): value for name, value in arrays.items() if name.startswith("values:")}
    return SlimScales(document["activations"], weights, integers, tuple(document["skipped"]), document["unseen"])


def slim_scales(
    graph: Graph,
    feeds: Iterable[dict[str, Array]],
    settings: PaddleSlim,
    folder: Path,
    progress: Progress | None = None,
) -> SlimScales:
    """Run PaddleSlim on the FP32 program of a prepared graph.

    Args:
        graph: prepared graph.
        feeds: input name -> array with batch size 1; at most `settings.samples` are taken.
        settings: algorithm and its arguments.
        folder: working folder; nothing is left in it.
        progress: called with samples done and samples in all (`hist` and `KL` read each twice).

    Raises:
        InputError: no samples, an operator that a Paddle program cannot hold, or more time or memory than allowed.
        OSError: there is no room for the files of the two processes.
        RuntimeError: PaddleSlim failed; names the log and its last line.
        Unavailable: PaddleSlim is not installed.
    """
    _check_installed()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="paddleslim-", dir=folder) as name:
        work = Path(name)
        part = writable_part(graph)
        count = _save_feeds(islice(feeds, settings.samples), work / "feeds")
        write_program(part, work / "fp32")
        job = {"algo": settings.algo, "hist_percent": settings.hist_percent, "samples": count}
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run_child(work, progress or (lambda done, total: None))
        found = load_scales(work)
    unseen = _unseen(graph) if part is not graph else {}
    return replace(found, skipped=_left_out(graph, found, unseen), unseen=unseen)


def slim_plan(
    graph: Graph,
    operators: list[Operator],
    scales: SlimScales,
    *,
    model: str,
    target: str,
    dtype: Literal["int8", "uint8"],
    prepared_sha256: str = "",
) -> QuantPlan:
    """A plan with PaddleSlim's grid.

    Args:
        operators: from `quantizable_operators`; those that PaddleSlim left out go back to FP32.
        dtype: of activations; uint8 writes the same grid with zero point 128.

    Raises:
        ValueError: the scales belong to another graph.
    """
    chosen = [_judged(operator, scales) for operator in operators]
    unseen = [operator.name for operator in operators if operator.quantized and operator.name in scales.unseen]
    ends = dict.fromkeys(f"the program for PaddleSlim ends early: {scales.unseen[name]}" for name in unseen)
    zero_point = 128 if dtype == "uint8" else 0
    activations = {
        # A tensor that held nothing but zeros, as behind a dead ReLU, gets a scale of 0.
        name: ActivationQuantizer(
            tensor=name, dtype=dtype, scale=max(scale, float(SMALLEST_SCALE)), zero_point=zero_point
        )
        for name, scale in sorted(scales.activations.items())
    }
    weights, integers = {}, {}
    for operator in chosen:
        if operator.quantized and operator.weight is not None:
            axis = weight_axis(operator.op_type)
            weights[operator.weight] = WeightQuantizer(tensor=operator.weight, axis=axis)
            integers[operator.weight] = _integer_weight(graph, scales, operator.weight, axis)
    return QuantPlan(
        model=model,
        target=target,
        method="paddleslim",
        prepared_sha256=prepared_sha256,
        operators=chosen,
        activations=activations,
        weights=weights,
        integers=integers,
        bias_shifts={},
        notes=[*ends, *(f"PaddleSlim left {name} in FP32" for name in scales.skipped)],
    )


def _judged(operator: Operator, scales: SlimScales) -> Operator:
    missing = [name for name in operator.activations if name not in scales.activations]
    if operator.weight is not None and operator.weight not in scales.weights:
        missing.append(operator.weight)
    if not operator.quantized or not missing:
        return operator
    end = scales.unseen.get(operator.name)
    reason = f"the program for PaddleSlim ends before it: {end}" if end else f"PaddleSlim left {missing[0]} in FP32"
    return operator.model_copy(update={"quantized": False, "reason": reason})


def _integer_weight(graph: Graph, scales: SlimScales, name: str, axis: int) -> IntegerWeight:
    """PaddleSlim's integers; channels that hold nothing get zeros and the plan's smallest scale.

    PaddleSlim gives a dead channel a scale of 0 or a denormal number, which no runtime can divide by.
    """
    values, scale = scales.integers[name], scales.weights[name]
    if values.shape != graph.constants[name].shape or scale.shape != values.shape[axis : axis + 1]:
        raise ValueError(f"{name}: the scales were made for another graph")
    shape = [1] * values.ndim
    shape[axis] = -1
    dead = scale < SMALLEST_SCALE
    return IntegerWeight(np.where(dead.reshape(shape), 0, values).astype(np.int8), np.maximum(scale, SMALLEST_SCALE))


def _check_installed() -> None:
    """PaddleSlim is no requirement of the package: its own would bring a second OpenCV build."""
    if importlib.util.find_spec("paddleslim") is None:
        fix = "Run `pip install --no-deps paddleslim`, or choose another method for this target"
        raise Unavailable("the package paddleslim is not installed", fix)


def _save_feeds(feeds: Iterable[dict[str, Array]], folder: Path) -> int:
    """One file a sample, so that neither process holds them all."""
    folder.mkdir()
    count = 0
    for count, feed in enumerate(feeds, start=1):
        write_arrays(folder / f"{count:06d}.npz", **feed)
    if not count:
        raise InputError("PaddleSlim needs calibration samples, but there are none")
    return count


def _run_child(work: Path, progress: Progress) -> None:
    log, weights = work / LOG_FILE, work / "fp32" / PARAMS_FILE
    # One thread: sums, and with them the scales, do not depend on the number of cores.
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # PaddleX sets the flag to 1 in the environment of the process that loads a model.
    environment = child_environment(**threads, FLAGS_enable_pir_api="0")
    command = child_command("quant.slim", work)
    limits = model_limits([weights], _SECONDS)
    try:
        code = run_child(command, log, environment, limits, _Teller(work / _PROGRESS_FILE, progress).tell)
    except LimitExceeded as error:
        raise InputError(f"PaddleSlim {error}; give it fewer samples: --set paddleslim.samples=8") from error
    if code:
        raise_answer(work, code)
        raise RuntimeError(f"PaddleSlim failed with code {code}{_kept(log)}: {ending(code, log)}")


@dataclass
class _Teller:
    """Tells on what the child has written to its file of progress since it was looked at last."""

    file: Path
    progress: Progress
    told: int = 0

    def tell(self) -> None:
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True) if self.file.is_file() else []
        for line in lines[self.told :]:
            if line.endswith("\n"):
                self.told += 1
                done, total = map(int, line.split())
                self.progress(done, total)


def _kept(log: Path) -> str:
    """Where a copy of the log stays, in words: the working folder vanishes. Nothing where there is no room for one."""
    try:
        with tempfile.NamedTemporaryFile(prefix="paddleslim-", suffix=".log", delete=False) as kept:
            kept.write(log.read_bytes())
    except OSError:
        return ""
    return f", see {kept.name}"


def _unseen(graph: Graph) -> dict[str, str]:
    """Operators that the plan could quantize and a Paddle program of the graph does not hold, and why not."""
    refused = unwritten(graph)
    return {one.name: refused[one.name] for one in quantizable_operators(graph, {}) if one.name in refused}


def _left_out(graph: Graph, found: SlimScales, unseen: Mapping[str, str]) -> tuple[str, ...]:
    """Tensors that the plan could quantize and PaddleSlim saw and did not, in graph order."""
    asked: list[str] = []
    for operator in quantizable_operators(graph, {}):
        if operator.quantized and operator.name not in unseen:
            asked += [*operator.activations, *([operator.weight] if operator.weight else [])]
    return tuple(name for name in dict.fromkeys(asked) if name not in found.activations and name not in found.weights)


def _child(folder: Path) -> None:
    """What the child process does; a line `done total` in the file of progress for each sample."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    with (folder / _PROGRESS_FILE).open("w", encoding="utf-8", buffering=1) as told:
        paddle = import_paddle()
        _quantize(paddle, job, folder, lambda done, total: print(done, total, file=told))
    _read_scales(paddle, folder / "int8").save(folder)


def _quantize(paddle: Any, job: dict[str, Any], folder: Path, progress: Progress) -> None:
    # PaddleSlim imports its search server, which needs pyzmq; quantization never uses it.
    sys.modules.setdefault("zmq", types.ModuleType("zmq"))
    from paddle.static.quantization import quant_config
    from paddleslim.quant import quant_post_static

    # Observers only note the ranges of all other operators' outputs; without them it takes half the time.
    quantizer: Any = quant_config.BaseQuantizer
    quantizer.observer_operation_types = property(lambda self: [])
    total = job["samples"] * (2 if job["algo"] in ("hist", "KL") else 1)
    done = 0

    def feeds() -> Iterator[dict[str, Array]]:
        nonlocal done
        for path in sorted((folder / "feeds").glob("*.npz")):
            with np.load(path) as stored:
                feed = {name: stored[name] for name in stored.files}
            done += 1
            progress(done, total)
            yield feed

    quant_post_static(
        paddle.static.Executor(paddle.CPUPlace()),
        str(folder / "fp32"),
        str(folder / "int8"),
        data_loader=feeds,
        model_filename=MODEL_FILE,
        params_filename=PARAMS_FILE,
        save_model_filename=MODEL_FILE,
        save_params_filename=PARAMS_FILE,
        batch_size=1,
        batch_nums=job["samples"],
        algo=job["algo"],
        hist_percent=job["hist_percent"],
        quantizable_op_type=_OPERATORS,
        is_full_quantize=False,
        weight_bits=8,
        activation_bits=8,
        activation_quantize_type="range_abs_max",
        weight_quantize_type="channel_wise_abs_max",
        onnx_format=True,
    )


def _read_scales(paddle: Any, folder: Path) -> SlimScales:
    """Scales by tensor name from a program that PaddleSlim saved; its `Scale` is what 127 stands for."""
    executor = paddle.static.Executor(paddle.CPUPlace())
    with paddle.static.scope_guard(paddle.static.Scope()):
        program, _, _ = paddle.static.load_inference_model(
            str(folder), executor, model_filename=MODEL_FILE, params_filename=PARAMS_FILE
        )

        def value(name: str) -> Array:
            return np.array(paddle.static.global_scope().find_var(name).get_tensor())

        found = SlimScales({}, {}, {}, ())
        for operator in program.global_block().ops:
            # An observer remembers a range and lets the values through as they are.
            if operator.type not in ("quantize_linear", "dequantize_linear") or _observes(operator):
                continue
            tensor = operator.input("X")[0]
            scale = value(operator.input("Scale")[0]).ravel().astype(np.float32) / np.float32(127)
            if operator.type == "quantize_linear":
                found.activations[tensor] = float(scale[0])
            elif program.global_block().var(tensor).persistable:
                found.weights[tensor] = scale
                found.integers[tensor] = value(tensor).astype(np.int8)
    return found


def _observes(operator: Any) -> bool:
    return bool(operator.has_attr("only_observer") and operator.attr("only_observer"))


if __name__ == "__main__":
    answer(Path(sys.argv[1]), lambda: _child(Path(sys.argv[1])))
