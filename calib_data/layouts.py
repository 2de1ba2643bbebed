"""The built-in set for layout: pages whose regions, of all 23 classes of the layout models, are known exactly.

A page is set like print: furniture at its edges, one to three columns, blocks one below the other until a column is
full. What a block draws it also reports, so boxes fit the ink. Page `i` depends on the seed, `i`, the fonts and
`GENERATOR_VERSION` alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from calib_data import photography, wording
from calib_data.generator import save_photo
from calib_data.lettering import (
    Fonts,
    Lettering,
    Mask,
    Paint,
    Style,
    draw,
    drawable,
    find_fonts,
    fonts_fingerprint,
    lay,
)
from calib_data.photography import Colour, Photo, Picture
from calib_data.wording import Rng

__all__ = [
    "CLASSES",
    "GENERATOR_VERSION",
    "find_fonts",
    "fonts_fingerprint",
    "write_layout_pages",
    "write_plain_layout_pages",
]

GENERATOR_VERSION: int = 1  # raise it with every change of the output: sets are cached under it

CLASSES = (
    "paragraph_title", "image", "text", "number", "abstract", "content", "figure_title", "formula", "table",
    "table_title", "reference", "doc_title", "footnote", "header", "algorithm", "footer", "seal", "chart_title",
    "chart", "formula_number", "header_image", "footer_image", "aside_text",
)  # fmt: skip
"""In the order of the models' label lists."""

PLAIN_CLASSES = ("paragraph_title", "image", "text", "table", "seal")
"""A narrow world of small, clean sheets: classes that a small network tells apart after minutes of training."""

Box = tuple[float, float, float, float]
"""x and y of the upper left, x and y of the lower right corner, in pixels."""

_BLACK: Colour = (25.0, 25.0, 25.0)
_RULE: Colour = (60.0, 60.0, 60.0)
_LEAST = 4.0  # pixels: what is smaller is no region
_FORMULAS = (
    r"\sum_{{i=1}}^{{{n}}} {a}_i^2 = \frac{{{b}}}{{{c}+1}}", r"\int_0^{{\infty}} e^{{-{a}{b}^2}} d{b} = \sqrt{{{c}}}",
    r"{a}({b}) = \alpha {b}^{n} + \beta {c}", r"\frac{{\partial {a}}}{{\partial {b}}} = \lambda \nabla^2 {c}",
    r"\| {a} - {b} \|_2 \leq \epsilon \cdot {c}_{{max}}", r"P({a}|{b}) = \frac{{P({b}|{a}) P({a})}}{{P({b})}}",
    r"{a}_{{t+1}} = {a}_t - \eta \, \nabla L({a}_t, {b})", r"\lim_{{{a} \to 0}} \frac{{\sin {a}}}{{{a}}} = 1 + {c}^{n}",
)  # fmt: skip


@dataclass
class Leaf:
    """A page while it is set.

    Args:
        wanted: classes that may be drawn.
        size: of the body's letters, in pixels.
        regions: class and box of what was drawn.
        counter: numbers figures, tables and formulas.
    """

    rng: Rng
    fonts: Fonts
    picture: Picture
    wanted: frozenset[str]
    body: Style
    heading: Style
    ink: Colour
    chinese: bool
    regions: list[tuple[str, Box]] = field(default_factory=list)
    counter: int = 0

    @property
    def plain(self) -> bool:
        """Whether it is of the narrow world."""
        return self.wanted != frozenset(CLASSES)

    @property
    def size(self) -> int:
        return self.body.size

    @property
    def height(self) -> int:
        return int(self.picture.shape[0])

    @property
    def width(self) -> int:
        return int(self.picture.shape[1])

    def mark(self, name: str, boxes: Iterable[Box]) -> Box:
        """Report one region around all boxes."""
        corners = np.array(list(boxes))
        x0, y0 = corners[:, :2].min(axis=0)
        x1, y1 = corners[:, 2:].max(axis=0)
        self.regions.append((name, (float(x0), float(y0), float(x1), float(y1))))
        return self.regions[-1][1]

    def put(self, mask: Mask, x: float, top: float, colour: Colour | None = None) -> Box:
        ink = self.ink if colour is None else colour
        lay(self.picture, mask, int(x), int(top), Paint(ink, ink))
        return int(x), int(top), int(x) + mask.shape[1], int(top) + mask.shape[0]

    def prose(self, style: Style, width: float) -> str:
        """Running text that fills a width."""
        letters = max(3, int(width / (style.size * (1.0 if self.chinese else 0.55))))
        text = (wording.chinese_document if self.chinese else wording.document_text)(self.rng, letters)
        return drawable(text, style.font) or "2024"


