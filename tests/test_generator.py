"""The built-in set: repeatable, exact labels, readable characters, and at home on a machine without fonts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from calib_data import generator, lettering, photography, wording
from calib_data.generator import (
    Region,
    find_fonts,
    fonts_fingerprint,
    write_codes,
    write_document_pages,
    write_notes,
    write_text_lines,
    write_text_pages,
)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lines")
    write_text_lines(folder, 60, seed=3)
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write_text_pages(folder, 12, seed=3)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under the folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def labels(folder: Path) -> list[tuple[Path, str]]:
    rows = (folder / "label.txt").read_text(encoding="utf-8").splitlines()
    return [(folder / image, label) for image, label in (row.split("\t") for row in rows)]


@pytest.mark.parametrize(
    ("write", "count"),
    [(write_text_lines, 12), (write_text_pages, 3), (write_document_pages, 3), (write_codes, 6), (write_notes, 3)],
)
def test_same_seed_same_bytes(write: Any, count: int, tmp_path: Path) -> None:
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        write(tmp_path / name, count, seed)
    first = contents(tmp_path / "first")
    assert first == contents(tmp_path / "again")
    assert first != contents(tmp_path / "other")


@pytest.mark.parametrize(("write", "few", "many"), [(write_text_lines, 8, 14), (write_text_pages, 2, 4)])
def test_a_larger_set_begins_with_the_smaller_one(write: Any, few: int, many: int, tmp_path: Path) -> None:
    write(tmp_path / "few", few, 5)
    write(tmp_path / "many", many, 5)
    small, large = contents(tmp_path / "few"), contents(tmp_path / "many")
    assert large.pop("label.txt").startswith(small.pop("label.txt"))
    assert small.items() <= large.items()


def test_pages_for_orientation_are_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No street scene, whose upper side its few words cannot tell."""

    def street(*_: Any) -> None:
        raise AssertionError("a street scene")

    monkeypatch.setattr(generator, "_street", street)
    write_document_pages(tmp_path, 6, 0)
    assert all(len(json.loads(boxes)) > 0 for _, boxes in labels(tmp_path))


def test_progress_counts_the_samples(tmp_path: Path) -> None:
    seen: list[int] = []
    write_text_lines(tmp_path, 3, 0, seen.append)
    assert seen == [1, 2, 3]


def test_line_labels(lines: Path) -> None:
    rows = labels(lines)
    assert len(rows) == 60
    for path, text in rows:
        image = cv2.imread(str(path))
        assert image is not None
        assert 12 <= image.shape[0] <= 100
        assert text == text.strip() != ""
        assert set(text) <= wording.alphabet()


def test_page_labels(pages: Path) -> None:
    texts = []
    for path, label in labels(pages):
        height, width = cv2.imread(str(path)).shape[:2]
        for entry in json.loads(label):
            quad = np.array(entry["points"], np.float32)
            assert quad.shape == (4, 2)
            assert (quad >= 0).all()
            assert (quad <= (width - 1, height - 1)).all()
            assert cv2.contourArea(quad, oriented=True) > 0  # clockwise where y points down
            texts.append(entry["transcription"])
    assert all(text == generator.UNREADABLE or set(text) <= wording.alphabet() for text in texts)
    assert sum(text != generator.UNREADABLE for text in texts) > len(texts) / 2


def test_latin_text_is_ascii() -> None:
    rng = np.random.default_rng(1)
    for source in (wording.street_text, wording.receipt_text, wording.document_text):
        assert all(source(rng).isascii() for _ in range(300))


