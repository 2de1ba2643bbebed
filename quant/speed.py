"""What INT8 gains on a target, measured: of a whole plan, and of each operator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.benchmark import interleaved_latency
from quant.execution import Kernel, kernel_tables
from quant.export import export_artifact, fitted
from quant.job import Job, fp32_folders, latency_feed, prepared_graph, prepared_stage
from quant.plan import QuantPlan
from quant.prepare import old_ir_form
from quant.runtime import open_session, target_format
from quant.storage import scratch
from quant.target import TargetName


def relative_latencies(job: Job, target: TargetName, plans: Sequence[QuantPlan]) -> list[float]:
    """INT8 / FP32 of each plan on the target, all in turn: FP32 prepared, or as shipped where it reads no ONNX."""
    fp32 = fp32_folders(job, target)
    with scratch() as place:
        folders = {"fp32": fp32.get("fp32_prepared", fp32["fp32"])}
        for index, plan in enumerate(plans):
            folders[str(index)] = exported_plan(job, target, plan, place / str(index))
        sessions = {name: open_session(target, folder, job.options.threads) for name, folder in folders.items()}
        latency = interleaved_latency(sessions, latency_feed(job), job.recipe.latency.runs)
    return [latency[str(index)] / latency["fp32"] for index in range(len(plans))]


def measured_gains(job: Job, target: TargetName, full: QuantPlan) -> dict[str, float]:
    """Milliseconds of one thread that INT8 saves on every operator that the full plan quantizes.

    By the runtime's own profile; nothing for `paddle`, which has none.
    """
    if target_format(target) != "onnx":
        return {}
    with scratch() as place:
        folders = [fp32_folders(job, target)["fp32_prepared"], exported_plan(job, target, full, place)]
        fp32, int8 = kernel_tables(target, folders, latency_feed(job), 1)
    return gains(list(full.quantized()), fp32, int8)


def gains(operators: Sequence[str], fp32: Sequence[Kernel], int8: Sequence[Kernel]) -> dict[str, float]:
    """FP32 - INT8 in milliseconds, for the operators whose kernels are found in both profiles."""
    before, after = ({kernel.operator: kernel.milliseconds for kernel in kernels} for kernels in (fp32, int8))
    return {name: before[name] - after[name] for name in operators if name in before and name in after}


def exported_plan(job: Job, target: TargetName, plan: QuantPlan, folder: Path) -> Path:
    """The folder, with the artifact of a plan."""
    graph = prepared_graph(job)
    original = old_ir_form(prepared_stage(job))
    plan = fitted(target, graph, plan, original)
    export_artifact(target, graph, plan, job.files.inference_yml, folder, original)
    return folder
