"""Labelled pictures: read from a folder, told apart by their content, split without overlap."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from calib_data.registry import DatasetFolder, LabelFormat, example_of
from eval.layouts import BrokenLayout, Layout, in_words_of, read_layouts
from quant.document import parse_json
from quant.errors import InputError
from quant.recipe import Angle, Rotations, Splits

if TYPE_CHECKING:
    import numpy as np

IGNORE = "###"
"""The text of a box that does not count: a detection there is neither right nor wrong."""

Split = Literal["calibration", "search", "report"]
SPLITS: tuple[Split, ...] = ("calibration", "search", "report")


_TABLE = re.compile(r"<table\b.*</table>", re.DOTALL)
_CELL_START = re.compile(r"<t[dh]\b[^>]*>")
_SPAN = re.compile(r"""(rowspan|colspan)\s*=\s*["']?(\d{1,4})""")


_MOST_PIXELS = 178_956_970
"""Of a picture; Pillow warns beyond."""

_MOST_DIGITS = 6
"""Of the index of a class; Python refuses to read numbers of thousands of digits."""


class BrokenPicture(InputError):
    """A picture that cannot be read: callers leave it out and count it."""


class _BrokenLine(Exception):
    """Why a line of a label file is left out."""


@dataclass(frozen=True)
class Box:
    """A text region: its corners, and its text or `IGNORE`."""

    points: tuple[tuple[float, float], ...]
    text: str


Label = str | tuple[Box, ...] | int | Layout


@dataclass(frozen=True)
class Sample:
    """A labelled picture.

    Attributes:
        id: first 16 hex digits of the sha256 of the picture file; `-180` and the like is added for a turned one.
        dataset: name of the set it is from.
        image: the picture file.
        label: text of a line, LaTeX of a formula, HTML of a table, boxes or layout of a page, or index of a class.
        turn: by how many degrees the picture in the file is to be turned clockwise.
    """

    id: str
    dataset: str
    image: Path
    label: Label
    turn: Angle = 0

    @property
    def picture(self) -> str:
        """What all rotations of one picture share: it decides the split, so that none is seen in another one."""
        return picture_of(self.id)


def picture_of(sample_id: str) -> str:
    """The id of the picture file that a sample is made from."""
    return sample_id.partition("-")[0]


@dataclass(frozen=True)
class Dataset:
    """The samples of a set, and what had to be left out.

    Attributes:
        folder: where it was read from.
        samples: in the order of the label files; of equal pictures only the first.
        broken: one sentence for each label line that was left out.
        duplicates: how many equal pictures were left out.
    """

    folder: DatasetFolder
    samples: tuple[Sample, ...]
    broken: tuple[str, ...]
    duplicates: int


def read_dataset(folder: DatasetFolder) -> Dataset:
    """Read the label files of a set and look at the head of every picture.

    Raises:
        InputError: a label file is missing, empty or not text, or more than half of its lines are broken.
    """
    samples: dict[str, Sample] = {}
    broken: list[str] = []
    lines = [line for path in folder.label_files for line in _labelled_lines(folder, path)]
    duplicates = 0
    for place, content in lines:
        try:
            sample = _sample(folder, content)
        except _BrokenLine as error:
            broken.append(f"{place}: {error}")
            continue
        duplicates += sample.id in samples
        samples.setdefault(sample.id, sample)
    if len(broken) * 2 > len(lines):
        count = f"{len(broken)} of {len(lines)} lines are broken"
        raise InputError(f"{count} in the data set {folder.name}, first {broken[0]}. {_expectation(folder.format)}")
    return Dataset(folder, tuple(samples.values()), tuple(broken), duplicates)