Block = Callable[[Leaf, float, float, float, float], float]
"""Draws something at x, y in a width and a room below; returns the height it took, 0 where there is no room."""


def write_layout_pages(directory: Path, count: int, seed: int, progress: Callable[[int], None] | None = None) -> None:
    """Write `count` pages with regions of all 23 classes, and COCO's `instances.json`.

    Args:
        directory: is made if missing; `instances.json` is written last.
        seed: 0 or above.
        progress: is called with the number of pages written so far.
    """
    _write(directory, count, seed, CLASSES, progress)


def write_plain_layout_pages(
    directory: Path, count: int, seed: int, progress: Callable[[int], None] | None = None
) -> None:
    """As `write_layout_pages`, with the regions of `PLAIN_CLASSES` alone, on small, clean sheets."""
    _write(directory, count, seed, PLAIN_CLASSES, progress)


def _write(
    directory: Path, count: int, seed: int, classes: tuple[str, ...], progress: Callable[[int], None] | None
) -> None:
    fonts = find_fonts()
    (directory / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        photo, regions = layout_page(rng, fonts, classes)
        name = f"images/{index:06}{save_photo(rng, photo, directory / 'images' / f'{index:06}')}"
        height, width = photo.shape[:2]
        images.append({"id": index, "file_name": name, "width": width, "height": height})
        for label, (x0, y0, x1, y1) in regions:
            box = [round(value, 1) for value in (x0, y0, x1 - x0, y1 - y0)]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": index, "category_id": classes.index(label) + 1, "bbox": box,
                 "area": box[2] * box[3], "iscrowd": 0}
            )  # fmt: skip
        if progress is not None:
            progress(index + 1)
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (directory / "instances.json").write_text(json.dumps(document), encoding="utf-8")


def layout_page(rng: Rng, fonts: Fonts, classes: Iterable[str] = CLASSES) -> tuple[Photo, list[tuple[str, Box]]]:
    """One page, and class and box of each region, in the order of drawing."""
    wanted = frozenset(classes)
    leaf = _blank(rng, fonts, wanted)
    top, bottom, margin = _furniture(leaf)
    top = _opening(leaf, margin, top)
    columns = int(rng.choice((1, 2, 3), p=(0.4, 0.5, 0.1)))
    gap = 1.6 * leaf.size
    width = (leaf.width - 2 * margin - (columns - 1) * gap) / columns
    for column in range(columns):
        x = margin + column * (width + gap)
        _column(leaf, x, top, width, bottom - _footnote(leaf, x, bottom, width))
    _seal(leaf, margin, top, bottom)
    return _scanned(rng, leaf)


def _blank(rng: Rng, fonts: Fonts, wanted: frozenset[str]) -> Leaf:
    plain = wanted != frozenset(CLASSES)
    height = int(rng.integers(520, 680) if plain else rng.integers(760, 1300))
    width = int(height * rng.choice((0.707, 0.773, 0.75, 1.35), p=(0.45, 0.3, 0.15, 0.1)))
    width = min(width, 1300)
    chinese = bool(fonts.cjk) and bool(rng.random() < 0.35)
    family = fonts.cjk if chinese else fonts.latin
    body, heading = (family[int(rng.integers(len(family)))] for _ in range(2))
    size = int(rng.integers(11, 17) if plain else rng.integers(11, 19))
    stretch = float(rng.uniform(0.85, 1.1))
    wear = 0.0 if rng.random() < 0.5 else 0.5 * float(rng.beta(1, 3))
    picture = photography.paper(rng, height, width, wear)
    return Leaf(rng, fonts, picture, wanted, Style(body, size, stretch),
                Style(heading, size, stretch, weight=float(rng.uniform(0.2, 0.8))), _ink(rng), chinese)  # fmt: skip


