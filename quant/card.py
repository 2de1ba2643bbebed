"""The model card of an artifact: what it is, how it was made, what was measured, how to load it.

It lies beside the model files as README.md and is no part of them: hashes leave it out (`artifact_digests`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from eval.gate import JudgedRow, SkippedRow, speed_advice, verdict_text
from quant import __version__
from quant.clients import PICTURE, Shapes, Snippet, snippets
from quant.ladder import Limits, result_text
from quant.manifest import CARD, Manifest
from quant.plan import QuantPlan
from quant.runtime import target_format
from quant.target import TARGETS, TargetName

Rows = Sequence[JudgedRow | SkippedRow]

_RUNTIMES = {
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
    "paddle": "Paddle Inference",
    "tensorrt": "TensorRT",
}
_TWIN = (
    "This is a **twin**: a small stand-in for the model, trained on generated pictures of a narrow world. It proves "
    "that the family goes through, not what INT8 costs the official model; do not use it for real work."
)
_LONGEST_NOTE = 200  # characters; some notes list every operator
_NOT_JUDGED = "This artifact was not judged: "


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        rows: of this target, see metrics.json.
        model_name: as PaddleX knows the model.
        inputs: what the model reads, at the shape that latency was measured with.
        steps: whether the model writes in a loop.
    """

    manifest: Manifest
    target: TargetName
    plan: QuantPlan
    rows: Rows
    model_name: str
    inputs: Shapes
    steps: bool

    @property
    def twin(self) -> bool:
        return any(row.twin for row in self.rows)

    @property
    def clients(self) -> list[Snippet]:
        task = self.manifest.recipe["task"]
        return snippets(self.target, task, self.model_name, self.inputs, self.steps)


def write_card(subject: Subject, folder: Path) -> None:
    """Write README.md into an artifact's folder."""
    (folder / CARD).write_text(model_card(subject), encoding="utf-8")


