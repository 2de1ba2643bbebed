"""Pictures of formulas and their LaTeX: random expressions in the part of LaTeX that matplotlib's mathtext draws.

Letters, commands and structures are joined by chance, as a grammar allows it: fractions, roots, powers, indices, sums,
integrals, functions, brackets, accents, relations. Nothing is quoted from anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from calib_data import photography
from calib_data.lettering import Mask, Paint, lay
from calib_data.photography import Picture
from calib_data.wording import Rng

_LATIN = tuple("abcdefghijkmnpqrstuvwxyz") + tuple("ABCDEFGHLMNPRSTVWX")
_GREEK = (
    r"\alpha", r"\beta", r"\gamma", r"\delta", r"\epsilon", r"\theta", r"\lambda", r"\mu", r"\nu", r"\pi", r"\rho",
    r"\sigma", r"\tau", r"\phi", r"\omega", r"\Gamma", r"\Delta", r"\Omega",
)  # fmt: skip
_RELATIONS = ("=", "=", "=", r"\leq", r"\geq", r"\neq", r"\approx", r"\in", "<", ">", r"\equiv", r"\rightarrow")
_SIGNS = ("+", "+", "-", "-", r"\cdot", r"\times", r"\pm")
_FUNCTIONS = (r"\sin", r"\cos", r"\exp", r"\log", r"\ln", r"\tan")
_ACCENTS = (r"\hat", r"\bar", r"\tilde", r"\vec", r"\dot")
_FONTSETS = ("cm", "cm", "stix", "dejavuserif", "dejavusans")


@dataclass(frozen=True)
class FormulaWorld:
    """Which formulas are drawn.

    Args:
        letters, relations, signs: what they are made of.
        largest: number, from 1 on.
        structures: kinds of parts: any of `power`, `index`, `fraction`, `root`, `sum`, `integral`, `function`,
            `bracket`, `accent`.
        depth: how deep parts may stand inside each other.
        terms: fewest and most terms on a side.
        relation: share of formulas with two sides.
        fonts: mathtext's sets of fonts.
        sizes: smallest and largest size of the letters, in pixels.
    """

    letters: tuple[str, ...] = _LATIN + _GREEK
    relations: tuple[str, ...] = _RELATIONS
    signs: tuple[str, ...] = _SIGNS
    largest: int = 9
    structures: tuple[str, ...] = (
        "power", "index", "fraction", "root", "sum", "integral", "function", "bracket", "accent",
    )  # fmt: skip
    depth: int = 2
    terms: tuple[int, int] = (1, 3)
    relation: float = 0.75
    fonts: tuple[str, ...] = _FONTSETS
    sizes: tuple[int, int] = (18, 44)


def formula(rng: Rng, world: FormulaWorld) -> tuple[Picture, str]:
    """A formula's picture, dark on paper before any damage, and its LaTeX."""
    latex = _side(rng, world, world.depth)
    if rng.random() < world.relation:
        latex += f" {_one(rng, world.relations)} {_side(rng, world, world.depth)}"
    mask = mathtext_mask(latex, _one(rng, world.fonts), int(rng.integers(world.sizes[0], world.sizes[1] + 1)))
    margin = int(rng.integers(3, 24))
    height, width = mask.shape
    picture = photography.paper(rng, height + 2 * margin, width + 2 * margin, 0.3 * float(rng.random()))
    ink = photography.contrasting(rng, (250.0, 250.0, 250.0), float(rng.uniform(150, 250)))
    lay(picture, mask, margin, margin, Paint(ink, ink))
    return picture, latex


def mathtext_mask(latex: str, fonts: str, size: int) -> Mask:
    """A formula drawn by mathtext, [height, width], 0 ground .. 255 ink.

    Args:
        fonts: mathtext's name of a set of fonts, such as `cm`.
        size: of the letters in pixels.
    """
    from matplotlib.font_manager import FontProperties

    properties = FontProperties(size=size, math_fontfamily=fonts)
    drawn = _parser().parse(f"${latex}$", dpi=72, prop=properties)  # at 72 dpi a point is a pixel
    return np.ascontiguousarray(np.asarray(drawn.image, np.uint8))


@cache
def _parser() -> Any:
    from matplotlib.mathtext import MathTextParser

    return MathTextParser("agg")


def _one(rng: Rng, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _side(rng: Rng, world: FormulaWorld, depth: int) -> str:
    terms = [_term(rng, world, depth) for _ in range(int(rng.integers(world.terms[0], world.terms[1] + 1)))]
    signs = [f" {_one(rng, world.signs)} " for _ in terms[1:]]
    return terms[0] + "".join(sign + term for sign, term in zip(signs, terms[1:], strict=True))


def _term(rng: Rng, world: FormulaWorld, depth: int) -> str:
    if not depth or not world.structures or rng.random() < 0.35:
        return _atom(rng, world)
    return _structure(rng, world, _one(rng, world.structures), depth - 1)


def _atom(rng: Rng, world: FormulaWorld) -> str:
    if rng.random() < 0.25:
        return str(int(rng.integers(1, world.largest + 1)))
    return _one(rng, world.letters)


def _structure(rng: Rng, world: FormulaWorld, kind: str, depth: int) -> str:
    if kind == "power":
        return f"{_one(rng, world.letters)}^{{{_term(rng, world, min(depth, 1))}}}"
    if kind == "index":
        return f"{_one(rng, world.letters)}_{{{_atom(rng, world)}}}"
    if kind == "fraction":
        return rf"\frac{{{_side(rng, world, depth)}}}{{{_side(rng, world, depth)}}}"
    if kind == "root":
        return rf"\sqrt{{{_side(rng, world, depth)}}}"
    if kind == "sum":
        index = _one(rng, ("i", "j", "k", "n"))
        return (
            rf"\sum_{{{index} = {int(rng.integers(0, 2))}}}^{{{_one(rng, world.letters)}}} {_term(rng, world, depth)}"
        )
    if kind == "integral":
        variable = _one(rng, ("x", "t", "u"))
        return rf"\int_{{{_atom(rng, world)}}}^{{{_atom(rng, world)}}} {_term(rng, world, depth)} d {variable}"
    if kind == "function":
        return rf"{_one(rng, _FUNCTIONS)} {_one(rng, world.letters)}"
    if kind == "bracket":
        return rf"\left( {_side(rng, world, depth)} \right)"
    return rf"{_one(rng, _ACCENTS)}{{{_one(rng, world.letters)}}}"