def turned(dataset: Dataset, rotations: Rotations) -> Dataset:
    """Labelled pictures for a classifier of orientation, from upright ones: one sample for every angle.

    Pictures narrower than `rotations.min_aspect` are left out, and counted in the words on the source.

    Raises:
        InputError: no picture is left.
    """
    wide = [sample for sample in dataset.samples if _aspect(sample) >= rotations.min_aspect]
    if not wide:
        why = f"none of its {len(dataset.samples)} pictures is {rotations.min_aspect:g} times as wide as high"
        raise InputError(f"the data set {dataset.folder.name} has no picture to turn: {why}; give another with --data")
    samples = tuple(
        replace(sample, id=f"{sample.id}-{angle}" if angle else sample.id, label=index, turn=angle)
        for sample in wide
        for index, angle in enumerate(rotations.angles)
    )
    source = f"{dataset.folder.source}, turned by {', '.join(map(str, rotations.angles))} degrees"
    if narrow := len(dataset.samples) - len(wide):
        source += f"; left out as narrower than {rotations.min_aspect:g} times their height: {narrow}"
    return replace(dataset, folder=replace(dataset.folder, source=source), samples=samples)


def in_model_words(dataset: Dataset, labels: Sequence[str]) -> Dataset:
    """Layouts in the classes of a model; what is not judged is named in the words on the source.

    Raises:
        InputError: the set and the model share no class, or the set's mapping is of another model.
    """
    folder = dataset.folder
    classes = dict.fromkeys(name for path in folder.label_files for name in read_layouts(path).classes)
    try:
        words = in_words_of(labels, list(classes), folder.mapping)
    except InputError as error:
        raise InputError(f"the data set {folder.name}: {error}; give another with --data") from error
    samples = [replace(s, label=words.translated(s.label)) for s in dataset.samples if isinstance(s.label, Layout)]
    source = folder.source + (f"; not judged: {', '.join(words.unjudged)}" if words.unjudged else "")
    return replace(dataset, folder=replace(folder, source=source), samples=tuple(samples))


def picture_size(sample: Sample) -> tuple[int, int]:
    """Width and height of the picture that `read_sample` gives, from the head of the file alone."""
    from PIL import ExifTags, Image

    with Image.open(sample.image) as picture:
        width, height = picture.size
        lies = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if lies != (sample.turn in (90, 270)) else (width, height)


def _aspect(sample: Sample) -> float:
    width, height = picture_size(sample)
    return width / height


_Page = tuple[str, Layout | BrokenLayout]


def _labelled_lines(folder: DatasetFolder, path: Path) -> list[tuple[str, str | _Page]]:
    """What a label file says of each picture, and where it says it."""
    if folder.format == "coco":
        return [(f"{path} picture {page[0]}", page) for page in read_layouts(path).pages]
    lines = _lines(path, folder.format)
    names = _names(folder, path, lines) if folder.format == "latex_lines" else [""] * len(lines)
    return [(f"{path} line {number}", f"{name}{text}") for name, (number, text) in zip(names, lines, strict=True)]


def _names(folder: DatasetFolder, path: Path, lines: list[tuple[int, str]]) -> list[str]:
    """What stands before the tab where the lines themselves name no picture: line k is of the k-th picture."""
    pictures = sorted(picture.name for picture in (folder.images / path.stem).glob("*.*"))
    if len(pictures) != lines[-1][0]:
        where = folder.images / path.stem
        raise InputError(f"{path} has {lines[-1][0]} formulas for the {len(pictures)} pictures in {where}")
    return [f"{path.stem}/{pictures[number - 1]}\t" for number, _ in lines]


