"""Charts of a report as SVG that takes its colours from the page, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from quant.histograms import RangeChart

_WIDTH, _HEIGHT, _MARGIN = 460, 260, 44
_BARS_WIDTH, _BARS_HEIGHT = 256, 72


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot.

    Attributes:
        bound: of y; a line leads there.
        front: no other point is better on both axes.
        chosen: it is marked, and its name stands beside it.
    """

    x: float
    y: float
    name: str
    bound: float | None = None
    front: bool = False
    chosen: bool = False


def scatter(dots: Sequence[Dot], x_title: str, y_title: str, limit: float | None = None) -> Markup:
    """Points, those of the front joined; `limit` is a line that y must stay below. Everything lies inside the axes."""
    heights = [*(dot.y for dot in dots), *(dot.bound for dot in dots), limit]
    left, right = _span([dot.x for dot in dots])
    low, high = _span([height for height in heights if height is not None])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left) * (_WIDTH - 2 * _MARGIN)
        up = (y - low) / (high - low) * (_HEIGHT - 2 * _MARGIN)
        return round(_MARGIN + across, 1), round(_HEIGHT - _MARGIN - up, 1)

    parts = [_axes(left, right, low, high, x_title, y_title)]
    if limit is not None:
        _, y = place(left, limit)
        line = '<path class="limit" d="M{} {}H{}"/><text class="limit" x="{}" y="{}">gate {:g}</text>'
        parts.append(Markup(line).format(_MARGIN, y, _WIDTH - _MARGIN, _MARGIN + 4, y - 4, limit))
    joined = [place(dot.x, dot.y) for dot in sorted(dots, key=lambda dot: dot.x) if dot.front]
    if len(joined) > 1:
        parts.append(Markup('<path class="front" d="M{}"/>').format("L".join(f"{x} {y}" for x, y in joined)))
    parts += [_whisker(place(dot.x, dot.y), place(dot.x, dot.bound)) for dot in dots if dot.bound is not None]
    parts += [_dot(dot, *place(dot.x, dot.y)) for dot in dots]
    return _svg(_WIDTH, _HEIGHT, f"{y_title} over {x_title}", parts)


def histogram(chart: RangeChart) -> Markup:
    """How many values fell into each bin, on a logarithmic scale; what is clipped is marked, the range is shaded.

    The axis holds the values and the range, of which either may reach farther.
    """
    left, right = min(chart.minimum, chart.low), max(chart.maximum, chart.high)
    scale = _BARS_WIDTH / ((right - left) or 1.0)
    most, count = math.log1p(max(chart.counts, default=0)) or 1.0, max(len(chart.counts), 1)
    first, width = (chart.minimum - left) * scale, (chart.maximum - chart.minimum) / count * scale
    start, end = (chart.low - left) * scale, (chart.high - left) * scale
    shade = '<rect class="range" x="{}" y="0" width="{}" height="{}"/>'
    parts = [Markup(shade).format(round(start, 1), round(end - start, 1), _BARS_HEIGHT)]
    drawn = max(0.75 * width, 1.0)
    for index, number in enumerate(chart.counts):
        height = round(math.log1p(number) / most * _BARS_HEIGHT, 1)
        x, center = min(first + index * width, _BARS_WIDTH - drawn), first + (index + 0.5) * width
        name = "bar" if start <= center <= end else "bar clipped"
        bar = '<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>'
        parts.append(Markup(bar).format(name, round(x, 1), round(_BARS_HEIGHT - height, 1), round(drawn, 1), height))
    return _svg(_BARS_WIDTH, _BARS_HEIGHT, f"values of {chart.tensor}", parts)


def _svg(width: int, height: int, title: str, parts: Sequence[Markup]) -> Markup:
    head = '<svg viewBox="0 0 {} {}" role="img" class="chart"><title>{}</title>'
    return Markup(head).format(width, height, title) + Markup("").join(parts) + Markup("</svg>")


def _axes(left: float, right: float, low: float, high: float, x_title: str, y_title: str) -> Markup:
    bottom, end = _HEIGHT - _MARGIN, _WIDTH - _MARGIN
    frame = Markup('<path class="axis" d="M{0} {0}V{1}H{2}"/>').format(_MARGIN, bottom, end)
    text = Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format
    ends = [
        text(_MARGIN, bottom + 16, "middle", f"{left:.3g}"),
        text(end, bottom + 16, "middle", f"{right:.3g}"),
        text(_MARGIN - 6, bottom, "end", f"{low:.3g}"),
        text(_MARGIN - 6, _MARGIN + 4, "end", f"{high:.3g}"),
    ]
    titles = [text(_WIDTH / 2, _HEIGHT - 8, "middle", x_title), text(_MARGIN - 30, _MARGIN - 16, "start", y_title)]
    return frame + Markup("").join([*ends, *titles])


def _whisker(point: tuple[float, float], end: tuple[float, float]) -> Markup:
    """A line from a point to its bound, with a cap."""
    x, y = end
    return Markup('<path class="bound" d="M{} {}V{}M{} {}H{}"/>').format(x, point[1], y, x - 4, y, x + 4)


def _dot(dot: Dot, x: float, y: float) -> Markup:
    name = " ".join(word for word, said in (("dot", True), ("best", dot.front), ("chosen", dot.chosen)) if said)
    circle = '<circle class="{}" cx="{}" cy="{}" r="{}"><title>{}: {:.3g}, {:.3g}{}</title></circle>'
    bound = "" if dot.bound is None else f", at most {dot.bound:.3g}"
    drawn = Markup(circle).format(name, x, y, 6 if dot.chosen else 4, dot.name, dot.x, dot.y, bound)
    if not dot.chosen:
        return drawn
    side, shift = ("end", -9) if x > _WIDTH / 2 else ("start", 9)
    label = Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>')
    return drawn + label.format(x + shift, y - 6, side, dot.name)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """A little more than the values take, never nothing."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
    return low - margin, high + margin
