"""The tables of a report, as plain values: what its Markdown and its page have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eval.exhibits import Slice
from eval.gate import JudgedRow, SkippedRow, verdict_text
from quant.ladder import result_text
from quant.report import ModelReport, TargetReport

MOST_OPERATORS = 40
NOT_KNOWN = "-"


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the number that it is sorted by; text by itself."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """Headings and rows; `marks` names what each row is: passed, failed, skipped, or nothing."""

    headings: list[str]
    rows: list[list[Cell]]
    marks: list[str]

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether it holds numbers."""
        return [any(row[column].value is not None for row in self.rows) for column in range(len(self.headings))]


@dataclass(frozen=True)
class Standing:
    """A target among those of its model: how fast it is against FP32 as shipped, and whether no other beats it.

    Attributes:
        front: no other is as good in speed and in drop, and better in one of them.
    """

    row: JudgedRow
    speed: float
    front: bool


def standings(model: ModelReport) -> list[Standing]:
    """The targets that were judged and timed."""
    rows = [(row, row.speedup) for target in model.targets if (row := target.pooled) and row.speedup]
    return [Standing(row, speed, not any(_beats(other, (row, speed)) for other in rows)) for row, speed in rows]


def _beats(other: tuple[JudgedRow, float], one: tuple[JudgedRow, float]) -> bool:
    """Whether another target is as good on both axes and better on one."""
    at_least = other[1] >= one[1] and other[0].drop <= one[0].drop
    return at_least and (other[1] > one[1] or other[0].drop < one[0].drop)


def number(value: float | None, digits: int = 2, unit: str = "") -> Cell:
    """A number, rounded for the eye."""
    if value is None:
        return Cell(NOT_KNOWN)
    text = f"{value:.{digits}f}"
    return Cell((text.lstrip("-") if float(text) == 0 else text) + unit, value)


def diff_table(models: Sequence[ModelReport]) -> Table:
    """FP32 against INT8, with bounds and verdicts: the gating rows before the single sets, the skipped ones last."""
    headings = ["Model", "Target", "Data set", "Pictures", "Metric", "FP32", "INT8", "Drop", "≤", "Rel. %", "Rel. % ≤"]
    headings += ["Differ %", "Work %", "Size %", "Speed", "Verdict"]
    rows = [row for model in models for row in model.rows]
    judged = sorted((row for row in rows if isinstance(row, JudgedRow)), key=lambda row: not row.gates)
    skipped = [row for row in rows if isinstance(row, SkippedRow)]
    cells = [_judged_cells(row) for row in judged]
    cells += [_skipped_cells(row, len(headings)) for row in skipped]
    return Table(headings, cells, [*map(_mark, judged), *["skipped"] * len(skipped)])


def _judged_cells(row: JudgedRow) -> list[Cell]:
    size = 100 * row.int8_bytes / row.fp32_bytes if row.int8_bytes and row.fp32_bytes else None
    return [
        Cell(row.title),
        Cell(row.target),
        Cell(row.dataset),
        number(row.samples, 0),
        Cell(row.metric),
        *map(number, (row.fp32, row.int8, row.drop, row.drop_upper95, row.relative_drop, row.relative_drop_upper95)),
        number(row.discordance, 1),
        number(None if row.coverage is None else 100 * row.coverage, 1),
        number(size, 0),
        number(row.speedup, 2, "x"),
        Cell(verdict_text(row)),
    ]


def _skipped_cells(row: SkippedRow, columns: int) -> list[Cell]:
    between = [Cell(NOT_KNOWN)] * (columns - 3)
    return [Cell(row.title), Cell(row.target), *between, Cell(f"skipped: {row.reason}. {row.fix}")]


def _mark(row: JudgedRow) -> str:
    if not row.gates:
        return "informs"
    return "passed" if row.gate.passed else "failed"


def front_table(model: ModelReport) -> Table:
    """Speed and accuracy of the targets, the fastest first, and which of them no other beats in both."""
    ordered = sorted(standings(model), key=lambda standing: -standing.speed)
    rows = [
        [
            Cell(standing.row.target),
            number(standing.speed, 2, "x"),
            number(standing.row.drop),
            number(standing.row.drop_upper95),
            Cell("yes" if standing.front else "no"),
        ]
        for standing in ordered
    ]
    return Table(["Target", "Speed", "Drop", "≤", "On the front"], rows, [""] * len(rows))


def ladder_table(target: TargetReport) -> Table:
    """Every step that was tried, what it gave on the search split, and which limits it missed."""
    headings = ["Step", "Work in INT8 %", "Back in FP32", "Error of outputs %", "Drop", "Rel. %", "Differ %", "Result"]
    rows = [
        [
            Cell(rung.name),
            number(100 * rung.coverage, 1),
            number(rung.reverted, 0),
            number(100 * rung.error, 2),
            number(rung.score.drop if rung.score else None),
            number(rung.score.relative_drop if rung.score else None),
            number(rung.score.discordance if rung.score else None, 1),
            Cell(result_text(rung, target.limits)),
        ]
        for rung in target.rungs
    ]
    return Table(headings, rows, ["passed" if rung.passed else "failed" for rung in target.rungs])


