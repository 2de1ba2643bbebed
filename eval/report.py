"""The diff table for the terminal, and the tables of results/README.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import IO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval.benchmark import BenchReport, BenchRow, Timing
from eval.gate import EvalReport, JudgedRow, SkippedRow, speed_advice, verdict_text
from quant.errors import InputError
from quant.record import read_record

FILE_WIDTH = 160
NOT_KNOWN = "-"

_HEADINGS = (
    "Target",
    "Data set",
    "n",
    "FP32",
    "INT8",
    "Drop\n(≤95 %)",
    "Rel. %\n(≤95 %)",
    "Disc.\n%",
    "Cover.\n%",
    "Size",
    "Speed",
    "Verdict",
)
_README_WORDS = (
    "Drop = FP32 - INT8 in points, relative drop in percent of FP32; in brackets the one-sided 95 % upper bounds of a "
    "paired bootstrap. Discordance = share of samples whose outcome differs. Coverage = share of multiply-accumulates "
    "in INT8, executed: on the runtime's integer kernels, by its own account. Size = INT8 / FP32 bytes. Speed against "
    "the model as shipped, and against the prepared (folded) one."
)
_TIMES = ("FP32\nshipped", "FP32\nprepared", "INT8", "Speed\n(prepared\n/ INT8)")
_LEFT = {"Target", "Data set", "Verdict"}


def print_report(rows: Sequence[JudgedRow | SkippedRow], file: IO[str] | None = None) -> None:
    """Print a table per model and metric, then the rows that were skipped.

    Args:
        file: where to; standard output by default. 160 columns wide where it is no terminal.
    """
    console = _console(file)
    for table in diff_tables([row for row in rows if isinstance(row, JudgedRow)]):
        console.print(table)
        console.print()
    for row in rows:
        if isinstance(row, JudgedRow) and (said := speed_advice(row)):
            console.print(said, markup=False, soft_wrap=True)
    _print_skipped(console, [row for row in rows if isinstance(row, SkippedRow)])


def _console(file: IO[str] | None) -> Console:
    console = Console(file=file, highlight=False)
    return console if console.is_terminal else Console(file=file, highlight=False, width=FILE_WIDTH)


def _print_skipped(console: Console, skipped: list[SkippedRow]) -> None:
    for line in _skipped_lines(skipped):
        console.print(f"skipped: {line}", markup=False, soft_wrap=True)
    if skipped:
        console.print(f"{len(skipped)} skipped, neither passed nor failed", markup=False)


def _skipped_lines(skipped: Iterable[SkippedRow]) -> list[str]:
    """What is said of skipped rows: targets of a model that share their reason share a line."""
    targets: dict[tuple[str, str, str], list[str]] = {}
    for row in skipped:
        targets.setdefault((row.title, row.reason, row.fix), []).append(row.target)
    return [f"{title}, {', '.join(names)}: {reason}. {fix}" for (title, reason, fix), names in targets.items()]


def diff_tables(rows: Sequence[JudgedRow]) -> list[Table]:
    """One table per model and metric: FP32 against INT8 per target and data set, gating rows in bold.

    The columns that are the same in every row, model and metric, are the title: so the table fits into
    120 columns. Cells are wrapped where they do not fit, never cut.
    """
    tables = []
    for (title, metric), group in groupby(_in_order(rows), key=lambda row: (row.title, row.metric)):
        table = Table(title=f"[bold]{escape(title)}[/]  {escape(metric)}", box=box.SIMPLE_HEAD, padding=0)
        table.title_justify = "left"
        for heading in _HEADINGS:
            table.add_column(
                heading,
                justify="left" if heading in _LEFT else "right",
                overflow="fold",
            )
        for row in group:
            table.add_row(*map(escape, _cells(row)), style=_style(row))
        tables.append(table)
    return tables


def print_bench(report: BenchReport, file: IO[str] | None = None) -> None:
    """Print a table of latencies per model, what they advise, then the rows that were skipped."""
    console = _console(file)
    rows = [row for row in report.rows if isinstance(row, BenchRow)]
    for model, group in groupby(rows, key=lambda row: row.model):
        console.print(_bench_table(model, list(group)))
        console.print()
    for advice in report.advice:
        console.print(advice.text, markup=False, soft_wrap=True)
    features = ", ".join(report.processor["features"]) or "none of note"
    words = f"Median ms, {report.threads} threads, {report.processor['name']} ({features})"
    console.print(words, markup=False, soft_wrap=True)
    _print_skipped(console, [row for row in report.rows if isinstance(row, SkippedRow)])


def _bench_table(model: str, rows: list[BenchRow]) -> Table:
    table = Table(title=f"[bold]{escape(model)}[/]  latency in ms", box=box.SIMPLE_HEAD, padding=0)
    table.title_justify = "left"
    headings = ["Target", "Size", "Input", *_TIMES]
    chosen = any(row.default_ms for row in rows)
    for heading in headings + ([f"default\n{heading}" for heading in _TIMES] if chosen else []):
        table.add_column(heading, justify="left" if heading in _LEFT else "right", overflow="fold")
    for row in rows:
        cells = [row.target, _number(row.int8_bytes / row.fp32_bytes), "x".join(map(str, row.shape))]
        if row.note:
            table.add_row(*cells, escape(row.note))
        else:
            table.add_row(*cells, *_time_cells(row.ms), *(_time_cells(row.default_ms) if chosen else []))
    return table


def _time_cells(timing: Timing | None) -> list[str]:
    if timing is None:
        return [NOT_KNOWN] * len(_TIMES)
    times = (timing.fp32, timing.fp32_prepared, timing.int8)
    return [*(_number(time) for time in times), _factor(timing.speedup)]


def read_reports(runs: Iterable[Path]) -> list[EvalReport]:
    """The metrics.json of every run folder; every row gets the name of its run.

    Raises:
        InputError: a file is not what it should be.
    """
    return [_read_report(run / "metrics.json") for run in runs]


def results_readme(reports: Sequence[EvalReport]) -> str:
    """Markdown of results/README.md: the gating rows, the single sets, and what was skipped."""
    rows = [row for report in reports for row in report.rows]
    judged = _in_order([row for row in rows if isinstance(row, JudgedRow)])
    parts = [
        "# Results",
        "Generated by `quant run` from the `metrics.json` of each model's newest run; do not edit.",
        _README_WORDS,
        "## Gates: the pooled evaluation sets",
        _markdown_table([row for row in judged if row.gates]),
    ]
    if informing := [row for row in judged if not row.gates]:
        parts += ["## Single sets, for information", _markdown_table(informing)]
    if skipped := [row for row in rows if isinstance(row, SkippedRow)]:
        parts += ["## Skipped", "\n".join(f"* {line}" for line in _skipped_lines(skipped))]
    return "\n\n".join(parts) + "\n"


def _read_report(path: Path) -> EvalReport:
    try:
        report = read_record(path, EvalReport)
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())
        raise InputError(
            f"{path}: not a metrics.json of this program ({line[:200]}); delete it or run it anew"
        ) from error
    run = path.parent.name
    rows = [row.model_copy(update={"run": run}) if isinstance(row, JudgedRow) else row for row in report.rows]
    return EvalReport(rows=rows)


def _in_order(rows: Iterable[JudgedRow]) -> list[JudgedRow]:
    """By model, twins last, metric, run and target; the pooled row of a target before its single sets."""
    return sorted(rows, key=lambda row: (row.title, row.metric, row.run or "", row.target, not row.gates, row.dataset))


def _cells(row: JudgedRow) -> list[str]:
    return [
        row.target,
        row.dataset,
        f"{row.samples:,}",
        _number(row.fp32),
        _number(row.int8),
        _bounded(row.drop, row.drop_upper95),
        _bounded(row.relative_drop, row.relative_drop_upper95),
        _number(row.discordance, 1),
        _number(None if row.coverage is None else 100 * row.coverage, 1),
        _number(_size_ratio(row)),
        _factor(row.speedup),
        verdict_text(row),
    ]


def _style(row: JudgedRow) -> str:
    if not row.gates:
        return "dim"
    return "bold" if row.gate.passed else "bold red"


def _markdown_table(rows: Sequence[JudgedRow]) -> str:
    if not rows:
        return "None yet."
    shared = [heading.replace("\n", " ") for heading in _HEADINGS]
    headings = ["Model", "Metric", *shared, "Executed %", "Speed (prepared)", "Method", "Run"]
    left = _LEFT | {"Model", "Metric", "Method", "Run"}
    lines = [headings, ["---" if heading in left else "---:" for heading in headings]]
    lines += [[row.title, row.metric, *_cells(row), *_executed(row)] for row in rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _executed(row: JudgedRow) -> list[str]:
    """What only the table in a file has room for."""
    faster = row.fp32_prepared_ms / row.int8_ms if row.fp32_prepared_ms and row.int8_ms else None
    share = None if row.executed_coverage is None else 100 * row.executed_coverage
    return [_number(share, 1), _factor(faster), row.method or NOT_KNOWN, row.run or NOT_KNOWN]


def _size_ratio(row: JudgedRow) -> float | None:
    return row.int8_bytes / row.fp32_bytes if row.int8_bytes and row.fp32_bytes else None


def _bounded(value: float, upper: float) -> str:
    return f"{_number(value)} ({_number(upper)})"


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return NOT_KNOWN
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def _factor(value: float | None) -> str:
    return NOT_KNOWN if value is None else f"{value:.2f}x"