@pytest.fixture
def undamaged(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pages without light, lens, sensor, shadows of letters: what is left is geometry."""

    def same(*arguments: Any) -> Any:
        return next(value for value in arguments if isinstance(value, np.ndarray))

    for name in ("light", "defocus", "shake", "coarsen", "sharpen", "expose", "sensor"):
        monkeypatch.setattr(photography, name, same)
    monkeypatch.setattr(generator, "_scanned", same)
    monkeypatch.setattr(lettering, "_lay_shadow", lambda *arguments: None)
    return monkeypatch


def test_polygons_hold_the_ink_and_little_else(undamaged: pytest.MonkeyPatch) -> None:
    # The same pages with and without letters differ exactly where ink is.
    fonts = find_fonts()
    inked = [generator.text_page(np.random.default_rng([7, index]), fonts) for index in range(8)]
    undamaged.setattr(generator, "lay", lambda *arguments: None)
    for index, (photo, regions) in enumerate(inked):
        bare, _ = generator.text_page(np.random.default_rng([7, index]), fonts)
        ink = cv2.absdiff(photo, bare).max(axis=2) > 8
        assert_inside(ink, regions)
        for region in regions:
            if region.text != generator.UNREADABLE:
                assert_tight(ink, region)


def assert_inside(ink: np.ndarray, regions: list[Region]) -> None:
    inside = np.zeros(ink.shape, np.uint8)
    for region in regions:
        cv2.fillConvexPoly(inside, np.round(region.quad).astype(np.int32), (1,))
    grown = cv2.dilate(inside, np.ones((3, 3), np.uint8)) > 0
    assert ink.any()
    assert (ink & ~grown).sum() <= 0.002 * ink.sum()


def assert_tight(ink: np.ndarray, region: Region) -> None:
    """Seen upright, the ink fills most of the width and of the height of its polygon."""
    frame = np.array(((0, 0), (400, 0), (400, 100), (0, 100)), np.float32)
    matrix = cv2.getPerspectiveTransform(region.quad, frame)
    upright = cv2.warpPerspective(ink.astype(np.uint8), matrix, (400, 100)) > 0
    rows, columns = np.flatnonzero(upright.any(axis=1)), np.flatnonzero(upright.any(axis=0))
    assert rows.size, region
    assert rows[-1] - rows[0] > 40, region
    assert columns[-1] - columns[0] > 200, region


def test_fonts_draw_the_letters_they_claim() -> None:
    fonts = find_fonts()
    assert len(fonts.latin) >= 10
    assert not any("math" in path.name.lower() or path.name.startswith("cm") for path in fonts.latin)
    for path in fonts.latin:
        assert lettering.drawable("Aa0 Zz9 $%&", path) == "Aa0 Zz9 $%&"


def test_without_system_fonts_matplotlib_s_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lettering, "SEARCH_FOLDERS", (tmp_path / "none",))
    fonts = find_fonts()
    assert fonts.latin
    assert all("mpl-data" in path.parts for path in fonts.latin)
    assert fonts.cjk == ()
    write_text_lines(tmp_path / "lines", 20, 1)
    assert all(text.isascii() for _, text in labels(tmp_path / "lines"))


def test_fingerprint_follows_names_and_contents(tmp_path: Path) -> None:
    font = find_fonts().latin[0]
    moved, changed = tmp_path / "a" / font.name, tmp_path / "b" / font.name
    for path, content in ((moved, font.read_bytes()), (changed, font.read_bytes() + b"x")):
        path.parent.mkdir()
        path.write_bytes(content)
    original, same, other = (fonts_fingerprint(lettering.Fonts((path,), ())) for path in (font, moved, changed))
    assert original == same != other


needs_dictionary = pytest.mark.skipif(
    not wording.ideographs(), reason="rapidocr-paddle is not installed: without its dictionary nothing Chinese is drawn"
)


@needs_dictionary
def test_chinese_is_drawn_when_a_font_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_font(tmp_path / "Standin.ttf", [*map(chr, range(32, 127)), *wording.ideographs(), *"，。：、；“”（）"])
    monkeypatch.setattr(lettering, "SEARCH_FOLDERS", (tmp_path,))
    assert [path.name for path in find_fonts().cjk] == ["Standin.ttf"]
    write_text_lines(tmp_path / "lines", 30, 1)
    write_text_pages(tmp_path / "pages", 4, 1)
    texts = [text for _, text in labels(tmp_path / "lines")]
    chinese = [text for text in texts if not text.isascii()]
    assert 4 <= len(chinese) < len(texts)
    assert set("".join(texts)) <= wording.alphabet()
    assert not (tmp_path / "pages" / "label.txt").read_text(encoding="utf-8").isascii()


@needs_dictionary
def test_this_machine_s_chinese_fonts() -> None:
    fonts = find_fonts().cjk
    if not fonts:
        pytest.skip("no font with Chinese characters on this machine")
    for path in fonts:
        assert lettering.drawable("中国发票", path) == "中国发票"


def build_font(path: Path, characters: list[str]) -> None:
    """A font whose letters are boxes, no two of neighbouring codes alike."""
    builder_module = pytest.importorskip("fontTools.fontBuilder", reason="comes with matplotlib")
    pen_module = pytest.importorskip("fontTools.pens.ttGlyphPen", reason="comes with matplotlib")
    names = {ord(char): f"u{ord(char):04X}" for char in characters}
    builder = builder_module.FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    glyphs = {".notdef": pen_module.TTGlyphPen(None).glyph()}
    for code, name in names.items():
        pen = pen_module.TTGlyphPen(None)
        right, top = 300 + code % 13 * 40, 300 + code % 11 * 40
        for point in ((60, 0), (60, top), (right, top), (right, 0)):
            (pen.moveTo if point == (60, 0) else pen.lineTo)(point)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (900, 60)))
    builder.setupHorizontalHeader(ascent=900, descent=-200)
    builder.setupNameTable({"familyName": "Standin", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
