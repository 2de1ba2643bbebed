"""What a camera adds to text: grounds to write on, light that falls on them, and the damage of optics,
sensor and compression.

Pictures are float32 [height, width, 3] BGR, 0..255, unless said otherwise; `amount` runs from 0 (none) to 1 (heavy).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt

from calib_data.wording import Rng

Picture = npt.NDArray[np.float32]
Field = npt.NDArray[np.float32]  # [height, width]
Photo = npt.NDArray[np.uint8]  # [height, width, 3] BGR
Colour = tuple[float, float, float]  # BGR, 0..255


def clouds(rng: Rng, height: int, width: int, cells: float, octaves: int = 3) -> Field:
    """Smooth noise, about -1..1.

    Args:
        cells: how many bumps fit along the longer side at the coarsest octave.
    """
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        scale = cells * 2**octave / max(height, width)
        rows, columns = (min(n, max(2, round(n * scale) + 1)) for n in (height, width))
        grid = rng.random((rows, columns), np.float32) * 2 - 1
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR) * 0.6**octave
    return total


def luma(colour: Colour) -> float:
    """Brightness of a colour, 0..255."""
    return 0.114 * colour[0] + 0.587 * colour[1] + 0.299 * colour[2]


def random_colour(rng: Rng, saturation: float, low: float = 0.0, high: float = 255.0) -> Colour:
    """A colour of any hue.

    Args:
        saturation: 0 gray .. 1 vivid; the drawn one is at most this.
        low, high: range of its strongest channel.
    """
    hue, value = rng.random() * 360, low + (high - low) * rng.random()
    chroma = saturation * float(rng.beta(1.2, 1.2))
    pixel = np.array([[[hue, chroma, value / 255]]], np.float32)
    blue, green, red = cv2.cvtColor(pixel, cv2.COLOR_HSV2BGR)[0, 0] * 255
    return float(blue), float(green), float(red)


def contrasting(rng: Rng, ground: Colour, contrast: float) -> Colour:
    """An ink that differs from the ground by about `contrast` levels of brightness, to whichever side has room."""
    level = luma(ground)
    up, down = 255 - level, level
    lighter = bool(rng.random() < (up**2) / (up**2 + down**2 + 1e-6))
    goal = min(255.0, level + contrast) if lighter else max(0.0, level - contrast)
    ink = random_colour(rng, 0.9 if rng.random() < 0.5 else 0.1, 120, 255)
    factor = goal / max(1.0, luma(ink))
    scaled = [min(255.0, channel * factor) for channel in ink]
    missing = goal - luma((scaled[0], scaled[1], scaled[2]))
    blue, green, red = (float(np.clip(channel + max(0.0, missing), 0, 255)) for channel in scaled)
    return blue, green, red


def _stripes(rng: Rng, height: int, width: int) -> Field:
    angle, period = rng.random() * np.pi, float(np.exp(rng.uniform(np.log(4), np.log(max(8, height)))))
    along = np.arange(width, dtype=np.float32) * np.cos(angle)
    down = np.arange(height, dtype=np.float32) * np.sin(angle)
    wave = np.sin((along[None, :] + down[:, None]) * (2 * np.pi / period))
    return np.clip(wave * rng.uniform(0.7, 6), -1, 1).astype(np.float32)


def _bricks(rng: Rng, height: int, width: int) -> Field:
    tall = max(4.0, height * rng.uniform(0.08, 0.5))
    long, joint = tall * rng.uniform(1, 3.2), max(1.0, tall * 0.1)
    rows, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    course = (rows / tall).astype(np.int32)
    place = (columns[None, :] + (course[:, None] % 2) * long / 2) / long
    number = place.astype(np.int32) + 7 * course[:, None]
    shade = rng.uniform(-0.4, 0.4, 256).astype(np.float32)[number % 256]
    gap = ((rows % tall) < joint)[:, None] | ((place % 1) * long < joint)
    return np.where(gap, np.float32(rng.choice((-1.0, 1.0))), shade).astype(np.float32)


def _wood(rng: Rng, height: int, width: int) -> Field:
    warp = clouds(rng, height, width, rng.uniform(1, 4), 2)
    rows = np.arange(height, dtype=np.float32)[:, None] / height
    return np.asarray(np.sin(rows * rng.uniform(15, 60) + warp * rng.uniform(1, 5)), np.float32)


def _pieces(rng: Rng, height: int, width: int) -> Field:
    # Edges of things: walls, shelves, people, leaves.
    field = np.zeros((height, width), np.float32)
    for _ in range(int(rng.integers(2, 14))):
        x, y = (float(v) for v in rng.random(2) * (width, height))
        reach = float(np.exp(rng.uniform(np.log(0.1), np.log(1.0)))) * max(height, width) * 0.25
        wide, tall = (float(v) for v in reach * rng.uniform(0.3, 2, 2))
        box, level, form = ((x, y), (wide, tall), float(rng.normal(0, 12))), float(rng.uniform(-1, 1)), rng.random()
        if form < 0.3:
            cv2.ellipse(field, box, (level,), -1, cv2.LINE_AA)
            continue
        ragged = rng.normal(0, reach, (int(rng.integers(3, 7)), 2)) + (x, y)
        _fill(field, cv2.boxPoints(box) if form < 0.8 else ragged, level)
    return field


def _fill(field: Field, corners: npt.NDArray[Any], level: float) -> None:
    """Fill the convex hull of the corners ([n, 2] x, y), in place."""
    hull = np.asarray(cv2.convexHull(corners.astype(np.int32)), np.int32)
    cv2.fillConvexPoly(field, hull, (level,), cv2.LINE_AA)


def _grid(rng: Rng, height: int, width: int) -> Field:
    # Windows of a house, goods on a shelf, tiles: regular like text, and not text.
    rows, columns = (int(n) for n in rng.integers(2, (14, 40)))
    cells = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
    fine = cv2.resize(cells, (columns * 8, rows * 8), interpolation=cv2.INTER_NEAREST)
    gap = int(rng.integers(1, 5))
    for k in range(gap):
        fine[k::8], fine[:, k::8] = 0, 0
    return np.asarray(cv2.resize(fine, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)


def _lights(rng: Rng, height: int, width: int) -> Field:
    field = np.zeros((height, width), np.float32)
    for _ in range(int(rng.integers(2, 18))):
        radius = max(1, int(min(height, width) * np.exp(rng.uniform(np.log(0.005), np.log(0.12)))))
        spot = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.circle(field, spot, radius, (float(rng.uniform(0.5, 2.5)),), -1, cv2.LINE_AA)
    haze = max(0.8, min(height, width) * rng.uniform(0.004, 0.03))
    return np.asarray(cv2.GaussianBlur(field, (0, 0), haze), np.float32)


def _smooth(rng: Rng, height: int, width: int) -> Field:
    return clouds(rng, height, width, rng.uniform(1, 5))


def _speckled(rng: Rng, height: int, width: int) -> Field:
    return clouds(rng, height, width, rng.uniform(20, 90), 2)


_TEXTURES: tuple[Callable[[Rng, int, int], Field], ...] = (
    _smooth, _smooth, _stripes, _bricks, _wood, _pieces, _pieces, _grid, _lights, _speckled,
)  # fmt: skip


def wall(rng: Rng, height: int, width: int, colour: Colour, busy: float) -> Picture:
    """A surface in the open: a colour with a gradient and one or two textures.

    Args:
        busy: 0 plain .. 1 as restless as foliage or a crowd.
    """
    tint = rng.normal(0, 12, 3).astype(np.float32) * busy
    picture = np.full((height, width, 3), colour, np.float32)
    picture += clouds(rng, height, width, 1.0, 1)[..., None] * np.float32(14 * rng.random())
    for _ in range(1 + int(rng.random() < busy)):
        texture = _TEXTURES[int(rng.integers(len(_TEXTURES)))](rng, height, width)
        depth = busy * rng.uniform(15, 70)
        picture += texture[..., None] * (depth + tint * rng.uniform(0, 3)).astype(np.float32)
    return np.clip(picture, 0, 255, out=picture)


def paper(rng: Rng, height: int, width: int, wear: float) -> Picture:
    """A sheet: nearly white or tinted, with fibres, folds and stains.

    Args:
        wear: 0 fresh .. 1 crumpled, stained, gray.
    """
    white = 255 - wear * rng.uniform(0, 70) - rng.uniform(0, 12)
    tint = rng.normal(0, 1, 3) * (10 * wear + 3 * rng.random())
    if rng.random() < 0.4:  # yellowed
        tint += np.array((-14.0, 0.0, 5.0)) * wear
    shade = clouds(rng, height, width, rng.uniform(1, 6), 2) * (9 * wear)
    for _ in range(rng.poisson(1.6 * wear)):
        shade += _fold(rng, height, width) * rng.uniform(6, 26)
    if rng.random() < 0.35 * wear:
        shade -= np.maximum(0, clouds(rng, height, width, rng.uniform(2, 7), 2) - 0.5) * rng.uniform(20, 70)
    picture = (white + tint).astype(np.float32) + shade[..., None]
    return cast(Picture, np.clip(picture, 0, 255, dtype=np.float32))


def _fold(rng: Rng, height: int, width: int) -> Field:
    angle, middle = rng.random() * np.pi, rng.random(2) * (width, height)
    along = (np.arange(width, dtype=np.float32) - middle[0]) * np.float32(np.cos(angle))
    down = (np.arange(height, dtype=np.float32) - middle[1]) * np.float32(np.sin(angle))
    distance = along[None, :] + down[:, None]
    reach = max(4.0, 0.12 * min(height, width))
    return np.asarray(np.sign(distance) * np.exp(-np.abs(distance) / reach), np.float32)


def scene(rng: Rng, height: int, width: int) -> Picture:
    """A place without text: planes of wall, floor and ceiling, things, lamps, lines."""
    half = (max(2, height // 2), max(2, width // 2))
    brightness = float(rng.beta(2, 2)) * 210 + 30
    picture = wall(rng, *half, random_colour(rng, 0.3, brightness * 0.6, brightness), 0.3 + 0.5 * rng.random())
    for _ in range(int(rng.integers(2, 9))):
        vivid = float(rng.choice((0.15, 0.3, 0.9), p=(0.45, 0.35, 0.2)))
        colour = random_colour(rng, vivid, 10, min(255.0, brightness * 1.6))
        patch = wall(rng, *half, colour, 0.6 * rng.random())
        stencil = np.clip(_pieces(rng, *half)[..., None] * 4, 0, 1)
        picture = picture + (patch - picture) * stencil if rng.random() < 0.4 else _plane(rng, picture, patch)
    if rng.random() < 0.05:  # at night most of the picture is black, and detectors answer to that
        picture = picture * np.float32(rng.uniform(0.2, 0.45))
    if rng.random() < 0.6:
        glow = np.array(random_colour(rng, 0.4, 180, 255), np.float32)
        picture = picture + _lights(rng, *half)[..., None] * glow * rng.uniform(0.3, 1.2)
    large = cv2.resize(np.clip(picture, 0, 255, dtype=np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    # Nothing real is perfectly flat, and a detector's neck answers to flat dark walls far too strongly.
    large = large + clouds(rng, height, width, max(height, width) / 3, 1)[..., None] * np.float32(rng.uniform(2, 8))
    large += clouds(rng, height, width, 12, 3)[..., None] * np.float32(rng.uniform(2, 8))
    _rule(rng, large)
    return cast(Picture, large)


def _plane(rng: Rng, picture: Picture, patch: Picture) -> Picture:
    height, width = picture.shape[:2]
    x, y = sorted(rng.integers(0, width, 2)), sorted(rng.integers(0, height, 2))
    skew = rng.integers(-height // 6, height // 6 + 1, 2)
    corners = np.array(((x[0], y[0]), (x[1], y[0] + skew[0]), (x[1], y[1] + skew[1]), (x[0], y[1])), np.float32)
    stencil = np.zeros((height, width), np.float32)
    _fill(stencil, corners, 1.0)
    return picture + (patch - picture) * stencil[..., None]


def _rule(rng: Rng, picture: Picture) -> None:
    # Sharp thin things: rails, cables, frames, tile joints.
    height, width = picture.shape[:2]
    for _ in range(int(rng.integers(0, 18))):
        start = (int(rng.integers(width)), int(rng.integers(height)))
        turn, reach = (
            rng.choice((0.0, np.pi / 2, rng.random() * np.pi)) + rng.normal(0, 0.05),
            width * rng.uniform(0.05, 0.6),
        )
        end = (int(start[0] + reach * np.cos(turn)), int(start[1] + reach * np.sin(turn)))
        cv2.line(picture, start, end, random_colour(rng, 0.5), int(rng.integers(1, 5)), cv2.LINE_AA)


def light(rng: Rng, picture: Picture, amount: float) -> Picture:
    """Uneven light: a gradient, a shadow's edge, a vignette, a highlight."""
    height, width = picture.shape[:2]
    small = (max(2, height // 4), max(2, width // 4))
    field = 1 + clouds(rng, *small, 1.0, 1) * 0.35 * amount
    if rng.random() < 0.3:
        field *= 1 - 0.5 * amount * rng.random() * (_fold(rng, *small) > 0)
    if rng.random() < 0.3:
        down, along = (np.linspace(-1, 1, n, dtype=np.float32) ** 2 for n in small)
        field *= 1 - 0.3 * amount * (down[:, None] + along[None, :])
    result = picture * cv2.resize(field.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)[..., None]
    if rng.random() < 0.3 * amount:
        result += _glare(rng, *small, (width, height))[..., None] * rng.uniform(40, 260)
    return cast(Picture, result.astype(np.float32))


def _glare(rng: Rng, height: int, width: int, size: tuple[int, int]) -> Field:
    middle, reach = rng.random(2) * (width, height), rng.uniform(0.08, 0.5, 2) * max(width, height)
    along = ((np.arange(width, dtype=np.float32) - middle[0]) / reach[0]) ** 2
    down = ((np.arange(height, dtype=np.float32) - middle[1]) / reach[1]) ** 2
    return np.asarray(cv2.resize(np.exp(-(along[None, :] + down[:, None])).astype(np.float32), size), np.float32)


def defocus(picture: Picture, radius: float) -> Picture:
    """Blur by a disc, as a lens out of focus does; `radius` in pixels, a fraction counts."""
    if radius < 0.3:
        return picture
    if radius < 1.5:
        return cast(Picture, cv2.GaussianBlur(picture, (0, 0), radius * 0.6))
    reach = int(np.ceil(radius))
    grid = np.arange(-reach, reach + 1, dtype=np.float32)
    kernel = np.clip(radius + 0.5 - np.hypot(grid[:, None], grid[None, :]), 0, 1)
    return cast(Picture, cv2.filter2D(picture, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT))


def shake(rng: Rng, picture: Picture, length: float) -> Picture:
    """Blur along a random direction, as a moving camera does; `length` in pixels."""
    if length < 1:
        return picture
    size = int(np.ceil(length)) | 1
    kernel = np.zeros((size, size), np.float32)
    turn = rng.random() * np.pi
    reach = np.array((np.cos(turn), np.sin(turn))) * length / 2
    middle = size // 2
    ends = [(round(float(middle + s * reach[0])), round(float(middle + s * reach[1]))) for s in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], (1.0,), 1, cv2.LINE_AA)
    return cast(Picture, cv2.filter2D(picture, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT))


def coarsen(rng: Rng, picture: Picture, factor: float) -> Picture:
    """Make the picture `factor` times smaller and enlarge it again, as digital zoom and thumbnails do."""
    height, width = picture.shape[:2]
    size = (max(4, round(width / factor)), max(4, round(height / factor)))
    down = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_NEAREST)[int(rng.choice(3, p=(0.6, 0.3, 0.1)))]
    up = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_NEAREST)[int(rng.choice(3, p=(0.5, 0.35, 0.15)))]
    return cast(Picture, cv2.resize(cv2.resize(picture, size, interpolation=down), (width, height), interpolation=up))


