"""What a runtime really does with an artifact: which operators run on integer kernels, and where the time goes.

A plan says what is meant to be in INT8. Whether a runtime follows depends on its graph optimizations, so the
runtime itself is asked: OpenVINO for the graph it executes, onnxruntime for the graph it has optimized.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx

from quant.graph import all_nodes
from quant.plan import QuantPlan
from quant.runtime import Feed, openvino_settings
from quant.target import TARGETS, TargetName

_INTEGER_TYPES = ("u8", "i8")
_OPENVINO_KERNELS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_ONNXRUNTIME_KERNELS = (
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
)
_WARM_UP, _RUNS = 3, 15
_DECORATIONS = ("/WithoutBiases", "_nchwc", "/MatmulTransposeFusion/")
"""What runtimes add to the name of an operator that they rewrite."""


@dataclass(frozen=True)
class Kernel:
    """One step of a runtime, as the runtime's own profile shows it.

    Attributes:
        name: the tensor it writes in the artifact, where the runtime keeps it; else a name of the runtime's own.
        kind: the runtime's name of the operator; for OpenVINO its implementation follows in brackets.
        precision: type that it computes in, as the runtime writes it: `u8`, `f32`, `uint8`, `float`.
        milliseconds: median over several runs.
        merged: names of the artifact's operators that it computes; empty where the runtime does not say.
    """

    name: str
    kind: str
    precision: str
    milliseconds: float
    merged: tuple[str, ...] = ()

    @property
    def operator(self) -> str:
        """The name without what runtimes add to it."""
        return _undecorated(self.name)


def _undecorated(name: str) -> str:
    for decoration in _DECORATIONS:
        name = name.removesuffix(decoration)
    return name


def executed_operators(target: TargetName, folder: Path, plan: QuantPlan) -> set[str] | None:
    """Names of the plan's operators that the target runs on integer kernels.

    A matrix product that OpenVINO has merged into a larger kernel does not count, nor what it has inside of a loop: the
    graph that it executes does not show it.

    Returns:
        None for `paddle`, which cannot be asked.
    """
    found = integer_operators(target, folder)
    return None if found is None else {operator.name for operator in plan.operators} & found


def integer_operators(target: TargetName, folder: Path) -> set[str] | None:
    """Names, by the tensor that they write, of all operators that run on integer kernels; None for `paddle`."""
    if target == "paddle" or not TARGETS[target].executed:
        return None
    return _openvino_integers(folder) if target == "openvino" else _onnxruntime_integers(folder)


def executed_coverage(target: TargetName, folder: Path, plan: QuantPlan) -> float | None:
    """Share of the plan's multiply-accumulates, 0..1, on integer kernels; None where the runtime cannot be asked."""
    executed = executed_operators(target, folder, plan)
    if executed is None:
        return None
    total = sum(operator.macs for operator in plan.operators)
    return sum(operator.macs for operator in plan.operators if operator.name in executed) / total if total else 0.0


def kernel_tables(target: TargetName, folders: Sequence[Path], feed: Feed, threads: int) -> list[list[Kernel]]:
    """Every step that the runtime takes for one input, the slowest first, of each model.

    The models take turns, so that a noisy machine disturbs them alike.

    Raises:
        ValueError: for `paddle`, whose profile is not read here.
    """
    if target == "paddle":
        raise ValueError("no profile is read from Paddle Inference")
    kind = _OpenVinoProfile if target == "openvino" else _OnnxRuntimeProfile
    with tempfile.TemporaryDirectory() as place:
        profiles: list[_Profile] = [kind(folder, threads, Path(place)) for folder in folders]
        for _ in range(_WARM_UP + _RUNS):
            for profile in profiles:
                profile.run(feed)
        tables = [profile.kernels() for profile in profiles]
    return [sorted(kernels, key=lambda kernel: -kernel.milliseconds) for kernels in tables]


class _Profile(Protocol):
    """A model in a runtime that notes the time of every step."""

    def run(self, feed: Feed) -> None: ...

    def kernels(self) -> list[Kernel]: ...


def _named_model(folder: Path) -> bytes:
    """The artifact with every node named by its output: runtimes carry names of nodes, plans names of tensors."""
    model = onnx.load(folder / "inference.onnx")
    for node in all_nodes(model.graph.node):
        node.name = node.output[0]
    return model.SerializeToString()


