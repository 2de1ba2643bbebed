"""From a Paddle inference model to the folded FP32 graph, with proof that the outputs are equal."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from quant.bridge import NotCarried, bridge
from quant.child import answer_job, ask, model_limits
from quant.comparison import largest_difference
from quant.conversion import ANCHORS, Imported, import_model, load_feeds, save_feeds, trace_anchors
from quant.errors import InputError, Unavailable
from quant.fold import fold
from quant.graph import Graph
from quant.invariants import hoist_invariants
from quant.loop import check_calls, has_loop, with_clean_bodies
from quant.padding import write_paddings
from quant.runtime import Feed, Session, onnx_session
from quant.source import ModelFiles
from quant.task import TaskAdapter

_FEED = "prepare-feed"
_SECONDS = 3600.0

_LARGE = 2**20
_WEIGHING = ("Conv", "ConvTranspose", "Gather", "Gemm", "Loop", "MatMul")
"""Operators that weigh something else by a constant; what a loop does with one is not folded."""


@dataclass(frozen=True)
class Proof:
    """How equal the prepared model is to the original.

    Attributes:
        max_difference: largest absolute difference of any output value on the compared pictures.
        tolerance: the largest that was allowed.
        pictures: number of pictures compared.
        folds: number of simplifications by pass.
        bridge: how the old-IR form of a PIR model compares with the original, in words; empty for old-IR models.
    """

    max_difference: float
    tolerance: float
    pictures: int
    folds: dict[str, int]
    bridge: str = ""


def prepare(files: ModelFiles, feeds: list[Feed], tolerance: float, threads: int, folder: Path) -> Proof:
    """Write `imported.onnx` (as shipped), `prepared.onnx` (folded) and `proof.json` into a folder.

    A PIR model also gets its old-IR form in `bridged`, unless the bridge does not carry it.

    Args:
        feeds: real pictures, already pre-processed.
        tolerance: largest absolute difference of outputs allowed between any two stages.

    Raises:
        InputError: the model cannot be imported, has other inputs than the task's, or two stages
            differ; then the message names the first operator at which they part.
    """
    imported = import_model(files, feeds, folder / "import")
    difference, folds = _written(files, imported, feeds, tolerance, threads, folder)
    bridged = _bridged(files, feeds[0], tolerance, threads, folder) if files.format == "pir" else ""
    proof = Proof(difference, tolerance, len(feeds), folds, bridged)
    (folder / "proof.json").write_text(json.dumps(asdict(proof), sort_keys=True), encoding="utf-8")
    return proof


def _written(
    files: ModelFiles, imported: Imported, feeds: list[Feed], tolerance: float, threads: int, folder: Path
) -> tuple[float, dict[str, int]]:
    """Write both ONNX models; returns the largest difference of an output, and the simplifications by pass."""
    shipped = _renamed(imported, feeds[0], files)
    difference = _compare_import(shipped, imported, files, feeds, tolerance, threads, folder / "import")
    onnx.save(shipped.to_model(), folder / "imported.onnx")
    graph = shipped.copy()
    hoisted = hoist_invariants(graph)
    graph = _cleaned(graph)
    folds = {"loop_invariant": hoisted, "named_padding": write_paddings(graph), **fold(graph)}
    prepared = graph.to_model()
    onnx.checker.check_model(prepared, full_check=True)
    onnx.save(prepared, folder / "prepared.onnx")
    del prepared
    difference = max(difference, _compare_fold(shipped, graph, imported, feeds, tolerance, threads))
    return difference, folds


def prepare_apart(files: ModelFiles, feeds: list[Feed], tolerance: float, threads: int, folder: Path) -> None:
    """`prepare` in a process of its own, within limits: whatever a model does to a native library stays there.

    Raises:
        InputError: as `prepare` does; or the model crashes what reads it, hangs it, or needs too much memory.
    """
    save_feeds(folder, feeds, _FEED)
    job = {"folder": str(folder), "feeds": len(feeds), "tolerance": tolerance, "threads": threads}
    places = {"model": str(files.model), "params": str(files.params), "format": files.format, "sha256": files.sha256}
    limits = model_limits([files.model, files.params], _SECONDS)
    ask("quant.prepare", {**job, **places}, folder, limits, str(files.model))
    for file in folder.glob(f"{_FEED}*.npz"):
        file.unlink()


def _child(job: dict[str, Any]) -> None:
    folder, model = Path(job["folder"]), Path(job["model"])
    files = ModelFiles(model.parent, job["format"], model, Path(job["params"]), {}, "", job["sha256"])
    prepare(files, load_feeds(folder, job["feeds"], _FEED), job["tolerance"], job["threads"], folder)


def old_ir_form(folder: Path) -> Path | None:
    """The folder of the old-IR form of a PIR model that `prepare` wrote, if it did."""
    bridged = folder / "bridged"
    return bridged if bridged.is_dir() else None


def missing_loop(folder: Path) -> Unavailable:
    """Why `prepare` left no program that a Paddle artifact could take a loop from, and what to do about it."""
    said = read_proof(folder).bridge
    if said:
        reason = f"the Paddle artifact takes the loop of a model from its old-IR form, and the bridge made none: {said}"
        return Unavailable(reason, "Use this model on another target, for example --target onnxruntime")
    reason = "the Paddle artifact takes the loop of a model from its PIR program, and this model came as an old-IR one"
    return Unavailable(reason, "Give the model's folder with inference.json by --model-dir")


def nothing_in_int8(graph: Graph) -> Unavailable:
    """Why a Paddle artifact could hold no operator of a graph in INT8, and what to do about it."""
    from quant.program import unwritten

    said = next(iter(unwritten(graph).values()), "the plan keeps all of it in FP32")
    reason = f"nothing of it can be in INT8 in a Paddle artifact: {said}"
    return Unavailable(reason, "Use this model on another target, for example --target onnxruntime")


def _bridged(files: ModelFiles, feed: Feed, tolerance: float, threads: int, folder: Path) -> str:
    """Write the old-IR form, and say how it compares; it is not kept where it differs."""
    target = folder / "bridged"
    try:
        difference = bridge(files, [feed], target, threads).difference
    except NotCarried as error:
        shutil.rmtree(target, ignore_errors=True)
        return f"not carried: {error}"
    if difference > tolerance:
        shutil.rmtree(target)
        return f"not kept: an output differs by {difference:.3g}"
    return f"differs by {difference:.3g}" if difference else "equal bit for bit"


def check_kind(files: ModelFiles, adapter: TaskAdapter) -> None:
    """Run a model on a grey picture and see whether its outputs are those of the task.

    Raises:
        InputError: they are not, or the model cannot be imported.
    """
    feed = adapter.preprocess(np.full((96, 320, 3), 128, dtype=np.uint8)).inputs
    with TemporaryDirectory() as work:
        check_outputs(files, adapter, feed, import_model(files, [feed], Path(work)).reference[0])


def read_proof(folder: Path) -> Proof:
    """The proof that `prepare` wrote."""
    return Proof(**json.loads((folder / "proof.json").read_text(encoding="utf-8")))


def check_outputs(files: ModelFiles, adapter: TaskAdapter, feed: Feed, outputs: list[np.ndarray]) -> None:
    """See whether a model's outputs for a feed have the shape that the task decodes; raises InputError if not."""
    expected = adapter.expected_shapes(feed)
    shapes = [value.shape for value in outputs]
    if len(shapes) != len(expected) or not all(map(_fits, shapes, expected)):
        found = " and ".join(str(list(shape)) for shape in shapes)
        wanted = " and ".join(f"[{', '.join('any' if s is None else str(s) for s in shape)}]" for shape in expected)
        raise InputError(
            f"{files.model}: it writes {found} where the recipe's task and classes need {wanted}: "
            "this is another model than the recipe's"
        )


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(want in (None, size) for want, size in zip(expected, shape, strict=True))