def unmeasured(model: ModelReport, target: TargetReport) -> str:
    """Why no operator's damage is known, and what measures it; empty where one is known."""
    if _damages(target):
        return ""
    whole = any(rung.passed and not rung.reverted for rung in target.rungs)
    passed = "All that the recipe puts into INT8 passed, so nothing" if whole else "Nothing"
    command = f"quant sensitivity {model.manifest.model} --target {target.target}"
    return f"{passed} was measured operator by operator; the command {command} does that, and the next report shows it."


def _damages(target: TargetReport) -> dict[str, float]:
    """Of the operators of which it is known: as `quant sensitivity` measured it, else as the ladder did."""
    laddered = {op.name: op.damage for op in target.plan.operators if op.damage is not None}
    measured = {op.name: op.damage for op in target.sensitivity.operators} if target.sensitivity else {}
    known, names = laddered | measured, {op.name for op in target.plan.operators}
    return {name: damage for name, damage in known.items() if name in names}


def operator_table(target: TargetReport) -> Table:
    """The operators that INT8 hurts most when each is alone in INT8, and what the plan made of them."""
    measured = {op.name: op for op in target.sensitivity.operators} if target.sensitivity else {}
    operators, work = target.plan.operators, sum(op.macs for op in target.plan.operators) or 1
    weights = sum(op.parameters for op in operators) or 1
    damages = _damages(target)
    worst = sorted(operators, key=lambda op: (-damages.get(op.name, 0.0), op.name))[:MOST_OPERATORS]
    headings = ["Operator", "Type", "Damage %", "Drop", "Work %", "Weights %", "Stored as", "Why"]
    rows = []
    for op in worst:
        damage, known = damages.get(op.name), measured.get(op.name)
        rows.append(
            [
                Cell(op.name),
                Cell(op.op_type),
                number(None if damage is None else 100 * damage, 3),
                number(known.drop if known else None),
                number(100 * op.macs / work, 2),
                number(100 * op.parameters / weights, 2),
                Cell("INT8" if op.quantized else "FP32"),
                Cell(op.reason or NOT_KNOWN),
            ]
        )
    return Table(headings, rows, ["" if op.quantized else "kept" for op in worst])


def range_table(target: TargetReport) -> Table:
    """What calibration saw of each tensor and what its quantizer covers, the most clipped first."""
    headings = ["Tensor", "Seen from", "to", "Covered from", "to", "Clipped %"]
    rows = [
        [
            Cell(chart.tensor),
            *(number(value, 3) for value in (chart.minimum, chart.maximum, chart.low, chart.high)),
            number(100 * chart.clipped, 3),
        ]
        for chart in target.ranges
    ]
    return Table(headings, rows, [""] * len(rows))


def size_table(target: TargetReport) -> Table:
    """Bytes of weights by type of operator, without their scales, and all else in the file."""
    headings = ["Operators", "Number", "In INT8", "Weights in FP32, bytes", "Weights now, bytes", "Share of FP32 %"]
    rows, now = [], 0
    for kind in sorted({op.op_type for op in target.plan.operators}):
        group = [op for op in target.plan.operators if op.op_type == kind]
        before = sum(4 * op.parameters for op in group)
        after = sum(op.parameters if op.quantized else 4 * op.parameters for op in group)
        now += after
        share = number(100 * after / before if before else None, 0)
        inside = sum(op.quantized for op in group)
        rows.append([Cell(kind), number(len(group), 0), number(inside, 0), _bytes(before), _bytes(after), share])
    if target.pooled and target.pooled.int8_bytes:
        rest = target.pooled.int8_bytes - now
        blank = Cell(NOT_KNOWN)
        rows.append([Cell("all else: graph, scales, biases"), blank, blank, blank, _bytes(rest), blank])
    return Table(headings, rows, [""] * len(rows))


def _bytes(count: int) -> Cell:
    return Cell(f"{count:,}", count)


def slice_table(slices: Sequence[Slice]) -> Table:
    """Parts of the report split, those that INT8 loses most on first."""
    headings = ["By", "Slice", "Pictures", "FP32", "INT8", "Drop", "INT8 worse on", "INT8 better on"]
    ordered = sorted(slices, key=lambda part: (-part.drop, part.axis))
    rows = [
        [
            Cell(part.axis),
            Cell(part.name),
            number(part.samples, 0),
            *map(number, (part.fp32, part.int8, part.drop)),
            number(part.worse, 0),
            number(part.better, 0),
        ]
        for part in ordered
    ]
    return Table(headings, rows, ["worse" if part.drop > 0 else "" for part in ordered])