def _openvino_model(folder: Path, threads: int, *, profile: bool) -> Any:
    import openvino

    core = openvino.Core()
    settings = {**openvino_settings(threads), "PERF_COUNT": profile}
    return core.compile_model(core.read_model(_named_model(folder)), "CPU", settings)


def _openvino_integers(folder: Path) -> set[str]:
    names: set[str] = set()
    for step in _openvino_steps(_openvino_model(folder, 1, profile=False)):
        if step["layerType"] in _OPENVINO_KERNELS and step["runtimePrecision"] in _INTEGER_TYPES:
            names.update(name.removesuffix("/WithoutBiases") for name in step["originalLayersNames"].split(","))
    return names


def _openvino_steps(compiled: Any) -> Iterator[dict[str, str]]:
    """What OpenVINO notes about each node of the graph that it executes, and the node's name under `name`."""
    for node in compiled.get_runtime_model().get_ordered_ops():
        notes = node.get_rt_info()
        fields = ("layerType", "runtimePrecision", "originalLayersNames")
        yield {"name": node.get_friendly_name(), **{field: notes[field].astype(str) for field in fields}}


class _OpenVinoProfile:
    def __init__(self, folder: Path, threads: int, _: Path) -> None:
        compiled = _openvino_model(folder, threads, profile=True)
        self._steps = {step["name"]: step for step in _openvino_steps(compiled)}
        self._request = compiled.create_infer_request()
        self._kinds: dict[str, str] = {}
        self._times: dict[str, list[float]] = defaultdict(list)

    def run(self, feed: Feed) -> None:
        from openvino import ProfilingInfo

        self._request.infer(feed)
        for info in self._request.get_profiling_info():
            if info.status == ProfilingInfo.Status.EXECUTED:
                self._kinds[info.node_name] = f"{info.node_type} ({info.exec_type})"
                self._times[info.node_name].append(1000 * info.real_time.total_seconds())

    def kernels(self) -> list[Kernel]:
        # Some steps are done in the first run alone.
        return [self._kernel(name, times[_WARM_UP:]) for name, times in self._times.items() if len(times) > _WARM_UP]

    def _kernel(self, name: str, times: Sequence[float]) -> Kernel:
        step = self._steps.get(name, {"runtimePrecision": "unknown", "originalLayersNames": ""})
        merged = tuple(_undecorated(layer) for layer in step["originalLayersNames"].split(",") if layer)
        return Kernel(name, self._kinds[name], step["runtimePrecision"], statistics.median(times), merged)


def _onnxruntime_session(folder: Path, options: Any) -> Any:
    import onnxruntime

    options.log_severity_level = 3  # it warns that an optimized file suits this processor alone
    return onnxruntime.InferenceSession(_named_model(folder), options, providers=["CPUExecutionProvider"])


def _onnxruntime_integers(folder: Path) -> set[str]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as place:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(place) / "optimized.onnx")
        _onnxruntime_session(folder, options)
        optimized = onnx.load(options.optimized_model_filepath)
    return {_old_name(node.name) for node in all_nodes(optimized.graph.node) if node.op_type in _ONNXRUNTIME_KERNELS}


def _old_name(name: str) -> str:
    """A node that onnxruntime replaces gets the old one's name and a number."""
    return re.sub(r"_token_\d+$", "", name)


class _OnnxRuntimeProfile:
    def __init__(self, folder: Path, threads: int, place: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Else the idle threads of one session take the cores from the next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(tempfile.mkdtemp(dir=place)) / "profile")
        self._session = _onnxruntime_session(folder, options)

    def run(self, feed: Feed) -> None:
        self._session.run(None, feed)

    def kernels(self) -> list[Kernel]:
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        seen: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                # Two nodes may bear one name.
                seen[event["name"].removesuffix("_kernel_time"), event["args"]["node_index"]].append(event)
        return [_onnxruntime_kernel(name, same[_WARM_UP:]) for (name, _), same in seen.items()]


def _onnxruntime_kernel(name: str, events: list[dict[str, Any]]) -> Kernel:
    notes = events[0]["args"]
    types = [kind for entry in notes["input_type_shape"] for kind in entry]
    milliseconds = statistics.median(event["dur"] for event in events) / 1000
    return Kernel(_old_name(name), notes["op_name"], types[0] if types else "unknown", milliseconds)
