"""Narrow worlds for small networks: short codes on one line, and small notes of a few ragged lines.

Everything that makes text hard to read is left out or mild, so that a network learns such a world in minutes; what a
sample shows follows from its generator alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calib_data import photography, wording
from calib_data.lettering import Fonts, Paint, Style, draw, drawable, lay
from calib_data.photography import Colour, Photo, Picture
from calib_data.wording import Rng

CODE_LETTERS = "0123456789ABCDEF"
"""Hexadecimal digits: few and unlike one another, so that a small network tells them apart after minutes."""

_SHORTEST, _LONGEST = 3, 6
_FONTS = 4


@dataclass(frozen=True)
class Spot:
    """One text of a note: what it says, and its upright box in pixels of the picture, with a little air."""

    text: str
    x: float
    y: float
    width: float
    height: float


def code_line(rng: Rng, fonts: Fonts) -> tuple[Photo, str]:
    """A cropped line of 3 to 6 of `CODE_LETTERS`, about 40 pixels high, and what it says."""
    text = "".join(rng.choice(list(CODE_LETTERS), int(rng.integers(_SHORTEST, _LONGEST + 1))))
    style = Style(
        _font(rng, fonts),
        int(rng.integers(32, 41)),
        float(rng.uniform(0.85, 1.1)),
        weight=float(rng.uniform(-0.2, 0.4)),
    )
    mask = draw(text, style).mask
    margins = rng.integers(3, 8, 4)
    height, width = mask.shape[0] + int(margins[0] + margins[1]), mask.shape[1] + int(margins[2] + margins[3])
    canvas, ink = _ground(rng, height, width)
    lay(canvas, mask, int(margins[2]), int(margins[0]), Paint(ink, ink))
    return _photographed(rng, canvas), text


def note(rng: Rng, fonts: Fonts) -> tuple[Photo, list[Spot]]:
    """A note of 256 to 384 pixels a side with 3 to 9 lines, flush left and ragged right, and where they stand."""
    height, width = (32 * int(rng.integers(8, 13)) for _ in range(2))
    canvas, ink = _ground(rng, height, width)
    size = int(rng.integers(16, 29))
    style = Style(_font(rng, fonts), size, float(rng.uniform(0.85, 1.1)), weight=float(rng.uniform(-0.2, 0.4)))
    left, y = int(rng.uniform(0.04, 0.12) * width), size * rng.uniform(0.5, 1.2)
    pitch, spots = size * rng.uniform(1.5, 2.2), list[Spot]()
    while y + 1.3 * size < height and len(spots) < 9:
        text = _fitted(rng, style, width - left - size)
        lettering = draw(text, style)
        top = int(y + size) - lettering.baseline
        lay(canvas, lettering.mask, left, top, Paint(ink, ink))
        tall, wide = lettering.mask.shape
        spots.append(Spot(text, left - 2, top - 2, wide + 4, tall + 4))
        y += pitch * (1 if rng.random() < 0.8 else 1.6)
    return _photographed(rng, canvas), spots


def _font(rng: Rng, fonts: Fonts) -> Path:
    """One of a few, spread over the fonts at hand."""
    step = max(1, len(fonts.latin) // _FONTS)
    family = fonts.latin[::step][:_FONTS]
    return family[int(rng.integers(len(family)))]


def _ground(rng: Rng, height: int, width: int) -> tuple[Picture, Colour]:
    """Paper or a plain coloured wall, and ink that can be told from it."""
    if rng.random() < 0.5:
        canvas = photography.paper(rng, height, width, 0.3 * float(rng.random()))
        return canvas, photography.contrasting(rng, (245.0, 245.0, 245.0), float(rng.uniform(120, 220)))
    ground = photography.random_colour(rng, 0.6, 20, 245)
    canvas = photography.wall(rng, height, width, ground, 0.15 * float(rng.random()))
    return canvas, photography.contrasting(rng, ground, float(rng.uniform(110, 200)))


def _fitted(rng: Rng, style: Style, most: int) -> str:
    """Words of a length between a fourth and all of `most` pixels."""
    text = drawable(wording.document_text(rng, 24), style.font) or "2024"
    wanted = rng.uniform(0.25, 1) * most
    wide = draw(text, style).mask.shape[1]
    return text[: max(3, int(len(text) * min(1.0, wanted / wide)))].strip()


def _photographed(rng: Rng, canvas: Picture) -> Photo:
    """Mild light, blur and noise."""
    hardness = 0.5 * float(rng.random())
    picture = photography.light(rng, canvas, hardness)
    picture = photography.defocus(picture, 1.2 * hardness)
    return photography.develop(photography.sensor(rng, np.asarray(picture, np.float32), 0.3 * hardness))
