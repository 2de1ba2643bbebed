"""Labelled layouts: regions of pages in COCO's JSON, and what they mean in the words of a model.

Sets name other classes than the models. So each registered set declares, for each of its classes, which classes of the
model count as it; the first of them names the class that is judged, so that sets can be pooled. What a set labels but
no model knows is not judged, and neither are detections of classes that a set does not label.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant.document import MOST_JSON, parse_json, read_bounded
from quant.errors import InputError

Rectangle = tuple[float, float, float, float]
"""x and y of the upper left corner, width, height, in pixels."""


class BrokenLayout(Exception):
    """Why the labels of a page cannot be used."""


@dataclass(frozen=True)
class LayoutRegion:
    """A labelled region.

    Attributes:
        name: its class, None where nothing is to be judged.
        crowd: several things in one box; detections there are not judged.
    """

    box: Rectangle
    name: str | None
    crowd: bool = False


@dataclass(frozen=True)
class Layout:
    """The labelled regions of a page.

    Attributes:
        counted_as: pairs of a class of the model and the labelled class that it counts as; empty until `in_words_of`.
    """

    regions: tuple[LayoutRegion, ...]
    counted_as: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LayoutFile:
    """What a COCO file says.

    Attributes:
        classes: names of its categories, in the order of the file.
        pages: path of each picture and its layout, or why there is none.
    """

    classes: tuple[str, ...]
    pages: tuple[tuple[str, Layout | BrokenLayout], ...]


def read_layouts(path: Path) -> LayoutFile:
    """Read `instances.json` or the like.

    Raises:
        InputError: it is no COCO file, or lists no picture.
    """
    try:
        document = parse_json(read_bounded(path, MOST_JSON).decode("utf-8-sig"))
        categories = {entry["id"]: str(entry["name"]) for entry in document["categories"]}
        images = {entry["id"]: str(entry["file_name"]) for entry in document["images"]}
        boxes: dict[Any, list[Any]] = {number: [] for number in images}
        for entry in document["annotations"]:
            boxes[entry["image_id"]].append(entry)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError) as error:
        what = " ".join(str(error).split())
        raise InputError(f"{path} is no COCO file ({what}): it needs images, annotations and categories") from error
    if not images:
        raise InputError(f"{path} lists no pictures")
    pages = tuple((name, _layout(boxes[number], categories)) for number, name in images.items())
    return LayoutFile(tuple(dict.fromkeys(categories.values())), pages)


@dataclass(frozen=True)
class Words:
    """A translation of labels.

    Attributes:
        names: the set's classes and the classes that are judged.
        counted_as: see `Layout`.
        unjudged: classes of the set that the model has no class for.
    """

    names: Mapping[str, str]
    counted_as: tuple[tuple[str, str], ...]
    unjudged: tuple[str, ...]

    def translated(self, layout: Layout) -> Layout:
        regions = (replace(region, name=self.names.get(region.name or "")) for region in layout.regions)
        return Layout(tuple(regions), self.counted_as)


def in_words_of(labels: Sequence[str], classes: Sequence[str], mapping: Mapping[str, Sequence[str]]) -> Words:
    """How to translate the labels of a set for a model.

    Args:
        labels: the model's classes.
        classes: the set's classes.
        mapping: which of the model's classes count as a class of the set; empty: classes of equal names.

    Raises:
        InputError: the mapping names a class that the model does not know, or no class is shared.
    """
    known = mapping or {name: [name] for name in classes if name in labels}
    if unknown := sorted({own for group in known.values() for own in group} - set(labels)):
        raise InputError(f"its mapping names classes that the model does not know: {', '.join(unknown)}")
    names = {name: group[0] for name, group in known.items() if group and name in classes}
    if not names:
        raise InputError(f"it labels {', '.join(classes)}, and the model knows none of them")
    counted = tuple(dict.fromkeys((own, group[0]) for name, group in known.items() if name in names for own in group))
    return Words(names, counted, tuple(name for name in classes if name not in names))


def _layout(entries: Sequence[Any], categories: Mapping[Any, str]) -> Layout | BrokenLayout:
    try:
        return Layout(tuple(_regions(entries, categories)))
    except BrokenLayout as error:
        return error


def _regions(entries: Sequence[Any], categories: Mapping[Any, str]) -> Iterator[LayoutRegion]:
    for entry in entries:
        try:
            x, y, width, height = (float(number) for number in entry["bbox"])
            name = categories[entry["category_id"]]
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise BrokenLayout("an annotation lacks 'bbox' as [x, y, width, height] or a known category") from error
        if not (all(map(math.isfinite, (x, y, width, height))) and width > 0 and height > 0):
            raise BrokenLayout(f"a box has no area: {entry['bbox']}")
        yield LayoutRegion((x, y, width, height), name, bool(entry.get("iscrowd", 0)))
