"""The built-in set: pictures of text lines, pages, tables and formulas with exact labels, for places without network.

Rendered text is too clean to calibrate on: its activation ranges are not those of photographs. So every
sample passes a chain that imitates a photograph (ground, ink, view, light, lens, sensor, compression), with a
severity that is drawn per sample and spreads from a clean scan to what a good recognizer can no longer read.

Sample `i` depends on the seed, `i`, the fonts and `GENERATOR_VERSION` alone, so a set can grow.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

from calib_data import photography, wording
from calib_data.formulas import FormulaWorld, formula
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
from calib_data.notes import code_line, note
from calib_data.photography import Colour, Photo, Picture
from calib_data.tables import TableWorld, table
from calib_data.wording import Rng

__all__ = [
    "GENERATOR_VERSION",
    "Fonts",
    "find_fonts",
    "fonts_fingerprint",
    "save_photo",
    "write_codes",
    "write_document_pages",
    "write_formulas",
    "write_notes",
    "write_tables",
    "write_text_lines",
    "write_text_pages",
]

GENERATOR_VERSION: int = 1  # raise it with every change of the output: sets are cached under it

UNREADABLE = "###"
Quad = npt.NDArray[np.float32]  # [4, 2] x, y in pixels, clockwise from the top left of the text
Matrix = npt.NDArray[np.float64]  # [3, 3] homography

_CHINESE_SHARE = 0.4
_LINE_KINDS = {"word": 0.4, "receipt": 0.3, "document": 0.3}
_PAGE_KINDS = {"street": 0.56, "receipt": 0.22, "document": 0.22}
_PAPER_KINDS = {"receipt": 0.5, "document": 0.5}
_LATIN_WORDING: dict[str, Callable[[Rng], str]] = {
    "word": wording.street_text, "receipt": wording.receipt_text, "document": wording.document_text,
}  # fmt: skip
_CHINESE_WORDING: dict[str, Callable[[Rng], str]] = {
    "word": wording.chinese_street, "receipt": wording.chinese_receipt, "document": wording.chinese_document,
}  # fmt: skip


@dataclass(frozen=True)
class Region:
    """One text on a page: what it says (`###` when nobody can tell) and where."""

    text: str
    quad: Quad


@dataclass
class Sheet:
    """A flat thing with text on it, before it is photographed.

    Args:
        picture: [height, width, 3 or 4]; a fourth channel is the coverage, as in `lettering.lay`.
        regions: in pixels of the picture.
    """

    picture: Picture
    regions: list[Region] = field(default_factory=list)


def write_text_lines(directory: Path, count: int, seed: int, progress: Callable[[int], None] | None = None) -> None:
    """Write `count` pictures of one text line each, 12 to 100 pixels high, and `label.txt` (`image<TAB>text`).

    Args:
        directory: is made if missing; `label.txt` is written last.
        seed: 0 or above.
        progress: is called with the number of samples written so far.
    """
    fonts = find_fonts()

    def sample(rng: Rng) -> tuple[Photo, str]:
        return text_line(rng, fonts)

    _write(directory, count, seed, sample, progress)


def write_text_pages(directory: Path, count: int, seed: int, progress: Callable[[int], None] | None = None) -> None:
    """Write `count` pages and street scenes, and `label.txt` (`image<TAB>[{"transcription", "points"}, ...]`).

    Points run clockwise from the top left of each text, in pixels of the image; `###` marks text that the
    damage made unreadable.

    Args:
        directory: is made if missing; `label.txt` is written last.
        seed: 0 or above.
        progress: is called with the number of samples written so far.
    """
    _write_pages(directory, count, seed, _PAGE_KINDS, progress)


def write_document_pages(directory: Path, count: int, seed: int, progress: Callable[[int], None] | None = None) -> None:
    """As `write_text_pages`, but receipts and printed pages only: what has an upper side that can be told."""
    _write_pages(directory, count, seed, _PAPER_KINDS, progress)


def write_tables(
    directory: Path,
    count: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
    world: TableWorld | None = None,
    hardness: float = 1.0,
) -> None:
    """Write `count` pictures of tables and `label.jsonl` (`{"filename", "html"}` in each line).

    Args:
        directory: is made if missing; `label.jsonl` is written last.
        seed: 0 or above.
        progress: is called with the number of samples written so far.
        world: which tables; all kinds if not given.
        hardness: most damage, 0 none .. 1 hard to read.
    """
    fonts, chosen = find_fonts(), world or TableWorld()

    def sample(rng: Rng) -> tuple[Photo, str]:
        picture, drawn = table(rng, fonts, chosen)
        return _damaged(rng, picture, hardness), drawn.to_html()

    _write(directory, count, seed, sample, progress, "label.jsonl")


def write_formulas(
    directory: Path,
    count: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
    world: FormulaWorld | None = None,
    hardness: float = 1.0,
) -> None:
    """Write `count` pictures of formulas and `label.txt` (`image<TAB>LaTeX`); arguments as of `write_tables`."""
    chosen = world or FormulaWorld()

    def sample(rng: Rng) -> tuple[Photo, str]:
        picture, latex = formula(rng, chosen)
        return _damaged(rng, picture, hardness), latex

    _write(directory, count, seed, sample, progress)


def write_codes(directory: Path, count: int, seed: int, progress: Callable[[int], None] | None = None) -> None:
    """As `write_text_lines`, but easy to read: a few of `notes.CODE_LETTERS`, in few fonts."""
    fonts = find_fonts()
    _write(directory, count, seed, lambda rng: code_line(rng, fonts), progress)


def write_notes(directory: Path, count: int, seed: int, progress: Callable[[int], None] | None = None) -> None:
    """As `write_text_pages`, but small notes, 256 to 384 pixels a side, of a few upright lines flush left."""
    fonts = find_fonts()

    def sample(rng: Rng) -> tuple[Photo, str]:
        photo, spots = note(rng, fonts)
        regions = [Region(spot.text, _box(spot.x, spot.y, spot.width, spot.height)) for spot in spots]
        return photo, json.dumps([_entry(region) for region in regions], ensure_ascii=False)

    _write(directory, count, seed, sample, progress)


def _damaged(rng: Rng, picture: Picture, hardness: float) -> Photo:
    """A cut-out from a page: mostly scanned or rendered, sometimes photographed."""
    amount = hardness * float(rng.beta(1.2, 2.5))
    if rng.random() < 0.75:
        return _scan(rng, Sheet(picture), amount)[0]
    picture = photography.defocus(photography.light(rng, picture, amount), 1.5 * amount * float(rng.random()))
    return photography.develop(photography.sensor(rng, picture, 0.15 + amount))


def _write_pages(
    directory: Path, count: int, seed: int, kinds: dict[str, float], progress: Callable[[int], None] | None
) -> None:
    fonts = find_fonts()

    def sample(rng: Rng) -> tuple[Photo, str]:
        photo, regions = text_page(rng, fonts, kinds)
        return photo, json.dumps([_entry(region) for region in regions], ensure_ascii=False)

    _write(directory, count, seed, sample, progress)


def _entry(region: Region) -> dict[str, object]:
    return {"transcription": region.text, "points": [[round(float(v), 1) for v in point] for point in region.quad]}


def _write(
    directory: Path, count: int, seed: int, sample: Callable[[Rng], tuple[Photo, str]],
    progress: Callable[[int], None] | None, file: str = "label.txt",
) -> None:  # fmt: skip
    (directory / "images").mkdir(parents=True, exist_ok=True)
    labels = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        photo, label = sample(rng)
        name = f"images/{index:06}{save_photo(rng, photo, directory / 'images' / f'{index:06}')}"
        if file.endswith(".jsonl"):
            labels.append(json.dumps({"filename": name, "html": label}, ensure_ascii=False) + "\n")
        else:
            labels.append(f"{name}\t{label}\n")
        if progress is not None:
            progress(index + 1)
    (directory / file).write_text("".join(labels), encoding="utf-8", newline="\n")


def save_photo(rng: Rng, photo: Photo, stem: Path) -> str:
    """Write a picture as PNG or, mostly, as JPEG of any quality; returns the suffix that was added to the stem."""
    if rng.random() < 0.12:
        suffix, options = ".png", (cv2.IMWRITE_PNG_COMPRESSION, 1)
    else:
        suffix, options = ".jpg", (cv2.IMWRITE_JPEG_QUALITY, int(20 + 75 * rng.beta(2.2, 1.0)))
    _, code = cv2.imencode(suffix, photo, options)
    stem.with_suffix(suffix).write_bytes(code.tobytes())
    return suffix


def _choose(rng: Rng, shares: dict[str, float]) -> str:
    return str(rng.choice(list(shares), p=list(shares.values())))


def _log_uniform(rng: Rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _font(rng: Rng, fonts: Fonts, chinese: bool) -> Path:
    family = fonts.cjk if chinese else fonts.latin
    return family[int(rng.integers(len(family)))]


def _wording(rng: Rng, kind: str, chinese: bool, font: Path) -> str:
    source = (_CHINESE_WORDING if chinese else _LATIN_WORDING)[kind]
    for _ in range(8):
        if text := drawable(source(rng), font):
            return text
    return "2024"  # digits are in every font


# ---- lines ---------------------------------------------------------------------------------------------------


def text_line(rng: Rng, fonts: Fonts) -> tuple[Photo, str]:
    """One cropped text line and what it says."""
    kind = _choose(rng, _LINE_KINDS)
    chinese = bool(fonts.cjk) and bool(rng.random() < _CHINESE_SHARE)
    font = _font(rng, fonts, chinese)
    text = _wording(rng, kind, chinese, font)
    height = _crop_height(rng, kind)
    style = _line_style(rng, kind, font, height)
    lettering = draw(text, style, rng)
    hardness = float(rng.beta(1.4, 1.3))
    ground, ink = _ground_and_ink(rng, kind, hardness)
    canvas, quad = _line_canvas(rng, kind, lettering, style, (ground, ink), hardness)
    photo = _damage_line(rng, kind, _crop(rng, kind, canvas, quad, height), hardness)
    return photo, text


def _crop_height(rng: Rng, kind: str) -> int:
    middle, spread = {"word": (36, 0.6), "receipt": (29, 0.28), "document": (20, 0.45)}[kind]
    return int(np.clip(np.exp(rng.normal(np.log(middle), spread)), 12, 100))


def _line_style(rng: Rng, kind: str, font: Path, height: int) -> Style:
    size = int(np.clip(height * 1.25, 20, 90))
    if kind == "word":
        return Style(
            font, size, stretch=_log_uniform(rng, 0.6, 1.5), slant=_often(rng, 0.3, rng.normal(0.05, 0.18)),
            weight=float(rng.uniform(-0.6, 0.9)), spacing=_often(rng, 0.3, rng.uniform(-0.03, 0.5)),
            jitter=_often(rng, 0.08, 0.05), arch=_often(rng, 0.1, rng.uniform(-0.5, 0.5)),
            dots=_often(rng, 0.04, rng.uniform(0.08, 0.13)), outline=bool(rng.random() < 0.04),
        )  # fmt: skip
    return Style(
        font, size, stretch=_log_uniform(rng, 0.65, 1.35), slant=_often(rng, 0.1, rng.normal(0, 0.15)),
        weight=float(rng.uniform(-0.6, 0.6)), spacing=_often(rng, 0.2, rng.uniform(0, 0.15)),
        dots=_often(rng, 0.12, rng.uniform(0.06, 0.1)) if kind == "receipt" else 0.0,
    )  # fmt: skip


def _often(rng: Rng, probability: float, value: float) -> float:
    return float(value) if rng.random() < probability else 0.0


def _ground_and_ink(rng: Rng, kind: str, hardness: float) -> tuple[Colour, Colour]:
    """The colours of ground and letters; hard samples have less contrast."""
    if kind == "word" or rng.random() < 0.06:
        ground = photography.random_colour(rng, float(rng.choice((0.1, 0.5, 1.0), p=(0.35, 0.35, 0.3))), 10, 255)
        contrast = float(np.clip(np.exp(rng.normal(4.75 - 0.7 * hardness, 0.5)), 22, 255))
        return ground, photography.contrasting(rng, ground, contrast)
    dark = rng.beta(1.2, 3.0) * (60 + 140 * hardness if kind == "receipt" else 130)
    tint = rng.normal(0, 1, 3) * rng.choice((3.0, 3.0, 25.0))
    blue, green, red = (float(np.clip(dark + t, 0, 235)) for t in tint)
    return (250.0, 250.0, 250.0), (blue, green, red)


def _line_canvas(
    rng: Rng, kind: str, lettering: Lettering, style: Style, colours: tuple[Colour, Colour], hardness: float
) -> tuple[Picture, Quad]:
    """Letters on their ground with room around; the quad is the box of the ink."""
    height, width = lettering.mask.shape
    pad = int(0.7 * height) + 6 + int(0.06 * width)
    size = (height + 2 * pad, width + 2 * pad)
    if kind == "word":
        canvas = photography.wall(rng, *size, colours[0], float(rng.beta(1.0, 1.6)))
    elif photography.luma(colours[0]) < 249:
        canvas = photography.wall(rng, *size, colours[0], 0.15 * float(rng.random()))
    else:
        wear = float(rng.beta(1.2, 2)) if kind == "receipt" else 0.5 * float(rng.beta(1, 3))
        canvas = photography.paper(rng, *size, wear)
    paint = _paint(rng, kind, colours, style.size)
    mask = _faded(rng, lettering.mask, hardness) if kind == "receipt" and rng.random() < 0.35 else lettering.mask
    _neighbours(rng, canvas, style, pad, paint, height)
    lay(canvas, mask, pad, pad, paint)
    return canvas, _box(pad, pad, width, height)


def _box(x: float, y: float, width: float, height: float) -> Quad:
    return np.array(((x, y), (x + width, y), (x + width, y + height), (x, y + height)), np.float32)


def _paint(rng: Rng, kind: str, colours: tuple[Colour, Colour], size: int) -> Paint:
    ground, ink = colours
    if kind != "word":
        return Paint(ink, ink, opacity=float(rng.uniform(0.75, 1)))
    end = ink
    if rng.random() < 0.25:
        end = photography.contrasting(rng, ground, abs(photography.luma(ground) - photography.luma(ink)))
    opacity = float(rng.uniform(0.8, 1))
    effect = rng.random()
    if effect < 0.6:
        return Paint(ink, end, opacity)
    shadow = photography.contrasting(rng, ink, float(rng.uniform(40, 220)))
    reach = max(1, size // 14)
    if effect < 0.78:  # a shadow to one side
        offset = (int(rng.integers(-reach, reach + 1)), int(rng.integers(-reach, reach + 1)))
        return Paint(ink, end, opacity, shadow, offset, soft=float(rng.uniform(0, reach)))
    if effect < 0.92:  # a rim
        return Paint(ink, end, opacity, shadow, spread=int(rng.integers(1, reach + 1)))
    return Paint(ink, end, opacity, ink, spread=1, soft=float(reach * rng.uniform(1, 2.5)))  # a neon glow


def _faded(rng: Rng, mask: Mask, hardness: float) -> Mask:
    """Thermal print that lost its ink in places, and print heads with dead rows."""
    height, width = mask.shape
    patches = photography.clouds(rng, height, width, 6.0, 2) + rng.uniform(-0.6, 0.2)
    loss = np.clip(patches, 0, 1) * (0.5 + 0.5 * hardness)
    return np.asarray(mask * (1 - loss), np.uint8)


def _neighbours(rng: Rng, canvas: Picture, style: Style, pad: int, paint: Paint, height: int) -> None:
    """Parts of the lines above and below, a rule, a frame: crops of real text hold them too."""
    if rng.random() < 0.35:
        text = wording.document_text(rng, 12)
        near = draw(text, Style(style.font, style.size, style.stretch, weight=style.weight)).mask
        gap = int(height * rng.uniform(0.08, 0.4))
        y = pad - gap - near.shape[0] if rng.random() < 0.5 else pad + height + gap
        lay(canvas, near, pad + int(rng.normal(0, height)), y, paint)
    if rng.random() < 0.1:
        y = pad + int(height * rng.choice((-0.15, 1.1, 1.2)))
        cv2.line(canvas, (0, y), (canvas.shape[1], y), paint.colour, max(1, height // 16), cv2.LINE_AA)


def _crop(rng: Rng, kind: str, canvas: Picture, quad: Quad, height: int) -> Picture:
    """View the canvas from an angle and cut the text out, tightly or loosely, `height` pixels high."""
    seen = _tilted(rng, quad, kind)
    low, high = seen.min(axis=0), seen.max(axis=0)
    tall = float((high - low)[1])
    tight = rng.choice((0.03, 0.12, 0.3), p=(0.35, 0.4, 0.25))
    margins = rng.uniform(-0.02, 1, 4) * tight * tall
    if rng.random() < 0.07:
        margins[int(rng.integers(4))] = -0.1 * tall * rng.random()
    corner, size = low - margins[:2], high - low + margins[:2] + margins[2:]
    scale = height / float(size[1])
    width = int(np.clip(round(float(size[0]) * scale), 8, 1600))
    shift = np.array([[scale, 0, -corner[0] * scale], [0, scale, -corner[1] * scale], [0, 0, 1]])
    matrix = shift @ cv2.getPerspectiveTransform(quad, seen)
    # Without interpolation edges come out as jagged as in thumbnails and fax-like scans.
    flags = cv2.INTER_NEAREST if rng.random() < 0.1 else cv2.INTER_LINEAR
    seen_from_there = cv2.warpPerspective(canvas, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT)
    return cast(Picture, seen_from_there)


def _tilted(rng: Rng, quad: Quad, kind: str) -> Quad:
    """The quad rotated and seen in perspective; long lines tilt less, or their crop would be mostly ground."""
    width, height = quad[2] - quad[0]
    most = 8.0 if kind == "word" else 1.5
    angle = np.radians(np.clip(rng.normal(0, most / 2), -most, most)) * min(1.0, 6 * height / width)
    turn = np.array(((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))))
    middle = quad.mean(axis=0)
    depth = (0.1 if kind == "word" else 0.03) * float(rng.beta(1, 2))
    offset = rng.normal(0, 1, (4, 2)) * depth * (height, height)
    if kind == "word" and rng.random() < 0.25:  # seen from the side: one end is smaller
        offset[:, 1] += np.array((1, -1, 1, -1)) * height * rng.uniform(-0.2, 0.2)
    return np.asarray((quad - middle) @ turn.T + middle + offset, np.float32)


def _damage_line(rng: Rng, kind: str, picture: Picture, hardness: float) -> Photo:
    height = picture.shape[0]
    scan = kind != "word" and rng.random() < 0.6
    if not scan:
        picture = photography.light(rng, picture, hardness)
        picture = _occluded(rng, picture) if rng.random() < 0.06 else picture
    picture = _blurred(rng, picture, height, hardness * (0.5 if scan else 1.0))
    if rng.random() < 0.4:
        picture = photography.sharpen(picture, float(rng.uniform(0.3, 1.6)), max(0.8, height / 30))
    if scan:
        picture = _scanned(rng, picture)
    else:
        picture = photography.expose(rng, picture, 0.35 + hardness)
        picture = photography.sensor(rng, picture, float(rng.beta(1, 2.5)) * 1.5 * hardness)
    return photography.develop(picture)


def _blurred(rng: Rng, picture: Picture, height: float, hardness: float) -> Picture:
    """Lens, shake and resolution, scaled to text `height` pixels high so that every size can stay readable."""
    if rng.random() < 0.6:
        picture = photography.defocus(picture, height * 0.09 * hardness * float(rng.random()))
    if rng.random() < 0.25:
        picture = photography.shake(rng, picture, height * 0.25 * hardness * float(rng.random()))
    if rng.random() < 0.35:
        most = max(1.0, height / (9 + 18 * (1 - hardness)))
        picture = photography.coarsen(rng, picture, float(rng.uniform(1, most)))
    return picture


def _scanned(rng: Rng, picture: Picture) -> Picture:
    """A scanner's tone curve: white ground, black ink, sometimes nothing in between."""
    if rng.random() < 0.5:
        gray = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
        picture = np.asarray(cv2.cvtColor(gray, cv2.COLOR_GRAY2BGR), np.float32)
    steep = float(rng.choice((1.0, 1.3, 2.0, 6.0), p=(0.4, 0.25, 0.2, 0.15)))
    if steep > 1:  # the middle tone of the sheet stays where it is, so that pale ink survives
        dark, bright = np.percentile(picture[::3, ::3], (1, 90))
        picture = (picture - (0.35 * dark + 0.65 * bright)) * steep + 190
    return photography.sensor(rng, picture.astype(np.float32), 0.5 * float(rng.beta(1, 4)))


