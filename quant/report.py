"""The report: what the newest runs found, read from their folders and written as Markdown and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from eval.exhibits import Exhibits, load_exhibits
from eval.gate import JudgedRow, SkippedRow
from eval.report import read_reports
from quant.archive import staged
from quant.errors import InputError
from quant.histograms import RANGES, RangeChart, load_ranges
from quant.job import TWINS
from quant.ladder import Limits, Rung, SearchScore
from quant.manifest import EXHIBITS, MANIFEST_FILE, Manifest, load_manifest, newest_run, newest_runs
from quant.plan import QuantPlan, load_plan
from quant.record import read_record
from quant.sensitivity_report import Sensitivity, load_sensitivity
from quant.target import TargetName

FOLDER = "report"
"""Below the results; the page and its Markdown lie there."""


@dataclass(frozen=True)
class SearchPoint:
    """A plan that the search tried, as `search.json` has it.

    Attributes:
        score: None where the error of the outputs alone ruled it out.
        latency: INT8 / FP32 prepared on the target.
        front: no other plan beats it in both.
    """

    name: str
    score: SearchScore | None
    latency: float
    front: bool
    chosen: bool


@dataclass(frozen=True)
class _Choice:
    method: str


@dataclass(frozen=True)
class _Recipe:
    """What the report says of the recipe in a manifest."""

    description: str
    targets: dict[str, _Choice]


@dataclass(frozen=True)
class TargetReport:
    """What a run says of one target.

    Attributes:
        rungs: steps of the ladder.
        limits: that they had to keep.
        points: of the search, where one was asked for.
        sensitivity: where `quant sensitivity` was run.
        exhibits: where the target was judged.
        pictures: folder of the exhibits' pictures.
    """

    target: str
    rows: list[JudgedRow | SkippedRow]
    plan: QuantPlan
    rungs: list[Rung]
    limits: Limits
    points: list[SearchPoint]
    ranges: list[RangeChart]
    sensitivity: Sensitivity | None
    exhibits: Exhibits | None
    pictures: Path

    @property
    def pooled(self) -> JudgedRow | None:
        return next((row for row in self.rows if isinstance(row, JudgedRow) and row.gates), None)


@dataclass(frozen=True)
class ModelReport:
    """A run: its rows, also of targets that could not be quantized, and its targets."""

    folder: Path
    manifest: Manifest
    rows: list[JudgedRow | SkippedRow]
    targets: list[TargetReport]

    @property
    def title(self) -> str:
        return self.rows[0].title if self.rows else self.manifest.model


@dataclass(frozen=True)
class WrittenReport:
    """Where a report was written, and how many pictures did not fit into the page."""

    page: Path
    markdown: Path
    models: list[str]
    pictures: int
    left_out: int


def write_report(results: Path, models: Sequence[str], folder: Path) -> WrittenReport:
    """Report on the newest runs below a results folder.

    Args:
        models: names, all that have a run if none is given.
        folder: for `report.html` and `report.md`; what is there is replaced.

    Raises:
        InputError: there is no run, or one of them is damaged.
    """
    from quant.report_markdown import report_markdown
    from quant.report_page import report_page

    reports = [read_run(run) for run in _runs(results, models)]
    page = report_page(reports)
    for name, text in (("report.html", page.html), ("report.md", report_markdown(reports))):
        with staged(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    titles = [report.title for report in reports]
    return WrittenReport(folder / "report.html", folder / "report.md", titles, page.pictures, page.left_out)


def read_run(folder: Path) -> ModelReport:
    """Everything that a run's folder says.

    Raises:
        InputError: something in it is damaged.
    """
    manifest, (report,) = _manifest(folder), read_reports([folder])
    targets = [_target(folder, manifest, target, report.rows) for target in manifest.artifacts]
    return ModelReport(folder, manifest, report.rows, targets)


def _manifest(folder: Path) -> Manifest:
    """A manifest whose open parts hold what the report shows of them."""
    manifest = load_manifest(folder)
    try:
        recipe = TypeAdapter(_Recipe).validate_python(manifest.recipe)
        TypeAdapter(str).validate_python(manifest.processor.get("name"))
        Limits.of_recipe(manifest.recipe)
    except (ValidationError, InputError) as error:
        raise _damaged(folder, error) from error
    if unknown := sorted(manifest.artifacts.keys() - recipe.targets.keys()):
        raise _damaged(folder, f"its recipe does not know the target {unknown[0]}")
    return manifest


def _damaged(folder: Path, what: object) -> InputError:
    line = " ".join(str(what).split())
    return InputError(f"{folder / MANIFEST_FILE}: damaged ({line[:200]}); delete the run's folder and run again")


def _runs(results: Path, models: Sequence[str]) -> list[Path]:
    if not models:
        found = [*newest_runs(results), *newest_runs(results / TWINS)]
        if not found:
            raise InputError(f"no run in {results}; run `quant run MODEL` first, or name the folder with --out")
        return found
    found = []
    for model in models:
        runs = [run for place in (results, results / TWINS) if (run := newest_run(place, model))]
        if not runs:
            raise InputError(f"{model} is not quantized yet: no run in {results}. Run `quant run {model}`")
        found += runs
    return found


def _target(
    folder: Path, manifest: Manifest, target: TargetName, rows: Sequence[JudgedRow | SkippedRow]
) -> TargetReport:
    plans, pictures = folder / "plans" / target, folder / EXHIBITS / target
    sensitivity = folder.parent / "sensitivity" / f"{target}.json"
    return TargetReport(
        target=target,
        rows=[row for row in rows if row.target == target],
        plan=load_plan(plans),
        rungs=manifest.ladder.get(target, []),
        limits=Limits.of_recipe(manifest.recipe),
        points=_points(plans / "search.json"),
        ranges=load_ranges(plans / RANGES) if (plans / RANGES).is_file() else [],
        sensitivity=_sensitivity(sensitivity),
        exhibits=load_exhibits(pictures) if pictures.is_dir() else None,
        pictures=pictures,
    )


def _points(file: Path) -> list[SearchPoint]:
    if not file.is_file():
        return []
    try:
        return read_record(file, list[SearchPoint])
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: damaged; delete the run's folder and run again") from error


def _sensitivity(file: Path) -> Sensitivity | None:
    if not file.is_file():
        return None
    try:
        return load_sensitivity(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: damaged; delete it, or run `quant sensitivity` again") from error
