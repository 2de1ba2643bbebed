"""The runtimes behind one small interface: a session takes named arrays and returns arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from onnx import ModelProto

from quant.errors import InputError, Unavailable
from quant.graph import LightModel
from quant.source import SHIPPED_FILES
from quant.target import TARGETS, ArtifactFormat, TargetName

Feed = dict[str, np.ndarray]
Precision = Literal["f32", "default"]
"""What OpenVINO computes in where not in INT8: f32, or what it takes by itself (bf16 where the processor can)."""

MODEL_FILES: dict[str, tuple[str, ...]] = {
    "onnx": ("inference.onnx",),
    "paddle": ("inference.pdmodel", "inference.pdiparams"),
}
"""Files of an artifact by format."""


class Session(Protocol):
    """A loaded model. `run` returns the model's outputs, or the named ones, as float or integer arrays."""

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[np.ndarray]: ...


def target_format(target: TargetName) -> ArtifactFormat:
    """Format of a target's artifact."""
    return TARGETS[target].format


def model_files(folder: Path, kind: str) -> list[Path]:
    """The files of the model in a folder, `onnx` or `paddle`; an original of Paddle may be a PIR program."""
    names = MODEL_FILES[kind]
    if kind == "paddle" and (folder / SHIPPED_FILES["pir"][0]).is_file():
        names = SHIPPED_FILES["pir"]
    return [folder / name for name in names]


def model_bytes(target: TargetName, folder: Path) -> int:
    """Size of the model in a folder, in bytes, without `inference.yml`."""
    return sum(path.stat().st_size for path in model_files(folder, target_format(target)))


def open_session(target: TargetName, folder: Path, threads: int, precision: Precision = "f32") -> Session:
    """Load the artifact (or FP32 model) in `folder` on the target's own runtime.

    Args:
        precision: of OpenVINO; the others compute in f32.

    Raises:
        Unavailable: the runtime is not installed.
        InputError: a model file is missing or the runtime refuses it.
    """
    for path in model_files(folder, target_format(target)):
        if not path.is_file():
            raise InputError(f"{folder}: {path.name} is missing; run `quant run` for this model again")
    try:
        if target == "onnxruntime":
            return onnx_session(folder / "inference.onnx", threads)
        if target == "openvino":
            return openvino_session(folder / "inference.onnx", threads, precision)
        return _PaddleInference(folder, threads)
    except ImportError as error:
        fix = "install it with `pip install 'paddle-quant[cpu]'`; `quant doctor` lists what is missing"
        raise Unavailable(f"the runtime of target '{target}' is not installed ({error})", fix) from error
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else error.__class__.__name__
        raise InputError(f"{folder}: {target} cannot load the model: {first}") from error


def writes_in_steps(model: Path) -> bool:
    """Whether a Paddle program has a loop. PaddleX runs such models without oneDNN, which fails on empty caches."""
    # An operator's kind as old-IR (field 3 of its message, 5 letters) and PIR programs write it; what an old-IR program
    # says of the network's source code may speak of loops, too.
    program = model.read_bytes()
    return b"\x1a\x05while" in program or b'"1.while"' in program


def streams(target: TargetName, threads: int) -> tuple[int, int]:
    """How to judge many pictures: sessions side by side, and threads of each.

    One-thread sessions side by side are fastest for onnxruntime (15 % on two cores). OpenVINO loses 28 % by them, and
    Paddle crashes now and then when two predictors of one process run at the same time.
    """
    return (threads, 1) if TARGETS[target].side_by_side else (1, threads)


def onnx_session(
    model: ModelProto | LightModel | Path, threads: int, *, integers: bool = True, plan_buffers: bool = True
) -> Session:
    """An onnxruntime CPU session of a model file or a model in memory.

    Args:
        integers: whether operators between Q/DQ may become integer kernels; else each node is computed as it stands.
        plan_buffers: whether it is planned which tensors share memory. That takes time with the square of their number:
            20 s for 5,000 nodes, which load in half a second without.
    """
    return _OnnxRuntime(model, threads, integers, plan_buffers)


