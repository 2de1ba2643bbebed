"""Tables: how much of the true structure was found.

TEDS is the tree-edit-distance-based similarity of Zhong et al. (2020, "Image-based table recognition: data, model,
and evaluation"): 1 - distance / nodes of the larger tree, by the package table-recognition-metric. `thead` and `tbody`
are taken out on both sides first, as PaddleOCR's accuracy does: many public sets do not mark them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

import numpy as np

from eval.metric import FloatArray, MeanScore

_GROUPS = ("thead", "tbody")
_STRUCTURE = re.compile(r"</?(?:tr|td)\b[^>]*>")
_SPAN = re.compile(r'(colspan|rowspan)="(\d{1,4})"')
_CELL = re.compile(r"(<td\b[^>]*>)(.*?)</td>", re.DOTALL)


class HasHtml(Protocol):
    @property
    def html(self) -> str: ...


class TedsStruct(MeanScore):
    """Mean TEDS of the structure alone: rows, cells and spans, without the text in the cells.

    Counts: TEDS of the structure; structure exactly right (0 or 1); TEDS with text; 1. A model that finds the
    structure reads no text, so the k-th cell found is given the text of the k-th labelled one: what a perfect
    reader would make of the structure, as far as it keeps the order of reading.
    """

    name = "teds_struct"
    scores = ("teds_struct", "exact_structure", "teds")

    def score(self, prediction: HasHtml, label: str) -> FloatArray:
        return np.array(_scores(prediction.html, label))


# FP32 and INT8 mostly agree, and every plan of a search is judged on the same tables.
@lru_cache(maxsize=4096)
def _scores(found: str, label: str) -> tuple[float, float, float, float]:
    exact = canonical_structure(found) == canonical_structure(label)
    if exact:
        return 1.0, 1.0, 1.0, 1.0
    return teds(found, label, structure_only=True), 0.0, teds(with_texts(found, label), label), 1.0


def teds(found: str, label: str, *, structure_only: bool = False) -> float:
    """Similarity 0..1 of two tables in HTML, each `<html><body><table>...`; 0 where one is no table."""
    from table_recognition_metric import TEDS

    return float(TEDS(structure_only=structure_only, ignore_nodes=_GROUPS)(found, label))


def canonical_structure(html: str) -> str:
    """Rows, cells and spans in one way of writing: spans of 1 left out, the others in the order of their names."""
    return "".join(_canonical_tag(match[0]) for match in _STRUCTURE.finditer(html))


def _canonical_tag(tag: str) -> str:
    if not tag.startswith("<td"):
        return "<tr>" if tag.startswith("<tr") else tag
    spans = sorted((name, int(number)) for name, number in _SPAN.findall(tag))
    return "<td" + "".join(f" {name}={number}" for name, number in spans if number != 1) + ">"


def with_texts(found: str, label: str) -> str:
    """A table without text, filled with the texts of another one, cell by cell."""
    texts: Iterator[str] = (match[2] for match in _CELL.finditer(label))
    return _CELL.sub(lambda match: f"{match[1]}{next(texts, '')}</td>", found)
