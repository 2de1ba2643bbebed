"""Pictures of tables and their HTML: rows, columns, heads, spans over rows and columns, several ways of ruling.

A table is laid out like print: columns are as wide as their texts, spanning cells take what they span. The HTML says
exactly what was drawn: `<html><body><table><thead>...</thead><tbody>...</tbody></table></body></html>`.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

import cv2
import numpy as np

from calib_data import photography, wording
from calib_data.lettering import Fonts, Lettering, Paint, Style, draw, drawable, lay
from calib_data.photography import Colour, Picture
from calib_data.wording import Rng


@dataclass(frozen=True)
class TableWorld:
    """Which tables are drawn.

    Args:
        rows, columns: fewest and most, the head's rows included.
        heads: most rows of the head.
        spans: how likely cells are joined where they may be, 0..1.
        empty: share of body cells without text.
        rulings: ways of ruling, of `full`, `rows`, `booktabs` and `none`.
        sizes: smallest and largest height of an em in pixels.
        chinese: share of tables in Chinese, where a font has it.
    """

    rows: tuple[int, int] = (2, 14)
    columns: tuple[int, int] = (2, 8)
    heads: int = 2
    spans: float = 0.3
    empty: float = 0.08
    rulings: tuple[str, ...] = ("full", "full", "rows", "booktabs", "none")
    sizes: tuple[int, int] = (11, 22)
    chinese: float = 0.3


@dataclass(frozen=True)
class Cell:
    """A cell: its upper left place in the grid, how much it spans, its text."""

    row: int
    column: int
    rows: int = 1
    columns: int = 1
    text: str = ""


@dataclass(frozen=True)
class Table:
    """Cells in the order of reading, and the number of rows, columns and rows of the head."""

    cells: tuple[Cell, ...]
    rows: int
    columns: int
    heads: int

    def to_html(self) -> str:
        head = "".join(self._row(row) for row in range(self.heads))
        body = "".join(self._row(row) for row in range(self.heads, self.rows))
        parts = (f"<thead>{head}</thead>" if head else "") + f"<tbody>{body}</tbody>"
        return f"<html><body><table>{parts}</table></body></html>"

    def _row(self, row: int) -> str:
        return "<tr>" + "".join(_cell_html(cell) for cell in self.cells if cell.row == row) + "</tr>"


def _cell_html(cell: Cell) -> str:
    rows = f' rowspan="{cell.rows}"' if cell.rows > 1 else ""
    columns = f' colspan="{cell.columns}"' if cell.columns > 1 else ""
    return f"<td{rows}{columns}>{html.escape(cell.text, quote=False)}</td>"


def table(rng: Rng, fonts: Fonts, world: TableWorld) -> tuple[Picture, Table]:
    """A table and its picture: black on white paper, or on light colours, before any damage."""
    chinese = bool(fonts.cjk) and bool(rng.random() < world.chinese)
    family = fonts.cjk if chinese else fonts.latin
    font = family[int(rng.integers(len(family)))]
    size = int(rng.integers(world.sizes[0], world.sizes[1] + 1))
    style = Style(font, size, stretch=float(rng.uniform(0.85, 1.1)), weight=float(rng.uniform(-0.3, 0.3)))
    grid = _grid(rng, world)
    numeric = bool(rng.random() < 0.7)
    texts = [_wording(rng, cell, grid, chinese, numeric, world.empty, style) for cell in grid.cells]
    cells = tuple(Cell(c.row, c.column, c.rows, c.columns, t) for c, t in zip(grid.cells, texts, strict=True))
    filled = Table(cells, grid.rows, grid.columns, grid.heads)
    ruling = world.rulings[int(rng.integers(len(world.rulings)))]
    return _drawn(rng, filled, style, ruling), filled


# ---- structure -----------------------------------------------------------------------------------------------


def _grid(rng: Rng, world: TableWorld) -> Table:
    rows = int(rng.integers(world.rows[0], world.rows[1] + 1))
    columns = int(rng.integers(world.columns[0], world.columns[1] + 1))
    heads = min(int(rng.integers(0, world.heads + 1)), rows - 1)
    taken = np.zeros((rows, columns), bool)
    cells: list[Cell] = []
    for row in range(rows):
        for column in range(columns):
            if not taken[row, column]:
                end = heads if row < heads else rows
                cell = _joined(rng, row, column, (end, columns), taken, world.spans, row < heads)
                taken[row : row + cell.rows, column : column + cell.columns] = True
                cells.append(cell)
    return Table(tuple(cells), rows, columns, heads)


def _joined(
    rng: Rng, row: int, column: int, end: tuple[int, int], taken: np.ndarray, likely: float, head: bool
) -> Cell:
    """A cell that spans some of the free places right of it or below it, but never all of a row or of a column."""
    free_right = 1
    while column + free_right < end[1] and not taken[row, column + free_right]:
        free_right += 1
    free_down = end[0] - row
    along = likely if head and row < end[0] - 1 else 0.05 * likely
    down = likely if column == 0 or head else 0.02 * likely
    if free_right > 1 and rng.random() < along:
        return Cell(row, column, 1, int(rng.integers(2, min(4, free_right) + 1)))
    if free_down > 1 and rng.random() < down and (head or free_down > 2):
        return Cell(row, column, free_down if head else int(rng.integers(2, min(4, free_down - 1) + 1)))
    return Cell(row, column)


def _wording(rng: Rng, cell: Cell, grid: Table, chinese: bool, numeric: bool, empty: float, style: Style) -> str:
    if cell.row >= grid.heads and cell.column and rng.random() < empty:
        return ""
    if numeric and cell.row >= grid.heads and cell.column:
        digits = int(rng.integers(0, 3))
        return f"{rng.uniform(0, 10 ** int(rng.integers(1, 5))):.{digits}f}"
    count = int(rng.integers(3, 11))
    text = wording.chinese_document(rng, max(2, count // 2)) if chinese else wording.document_text(rng, count)
    return drawable(text, style.font) or "2024"


# ---- drawing -------------------------------------------------------------------------------------------------


def _drawn(rng: Rng, filled: Table, style: Style, ruling: str) -> Picture:
    letterings = [draw(cell.text, style) if cell.text else None for cell in filled.cells]
    room = (float(rng.uniform(0.4, 1.0)) * style.size, float(rng.uniform(0.2, 0.6)) * style.size)
    widths, height = _widths(filled, letterings, room[0]), style.size + 2 * room[1]
    margin = int(style.size * rng.uniform(0.3, 1.2))
    lefts = margin + np.concatenate(([0], np.cumsum(widths)))
    tops = margin + np.arange(filled.rows + 1) * height
    picture = photography.paper(rng, int(tops[-1]) + margin + 1, int(lefts[-1]) + margin + 1, 0.3 * float(rng.random()))
    if filled.heads and rng.random() < 0.3:
        shade = np.float32(rng.uniform(0.85, 0.96))
        picture[int(tops[0]) : int(tops[filled.heads]), int(lefts[0]) : int(lefts[-1])] *= shade
    ink: Colour = photography.contrasting(rng, (250.0, 250.0, 250.0), float(rng.uniform(150, 250)))
    centred = bool(rng.random() < 0.5)
    for cell, lettering in zip(filled.cells, letterings, strict=True):
        if lettering is not None:
            _place(picture, cell, lettering, (lefts, tops), style, Paint(ink, ink), room, centred)
    _rule(rng, picture, filled, (lefts, tops), ruling, ink)
    return picture


def _widths(filled: Table, letterings: list[Lettering | None], room: float) -> np.ndarray:
    """Of the columns: as wide as their widest text, then wider where a spanning text needs it."""
    widths = np.full(filled.columns, 2.5 * room)
    needs = [
        (cell, lettering.mask.shape[1] + 2 * room)
        for cell, lettering in zip(filled.cells, letterings, strict=True)
        if lettering is not None
    ]
    for cell, need in sorted(needs, key=lambda pair: pair[0].columns):
        spanned = slice(cell.column, cell.column + cell.columns)
        widths[spanned] += max(0.0, need - widths[spanned].sum()) / cell.columns
    return widths


def _place(
    picture: Picture,
    cell: Cell,
    lettering: Lettering,
    lines: tuple[np.ndarray, np.ndarray],
    style: Style,
    paint: Paint,
    room: tuple[float, float],
    centred: bool,
) -> None:
    lefts, tops = lines
    left, right = lefts[cell.column], lefts[cell.column + cell.columns]
    middle = (tops[cell.row] + tops[cell.row + cell.rows]) / 2
    x = (left + right - lettering.mask.shape[1]) / 2 if centred else left + room[0]
    baseline = middle + 0.35 * style.size
    lay(picture, lettering.mask, int(x), int(baseline) - lettering.baseline, paint)


def _rule(
    rng: Rng, picture: Picture, filled: Table, lines: tuple[np.ndarray, np.ndarray], ruling: str, ink: Colour
) -> None:
    lefts, tops = (np.round(places).astype(int) for places in lines)
    thick = int(rng.integers(1, 3))
    if ruling == "full":
        for cell in filled.cells:
            corner = (int(lefts[cell.column]), int(tops[cell.row]))
            opposite = (int(lefts[cell.column + cell.columns]), int(tops[cell.row + cell.rows]))
            cv2.rectangle(picture, corner, opposite, ink, thick)
    elif ruling == "rows":
        for cell in filled.cells:
            y = int(tops[cell.row + cell.rows])
            cv2.line(picture, (int(lefts[cell.column]), y), (int(lefts[cell.column + cell.columns]), y), ink, thick)
    if ruling in ("rows", "booktabs"):
        for row in {0, filled.heads, filled.rows}:
            cv2.line(picture, (int(lefts[0]), int(tops[row])), (int(lefts[-1]), int(tops[row])), ink, thick + 1)