def _ink(rng: Rng) -> Colour:
    dark = float(rng.uniform(0, 70))
    return dark, dark, dark


# ---- lines of text -----------------------------------------------------------------------------------------------


def _scaled(style: Style, factor: float) -> Style:
    return Style(style.font, max(8, int(style.size * factor)), style.stretch, weight=style.weight)


def _shortened(text: str, style: Style, width: float) -> Lettering:
    """The text as ink, shortened to a width."""
    lettering = draw(text, style)
    if lettering.mask.shape[1] > width:
        text = text[: int(len(text) * width / lettering.mask.shape[1])].strip() or "1"
        lettering = draw(text, style)
    return Lettering(lettering.mask[:, : max(1, int(width))], lettering.baseline)


def _fitted(text: str, style: Style, width: float) -> Mask:
    return _shortened(text, style, width).mask


def _lines(
    leaf: Leaf, x: float, y: float, width: float, count: int, style: Style, lead: str = "", hang: float = 0.0
) -> list[Box]:
    """Lines of prose of which the last may be short; `hang` indents all but the first."""
    boxes = []
    pitch = style.size * 1.4
    for index in range(count):
        indent = hang if index else 0.0
        room = (width - indent) * (leaf.rng.uniform(0.3, 0.95) if index == count - 1 and count > 1 else 1.0)
        text = (lead if not index else "") + leaf.prose(style, room)
        lettering = _shortened(text, style, room)
        top = y + index * pitch + 0.85 * style.size - lettering.baseline
        boxes.append(leaf.put(lettering.mask, x + indent, top))
    return boxes


def _room_for(room: float, style: Style, least: int, most: int, rng: Rng) -> int:
    """A number of lines that fits; 0 where not even the least does."""
    fits = int(room / (style.size * 1.4))
    return 0 if fits < least else int(rng.integers(least, min(fits, most) + 1))


def _centred(leaf: Leaf, text: str, style: Style, x: float, y: float, width: float) -> Box:
    mask = _fitted(drawable(text, style.font) or "2024", style, width)
    return leaf.put(mask, x + (width - mask.shape[1]) / 2, y)


# ---- the edges of the page ---------------------------------------------------------------------------------------


def _furniture(leaf: Leaf) -> tuple[float, float, float]:
    """Headers, footers, page numbers, marginal text; returns where the body begins and ends, and its margin."""
    rng, small = leaf.rng, _scaled(leaf.body, 0.8)
    margin = leaf.width * float(rng.uniform(0.07, 0.11))
    top, bottom = leaf.height * 0.045, leaf.height * 0.945
    inner = leaf.width - 2 * margin
    used = 0.0
    if "header_image" in leaf.wanted and rng.random() < 0.3:
        leaf.mark("header_image", [_logo(leaf, margin, top - 4)])
        used = inner * 0.3
    if "header" in leaf.wanted and rng.random() < 0.55:
        text = leaf.prose(small, inner * 0.4)
        leaf.mark("header", [leaf.put(_fitted(text, small, inner * 0.5), margin + used, top)])
    if "footer_image" in leaf.wanted and rng.random() < 0.25:
        leaf.mark("footer_image", [_logo(leaf, leaf.width - margin - 110, bottom + 4)])
    if "footer" in leaf.wanted and rng.random() < 0.45:
        text = leaf.prose(small, inner * 0.35)
        leaf.mark("footer", [leaf.put(_fitted(text, small, inner * 0.4), margin, bottom + 8)])
    if "number" in leaf.wanted and rng.random() < 0.7:
        below = rng.random() < 0.7
        mask = draw(str(int(rng.integers(1, 400))), _scaled(leaf.body, 0.95)).mask
        x = leaf.width / 2 if below else leaf.width - margin - mask.shape[1]
        leaf.mark("number", [leaf.put(mask, x, bottom + 8 if below else top)])
    if "aside_text" in leaf.wanted and rng.random() < 0.25:
        mask = draw(leaf.prose(small, leaf.height * 0.3), small).mask[:, : int(leaf.height * 0.5)]
        turned = np.ascontiguousarray(np.rot90(mask))
        x = max(4.0, margin * 0.4 - turned.shape[1] / 2)
        leaf.mark("aside_text", [leaf.put(turned, x, leaf.height * 0.25, (110.0, 110.0, 110.0))])
    return top + 3.2 * leaf.size, bottom - 1.2 * leaf.size, margin


