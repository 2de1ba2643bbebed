"""The quantizers that are compared, each as its makers document it, from the same FP32 model and pictures.

A quantizer is a function of `Inputs` and a folder, which receives `inference.onnx`, `inference.xml` (OpenVINO IR) or
`inference.pdmodel`. It imports its package inside, so that one that is not installed costs its own rows alone.
"""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from quant.errors import InputError
from quant.job import Job, Options, prepared_stage, start
from quant.recipe import limited_to, load_recipe
from quant.runtime import MODEL_FILES, Feed
from quant.target import TargetName

ONNX_TARGETS: tuple[TargetName, ...] = ("onnxruntime", "openvino")
OPERATORS = ["Conv", "ConvTranspose", "MatMul"]
MAX_DROP = 0.01  # of a metric between 0 and 1
INSTALL = "pip install -c constraints.txt -e '.[peers]'"
# Its own requirements would bring a second OpenCV build.
INSTALL_INC = f"{INSTALL} && pip install --no-deps neural-compressor==2.6"

# Everything in INT8, nothing reverted and no picture scored: what the peers' plain calls do.
NO_SEARCH = [
    "ladder.search_samples=1",
    "ladder.damage_samples=1",
    "ladder.error_samples=1",
    "ladder.coverage_steps=[]",
    "ladder.fit_samples=0",
    "ladder.max_error=1.0e-12",
]


@dataclass(frozen=True)
class Inputs:
    """What a quantizer may use.

    Attributes:
        shipped: folder of the FP32 model as shipped, in Paddle's format and as ONNX.
        feeds: folder of the calibration pictures, pre-processed, one npz each.
        target: that the result is for; quantizers of several targets are asked once, for the first.
    """

    model: str
    overrides: list[str]
    options: Options
    shipped: Path
    feeds: Path
    target: TargetName

    def read_feeds(self, start: int = 0, stop: int | None = None) -> Iterator[Feed]:
        for file in sorted(self.feeds.glob("*.npz"))[start:stop]:
            with np.load(file) as stored:
                yield {name: stored[name] for name in stored.files}

    def job(self, extra: list[str] = []) -> Job:  # noqa: B006  (only read)
        """The job of the model on the target alone."""
        recipe = load_recipe(self.model, [*self.overrides, *extra])
        return start(limited_to(recipe, [self.target]), self.options)

    @cached_property
    def count(self) -> int:
        return len(list(self.feeds.glob("*.npz")))


@dataclass(frozen=True)
class Peer:
    """A quantizer.

    Attributes:
        targets: runtimes that its result is judged on.
        each: whether every target gets a result of its own.
        folded: whether `quantize` begins with the folded model, for which all others have only the imported one.
        quantize: gives the coverage back where the quantizer itself says it.
        prepare: makes what is not timed, as reading the sets; its result is handed to `quantize`.
        package: what `quantize` imports, which is not timed: starting is no quantizing.
        install: how to get the package.
    """

    label: str
    targets: tuple[TargetName, ...]
    quantize: Callable[[Inputs, Any, Path], float | None]
    prepare: Callable[[Inputs], Any] = lambda inputs: None
    each: bool = False
    folded: bool = False
    package: str = ""
    install: str = INSTALL


# --- this project ----------------------------------------------------------------------------------


def prepare_ours(inputs: Inputs, search: bool) -> Job:
    return inputs.job([] if search else [*NO_SEARCH, f"targets.{inputs.target}.min_coverage=1"])


def quantize_ours(inputs: Inputs, job: Job, folder: Path, search: bool) -> float:
    """Calibrate, plan, export and check; with search from the model as published, else from the folded one."""
    from quant.pipeline import quantize
    from quant.stage import StageStore

    fresh = replace(job, store=StageStore(folder.parent / "stages"))
    if not search:
        stage = prepared_stage(job)
        shutil.copytree(stage, fresh.store.folder / stage.name)
    found = quantize(fresh, inputs.target)
    shutil.copytree(found.artifact, folder, dirs_exist_ok=True)
    return found.plan.coverage()


# --- onnxruntime -----------------------------------------------------------------------------------


def quantize_onnxruntime(inputs: Inputs, _: None, folder: Path, method: str) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    shipped, preprocessed = inputs.shipped / "inference.onnx", folder / "preprocessed.onnx"
    try:
        quant_pre_process(str(shipped), str(preprocessed))
    except ImportError:
        raise
    except Exception as error:  # it raises a bare Exception where it cannot name every size, as for mobile_rec
        print(f"{error}: once more without symbolic shapes, as onnxruntime's manual says")
        quant_pre_process(str(shipped), str(preprocessed), skip_symbolic_shape=True)
    quantize_static(
        str(preprocessed),
        str(folder / "inference.onnx"),
        _Reader(inputs),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=OPERATORS,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
        # One picture at a time: Percentile fails on pictures of different sizes, and both would keep all activations.
        extra_options={"CalibStridedMinMax": 1},
    )
    preprocessed.unlink()


