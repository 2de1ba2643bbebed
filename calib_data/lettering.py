"""Fonts and the shapes of letters: which fonts are at hand, and text drawn with them in many variants.

A bare machine has about ten families, so variety is made here: stretched, slanted, thinned, thickened,
outlined, dotted, spaced, arched letters from the same font files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from calib_data.photography import Colour, Picture
from calib_data.wording import CHINESE_WORDS, Rng, alphabet, ideographs

Mask = npt.NDArray[np.uint8]

SEARCH_FOLDERS: tuple[Path, ...] = (
    Path("/usr/share/fonts"),
    Path("/usr/local/share/fonts"),
    Path.home() / ".fonts",
    Path.home() / ".local/share/fonts",
)
# Symbols, formulas and stand-ins: they claim Latin letters, and draw something else.
_EXCLUDED = ("stixsiz", "stixnonuni", "lastresort", "symbol", "emoji", "wingding", "webding", "dingbat", "math",
             "adobeblank", "barcode", "icon", "awesome", "braille", "music")  # fmt: skip
_LATIN = frozenset(map(chr, range(33, 127)))
# A machine may have thousands of fonts; more than these only cost time.
_MAX_LATIN, _MAX_CJK = 48, 8
INK = 40  # of 255: a pixel of a mask with more counts as ink


@dataclass(frozen=True)
class Fonts:
    """Font files in the order of their names.

    Args:
        latin: fonts with every printable ASCII character.
        cjk: fonts with the common Chinese characters too; empty when the dictionary has no such characters.
    """

    latin: tuple[Path, ...]
    cjk: tuple[Path, ...]


@dataclass(frozen=True)
class Style:
    """How letters are drawn.

    Args:
        font: the font file.
        size: height of an em in pixels.
        stretch: width relative to the font's own.
        slant: horizontal shift per pixel of height; 0.2 looks italic.
        weight: -1 thinnest .. 0 as designed .. 1 thickest.
        spacing: extra room between letters, in em.
        jitter: random vertical shift of each letter, in em.
        arch: how far the baseline bends up or down from end to middle, in em.
        dots: pitch of the dots of a dot-matrix or LED print, in em; 0 means solid.
        outline: draw the contour only.
    """

    font: Path
    size: int
    stretch: float = 1.0
    slant: float = 0.0
    weight: float = 0.0
    spacing: float = 0.0
    jitter: float = 0.0
    arch: float = 0.0
    dots: float = 0.0
    outline: bool = False


@dataclass(frozen=True)
class Lettering:
    """Drawn text, cut out along its ink.

    Args:
        mask: [height, width], 0 ground .. 255 ink.
        baseline: row of the mask on which the letters stand; may lie outside of it.
    """

    mask: Mask
    baseline: int


@dataclass(frozen=True)
class Paint:
    """How ink covers the ground. Colours are BGR, 0..255.

    Args:
        colour: of the letters, at the top.
        end: of the letters, at the bottom; the same for plain letters.
        opacity: 0..1.
        shadow: None, or the colour of a shadow, a rim or a glow behind the letters.
        offset: of the shadow in pixels (x, y).
        spread: how far the shadow reaches around the letters, in pixels.
        soft: blur of the shadow, in pixels.
    """

    colour: Colour
    end: Colour
    opacity: float = 1.0
    shadow: Colour | None = None
    offset: tuple[int, int] = (0, 0)
    spread: int = 0
    soft: float = 0.0


def find_fonts() -> Fonts:
    """The usable fonts of this machine: the system's, the user's, and those that matplotlib brings along."""
    files: dict[str, Path] = {}
    for path in _font_files():
        files.setdefault(path.name, path)
    ordered = [files[name] for name in sorted(files)]
    latin = [path for path in ordered if glyphs(path) >= _LATIN and _draws_letters(path)]
    wanted = frozenset("".join(CHINESE_WORDS)) | frozenset(ideographs())
    # Japanese and Korean fonts have part of the characters only; a line must not be drawn with holes.
    cjk = [path for path in latin if len(wanted & glyphs(path)) > 0.9 * len(wanted)] if ideographs() else []
    return Fonts(latin=_spread(latin, _MAX_LATIN), cjk=_spread(cjk, _MAX_CJK))


def fonts_fingerprint(fonts: Fonts) -> str:
    """Hex hash over names and contents of the fonts: the same fonts in another folder give the same hash."""
    total = hashlib.sha256()
    for kind, paths in (("latin", fonts.latin), ("cjk", fonts.cjk)):
        for path in paths:
            total.update(f"{kind}:{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def _font_files() -> Iterator[Path]:
    shipped = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for folder in (shipped, *SEARCH_FOLDERS):
        for path in sorted(folder.rglob("*")) if os.access(folder, os.R_OK | os.X_OK) else ():
            stem = path.stem.lower()
            wrong = stem.startswith("cm") or stem.endswith("display") or any(word in stem for word in _EXCLUDED)
            if path.suffix.lower() in (".ttf", ".otf", ".ttc") and not wrong:
                yield path


def _spread(paths: list[Path], most: int) -> tuple[Path, ...]:
    step = max(1.0, len(paths) / most)
    return tuple(paths[int(k * step)] for k in range(min(len(paths), most)))


@cache
def glyphs(path: Path) -> frozenset[str]:
    """The characters that a font can draw, by its character map; empty for a file that cannot be read."""
    try:
        return frozenset(map(chr, FT2Font(str(path)).get_charmap())) & (alphabet() | _LATIN)
    except (RuntimeError, OSError, ValueError):
        return frozenset()


@cache
def _draws_letters(path: Path) -> bool:
    # The character map may promise what the outlines do not hold (blank and stand-in fonts).
    try:
        shapes = {draw(char, Style(path, 32)).mask.tobytes() for char in "HoA8g"}
    except (OSError, ValueError):
        return False
    return len(shapes) == 5


def drawable(text: str, font: Path) -> str:
    """`text` without the characters that the dictionary or the font lacks."""
    return "".join(char for char in text if char == " " or (char in alphabet() and char in glyphs(font))).strip()


@lru_cache(maxsize=256)
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout is always there; the other one depends on how Pillow was built.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def draw(text: str, style: Style, rng: Rng | None = None) -> Lettering:
    """Draw one line of text.

    Args:
        text: what to draw; at least one visible character.
        style: how.
        rng: needed for `jitter` alone.

    Raises:
        ValueError: the text left no ink.
    """
    mask, baseline = _strike(text, style, rng)
    if style.stretch != 1.0 or style.slant:
        mask = _shear(mask, baseline, style)
    if style.weight:
        mask = _weigh(mask, style)
    if style.outline:
        mask = np.asarray(cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, _disc(max(1, style.size // 24))), np.uint8)
    if style.dots:
        mask = _perforate(mask, style)
    if style.arch:
        mask, baseline = _bend(mask, baseline, style)
    return _trim(mask, baseline, text)


def _strike(text: str, style: Style, rng: Rng | None) -> tuple[Mask, int]:
    font, pad = _font(style.font, style.size), style.size // 2
    ascent, descent = font.getmetrics()
    advances = [font.getlength(char) + style.spacing * style.size for char in text]
    size = (int(sum(advances)) + 2 * pad + style.size, ascent + descent + 2 * pad)
    canvas = Image.new("L", size)
    pen, baseline = ImageDraw.Draw(canvas), ascent + pad
    if not style.spacing and not style.jitter:
        pen.text((pad, baseline), text, fill=255, font=font, anchor="ls")
        return np.asarray(canvas), baseline
    x = float(pad)
    for char, advance in zip(text, advances, strict=True):
        shift = rng.normal(0, style.jitter * style.size) if rng is not None and style.jitter else 0.0
        pen.text((round(x), round(baseline + shift)), char, fill=255, font=font, anchor="ls")
        x += advance
    return np.asarray(canvas), baseline


def _shear(mask: Mask, baseline: int, style: Style) -> Mask:
    height, width = mask.shape
    left = max(style.slant * (height - baseline), -style.slant * baseline)
    matrix = np.array([[style.stretch, -style.slant, style.slant * baseline + left], [0, 1, 0]], np.float32)
    size = (int(width * style.stretch + abs(style.slant) * height) + 2, height)
    return np.asarray(cv2.warpAffine(mask, matrix, size), np.uint8)


def _weigh(mask: Mask, style: Style) -> Mask:
    # A blur and a steep threshold move the contour by fractions of a pixel, as spreading ink does.
    reach = max(0.6, abs(style.weight) * style.size / (16 if style.weight > 0 else 28))
    soft = cv2.GaussianBlur(mask, (0, 0), reach).astype(np.float32)
    if style.weight < 0:
        soft *= 255 / max(1.0, float(soft.max()))  # else hairlines would vanish
    level = 127 - style.weight * (95 if style.weight > 0 else 45)
    return np.clip((soft - level) * (0.6 + 2.0 * reach) + 127, 0, 255).astype(np.uint8)


def _perforate(mask: Mask, style: Style) -> Mask:
    pitch = max(2.2, style.dots * style.size)
    wave_y = np.cos(np.arange(mask.shape[0]) * (2 * np.pi / pitch))[:, None]
    wave_x = np.cos(np.arange(mask.shape[1]) * (2 * np.pi / pitch))[None, :]
    grid = np.clip((wave_y + wave_x) * 0.8 + 0.65, 0.17, 1)
    return np.asarray(mask * grid, np.uint8)


def _bend(mask: Mask, baseline: int, style: Style) -> tuple[Mask, int]:
    reach = abs(style.arch) * style.size
    padded = cv2.copyMakeBorder(mask, int(reach) + 1, int(reach) + 1, 0, 0, cv2.BORDER_CONSTANT)
    height, width = padded.shape
    along = np.linspace(-1, 1, width, dtype=np.float32) ** 2
    rows = np.arange(height, dtype=np.float32)[:, None] - style.arch * style.size * along[None, :]
    columns = np.broadcast_to(np.arange(width, dtype=np.float32), (height, width))
    bent = cv2.remap(padded, np.ascontiguousarray(columns), rows, cv2.INTER_LINEAR)
    return np.asarray(bent, np.uint8), baseline + int(reach) + 1


def _trim(mask: Mask, baseline: int, text: str) -> Lettering:
    ink = mask > INK
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if not rows.size:
        raise ValueError(f"the text {text!r} left no ink")
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Lettering(np.ascontiguousarray(cut), baseline - int(rows[0]))


def _disc(radius: int) -> Mask:
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1)), np.uint8)


def lay(canvas: Picture, mask: Mask, x: int, y: int, paint: Paint) -> None:
    """Put ink on a canvas, in place; what lies outside the canvas is cut off.

    Args:
        canvas: [height, width, 3] BGR 0..255, or with a fourth channel that holds the coverage (0..255), in which
            case the colours are already multiplied by it.
        mask: [h, w] 0..255.
        x, y: where the upper left corner of the mask goes.
        paint: colours.
    """
    if paint.shadow is not None:
        _lay_shadow(canvas, mask, x, y, paint)
    ramp = np.linspace(0, 1, mask.shape[0], dtype=np.float32)[:, None, None]
    top, bottom = np.array((*paint.colour, 255), np.float32), np.array((*paint.end, 255), np.float32)
    _cover(canvas, mask.astype(np.float32) * (paint.opacity / 255), x, y, top + (bottom - top) * ramp)


def _lay_shadow(canvas: Picture, mask: Mask, x: int, y: int, paint: Paint) -> None:
    pad = paint.spread + int(2 * paint.soft) + 1
    wide = cv2.copyMakeBorder(mask, pad, pad, pad, pad, cv2.BORDER_CONSTANT)
    if paint.spread:
        wide = cv2.dilate(wide, _disc(paint.spread))
    if paint.soft:
        wide = cv2.GaussianBlur(wide, (0, 0), paint.soft)
    assert paint.shadow is not None
    colour = np.array((*paint.shadow, 255), np.float32)[None, None]
    alpha = np.asarray(wide, np.float32) * (paint.opacity / 255)
    _cover(canvas, alpha, x - pad + paint.offset[0], y - pad + paint.offset[1], colour)


def _cover(canvas: Picture, alpha: Picture, x: int, y: int, colour: Picture) -> None:
    height, width, channels = canvas.shape
    x0, y0, x1, y1 = max(0, x), max(0, y), min(width, x + alpha.shape[1]), min(height, y + alpha.shape[0])
    if x0 >= x1 or y0 >= y1:
        return
    part = alpha[y0 - y : y1 - y, x0 - x : x1 - x, None]
    rows = colour[y0 - y : y1 - y, :, :channels] if colour.shape[0] > 1 else colour[:, :, :channels]
    spot = canvas[y0:y1, x0:x1]
    spot += part * (rows - spot)
