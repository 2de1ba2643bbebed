"""Where the time of a model goes, kernel by kernel, by the runtime's own profiler: FP32 and INT8 side by side.

    .venv/bin/python benchmarks/kernel_profile.py MODEL [--targets LIST] [--results FOLDER] [--threads 1]

Takes the artifacts of the model's newest run. FP32 as shipped, FP32 prepared and INT8 take turns, once with the
profiler and once without, by the clock. Writes `results/profile-MODEL-TARGET.json`, with every kernel, and the page of
the largest ones beside it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import onnx
from goals import SPEEDS, TARGETS, machine
from peer_table import NOT_KNOWN, table

from eval.benchmark import interleaved_latency
from quant.execution import Kernel, kernel_tables
from quant.graph import all_nodes, attribute
from quant.job import Options, fp32_folders, latency_feed
from quant.judging import Evaluation, find_evaluation
from quant.manifest import processor, versions
from quant.plan import QuantPlan, load_plan
from quant.recipe import load_recipe
from quant.runtime import open_session
from quant.target import TargetName

RESULTS = Path(__file__).parents[1] / "results"
SHOWN = 40
"""Kernels on the page; the JSON holds all."""

_MULTIPLIES = re.compile(r"(Conv|Convolution|Deconvolution|ConvTranspose|MatMul|Gemm|FullyConnected)$|Integer")
"""Kinds of kernels that stand for an operator of the plan; others that bear its name convert or reorder."""

NAMES = {"fp32": "FP32 as shipped", "fp32_prepared": "FP32 prepared", "int8": "INT8"}
WORDS = (
    "A row is a kernel of INT8 with the one of FP32 prepared that computes the same operator; a dash where there is "
    "none. Work is counted in millions of multiply-accumulates. What the profiler itself costs is in these times, what "
    "lies between two kernels is not."
)


@dataclass(frozen=True)
class Row:
    """A kernel of INT8 and the one of FP32 prepared that it replaces; None where there is none.

    Attributes:
        kind: the runtime's name of the kernel.
        group: form of the operator for convolutions and products, else the kind without its implementation.
        precision: that the INT8 model computes in; that of FP32 where the kernel is gone.
    """

    name: str
    kind: str
    group: str
    precision: str
    mmacs: float | None
    fp32_ms: float | None
    int8_ms: float | None


@dataclass(frozen=True)
class Operators:
    """What is known of the prepared model.

    Attributes:
        macs: multiply-accumulates of convolutions and products, by name; it is that of the tensor they write.
        forms: what kind of convolution or product they are.
        reads: of every node, by the tensor that it writes.
    """

    macs: Mapping[str, int]
    forms: Mapping[str, str]
    reads: Mapping[str, Sequence[str]]

    def of_kernel(self, kernel: Kernel) -> str:
        """The operator that a kernel computes; one with a merged activation may be named by what that writes."""
        names = [name for name in (*kernel.merged, kernel.operator) if name in self.macs]
        if names or not multiplies(kernel):
            return names[0] if names else kernel.operator
        waiting = deque([kernel.operator])
        while waiting:
            name = waiting.popleft()
            if name in self.macs:
                return name
            waiting.extend(self.reads.get(name, ()))
        return kernel.operator


def multiplies(kernel: Kernel) -> bool:
    return _MULTIPLIES.search(_plain(kernel)) is not None


def _plain(kernel: Kernel) -> str:
    """The kind without its implementation."""
    return kernel.kind.partition(" (")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--targets", default="onnxruntime,openvino")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the runs")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    options = Options(arguments.results, arguments.threads, lambda *_: None)
    found = find_evaluation(load_recipe(arguments.model), options)
    for target in arguments.targets.split(","):
        if target not in TARGETS or target not in found.manifest.artifacts:
            raise SystemExit(
                f"no profile of '{target}': {found.folder} has no artifact, or its runtime has no profiler"
            )
        report = profiled(found, cast(TargetName, target))
        file = RESULTS / f"profile-{arguments.model}-{target}.json"
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
        print(f"written: {file}", flush=True)


def profiled(found: Evaluation, target: TargetName) -> dict[str, Any]:
    """The report of one artifact; the times of one picture of the recipe's size."""
    job, threads = found.job, found.job.options.threads
    folders = {**fp32_folders(job, target), "int8": found.folder / target}
    feed = latency_feed(job)
    tables = dict(zip(folders, kernel_tables(target, list(folders.values()), feed, threads), strict=True))
    sessions = {name: open_session(target, folder, threads) for name, folder in folders.items()}
    clock = interleaved_latency(sessions, feed, job.recipe.latency.runs)
    known = operators(folders["fp32_prepared"], load_plan(found.folder / "plans" / target))
    rows = paired(tables["fp32_prepared"], tables["int8"], known)
    return {
        "schema": 1,
        "model": job.recipe.name,
        "target": target,
        "run": found.manifest.run,
        "command": f"benchmarks/kernel_profile.py {job.recipe.name} --threads {threads}",
        "processor": processor(),
        "versions": {name: version for name, version in versions().items() if name == target},
        "threads": threads,
        "shape": job.recipe.latency.shape,
        "clock": clock,
        "profiled": {name: sum(kernel.milliseconds for kernel in kernels) for name, kernels in tables.items()},
        "goals": goals(job.recipe.name, target, clock),
        "kinds": kinds(rows),
        "operators": [asdict(row) for row in rows],
    }