def openvino_session(file: Path, threads: int, precision: Precision = "f32") -> Session:
    """An OpenVINO CPU session of an ONNX file or an IR (.xml)."""
    return _OpenVino(file, threads, precision)


class _OnnxRuntime:
    def __init__(self, model: ModelProto | LightModel | Path, threads: int, integers: bool, plan_buffers: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # a pattern is kept for every picture size
        options.enable_mem_reuse = plan_buffers
        # Else the idle threads of one session take the cores from the next: FP32 and INT8 in turn run at half speed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.disable_quant_qdq", "0" if integers else "1")
        if isinstance(model, LightModel):
            self._weights = model.weights  # that the session reads as long as it lives
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in model.weights.values()]
            options.add_external_initializers(list(model.weights), values)
            model = model.model
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the exception classes of onnxruntime derive from Exception alone
            raise RuntimeError(str(error)) from error

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[np.ndarray]:
        if outputs is None:
            return list(self._session.run(None, feed))
        return list(self._session.run(list(outputs), feed)) if outputs else []  # onnxruntime reads [] as "all"


def openvino_settings(threads: int, precision: Precision = "f32") -> dict[str, str | int]:
    """How every OpenVINO model is compiled here."""
    settings: dict[str, str | int] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        # By default every new picture size is remembered: 1.1 GB after 150 line widths instead of 0.3.
        "CPU_RUNTIME_CACHE_CAPACITY": "100",
    }
    if precision == "f32":
        # Without the hint OpenVINO computes in bf16 where the processor can: no FP32 baseline then.
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    return settings


class _OpenVino:
    def __init__(self, file: Path, threads: int, precision: Precision) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(str(file))
        settings = openvino_settings(threads, precision)
        if any(operator.get_type_name() == "Loop" for operator in model.get_ops()):
            # Kernels kept for one length are taken for others where a cache grows (see docs/targets.md).
            settings["CPU_RUNTIME_CACHE_CAPACITY"] = "0"
        self._compiled = core.compile_model(model, "CPU", settings)
        self._request = self._compiled.create_infer_request()

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[np.ndarray]:
        self._request.infer(feed)
        wanted = outputs if outputs else [port.any_name for port in self._compiled.outputs]
        return [np.array(self._request.get_tensor(name).data) for name in wanted]


class _PaddleInference:
    def __init__(self, folder: Path, threads: int) -> None:
        os.environ.setdefault("FLAGS_enable_pir_api", "0")
        os.environ.setdefault("GLOG_minloglevel", "3")
        from paddle import inference

        model, params = map(str, model_files(folder, "paddle"))
        config = inference.Config(model, params)
        config.disable_gpu()
        config.disable_glog_info()
        config.set_cpu_math_library_num_threads(threads)
        if writes_in_steps(Path(model)):
            config.disable_mkldnn()
        else:
            config.enable_mkldnn()
            # Every new picture size would keep its own buffers: 5 GB after 90 pages without these.
            config.set_mkldnn_cache_capacity(1)
            # It merges a Reshape into the product before it, and loses it where the sizes are computed.
            config.delete_pass("operator_reshape2_onednn_fuse_pass")
        if not model.endswith(".json"):  # Paddle 3.2.2 stumbles over the pass for a PIR program under this flag
            config.enable_memory_optim()
        self._predictor = inference.create_predictor(config)

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[np.ndarray]:
        for name, values in feed.items():
            self._predictor.get_input_handle(name).copy_from_cpu(values)
        self._predictor.run()
        wanted = outputs if outputs else self._predictor.get_output_names()
        results = [self._predictor.get_output_handle(name).copy_to_cpu() for name in wanted]
        self._predictor.clear_intermediate_tensor()
        self._predictor.try_shrink_memory()
        return results