def _lines(path: Path, label_format: LabelFormat) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{path} cannot be read: {why}. {_expectation(label_format)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text (byte {error.start}). {_expectation(label_format)}") from error
    # Not splitlines(): a text may hold characters that it splits at.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise InputError(f"{path} is empty. {_expectation(label_format)}")
    return lines


def _expectation(label_format: LabelFormat) -> str:
    return f"Expected {example_of(label_format)}"


def _sample(folder: DatasetFolder, content: str | _Page) -> Sample:
    name, label = _parsed(folder, content)
    image = folder.images / _relative(name)
    return Sample(_content_id(image, name), folder.name, image, label)


def _parsed(folder: DatasetFolder, content: str | _Page) -> tuple[str, Label]:
    if isinstance(content, str):
        read = {"cls_label": _class, "table_label": _table}.get(folder.format, _after_tab)
        return read(folder, content)
    name, layout = content
    if isinstance(layout, BrokenLayout):
        raise _BrokenLine(str(layout))
    return name, layout


def _after_tab(folder: DatasetFolder, line: str) -> tuple[str, Label]:
    name, tab, text = line.partition("\t")
    if not tab:
        raise _BrokenLine("no tab between picture and label")
    return name, _boxes(text) if folder.format == "det_label" else _text(text)


def _class(folder: DatasetFolder, line: str) -> tuple[str, Label]:
    name, index = ([*line.rsplit(maxsplit=1), ""])[:2]
    if not index.isdecimal() or len(index) > _MOST_DIGITS:
        raise _BrokenLine("no space and index of a class behind the picture")
    if folder.classes and int(index) >= len(folder.classes):
        raise _BrokenLine(f"class {index}, but the set has {len(folder.classes)} classes, numbered from 0")
    return name, int(index)


def _table(folder: DatasetFolder, line: str) -> tuple[str, Label]:
    """A table: `html` is text, or PubTabNet's structure and cells, whose pictures lie in a folder for each `split`."""
    try:
        entry = parse_json(line)
        name, html = entry["filename"], entry["html"]
        if not isinstance(name, str):
            raise TypeError
        markup = html if isinstance(html, str) else _joined(html["structure"]["tokens"], html["cells"])
        if "split" in entry and not (folder.images / _relative(name)).is_file():
            name = f"{entry['split']}/{name}"
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise _BrokenLine("the label is no JSON object with 'filename' and 'html'") from error
    return name, _table_html(markup)


def _joined(structure: list[str], cells: list[dict[str, Any]]) -> str:
    """The structure's tokens with the text of each cell before the cell's end."""
    texts = ["".join(cell["tokens"]) for cell in cells]
    ends = [place for place, token in enumerate(structure) if token.endswith("</td>")]
    if len(ends) != len(texts):
        raise _BrokenLine(f"the structure has {len(ends)} cells, and there are {len(texts)} texts")
    tokens = list(structure)
    for place, text in zip(ends, texts, strict=True):
        tokens[place] = f"{structure[place].removesuffix('</td>')}{text}</td>"
    return f"<table>{''.join(tokens)}</table>"


def _table_html(markup: str) -> str:
    """A table as `<html><body><table>...`: head cells are cells, and of their attributes only the spans are kept."""
    tables = _TABLE.findall(markup)
    if len(tables) != 1 or tables[0].count("<table") != 1:
        raise _BrokenLine("the HTML is not one table")
    table = _CELL_START.sub(_bare_cell, tables[0]).replace("</th>", "</td>")
    if not table.count("<td") or table.count("<td") != table.count("</td>"):
        raise _BrokenLine("the HTML has no cells, or cells without an end")
    return f"<html><body>{table}</body></html>"


def _bare_cell(match: re.Match[str]) -> str:
    spans = (f' {name}="{number}"' for name, number in _SPAN.findall(match[0]))
    return f"<td{''.join(spans)}>"


def _relative(name: str) -> Path:
    path = PurePosixPath(name)
    # A lone surrogate, which JSON can spell, is in no file name.
    odd = "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name)
    if not path.parts or path.is_absolute() or ".." in path.parts or odd:
        raise _BrokenLine(f"{name!r} is not a path inside the folder")
    return Path(path)


def _content_id(image: Path, name: str) -> str:
    try:
        data = image.read_bytes()
    except OSError as error:
        raise _BrokenLine(f"picture {name}: {error.strerror or error}") from error
    if not _has_picture_head(data):
        raise _BrokenLine(f"picture {name} is no picture, or damaged")
    return hashlib.sha256(data).hexdigest()[:16]


def _has_picture_head(data: bytes) -> bool:
    """Cheap: finds foreign, empty and cut files; what breaks later is found by `read_image`."""
    from PIL import Image

    if _is_cut(data):
        return False
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return min(picture.size) > 0 and math.prod(picture.size) <= _MOST_PIXELS
    except Exception:  # Pillow's readers raise whatever their parsing trips over.
        return False


def _is_cut(data: bytes) -> bool:
    """Whether the marker is missing that ends a JPEG or PNG: OpenCV fills up what is missing with grey."""
    ends = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND"}
    return any(data.startswith(head) and end not in data[len(data) // 2 :] for head, end in ends.items())


def _text(text: str) -> str:
    stripped = text.rstrip("\r")
    if not stripped.strip():
        raise _BrokenLine("the text is empty")
    return stripped


def _boxes(text: str) -> tuple[Box, ...]:
    try:
        entries = parse_json(text)
    except ValueError as error:
        raise _BrokenLine("the label is no JSON") from error
    if not isinstance(entries, list):
        raise _BrokenLine("the label is no JSON list")
    return tuple(_box(entry) for entry in entries)


def _box(entry: Any) -> Box:
    try:
        text = entry["transcription"]
        points = tuple((float(x), float(y)) for x, y in entry["points"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _BrokenLine("a box lacks 'transcription' or 'points' as [[x, y], ...]") from error
    if not isinstance(text, str) or len(points) < 3 or not all(math.isfinite(n) for point in points for n in point):
        raise _BrokenLine("a box needs a text and at least three points")
    return Box(points, text)


def read_image(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture as uint8 BGR, height x width x 3, turned as its EXIF data say, as PaddleX reads it.

    Raises:
        BrokenPicture: missing, unreadable, or not decodable.
    """
    import cv2
    import numpy as np

    try:
        data = path.read_bytes()
        if not _has_picture_head(data):  # OpenCV would reserve whatever a head asks for
            raise BrokenPicture(f"the picture {path} cannot be decoded: it is no picture, cut off, or too large")
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except OSError as error:
        raise BrokenPicture(f"the picture {path} cannot be read: {error.strerror or error}") from error
    except cv2.error as error:
        raise BrokenPicture(f"the picture {path} cannot be decoded: {' '.join(str(error).split())}") from error
    if image is None:
        raise BrokenPicture(f"the picture {path} cannot be decoded; replace it, or take it out of the label file")
    return image.astype(np.uint8, copy=False)


def read_sample(sample: Sample) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The picture of a sample as `read_image` gives it, turned as the sample says.

    Raises:
        BrokenPicture: see `read_image`.
    """
    import numpy as np

    image = read_image(sample.image)
    return np.ascontiguousarray(np.rot90(image, -sample.turn // 90)) if sample.turn else image


def by_shape(samples: Sequence[Sample]) -> list[Sample]:
    """Samples by width to height: runtimes are a fourth slower when every picture has another shape than the last."""

    def shape(sample: Sample) -> tuple[float, str]:
        try:
            return _aspect(sample), sample.id
        except Exception:  # Pillow's readers raise whatever they trip over; judging will name the picture
            return 0.0, sample.id

    return sorted(samples, key=shape)


def split_of(sample_id: str, splits: Splits) -> Split:
    """The split of a picture: it follows from the content, so that lists need not be shipped."""
    place = _uniform(f"split:{sample_id}")
    if place < splits.calibration:
        return "calibration"
    return "search" if place < splits.calibration + splits.search else "report"


def split(samples: Iterable[Sample], splits: Splits) -> dict[Split, list[Sample]]:
    """All samples by split, in their order."""
    parts: dict[Split, list[Sample]] = {name: [] for name in SPLITS}
    for sample in samples:
        parts[split_of(sample.picture, splits)].append(sample)
    return parts


def check_disjoint(calibration: Iterable[Sample], search: Iterable[Sample], report: Iterable[Sample]) -> None:
    """Make sure that no picture serves two purposes.

    Raises:
        InputError: one does; names it.
    """
    seen: dict[str, tuple[Split, Sample]] = {}
    for name, samples in zip(SPLITS, (calibration, search, report), strict=True):
        for sample in samples:
            other, first = seen.setdefault(sample.picture, (name, sample))
            if other != name:
                same = f"{sample.image} ({sample.dataset}) is in the {name} split and, as {first.image}, in {other}"
                raise InputError(f"the splits overlap: {same}; take it out of one of them")


def pick(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """A fixed choice, spread evenly over the data sets, that does not depend on the order given."""
    by_set: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: _uniform(f"pick:{seed}:{sample.id}")):
        by_set.setdefault(sample.dataset, []).append(sample)
    rounds = zip_longest(*(by_set[name] for name in sorted(by_set)))
    return [sample for turn in rounds for sample in turn if sample is not None][:count]


def _uniform(text: str) -> float:
    """A number in [0, 1) that a text always gives."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13