def goals(model: str, target: str, clock: Mapping[str, float]) -> list[dict[str, Any]]:
    """What each goal of speed needs, beside what was measured."""
    found = []
    for against, factor in SPEEDS.get((model, target), {}).items():
        measured, needed = clock[against] / clock["int8"], clock[against] / factor
        reached = measured >= factor
        found.append(
            {"against": against, "factor": factor, "measured": measured, "needed_ms": needed, "reached": reached}
        )
    return found


def operators(prepared: Path, plan: QuantPlan) -> Operators:
    """Of the model in a folder, for which the plan was made."""
    model = onnx.load(prepared / "inference.onnx")
    shapes = {constant.name: list(constant.dims) for constant in model.graph.initializer}
    nodes = list(all_nodes(model.graph.node))
    return Operators(
        macs={operator.name: operator.macs for operator in plan.operators},
        forms={node.output[0]: _form(node, shapes) for node in nodes},
        reads={node.output[0]: list(node.input) for node in nodes},
    )


def _form(node: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> str:
    if node.op_type not in ("Conv", "ConvTranspose"):
        return node.op_type
    size = "x".join(map(str, shapes.get(node.input[1], [])[2:]))  # weights inside of a loop are not among them
    return f"{node.op_type} {size}{', depthwise' if attribute(node, 'group', 1) > 1 else ''}".strip()


def paired(fp32: Iterable[Kernel], int8: Iterable[Kernel], known: Operators) -> list[Row]:
    """Every kernel of both tables once: those of INT8, the slowest first, then what is left of FP32.

    Args:
        fp32, int8: the slowest first, so that of several with one name the kernels themselves meet.
    """
    waiting: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in fp32:
        waiting[known.of_kernel(kernel)].append(kernel)
    rows = []
    for kernel in int8:
        same = waiting[known.of_kernel(kernel)]
        rows.append(_row(kernel, same.pop(0).milliseconds if same else None, kernel.milliseconds, known))
    rows += [_row(kernel, kernel.milliseconds, None, known) for left in waiting.values() for kernel in left]
    return rows


def _row(kernel: Kernel, before: float | None, after: float | None, known: Operators) -> Row:
    name = known.of_kernel(kernel)
    macs = known.macs.get(name) if multiplies(kernel) else None
    return Row(
        name=name,
        kind=kernel.kind,
        group=known.forms.get(name, _plain(kernel)) if multiplies(kernel) else _plain(kernel),
        precision=kernel.precision,
        mmacs=None if macs is None else macs / 1e6,
        fp32_ms=before,
        int8_ms=after,
    )


def kinds(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Sums of the rows of one group and precision, those that take most in INT8 first."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group, row.precision].append(row)
    sums = [
        {
            "group": group,
            "precision": precision,
            "kernels": sum(row.int8_ms is not None for row in same),
            "mmacs": sum(row.mmacs or 0 for row in same),
            "fp32_ms": sum(row.fp32_ms or 0 for row in same),
            "int8_ms": sum(row.int8_ms or 0 for row in same),
        }
        for (group, precision), same in groups.items()
    ]
    return sorted(sums, key=lambda entry: (-entry["int8_ms"], -entry["fp32_ms"]))


def markdown(report: dict[str, Any]) -> str:
    """The generated page of a report."""
    rows = report["operators"]
    size = "x".join(map(str, report["shape"]))
    left = len(rows) - SHOWN
    runtime = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [
        f"# {report['model']} on {report['target']}: where the time goes",
        f"Generated by `{report['command']}` from run {report['run']}; do not edit.",
        f"{machine(report['processor'], report['threads'])}, {runtime}, input {size}.",
        "## By the clock, in turn, without the profiler",
        _clock_table(report),
        *(["## Goals", _goal_table(report)] if report["goals"] else []),
        "## By kind",
        WORDS,
        _kind_table(report["kinds"]),
        "## Kernel by kernel",
        table(
            ["Operator", "Kernel", "Computes in", "Work", "FP32 ms", "INT8 ms"],
            [_line(row) for row in rows[:SHOWN]],
        ),
        *([f"The {left} more, each smaller, stand in the JSON beside this page."] if left > 0 else []),
    ]
    return "\n\n".join(parts) + "\n"


def _clock_table(report: dict[str, Any]) -> str:
    clock = report["clock"]
    return table(
        ["Model", "ms", "INT8 is faster by", "Sum of its kernels, profiled, ms"],
        [
            [NAMES[name], _ms(clock[name]), f"{clock[name] / clock['int8']:.2f}x", _ms(report["profiled"][name])]
            for name in clock
        ],
    )


def _goal_table(report: dict[str, Any]) -> str:
    int8 = report["clock"]["int8"]
    lines = [
        [
            NAMES[goal["against"]],
            f"{goal['factor']}x",
            f"{goal['measured']:.2f}x",
            _ms(goal["needed_ms"]),
            _ms(int8),
            "reached" if goal["reached"] else f"missed by {int8 - goal['needed_ms']:.2f} ms",
        ]
        for goal in report["goals"]
    ]
    return table(["Against", "Goal", "Measured", "INT8 needs ms", "INT8 takes ms", "Verdict"], lines)


def _kind_table(groups: Sequence[dict[str, Any]]) -> str:
    before, after = (sum(group[field] for group in groups) for field in ("fp32_ms", "int8_ms"))
    lines = [
        [
            group["group"],
            group["precision"],
            str(group["kernels"]),
            _ms(group["fp32_ms"]),
            _ms(group["int8_ms"]),
            f"{100 * group['int8_ms'] / after:.1f}",
            _rate(group["mmacs"], group["int8_ms"]),
        ]
        for group in groups
    ]
    headings = ["Kind", "Computes in", "Kernels", "FP32 ms", "INT8 ms", "% of INT8", "GMAC/s in INT8"]
    return table(headings, [*lines, ["**all**", "", "", _ms(before), _ms(after), "100.0", ""]])


def _line(row: dict[str, Any]) -> list[str]:
    work = NOT_KNOWN if row["mmacs"] is None else f"{row['mmacs']:.1f}"
    return [row["name"], row["kind"], row["precision"], work, _ms(row["fp32_ms"]), _ms(row["int8_ms"])]


def _ms(value: float | None) -> str:
    return NOT_KNOWN if value is None else f"{value:.2f}"


def _rate(mmacs: float, milliseconds: float) -> str:
    return f"{mmacs / milliseconds:.0f}" if mmacs and milliseconds else NOT_KNOWN


if __name__ == "__main__":
    main()
