"""The report as Markdown: the tables of the page, without its charts and pictures."""

from __future__ import annotations

from collections.abc import Sequence

from quant.card import markdown_table, plain
from quant.report import ModelReport, TargetReport
from quant.report_tables import (
    Table,
    diff_table,
    front_table,
    ladder_table,
    operator_table,
    range_table,
    size_table,
    slice_table,
    unmeasured,
)

_SHOWN_OPERATORS = 10
_SHOWN_RANGES = 10
_SHOWN_PICTURES = 12


def report_markdown(models: Sequence[ModelReport]) -> str:
    """The same for the same runs."""
    parts = ["# INT8 report", "## FP32 against INT8", _markdown(diff_table(models))]
    for model in models:
        manifest = model.manifest
        parts += [f"## {plain(model.title)}", f"Run {plain(manifest.run)}, made from {plain(manifest.source)}."]
        parts += ["Speed against FP32 as shipped, and accuracy:", _markdown(front_table(model))]
        for target in model.targets:
            parts += _target(model, target)
    return "\n\n".join(parts) + "\n"


def _target(model: ModelReport, target: TargetReport) -> list[str]:
    parts = [f"### {plain(target.target)}", "Steps of the ladder:", _markdown(ladder_table(target))]
    if why := unmeasured(model, target):
        parts.append(plain(why))
    else:
        parts += ["Operators that INT8 hurts most:", _markdown(operator_table(target), _SHOWN_OPERATORS)]
    parts += ["Size by type of operator:", _markdown(size_table(target))]
    parts += ["Ranges that clip most:", _markdown(range_table(target), _SHOWN_RANGES)]
    exhibits = target.exhibits
    if exhibits is None:
        return parts
    parts += ["Slices, what INT8 loses most on first:", _markdown(slice_table(exhibits.slices))]
    parts.append(f"FP32 and INT8 differ on {exhibits.differing} of {exhibits.samples} pictures.")
    if exhibits.rows:
        lines = [
            [plain(row.dataset), plain(row.id), f"{row.fp32:.1f}", f"{row.int8:.1f}"]
            for row in exhibits.rows[:_SHOWN_PICTURES]
        ]
        parts.append(markdown_table(["Data set", "Picture", "FP32", "INT8"], lines, [False, False, True, True]))
    return parts


def _markdown(table: Table, most: int | None = None) -> str:
    rows = [[plain(cell.text) for cell in row] for row in table.rows[:most]]
    headings = [plain(heading) for heading in table.headings]
    return markdown_table(headings, rows, table.numeric) if rows else "None."