def _occluded(rng: Rng, picture: Picture) -> Picture:
    """Something thin in front: a cable, a branch, a finger at the edge."""
    height, width = picture.shape[:2]
    start = (int(rng.integers(width)), int(rng.choice((0, height))))
    end = (int(start[0] + rng.normal(0, height)), height - start[1])
    colour = photography.random_colour(rng, 0.4, 10, 200)
    covered = np.ascontiguousarray(picture)
    cv2.line(covered, start, end, colour, max(1, int(height * rng.uniform(0.03, 0.15))), cv2.LINE_AA)
    return covered


# ---- pages ---------------------------------------------------------------------------------------------------


def text_page(rng: Rng, fonts: Fonts, kinds: dict[str, float] = _PAGE_KINDS) -> tuple[Photo, list[Region]]:
    """One page and its texts; `kinds` says how often it is a street, a receipt or a document."""
    kind = _choose(rng, kinds)
    chinese = bool(fonts.cjk) and bool(rng.random() < _CHINESE_SHARE)
    hardness = float(rng.beta(1.6, 1.2))
    if kind == "street":
        sheet = _street(rng, fonts, chinese)
        return _damage_page(rng, sheet, hardness)
    make = _receipt if kind == "receipt" else _document
    if rng.random() < 0.55:
        return _scan(rng, make(rng, fonts, chinese), hardness)
    return _damage_page(rng, _photographed(rng, make(rng, fonts, chinese), hardness), hardness)