class _Reader:
    """What onnxruntime's calibration reads from, a range of the pictures at a time."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._feeds = inputs.read_feeds()

    def __len__(self) -> int:
        return self._inputs.count

    def set_range(self, start_index: int, end_index: int) -> None:
        self._feeds = self._inputs.read_feeds(start_index, end_index)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)

    def __iter__(self) -> Iterator[Feed]:
        return self._feeds

    def __next__(self) -> Feed:
        return next(self._feeds)


# --- NNCF ------------------------------------------------------------------------------------------


def quantize_nncf(inputs: Inputs, _: None, folder: Path) -> None:
    import nncf
    import openvino

    model = openvino.Core().read_model(inputs.shipped / "inference.onnx")
    quantized = nncf.quantize(
        model,
        nncf.Dataset(list(inputs.read_feeds())),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=inputs.count,
        fast_bias_correction=True,
    )
    openvino.save_model(quantized, folder / "inference.xml", compress_to_fp16=False)


def quantize_nncf_accuracy(inputs: Inputs, job: Job, folder: Path) -> None:
    """Reverts operators until the search split loses at most `MAX_DROP` by the recipe's own metric."""
    import nncf
    import openvino

    from eval.dataset import read_sample
    from eval.evaluation import readable
    from eval.metric import make_metric

    metric, adapter = make_metric(job.recipe.metric), job.adapter
    search = [sample for sample, _ in readable(job.selection.search, adapter, [])]

    def metric_of(compiled: Any, samples: Any) -> tuple[float, None]:
        counts = []
        for sample in samples:
            prepared = adapter.preprocess(read_sample(sample))
            outputs = list(compiled(prepared.inputs).values())
            counts.append(metric.score(adapter.postprocess(outputs, prepared.context), sample.label))
        return metric.value(np.array(counts)) / 100, None

    quantized = nncf.quantize_with_accuracy_control(
        openvino.Core().read_model(inputs.shipped / "inference.onnx"),
        nncf.Dataset(list(inputs.read_feeds())),
        nncf.Dataset(search, lambda sample: adapter.preprocess(read_sample(sample)).inputs),
        validation_fn=metric_of,
        max_drop=MAX_DROP,
        drop_type=nncf.DropType.ABSOLUTE,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=inputs.count,
        fast_bias_correction=True,
    )
    openvino.save_model(quantized, folder / "inference.xml", compress_to_fp16=False)


# --- PaddleSlim ------------------------------------------------------------------------------------


def quantize_paddleslim(inputs: Inputs, _: None, folder: Path) -> None:
    # PaddleSlim imports its search server, which needs pyzmq; quantization never uses it.
    sys.modules.setdefault("zmq", types.ModuleType("zmq"))
    import paddle
    from paddleslim.quant import quant_post_static

    model, params = MODEL_FILES["paddle"]
    if not (inputs.shipped / model).is_file():
        raise InputError("PaddleSlim reads old-IR programs alone, and this model is published as PIR")
    paddle.enable_static()
    quant_post_static(
        paddle.static.Executor(paddle.CPUPlace()),
        str(inputs.shipped),
        str(folder),
        data_loader=inputs.read_feeds,
        model_filename=model,
        params_filename=params,
        save_model_filename=model,
        save_params_filename=params,
        batch_size=1,
        batch_nums=inputs.count,
        algo="hist",
        weight_quantize_type="channel_wise_abs_max",
        onnx_format=True,
    )


# --- Intel Neural Compressor -----------------------------------------------------------------------


def quantize_inc(inputs: Inputs, _: None, folder: Path) -> None:
    """Version 2.6: 3.x has given up ONNX."""
    from neural_compressor import PostTrainingQuantConfig, quantization

    config = PostTrainingQuantConfig(
        approach="static", quant_format="QDQ", calibration_sampling_size=[inputs.count], excluded_precisions=["bf16"]
    )
    model = quantization.fit(str(inputs.shipped / "inference.onnx"), config, calib_dataloader=_Loader(inputs))
    if model is None:
        raise RuntimeError("Neural Compressor gave no model back; its log says why")
    model.save(str(folder / "inference.onnx"))


class _Loader:
    """What Neural Compressor takes for a data loader: pairs of inputs and label."""

    batch_size = 1

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        for feed in self._inputs.read_feeds():
            yield next(iter(feed.values())), 0


PEERS: dict[str, Peer] = {
    "ours": Peer(
        "ours, no search",
        (*ONNX_TARGETS, "paddle"),
        partial(quantize_ours, search=False),
        partial(prepare_ours, search=False),
        each=True,
        folded=True,
        package="quant.pipeline",
    ),
    "ours-search": Peer(
        "ours, whole run",
        (*ONNX_TARGETS, "paddle"),
        partial(quantize_ours, search=True),
        partial(prepare_ours, search=True),
        each=True,
        package="quant.pipeline",
    ),
    "ort-minmax": Peer("onnxruntime MinMax", ONNX_TARGETS, partial(quantize_onnxruntime, method="MinMax")),
    "ort-percentile": Peer("onnxruntime Percentile", ONNX_TARGETS, partial(quantize_onnxruntime, method="Percentile")),
    "nncf": Peer("NNCF", ("openvino",), quantize_nncf, package="nncf"),
    "nncf-accuracy": Peer("NNCF, accuracy control", ("openvino",), quantize_nncf_accuracy, Inputs.job, package="nncf"),
    "paddleslim": Peer("PaddleSlim hist", ("paddle",), quantize_paddleslim),
    "inc": Peer("Neural Compressor", ONNX_TARGETS, quantize_inc, install=INSTALL_INC),
}