def _logo(leaf: Leaf, x: float, y: float) -> Box:
    """A small mark: a coloured shape and a name beside it."""
    rng = leaf.rng
    side = int(rng.integers(22, 34))
    colour = photography.random_colour(rng, 1.0, 30, 200)
    left, upper = int(x), int(y)
    if rng.random() < 0.5:
        middle = (left + side // 2, upper + side // 2)
        cv2.circle(leaf.picture, middle, side // 2, colour, -1, cv2.LINE_AA)
    else:
        cv2.rectangle(leaf.picture, (left, upper), (left + side, upper + side), colour, -1)
    style = Style(leaf.heading.font, int(side * 0.8), weight=0.5)
    name = drawable(wording.street_text(rng)[:6].strip(), style.font) or "ABC"
    box = leaf.put(draw(name, style).mask[:, :70], left + side + 6, upper + side * 0.15, colour)
    return left, upper, max(box[2], left + side), max(box[3], upper + side)


def _opening(leaf: Leaf, margin: float, top: float) -> float:
    """Title and abstract, or a table of contents, over all columns; returns where the columns begin."""
    rng, inner, y = leaf.rng, leaf.width - 2 * margin, top
    if "doc_title" in leaf.wanted and rng.random() < 0.4:
        style = _scaled(leaf.heading, float(rng.uniform(1.7, 2.4)))
        boxes = []
        for _ in range(1 + int(rng.random() < 0.5)):
            boxes.append(_centred(leaf, leaf.prose(style, inner * 0.6), style, margin, y, inner))
            y += style.size * 1.35
        leaf.mark("doc_title", boxes)
        y += leaf.size
    if "abstract" in leaf.wanted and rng.random() < 0.35:
        lead = "摘要：" if leaf.chinese else "Abstract. "
        inset = inner * float(rng.choice((0.0, 0.06)))
        count = int(rng.integers(4, 9))
        leaf.mark("abstract", _lines(leaf, margin + inset, y, inner - 2 * inset, count, leaf.body, lead))
        y += count * leaf.size * 1.4 + 1.4 * leaf.size
    if "content" in leaf.wanted and rng.random() < 0.15:
        y += _contents(leaf, margin, y, inner)
    return y


def _contents(leaf: Leaf, x: float, y: float, width: float) -> float:
    """A table of contents: entries, dots, page numbers."""
    style, pitch = leaf.body, leaf.size * 1.7
    boxes = []
    count = int(leaf.rng.integers(5, 13))
    for index in range(count):
        indent = float(leaf.rng.choice((0, 1.5, 3))) * leaf.size
        text = f"{index + 1} " + leaf.prose(style, width * 0.4)
        entry = leaf.put(_fitted(text, style, width * 0.6), x + indent, y + index * pitch)
        number = draw(str(10 * index + 3), style).mask
        page = leaf.put(number, x + width - number.shape[1], y + index * pitch)
        for dot in range(int(entry[2]) + 8, int(page[0]) - 6, max(6, leaf.size // 2)):
            cv2.circle(leaf.picture, (dot, int(entry[3]) - 2), 1, leaf.ink, -1)
        boxes += [entry, page]
    leaf.mark("content", boxes)
    return count * pitch + leaf.size


def _footnote(leaf: Leaf, x: float, bottom: float, width: float) -> float:
    """A note at the foot of a column; returns the height it takes."""
    if "footnote" not in leaf.wanted or leaf.rng.random() > 0.2:
        return 0.0
    style = _scaled(leaf.body, 0.75)
    count = int(leaf.rng.integers(1, 4))
    tall = count * style.size * 1.4 + 8
    cv2.line(leaf.picture, (int(x), int(bottom - tall)), (int(x + width / 3), int(bottom - tall)), _RULE, 1)
    leaf.mark("footnote", _lines(leaf, x, bottom - tall + 7, width, count, style, "* "))
    return tall + leaf.size


def _seal(leaf: Leaf, margin: float, top: float, bottom: float) -> None:
    """A round stamp anywhere on the body, over what is there."""
    rng = leaf.rng
    if "seal" not in leaf.wanted or rng.random() > (0.6 if leaf.plain else 0.3):
        return
    radius = int(rng.uniform(0.05, 0.08) * leaf.height)
    x = int(rng.uniform(margin + radius, leaf.width - margin - radius))
    y = int(rng.uniform(min(top, bottom - 3 * radius) + radius, bottom - radius))
    red: Colour = (float(rng.uniform(20, 90)), float(rng.uniform(20, 80)), float(rng.uniform(180, 235)))
    stamp = np.zeros((2 * radius + 1, 2 * radius + 1), np.uint8)
    cv2.circle(stamp, (radius, radius), radius - 2, (255,), max(2, radius // 14), cv2.LINE_AA)
    angles = np.arange(5) * 4 * np.pi / 5 - np.pi / 2
    star = radius + 0.35 * radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    cv2.fillPoly(stamp, [np.round(star).astype(np.int32)], (255,), cv2.LINE_AA)
    _around(leaf, stamp, radius)
    leaf.mark("seal", [leaf.put(stamp, x - radius, y - radius, red)])


def _around(leaf: Leaf, stamp: Mask, radius: int) -> None:
    """Letters along the rim of a stamp, in place."""
    style = Style(leaf.body.font, max(9, radius // 4))
    source = "合同专用章有限公司电子" if leaf.chinese else "OFFICIAL SEAL OFFICE"
    text = drawable(source, style.font) or "SEAL"
    for index, letter in enumerate(text):
        if letter.isspace():
            continue
        angle = np.radians(-150 + 300 * index / max(1, len(text) - 1))
        glyph = draw(letter, style).mask
        height, width = glyph.shape
        turn = np.asarray(cv2.getRotationMatrix2D((width / 2, height / 2), -float(np.degrees(angle)), 1.0), np.float64)
        middle = radius + 0.72 * radius * np.array((np.sin(angle), -np.cos(angle)))
        turn[:, 2] += middle - (width / 2, height / 2)
        placed = np.asarray(cv2.warpAffine(glyph, turn, (stamp.shape[1], stamp.shape[0])), np.uint8)
        np.maximum(stamp, placed, out=stamp)


# ---- blocks of a column ------------------------------------------------------------------------------------------


def _column(leaf: Leaf, x: float, top: float, width: float, bottom: float) -> None:
    """Blocks one below the other until no more fit."""
    shares = {name: share for name, (share, _) in _BLOCKS.items() if name in leaf.wanted}
    chances = np.array(list(shares.values())) / sum(shares.values())
    y, missed = top, 0
    while bottom - y > 2 * leaf.size and missed < 4:
        name = str(leaf.rng.choice(list(shares), p=chances))
        used = _BLOCKS[name][1](leaf, x, y, width, bottom - y)
        missed = 0 if used else missed + 1
        y += used + leaf.size * float(leaf.rng.uniform(0.7, 1.4)) if used else 0.0


def _text(leaf: Leaf, x: float, y: float, width: float, room: float) -> float:
    count = _room_for(room, leaf.body, 2, 9, leaf.rng)
    if count:
        leaf.mark("text", _lines(leaf, x, y, width, count, leaf.body))
    return count * leaf.size * 1.4


def _paragraph_title(leaf: Leaf, x: float, y: float, width: float, room: float) -> float:
    style = _scaled(leaf.heading, float(leaf.rng.uniform(1.5, 1.9) if leaf.plain else leaf.rng.uniform(1.1, 1.5)))
    if room < 4 * style.size:
        return 0.0
    text = f"{int(leaf.rng.integers(1, 9))}. {leaf.prose(style, width * leaf.rng.uniform(0.25, 0.7))}"
    leaf.mark("paragraph_title", [leaf.put(_fitted(text, style, width), x, y)])
    return style.size * 1.3


def _formula(leaf: Leaf, x: float, y: float, width: float, room: float) -> float:
    mask = _mathematics(leaf.rng, float(leaf.size * leaf.rng.uniform(1.0, 1.4)))
    height, wide = mask.shape
    if wide > 0.8 * width or height > room:
        return 0.0
    box = leaf.mark("formula", [leaf.put(mask, x + (width - wide) / 2, y)])
    if "formula_number" in leaf.wanted and leaf.rng.random() < 0.6:
        leaf.counter += 1
        number = draw(f"({leaf.counter})", leaf.body).mask
        middle = (box[1] + box[3] - number.shape[0]) / 2
        leaf.mark("formula_number", [leaf.put(number, x + width - number.shape[1], middle)])
    return float(height)


def _mathematics(rng: Rng, size: float) -> Mask:
    """A formula as ink, set by matplotlib."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser

    letters = list(rng.choice(list("abcdfghkmnpqstuvwxyz"), 3, replace=False))
    pattern = _FORMULAS[int(rng.integers(len(_FORMULAS)))]
    text = pattern.format(a=letters[0], b=letters[1], c=letters[2], n=int(rng.integers(2, 9)))
    parsed = MathTextParser("agg").parse(f"${text}$", dpi=72, prop=FontProperties(size=size))
    mask = np.asarray(parsed.image, dtype=np.uint8)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.ascontiguousarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _captioned(
    name: str, title: str, word: tuple[str, str], body: Block, leaf: Leaf, x: float, y: float, width: float,
    room: float,
) -> float:  # fmt: skip
    """A figure, chart or table with its caption below, or above for tables and, sometimes, charts."""
    style = _scaled(leaf.body, 0.9)
    rows = int(leaf.rng.integers(1, 3)) if title in leaf.wanted and leaf.rng.random() < 0.75 else 0
    caption = rows * style.size * 1.4 + (0.6 * leaf.size if rows else 0)
    above = name == "table" or (name == "chart" and leaf.rng.random() < 0.4)
    used = body(leaf, x, y + caption if above else y, width, room - caption)
    if used and rows:
        leaf.counter += 1
        lead = f"{word[leaf.chinese]} {leaf.counter}. "
        leaf.mark(title, _lines(leaf, x, y if above else y + used + 0.6 * leaf.size, width, rows, style, lead))
    return used + caption if used else 0.0


def _image(leaf: Leaf, x: float, y: float, width: float, room: float) -> float:
    rng = leaf.rng
    wide = int(width * rng.uniform(0.5, 1.0))
    tall = int(wide * rng.uniform(0.45, 0.9))
    if tall > room or tall > leaf.height * 0.5:
        return 0.0
    left = int(x + (width - wide) / 2)
    leaf.picture[int(y) : int(y) + tall, left : left + wide, :3] = photography.scene(rng, tall, wide)
    leaf.mark("image", [(left, int(y), left + wide, int(y) + tall)])
    return float(tall)


def _table(leaf: Leaf, x: float, y: float, width: float, room: float) -> float:
    rng, style = leaf.rng, _scaled(leaf.body, 0.85)
    pitch = int(style.size * rng.uniform(1.6, 2.2))
    rows, columns = int(rng.integers(3, 11)), int(rng.integers(2, 7))
    if rows * pitch > room:
        return 0.0
    wide = int(width * rng.uniform(0.75, 1.0))
    left, top = int(x + (width - wide) / 2), int(y)
    right, bottom = left + wide, top + rows * pitch
    if leaf.plain or rng.random() < 0.3:
        head = leaf.picture[top : top + pitch, left:right]
        np.multiply(head, np.float32(rng.uniform(0.8, 0.92)), out=head)
    _grid(leaf, (left, top, right, bottom), rows, columns, lines=leaf.plain or bool(rng.random() < 0.65))
    cell = wide / columns
    for row in range(rows):
        for column in range(columns):
            text = leaf.prose(style, cell * 0.7) if row == 0 or column == 0 else wording.price(rng)
            mask = _fitted(text, style, cell * 0.85)
            leaf.put(mask, left + column * cell + 0.07 * cell, top + row * pitch + (pitch - mask.shape[0]) / 2)
    leaf.mark("table", [(left, top, right, bottom)])
    return float(rows * pitch)


def _grid(leaf: Leaf, box: tuple[int, int, int, int], rows: int, columns: int, lines: bool) -> None:
    """All rules of a table, or only those of a printed book's: top, below the head, bottom."""
    left, top, right, bottom = box
    for row in range(rows + 1):
        if lines or row in (0, 1, rows):
            y = round(top + row * (bottom - top) / rows)
            cv2.line(leaf.picture, (left, y), (right, y), _RULE, 1 if lines else 2)
    for column in range(columns + 1) if lines else ():
        x = round(left + column * (right - left) / columns)
        cv2.line(leaf.picture, (x, top), (x, bottom), _RULE, 1)


def _chart(leaf: Leaf, x: float, y: float, width: float, room: float) -> float:
    rng = leaf.rng
    wide = int(width * rng.uniform(0.6, 1.0))
    tall = int(wide * rng.uniform(0.5, 0.75))
    if tall > room or tall > leaf.height * 0.45:
        return 0.0
    left, top = int(x + (width - wide) / 2), int(y)
    style = _scaled(leaf.body, 0.7)
    edge = 2 * style.size
    inner = (left + edge, top + style.size, left + wide - style.size, top + tall - edge)
    plots = (_bars, _curves, _pie)
    plots[int(rng.integers(len(plots)))](leaf, inner)
    boxes: list[Box] = [(float(inner[0]), float(inner[1]), float(inner[2]), float(inner[3]))]
    for step in range(4):
        along = inner[0] + step * (inner[2] - inner[0]) / 4 + 4
        boxes.append(leaf.put(draw(str(2018 + step), style).mask, along, inner[3] + 6))
        down = inner[3] - step * (inner[3] - inner[1]) / 4 - style.size
        boxes.append(leaf.put(draw(str(20 * step), style).mask, left, down))
    leaf.mark("chart", boxes)
    return float(tall)


Inner = tuple[int, int, int, int]


def _axes(leaf: Leaf, inner: Inner) -> None:
    cv2.line(leaf.picture, (inner[0], inner[1]), (inner[0], inner[3]), _RULE, 1)
    cv2.line(leaf.picture, (inner[0], inner[3]), (inner[2], inner[3]), _RULE, 1)


def _bars(leaf: Leaf, inner: Inner) -> None:
    _axes(leaf, inner)
    rng, count = leaf.rng, int(leaf.rng.integers(4, 13))
    colours = [photography.random_colour(rng, 1.0, 40, 220) for _ in range(int(rng.integers(1, 4)))]
    step = (inner[2] - inner[0]) / count
    for index in range(count):
        high = int((inner[3] - inner[1]) * rng.uniform(0.15, 1.0))
        left = int(inner[0] + index * step + 0.15 * step)
        cv2.rectangle(leaf.picture, (left, inner[3] - high), (int(left + 0.7 * step), inner[3]),
                      colours[index % len(colours)], -1)  # fmt: skip


def _curves(leaf: Leaf, inner: Inner) -> None:
    _axes(leaf, inner)
    rng = leaf.rng
    for _ in range(int(rng.integers(1, 5))):
        along = np.linspace(inner[0], inner[2], int(rng.integers(5, 20)))
        level = np.clip(np.cumsum(rng.normal(0, 0.15, len(along))) + 0.5, 0, 1)
        points = np.stack([along, inner[3] - level * (inner[3] - inner[1])], axis=1)
        colour = photography.random_colour(rng, 1.0, 20, 200)
        cv2.polylines(leaf.picture, [np.round(points).astype(np.int32)], False, colour, 2, cv2.LINE_AA)


def _pie(leaf: Leaf, inner: Inner) -> None:
    rng = leaf.rng
    middle = ((inner[0] + inner[2]) // 2, (inner[1] + inner[3]) // 2)
    radius = min(inner[2] - inner[0], inner[3] - inner[1]) // 2 - 2
    ends = np.append(np.sort(rng.uniform(0, 360, int(rng.integers(2, 6)))), 360.0)
    start = 0.0
    for end in ends:
        colour = photography.random_colour(rng, 1.0, 60, 235)
        cv2.ellipse(leaf.picture, middle, (radius, radius), 0, start, float(end), colour, -1, cv2.LINE_AA)
        start = float(end)


def _algorithm(leaf: Leaf, x: float, y: float, width: float, room: float) -> float:
    """Numbered steps, indented, between rules."""
    style = _scaled(leaf.body, 0.9)
    count = _room_for(room - style.size, style, 4, 12, leaf.rng)
    if not count:
        return 0.0
    words = ("for", "if", "while", "return", "else", "end", "set", "do")
    depth = 0
    boxes: list[Box] = []
    for index in range(count):
        lead = f"{index}: {words[int(leaf.rng.integers(len(words)))]} " if index else "Algorithm 1 "
        indent = depth * 1.5 * style.size
        text = lead + leaf.prose(style, (width - indent) * leaf.rng.uniform(0.2, 0.6))
        boxes.append(leaf.put(_fitted(text, style, width - indent), x + indent, y + 6 + index * style.size * 1.4))
        depth = int(np.clip(depth + leaf.rng.integers(-1, 2), 0, 3))
    tall = count * style.size * 1.4 + 8
    for rule in (y, y + style.size * 1.4 + 2, y + tall):
        cv2.line(leaf.picture, (int(x), int(rule)), (int(x + width), int(rule)), _BLACK, 1)
    leaf.mark("algorithm", [*boxes, (x, y, x + width, y + tall)])
    return tall


def _reference(leaf: Leaf, x: float, y: float, width: float, room: float) -> float:
    """A bibliography: numbered entries with a hanging indent."""
    style = _scaled(leaf.body, 0.85)
    entries = _room_for(room, style, 4, 16, leaf.rng) // 2
    boxes: list[Box] = []
    used = 0.0
    for index in range(entries):
        count = int(leaf.rng.integers(1, 3))
        boxes += _lines(leaf, x, y + used, width, count, style, f"[{index + 1}] ", hang=1.8 * style.size)
        used += count * style.size * 1.4
    if boxes:
        leaf.mark("reference", boxes)
    return used


_BLOCKS: dict[str, tuple[float, Block]] = {
    "text": (0.42, _text),
    "paragraph_title": (0.16, _paragraph_title),
    "formula": (0.1, _formula),
    "image": (0.09, partial(_captioned, "image", "figure_title", ("Figure", "图"), _image)),
    "table": (0.08, partial(_captioned, "table", "table_title", ("Table", "表"), _table)),
    "chart": (0.07, partial(_captioned, "chart", "chart_title", ("Fig.", "图"), _chart)),
    "algorithm": (0.04, _algorithm),
    "reference": (0.04, _reference),
}
"""How often each block is tried, and what draws it."""


# ---- from print to picture ---------------------------------------------------------------------------------------


def _scanned(rng: Rng, leaf: Leaf) -> tuple[Photo, list[tuple[str, Box]]]:
    """The page from a scanner or a renderer: some are slightly turned, blurred, grey or noisy; plain ones are not."""
    plain = leaf.plain
    picture, hardness = leaf.picture, 0.0 if plain else float(rng.beta(1.2, 2.5))
    matrix = np.eye(2, 3)
    if not plain and rng.random() < 0.4:
        angle = float(np.clip(rng.normal(0, 0.4), -1, 1))
        matrix = np.asarray(cv2.getRotationMatrix2D((leaf.width / 2, leaf.height / 2), angle, 1.0), np.float64)
        size = (leaf.width, leaf.height)
        picture = np.asarray(cv2.warpAffine(picture, matrix, size, borderMode=cv2.BORDER_REPLICATE), np.float32)
    if not plain and rng.random() < 0.3:
        grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
        picture = np.asarray(cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR), np.float32)
    if hardness:
        picture = photography.defocus(picture, 1.3 * hardness * float(rng.random()))
        picture = photography.sensor(rng, photography.light(rng, picture, 0.4 * hardness), 0.8 * hardness)
    regions = [(name, _moved(box, matrix, leaf)) for name, box in leaf.regions]
    seen = [(name, box) for name, box in regions if min(box[2] - box[0], box[3] - box[1]) >= _LEAST]
    return photography.develop(picture), seen


def _moved(box: Box, matrix: np.ndarray, leaf: Leaf) -> Box:
    """The box around a box that was turned, inside the picture."""
    corners = np.array([(box[i], box[j], 1.0) for i in (0, 2) for j in (1, 3)]) @ matrix.T
    inside = np.clip(corners, 0, (leaf.width, leaf.height))
    (x0, y0), (x1, y1) = inside.min(axis=0), inside.max(axis=0)
    return float(x0), float(y0), float(x1), float(y1)