def model_card(subject: Subject) -> str:
    """The card in Markdown; the same for the same run."""
    manifest = subject.manifest
    parts = [
        f"# {plain(manifest.model)}, INT8 for {_RUNTIMES[subject.target]}",
        *_what_it_is(subject),
        "## Figures",
        *_figures(subject),
        "## How to load it",
        *_loading(subject),
        "## How it was made",
        *_making(subject),
        "## Limits",
        _bullets(_limits(subject)),
        "## Hashes",
        *_hashes(manifest, subject.target),
    ]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Text from a file on one line of Markdown: nothing in it makes a table, a tag or a heading."""
    line = " ".join(text.split())
    for sign in "\\`*_|[]":
        line = line.replace(sign, f"\\{sign}")
    return line.replace("&", "&amp;").replace("<", "&lt;")


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool] = ()) -> str:
    """A table; cells are Markdown already, see `plain`. Columns that are numeric stand to the right."""
    lines = [headings, ["---:" if right else "---" for right in numeric or [False] * len(headings)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _what_it_is(subject: Subject) -> list[str]:
    manifest, recipe = subject.manifest, subject.manifest.recipe
    facts = {
        "Task": plain(recipe["task"].replace("_", " ")),
        "What": plain(recipe["description"]),
        "Made from": plain(manifest.source),
        "Licence of the weights": plain(licence(manifest, subject.twin)),
        "Target": f"{_RUNTIMES[subject.target]} ({target_format(subject.target)} format)",
        "Run": f"{plain(manifest.run)} of paddle-quant {__version__}",
    }
    return [*([_TWIN] if subject.twin else []), _bullets(f"{name}: {value}" for name, value in facts.items())]


def licence(manifest: Manifest, twin: bool) -> str:
    """Of the weights, in words."""
    if twin:
        return "Apache-2.0; this program trained them"
    stated: str = manifest.recipe["model"].get("licence") or "not stated by the recipe; ask whoever made them"
    return stated


def _figures(subject: Subject) -> list[str]:
    judged = [row for row in subject.rows if isinstance(row, JudgedRow)]
    skipped = [row for row in subject.rows if isinstance(row, SkippedRow)]
    parts = [_NOT_JUDGED + f"{plain(row.reason)}. {plain(row.fix)}." for row in skipped]
    if not judged:
        return parts
    headings = ["Data set", "Pictures", "FP32", "INT8", "Drop (at most, 95 %)", "Relative %", "Verdict"]
    cells = [
        [
            plain(row.dataset),
            str(row.samples),
            f"{row.fp32:.2f}",
            f"{row.int8:.2f}",
            f"{row.drop:.2f} ({row.drop_upper95:.2f})",
            f"{row.relative_drop:.2f} ({row.relative_drop_upper95:.2f})",
            verdict_text(row),
        ]
        for row in judged
    ]
    metric, limits = plain(judged[0].metric), judged[0].gate
    words = (
        f"Metric: {metric}, in percent, of the FP32 model as shipped and of this artifact, both on "
        f"{_RUNTIMES[subject.target]}, on pictures that neither calibration nor search has seen. Limits of the gate: "
        f"{limits.max_drop:g} (drop, points) and {limits.max_relative_drop:g} (relative, %)."
    )
    return [words, markdown_table(headings, cells), *parts, *_costs(subject, judged)]


def _costs(subject: Subject, judged: Sequence[JudgedRow]) -> list[str]:
    """Bytes and milliseconds; they are the same in every row of a target."""
    row, lines = judged[0], []
    if row.int8_bytes and row.fp32_bytes:
        share = row.int8_bytes / row.fp32_bytes
        lines.append(f"Size: {row.int8_bytes:,} bytes, {100 * share:.0f} % of FP32's {row.fp32_bytes:,}")
    if row.int8_ms and row.fp32_ms:
        shape = "x".join(map(str, row.latency_shape or []))
        processor = subject.manifest.processor
        lines.append(
            f"Speed at {shape}: {row.int8_ms:.1f} ms, FP32 as shipped {row.fp32_ms:.1f} ms "
            f"({row.fp32_ms / row.int8_ms:.2f}x), {subject.manifest.threads} threads of {plain(processor['name'])}"
        )
    if row.coverage is not None:
        executed = row.executed_coverage
        seen = "" if executed is None else f"; {100 * executed:.1f} % ran on integer kernels"
        lines.append(f"In INT8: {100 * row.coverage:.1f} % of the multiply-accumulates{seen}")
    return [_bullets(lines)] if lines else []


def _loading(subject: Subject) -> list[str]:
    words = (
        f"Run these inside this folder. They read the picture `{PICTURE}`: put yours there, or write its path instead, "
        "but keep it out of this folder, where `quant verify` would name it as added."
    )
    if target_format(subject.target) == "onnx":
        words += f" The figures above are of {_RUNTIMES[subject.target]}; other runtimes read the file as well."
    parts = [words]
    for snippet in subject.clients:
        parts += [f"### {snippet.client}", *([snippet.note] if snippet.note else []), f"```python\n{snippet.code}```"]
    return parts


def _making(subject: Subject) -> list[str]:
    manifest, plan = subject.manifest, subject.plan
    quantized = plan.quantized()
    choice, asked = manifest.recipe["targets"][subject.target], manifest.recipe["calibration"]["samples"]
    few = f" (the recipe asks for {asked})" if len(manifest.calibration_ids) < asked else ""
    facts = [
        f"Method: {plain(plan.method)}; activations {plain(choice['activations'])}, weights int8 per output channel",
        f"In INT8: {len(quantized)} of {len(plan.operators)} operators (Conv, ConvTranspose, MatMul)",
        f"Pictures: {len(manifest.calibration_ids)} for calibration{few}, {len(manifest.search_ids)} for the search, "
        f"{len(manifest.report_ids)} for the figures, no picture twice",
        f"Seed {manifest.seed}, {manifest.threads} threads",
    ]
    facts += [f"Data set {plain(name)}: {plain(r.source)} ({plain(r.licence)})" for name, r in manifest.data.items()]
    facts += [plain(shorten(note, _LONGEST_NOTE, placeholder=" ...")) for note in plan.notes]
    limits = Limits.of_recipe(manifest.recipe)
    rungs = [
        [
            plain(rung.name),
            f"{100 * rung.coverage:.1f}",
            str(rung.reverted),
            f"{rung.error:.4f}",
            f"{rung.score.drop:.2f}" if rung.score else "-",
            result_text(rung, limits),
        ]
        for rung in manifest.ladder[subject.target]
    ]
    headings = ["Step", "Work in INT8 %", "Back in FP32", "Error of outputs", "Drop on the search split", "Result"]
    return [_bullets(facts), markdown_table(headings, rungs)]


def _limits(subject: Subject) -> list[str]:
    limits = []
    if not TARGETS[subject.target].executed:
        limits.append(f"Nobody has run it on {_RUNTIMES[subject.target]}; its structure was checked.")
    pooled = [row for row in subject.rows if isinstance(row, JudgedRow) and row.gates]
    if any(row.gate.evidence == "generated" for row in pooled):
        limits.append("The figures are of generated pictures: they are no evidence for real ones.")
    limits += [f"{said}." for row in pooled if (said := speed_advice(row))]
    limits += [f"The gate says: {verdict_text(row)}." for row in pooled if not row.gate.certified]
    reasons = Counter(op.reason or "not given" for op in subject.plan.operators if not op.quantized)
    limits += [f"In FP32: {count} operators ({plain(why)})." for why, count in sorted(reasons.items())]
    limits.append("Pictures unlike those of the data sets above may lose more; judge it on yours with `quant eval`.")
    return limits


def _hashes(manifest: Manifest, target: TargetName) -> list[str]:
    named = [("this artifact", name, sha256) for name, sha256 in manifest.artifacts[target].items()]
    named += [("the FP32 model", name, sha256) for name, sha256 in manifest.model_sha256.items()]
    plan = f"plans/{target}/plan."  # the JSON and its weights
    named += [("its plan", name, sha256) for name, sha256 in manifest.files.items() if name.startswith(plan)]
    named += [("the recipe", manifest.model, manifest.recipe_sha256)]
    named += [("this program", "its source", manifest.code_sha256)]
    files = [[of, plain(name), plain(sha256)] for of, name, sha256 in named]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    return [markdown_table(["Of", "File", "sha256"], files), f"Versions: {plain(versions)}."]


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)