def _renamed(imported: Imported, feed: Feed, files: ModelFiles) -> Graph:
    """The imported graph with the output names of the original."""
    graph = Graph(with_clean_bodies(onnx.load(imported.onnx)))
    if sorted(graph.inputs) != sorted(feed) or len(graph.outputs) != len(imported.outputs):
        raise InputError(
            f"{files.model}: the model reads {graph.inputs} and writes {len(graph.outputs)} outputs, "
            f"the task feeds {sorted(feed)}: this is another kind of model than the recipe's"
        )
    for old, new in zip(list(graph.outputs), imported.outputs, strict=True):
        graph.rename_output(old, new)
    return graph


def _cleaned(graph: Graph) -> Graph:
    """Constants folded by onnxsim; its fusions stay off, they break up what `fold` and runtimes match.

    Large weights are inputs meanwhile, since it holds a model several times over; the graph is left without them.
    """
    import onnxsim

    weights = {name: graph.constants.pop(name) for name in _large_weights(graph)}
    model = graph.to_model()
    for name, value in weights.items():
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        model.graph.input.append(helper.make_tensor_value_info(name, kind, value.shape))
    cleaned = Graph(onnxsim.simplify(model, perform_optimization=False)[0])
    cleaned.inputs = [name for name in cleaned.inputs if name not in weights]
    cleaned.constants |= weights
    return cleaned