def sharpen(picture: Picture, amount: float, radius: float) -> Picture:
    """Overshoot at edges, as camera firmware and scanners add it."""
    return cast(Picture, picture + (picture - cv2.GaussianBlur(picture, (0, 0), radius)) * amount)


def expose(rng: Rng, picture: Picture, amount: float) -> Picture:
    """Exposure, gamma, haze and colour cast of one shot."""
    unit = np.clip(picture, 0, 255) / np.float32(255)
    gamma = np.float32(np.exp(rng.normal(0, 0.35) * amount))
    cast_ = np.exp(rng.normal(0, 0.08, 3) * amount).astype(np.float32)
    gain = np.float32(np.exp(rng.normal(-0.12, 0.4) * amount))
    haze = np.float32(max(0.0, rng.normal(0, 0.1)) * amount)
    return cast(Picture, ((unit**gamma * gain * (1 - haze) + haze) * cast_ * np.float32(255)).astype(np.float32))


def sensor(rng: Rng, picture: Picture, amount: float) -> Picture:
    """Noise of the sensor: brighter pixels are noisier, colour noise is weaker and coarser."""
    height, width = picture.shape[:2]
    grain = rng.standard_normal((height, width), np.float32)
    coarse = rng.standard_normal((height // 3 + 1, width // 3 + 1, 3), np.float32)
    colour = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    grain *= np.float32(amount) * (6 + np.float32(0.05) * cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY))
    noisy = np.asarray(cv2.scaleAdd(colour, 3.5 * amount, picture), np.float32)
    noisy += grain[..., None]
    return noisy


def develop(picture: Picture) -> Photo:
    """To eight bits, clipped."""
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
