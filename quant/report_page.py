"""The report as one HTML page that needs nothing else: style, script and pictures stand in it.

The template escapes every value; the page's own policy lets the browser run its one script and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rapidfuzz.distance import Levenshtein

from eval.exhibits import Exhibit, Finding
from eval.formula_metric import latex_tokens
from eval.gate import verdict_text
from quant.charts import Dot, histogram, scatter
from quant.errors import InputError
from quant.report import ModelReport, TargetReport
from quant.report_tables import (
    diff_table,
    ladder_table,
    operator_table,
    size_table,
    slice_table,
    standings,
    unmeasured,
)

MOST_PICTURES = 12
"""Shown of a target."""

MOST_BYTES = 8 << 20
"""Of all pictures in the page, before they are written as text, which takes a third more."""

_MOST_CHARTS = 24
_MOST_SPAN = 50
_CELL = re.compile(r"<t[dh]\b([^>]*)>")
_SPAN = re.compile(r'(rowspan|colspan)="?(\d{1,4})')
_SCORE = "drop + half of the differing samples, % on the search split"

Segment = tuple[bool, str]
"""Whether a piece of a text is wrong, and the piece."""


@dataclass(frozen=True)
class Page:
    """The page, how many pictures it holds, and how many were left out so that it stays small."""

    html: str
    pictures: int
    left_out: int


class Album:
    """Pictures as data: URIs, each once, as long as there is room.

    Args:
        files: what came first has the room.
    """

    def __init__(self, files: Iterable[Path], room: int) -> None:
        self.pictures: dict[str, str] = {}
        self._room = room
        self._names = {file: self._add(file) for file in files}

    @property
    def left_out(self) -> int:
        return sum(name is None for name in self._names.values())

    def name(self, file: Path) -> str | None:
        """Under which a picture stands in the page; None where there was no room."""
        return self._names[file]

    def _add(self, file: Path) -> str | None:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InputError(f"{file}: {error.strerror or error}; delete the run's folder and run again") from error
        name = "p" + hashlib.sha256(content).hexdigest()[:16]
        if name not in self.pictures:
            if len(content) > self._room:
                return None
            self._room -= len(content)
            self.pictures[name] = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
        return name


def report_page(models: Sequence[ModelReport]) -> Page:
    """The same for the same runs."""
    album = Album(_worst_first(models), MOST_BYTES)
    shown = [
        {"report": model, "id": f"m{i}", "targets": _targets(model, album), "front": _target_front(model)}
        for i, model in enumerate(models)
    ]
    templates = Environment(
        loader=PackageLoader("quant"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["breakable"] = _breakable
    assert templates.loader is not None
    style, script = (Markup(templates.loader.get_source(templates, f"report.{kind}")[0]) for kind in ("css", "js"))
    html = templates.get_template("report.html").render(
        summary=diff_table(models),
        models=shown,
        pictures=album.pictures,
        left_out=album.left_out,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return Page(html, len(album.pictures), album.left_out)


def _breakable(text: str) -> Markup:
    """A text whose names, which hold no blanks, may go on in the next line of a narrow column."""
    return Markup("_<wbr>").join(text.split("_"))


def _targets(model: ModelReport, album: Album) -> list[dict[str, Any]]:
    return [
        {
            "report": target,
            "verdict": verdict_text(target.pooled) if target.pooled else "",
            "ladder": ladder_table(target),
            "operators": operator_table(target),
            "unmeasured": unmeasured(model, target),
            "sizes": size_table(target),
            "slices": slice_table(target.exhibits.slices if target.exhibits else []),
            "search": _search_front(target),
            "ranges": [(chart, histogram(chart)) for chart in target.ranges[:_MOST_CHARTS]],
            "exhibits": _exhibits(target, album),
        }
        for target in model.targets
    ]


# --- fronts ----------------------------------------------------------------------------------------


def _target_front(model: ModelReport) -> Markup | None:
    """The targets beside one another, by speed against FP32 as shipped and by drop."""
    shown = standings(model)
    if not shown:
        return None
    dots = [
        Dot(
            standing.speed,
            standing.row.drop,
            standing.row.target,
            bound=standing.row.drop_upper95,
            front=standing.front,
            chosen=True,
        )
        for standing in shown
    ]
    return scatter(dots, "speed against FP32 as shipped", "drop, points", limit=shown[0].row.gate.max_drop)


def _search_front(target: TargetReport) -> Markup | None:
    """The plans that a search by latency tried."""
    dots = [
        Dot(
            point.latency,
            point.score.drop + point.score.discordance / 2,
            point.name,
            front=point.front,
            chosen=point.chosen,
        )
        for point in target.points
        if point.score
    ]
    return scatter(dots, "latency, INT8 / FP32 prepared", _SCORE) if dots else None


# --- pictures --------------------------------------------------------------------------------------


def _worst_first(models: Sequence[ModelReport]) -> list[Path]:
    """The worst picture of every target, then the second of every target, and so on."""
    shown = [_shown(target) for model in models for target in model.targets]
    return [file for rank in zip_longest(*shown) for _, file in filter(None, rank)]


def _shown(target: TargetReport) -> list[tuple[Exhibit, Path]]:
    kept = target.exhibits.exhibits if target.exhibits else []
    return [(exhibit, target.pictures / Path(exhibit.picture).name) for exhibit in kept[:MOST_PICTURES]]


def _exhibits(target: TargetReport, album: Album) -> list[dict[str, Any]]:
    if target.exhibits is None:
        return []
    task, shown = target.exhibits.task, []
    for exhibit, file in _shown(target):
        picture = album.name(file)
        if picture is not None:
            sides = [_side(task, name, found, exhibit) for name, found in _findings(exhibit)]
            shown.append({"exhibit": exhibit, "picture": picture, "sides": sides})
    return shown


def _findings(exhibit: Exhibit) -> list[tuple[str, Finding]]:
    return [("labelled", exhibit.label), ("FP32", exhibit.fp32_found), ("INT8", exhibit.int8_found)]


def _side(task: str, name: str, found: Finding, exhibit: Exhibit) -> dict[str, Any]:
    """What one side of an exhibit shows: shapes on the picture, a table's cells, or a text with its errors."""
    side: dict[str, Any] = {"name": name, "shapes": found.shapes, "missed": found.missed, "cells": [], "segments": []}
    if task == "table_structure":
        side["cells"] = table_cells(found.text)
    elif task == "formula_recognition":
        read, true = latex_tokens(found.text), latex_tokens(exhibit.label.text)
        side["segments"] = [(wrong, f"{piece} ") for wrong, piece in _segments(read, true, " ")]
    elif not found.shapes:
        side["segments"] = _segments(found.text, exhibit.label.text, "")
    return side


def _segments(read: str | list[str], true: str | list[str], glue: str) -> list[Segment]:
    """A text cut into right and wrong pieces; where more than blanks is missing there is a wrong piece `·`."""
    pieces: list[Segment] = []
    for change in Levenshtein.opcodes(true, read):
        piece = glue.join(read[change.dest_start : change.dest_end])
        meant = glue.join(true[change.src_start : change.src_end])
        wrong = change.tag != "equal" and bool(piece.strip() or meant.strip())
        pieces.append((wrong, piece or "·" if wrong else piece))
    return pieces


def table_cells(html: str) -> list[list[tuple[int, int]]]:
    """The rows of a table in HTML, each cell as (rowspan, colspan); the HTML itself is never shown as such."""
    starts = [match.end() for match in re.finditer(r"<tr\b[^>]*>", html)] + [len(html)]
    return [[_spans(cell) for cell in _CELL.findall(html[start:end])] for start, end in pairwise(starts)]


def _spans(attributes: str) -> tuple[int, int]:
    spans = {name: max(1, min(int(count), _MOST_SPAN)) for name, count in _SPAN.findall(attributes)}
    return spans.get("rowspan", 1), spans.get("colspan", 1)