def _put(sheet: Sheet, text: str, x: float, baseline: float, style: Style, paint: Paint, rng: Rng) -> float:
    """Write one text with its left edge at `x`; returns its width in pixels."""
    lettering = draw(text, style, rng)
    top = int(baseline) - lettering.baseline
    lay(sheet.picture, lettering.mask, int(x), top, paint)
    height, width = lettering.mask.shape
    room = 0.07 * style.size  # people draw boxes with a little air
    sheet.regions.append(Region(text, _box(int(x) - room, top - room, width + 2 * room, height + 2 * room)))
    return float(width)


def _receipt(rng: Rng, fonts: Fonts, chinese: bool) -> Sheet:
    """A till receipt: head, labelled fields, goods with prices, totals."""
    width, height = int(rng.integers(400, 760)), int(rng.integers(700, 1401))
    sheet = Sheet(photography.paper(rng, height, width, float(rng.beta(1.2, 2))))
    size = int(width / rng.uniform(17, 30))
    style = Style(_font(rng, fonts, chinese), size, _log_uniform(rng, 0.75, 1.15), weight=float(rng.uniform(-0.5, 0.5)),
                  dots=_often(rng, 0.1, 0.08))  # fmt: skip
    dark = float(rng.beta(1.2, 2.5)) * 170
    ink = (dark + float(rng.choice((0.0, 0.0, 40.0))), dark, dark)
    paint = Paint(ink, ink, opacity=float(rng.uniform(0.7, 1)))
    y, pitch, left = size * rng.uniform(1.5, 4), size * rng.uniform(1.1, 1.8), width * rng.uniform(0.03, 0.12)
    end = height * (1.0 if rng.random() < 0.6 else rng.uniform(0.5, 0.9)) - size
    while y < end and len(sheet.regions) < 80:
        part = y / height
        if part < 0.2:
            _centred(rng, sheet, _wording(rng, "receipt", chinese, style.font), y, style, paint)
        elif rng.random() < 0.06:
            _dashes(rng, sheet.picture, int(y), ink)
        else:
            _row(rng, sheet, chinese, left, y, style, paint)
        y += pitch * (1 if rng.random() < 0.9 else rng.uniform(1.2, 2.5))
    return sheet