def _large_weights(graph: Graph) -> list[str]:
    """Constants of a megabyte and more from which nothing constant is computed."""
    readers = graph.consumers()

    def weighs(node: NodeProto) -> bool:
        return node.op_type in _WEIGHING and not all(map(graph.is_constant, node.input))

    large = [name for name, value in graph.constants.items() if value.nbytes >= _LARGE]
    return [name for name in large if readers[name] and all(map(weighs, readers[name]))]


def _compare_import(
    graph: Graph, imported: Imported, files: ModelFiles, feeds: list[Feed], tolerance: float, threads: int, work: Path
) -> float:
    session = _import_session(graph, files, threads)
    if has_loop(graph):
        what = f"{files.model}: the ONNX import differs from Paddle"
        check_calls(session, feeds, imported.reference, tolerance, what)
    worst = 0.0
    for feed, reference in zip(feeds, imported.reference, strict=True):
        difference = largest_difference(session.run(feed), reference)
        if not difference <= tolerance:
            place = _first_anchor_apart(graph, files, feed, tolerance, threads, work)
            raise InputError(
                f"{files.model}: the ONNX import differs from Paddle by {difference:.3g} (allowed {tolerance:g}), "
                f"first at {place}"
            )
        worst = max(worst, difference)
    return worst


def _import_session(graph: Graph, files: ModelFiles, threads: int) -> Session:
    try:
        return onnx_session(graph.to_light_model(), threads)
    except RuntimeError as error:
        better = ". Give its PIR form, inference.json, if it has one" if files.format == "paddle" else ""
        what = "what paddle2onnx makes of it is no ONNX model that onnxruntime loads"
        raise InputError(f"{files.model}: {what}{better if has_loop(graph) else ''} ({error})") from error


def _first_anchor_apart(graph: Graph, files: ModelFiles, feed: Feed, tolerance: float, threads: int, work: Path) -> str:
    traced = trace_anchors(files, feed, work)
    nodes = [node for node in graph.nodes if node.op_type in ANCHORS.values()]
    values = onnx_session(graph.to_light_model([n.output[0] for n in nodes]), threads).run(
        feed, [n.output[0] for n in nodes]
    )
    for (kind, name, original), node, value in zip(traced, nodes, values, strict=False):
        if ANCHORS[kind] != node.op_type or not largest_difference([value], [original]) <= _scaled(tolerance, original):
            return f"operator {kind} '{name}' (ONNX {node.op_type} '{node.name or node.output[0]}')"
    return "the last operators"


def _compare_fold(
    shipped: Graph, prepared: Graph, imported: Imported, feeds: list[Feed], tolerance: float, threads: int
) -> float:
    session = onnx_session(prepared.to_light_model(), threads)
    worst = 0.0
    for feed, reference in zip(feeds, imported.reference, strict=True):
        difference = largest_difference(session.run(feed), reference)
        if not difference <= tolerance:
            place = first_operator_apart(shipped, prepared, feed, tolerance, threads)
            apart = f"{difference:.3g} (allowed {tolerance:g})"
            raise InputError(f"folding changed the outputs by {apart}, first at {place}")
        worst = max(worst, difference)
    return worst


def first_operator_apart(before: Graph, after: Graph, feed: Feed, tolerance: float, threads: int) -> str:
    """Name the first operator of `after` whose output differs from the equally named tensor of `before`."""
    written = before.producers()
    nodes = [node for node in after.nodes if node.output and node.output[0] in written]
    names = [node.output[0] for node in nodes]
    expected = onnx_session(before.to_light_model(names), threads).run(feed, names)
    found = onnx_session(after.to_light_model(names), threads).run(feed, names)
    for node, one, other in zip(nodes, expected, found, strict=True):
        if not largest_difference([one], [other]) <= _scaled(tolerance, one):
            return f"operator {node.op_type} '{node.output[0]}'"
    return "an operator whose output has no counterpart"


def _scaled(tolerance: float, values: np.ndarray) -> float:
    """Inner tensors are larger than the outputs that `tolerance` is meant for."""
    return tolerance * max(1.0, float(np.abs(values).max(initial=0.0)))


if __name__ == "__main__":
    answer_job(_child)