def _centred(rng: Rng, sheet: Sheet, text: str, y: float, style: Style, paint: Paint) -> None:
    width = sheet.picture.shape[1]
    span = draw(text, style).mask.shape[1]
    fitted = text if span < width * 0.94 else text[: int(len(text) * width * 0.9 / span)].strip() or "1"
    span = draw(fitted, style).mask.shape[1]
    _put(sheet, fitted, max(4.0, (width - span) / 2), y, style, paint, rng)


def _row(rng: Rng, sheet: Sheet, chinese: bool, left: float, y: float, style: Style, paint: Paint) -> None:
    """A text at the left and, two times in three, an amount at the right if there is room."""
    width = sheet.picture.shape[1]
    used = draw(text := _wording(rng, "receipt", chinese, style.font), style).mask.shape[1]
    if used > width - 2 * left:
        text = text[: int(len(text) * (width - 2 * left) / used)].strip() or "1"
    used_now = _put(sheet, text, left, y, style, paint, rng)
    amount = wording.price(rng)
    span = draw(amount, style).mask.shape[1]
    if rng.random() < 0.66 and left + used_now + span + 2.5 * style.size < width - left:
        _put(sheet, amount, width - left - span, y, style, paint, rng)


def _dashes(rng: Rng, picture: Picture, y: int, ink: Colour) -> None:
    step = int(rng.choice((1, 8, 14)))
    for x in range(0, picture.shape[1], max(2, step)):
        cv2.line(picture, (x, y), (x + max(1, step // 2), y), ink, 1)


def _document(rng: Rng, fonts: Fonts, chinese: bool) -> Sheet:
    """A printed page or a slide: title, one or two columns of prose, figures."""
    width, height = int(rng.integers(560, 1001)), int(rng.integers(720, 1401))
    poster = rng.random() < 0.3
    if rng.random() < (0.5 if poster else 0.2):
        width, height = height, width
    ground: Colour = photography.random_colour(rng, 0.8, 10, 255) if poster else (250.0, 250.0, 250.0)
    picture = photography.wall(rng, height, width, ground, 0.12) if poster else photography.paper(
        rng, height, width, 0.6 * float(rng.beta(1, 3)))  # fmt: skip
    sheet = Sheet(picture)
    ink = photography.contrasting(rng, ground, float(rng.uniform(90, 250)))
    size = int(_log_uniform(rng, 20, 70)) if poster else int(_log_uniform(rng, 10, 24))
    style = Style(_font(rng, fonts, chinese), size, _log_uniform(rng, 0.8, 1.15), weight=float(rng.uniform(-0.4, 0.3)))
    paint = Paint(ink, ink)
    margin = width * rng.uniform(0.05, 0.12)
    top = margin + 2 * size
    if rng.random() < 0.7:
        title = Style(_font(rng, fonts, chinese), int(size * rng.uniform(1.3, 2.2)))
        _centred(rng, sheet, _wording(rng, "word", chinese, title.font), top, title, paint)
        top += 3 * size
    columns = 1 if poster else int(rng.integers(1, 4))
    column_width = (width - 2 * margin - (columns - 1) * 1.5 * size) / columns
    for column in range(columns):
        _column(rng, sheet, chinese, margin + column * (column_width + 1.5 * size), top, column_width, style, paint)
    return sheet


def _column(
    rng: Rng, sheet: Sheet, chinese: bool, x: float, top: float, width: float, style: Style, paint: Paint
) -> None:
    height, pitch = sheet.picture.shape[0], style.size * rng.uniform(1.05, 1.6)
    per_line = max(3, int(width / (style.size * style.stretch * (1.0 if chinese else 0.62))))
    y = top
    while y < height - 2 * style.size and len(sheet.regions) < 80:
        if rng.random() < 0.04:
            y += _figure(rng, sheet.picture, x, y, width)
            continue
        last = rng.random() < 0.15
        count = max(3, int(per_line * rng.uniform(0.3, 0.9))) if last else per_line
        text = wording.chinese_document(rng, count) if chinese else wording.document_text(rng, count)
        if text := drawable(text, style.font):
            _put(sheet, text, x, y, style, paint, rng)
        y += pitch * (1.8 if last else 1.0)


def _figure(rng: Rng, picture: Picture, x: float, y: float, width: float) -> float:
    """A picture, or an empty table, in the column; returns the height it takes."""
    tall = int(min(width * rng.uniform(0.2, 0.6), picture.shape[0] - y - 4))
    if tall < 20:
        return 20.0
    left, upper, right = int(x), int(y), int(x + width)
    if rng.random() < 0.6:
        picture[upper : upper + tall, left:right, :3] = photography.scene(rng, tall, right - left)
    else:
        for step in range(upper, upper + tall, max(8, tall // 5)):
            cv2.line(picture, (left, step), (right, step), (90.0, 90.0, 90.0), 1)
    return tall + 40.0


def _scan(rng: Rng, sheet: Sheet, hardness: float) -> tuple[Photo, list[Region]]:
    """The sheet from a flat-bed scanner or a renderer: nearly straight, white, sharp, sometimes jagged."""
    height, width = sheet.picture.shape[:2]
    scale = float(rng.choice((1.0, rng.uniform(0.6, 1.0))))
    angle = _often(rng, 0.6, rng.normal(0, 0.6))
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1.0)
    matrix = np.diag((scale, scale, 1.0)) @ np.vstack((turn, (0, 0, 1)))
    size = (int(width * scale), int(height * scale))
    flags = int(rng.choice((cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC)))
    picture = cv2.warpPerspective(sheet.picture, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    regions = [Region(region.text, _moved(region.quad, matrix)) for region in sheet.regions]
    blur = 1.2 * hardness * float(rng.random())
    picture = photography.defocus(cast(Picture, picture), blur)
    if rng.random() < 0.5:
        picture = photography.sharpen(picture, float(rng.uniform(0.5, 2.0)), 1.0)
    photo = photography.develop(_scanned(rng, picture))
    return photo, _readable(regions, photo, blur)


def _photographed(rng: Rng, sheet: Sheet, hardness: float) -> Sheet:
    """The sheet on a table, turned and in perspective."""
    height, width = sheet.picture.shape[:2]
    scale = float(rng.uniform(0.6, 0.95))
    angle = np.radians(np.clip(rng.normal(0, 6), -15, 15) * (0.4 + 0.6 * hardness))
    turn = np.array(((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle)))) * scale
    corners = _box(0, 0, width, height)
    seen = (corners - corners.mean(axis=0)) @ turn.T
    seen = seen + rng.normal(0, 1, (4, 2)) * 0.03 * width * float(rng.random())
    low, high = seen.min(axis=0), seen.max(axis=0)
    room = (high - low) * rng.uniform(-0.03, 0.12)
    size = np.maximum(64, np.round(high - low + 2 * room)).astype(int)
    matrix = np.asarray(cv2.getPerspectiveTransform(corners, (seen - low + room).astype(np.float32)), np.float64)
    return _onto(Sheet(_desk(rng, int(size[1]), int(size[0]))), sheet, matrix)


def _desk(rng: Rng, height: int, width: int) -> Picture:
    colour = photography.random_colour(rng, 0.6, 15, 200)
    small = photography.wall(rng, height // 2, width // 2, colour, float(rng.beta(1.3, 1.3)))
    return cast(Picture, cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR))


def _onto(page: Sheet, sheet: Sheet, matrix: Matrix) -> Sheet:
    """Lay a sheet over a page through a homography; the sheet's texts move along."""
    height, width = page.picture.shape[:2]
    tall, wide = sheet.picture.shape[:2]
    outline = _moved(_box(0, 0, wide, tall), matrix)
    low = np.clip(np.floor(outline.min(axis=0)).astype(int) - 1, 0, (width, height))
    high = np.clip(np.ceil(outline.max(axis=0)).astype(int) + 1, 0, (width, height))
    size = (int(high[0] - low[0]), int(high[1] - low[1]))
    if min(size) > 0:
        shift = np.array([[1.0, 0, -low[0]], [0, 1, -low[1]], [0, 0, 1]])
        spot = page.picture[low[1] : high[1], low[0] : high[0]]
        _blend(spot, sheet.picture, shift @ matrix, size)
    for region in sheet.regions:
        page.regions.append(Region(region.text, _moved(region.quad, matrix)))
    return page


def _blend(spot: Picture, picture: Picture, matrix: Matrix, size: tuple[int, int]) -> None:
    warped = cv2.warpPerspective(picture, matrix, size, flags=cv2.INTER_LINEAR)
    if picture.shape[2] == 4:
        spot *= 1 - warped[..., 3:] / 255
        spot += warped[..., :3]
        return
    whole = np.full(picture.shape[:2], 255, np.uint8)
    cover = cv2.warpPerspective(whole, matrix, size, flags=cv2.INTER_LINEAR)[..., None] > 127
    np.copyto(spot, warped, where=cover)


def _moved(quad: Quad, matrix: Matrix) -> Quad:
    return np.asarray(cv2.perspectiveTransform(quad[None].astype(np.float64), matrix)[0], np.float32)


def _street(rng: Rng, fonts: Fonts, chinese: bool) -> Sheet:
    """A place with signs: small and large, near and far, upright and turned."""
    width, height = ((1280, 720), (640, 480), (720, 960), (960, 540))[int(rng.choice(4, p=(0.45, 0.25, 0.15, 0.15)))]
    page = Sheet(photography.scene(rng, height, width))
    taken: list[tuple[float, float, float, float]] = []
    for _ in range(int(rng.integers(3, 18))):
        sign = _sign(rng, fonts, chinese and bool(rng.random() < 0.7))
        matrix = _place(rng, sign, (width, height), taken)
        if matrix is not None:
            _onto(page, sign, matrix)
    return page


def _sign(rng: Rng, fonts: Fonts, chinese: bool) -> Sheet:
    """One to five lines on a board, or letters fixed to whatever is behind (then the board is transparent)."""
    font = _font(rng, fonts, chinese)
    count = int(rng.choice(5, p=(0.45, 0.25, 0.15, 0.1, 0.05))) + 1
    sizes = [int(_log_uniform(rng, 24, 60)) if k == 0 or rng.random() < 0.3 else 28 for k in range(count)]
    styles = [_line_style(rng, "word", font, int(size / 1.25)) for size in sizes]
    kinds = ["document" if count > 2 and rng.random() < 0.3 else "word" for _ in range(count)]
    texts = [_wording(rng, kind, chinese, font)[:24].strip() for kind in kinds]
    letterings = [draw(text, style) for text, style in zip(texts, styles, strict=True)]
    pad = int(max(sizes) * rng.uniform(0.3, 0.9))
    width = max(lettering.mask.shape[1] for lettering in letterings) + 2 * pad
    height = sum(int(lettering.mask.shape[0] * 1.35) for lettering in letterings) + 2 * pad
    ground, ink = _ground_and_ink(rng, "word", float(rng.uniform(0.2, 1.5)))
    sheet = Sheet(_board(rng, height, width, ground))
    y = float(pad)
    left = bool(rng.random() < 0.3)
    for text, style, lettering in zip(texts, styles, letterings, strict=True):
        tall, wide = lettering.mask.shape
        x = pad if left else (width - wide) / 2
        _put(sheet, text, x, y + lettering.baseline, style, _paint(rng, "word", (ground, ink), style.size), rng)
        y += tall * 1.35
    return sheet


def _board(rng: Rng, height: int, width: int, ground: Colour) -> Picture:
    board = np.zeros((height, width, 4), np.float32)
    if rng.random() < 0.3:
        return board
    board[..., :3] = photography.wall(rng, height, width, ground, 0.5 * float(rng.beta(1, 2)))
    board[..., 3] = 255
    if rng.random() < 0.4:
        rim = photography.contrasting(rng, ground, float(rng.uniform(40, 200)))
        edge = max(2, height // 30)
        cv2.rectangle(board, (edge, edge), (width - edge, height - edge), (*rim, 255.0), edge)
    return board


def _place(
    rng: Rng, sign: Sheet, size: tuple[int, int], taken: list[tuple[float, float, float, float]]
) -> Matrix | None:
    """A free place and a view for the sign; None when the scene is full."""
    height, width = sign.picture.shape[:2]
    text = float(np.median([region.quad[3, 1] - region.quad[0, 1] for region in sign.regions]))
    corners = _box(0, 0, width, height)
    for _ in range(6):
        tall = _log_uniform(rng, 7, 45 if rng.random() < 0.85 else 180)
        scale = min(tall / text, 0.9 * size[0] / width, 0.9 * size[1] / height)
        angle = np.radians(rng.uniform(-45, 45) if rng.random() < 0.06 else rng.normal(0, 5))
        turn = np.array(((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle)))) * scale
        seen = (corners - corners.mean(axis=0)) @ turn.T
        seen = seen + rng.normal(0, 1, (4, 2)) * 0.12 * height * scale * float(rng.random())
        seen[:, 0] *= rng.uniform(0.6, 1)
        seen[:, 1] += seen[:, 0] * rng.normal(0, 0.08)
        span = seen.max(axis=0) - seen.min(axis=0)
        room = np.array(size) - span
        if (room <= 0).any():
            continue
        overhang = 0.08 * span if rng.random() < 0.15 else 0 * span
        low = rng.uniform(-overhang, room + overhang)
        box = (*low, *(low + span))
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            continue
        taken.append(box)
        return np.asarray(cv2.getPerspectiveTransform(corners, (seen - seen.min(axis=0) + low).astype(np.float32)))
    return None


def _damage_page(rng: Rng, sheet: Sheet, hardness: float) -> tuple[Photo, list[Region]]:
    """The way of a photograph from light to eight bits."""
    picture, regions = sheet.picture, sheet.regions
    height, width = picture.shape[:2]
    if rng.random() < 0.2:
        picture, regions = _hidden(rng, picture, regions)
    picture = photography.light(rng, picture, hardness)
    blur = float(rng.random()) * hardness * 3.2 * max(height, width) / 1280
    picture = photography.defocus(picture, blur)
    if rng.random() < 0.3:
        picture = photography.shake(rng, picture, 9 * hardness * float(rng.random()))
    if rng.random() < 0.3:
        picture = photography.coarsen(rng, picture, float(rng.uniform(1, 1.3 + hardness)))
    if rng.random() < 0.4:
        picture = photography.sharpen(picture, float(rng.uniform(0.3, 1.6)), 1.2)
    picture = photography.expose(rng, picture, 0.25 + 0.7 * hardness)
    photo = photography.develop(photography.sensor(rng, picture, 0.15 + 1.3 * hardness * float(rng.beta(1, 2.5))))
    return photo, _readable(regions, photo, blur)


def _hidden(rng: Rng, picture: Picture, regions: list[Region]) -> tuple[Picture, list[Region]]:
    """A post or a person in front; texts of which much is covered are no longer readable."""
    height, width = picture.shape[:2]
    x, thick = int(rng.integers(width)), int(width * rng.uniform(0.01, 0.08))
    cover = np.zeros((height, width), np.uint8)
    cv2.line(cover, (x, int(rng.integers(0, height // 2))), (x + int(rng.normal(0, 30)), height), (255,), max(2, thick))
    colour = np.array(photography.random_colour(rng, 0.5, 5, 180), np.float32)
    surface = colour + photography.clouds(rng, height, width, 4, 1)[..., None] * np.float32(20)
    hidden = np.where(cover[..., None] > 0, surface, picture)
    kept = [Region(UNREADABLE, r.quad) if _share(cover, r.quad) > 0.1 else r for r in regions]
    return cast(Picture, hidden.astype(np.float32)), kept


def _share(cover: Mask, quad: Quad) -> float:
    """How much of the quad is covered, 0..1."""
    stencil = np.zeros_like(cover)
    cv2.fillConvexPoly(stencil, np.round(quad).astype(np.int32), (1,))
    area = int(stencil.sum())
    return float((stencil & (cover > 0)).sum()) / area if area else 1.0


def _readable(regions: list[Region], photo: Photo, blur: float) -> list[Region]:
    """Mark what is too small, too blurred, too faint or cut by the border; drop what is out of sight."""
    height, width = photo.shape[:2]
    limit = np.array((width - 1, height - 1), np.float32)
    kept = []
    for region in regions:
        quad = np.clip(region.quad, 0, limit)
        if min(_sides(quad)) < 2 or cv2.contourArea(quad) < 12:
            continue
        tall = min(_sides(region.quad))
        cut = bool(np.abs(quad - region.quad).max() > 1)
        lost = cut or tall < 6 or blur > 0.25 * tall or _contrast(photo, quad) < 4
        kept.append(Region(UNREADABLE if lost else region.text, quad))
    return kept


def _sides(quad: Quad) -> tuple[float, float]:
    """Mean width and mean height of a quad."""
    edges = np.linalg.norm(np.roll(quad, -1, axis=0) - quad, axis=1)
    return float(edges[0] + edges[2]) / 2, float(edges[1] + edges[3]) / 2


def _contrast(photo: Photo, quad: Quad) -> float:
    """Standard deviation of brightness in the quad's box, in levels."""
    low, high = np.floor(quad.min(axis=0)).astype(int), np.ceil(quad.max(axis=0)).astype(int) + 1
    return float(cv2.cvtColor(photo[low[1] : high[1], low[0] : high[0]], cv2.COLOR_BGR2GRAY).std())
