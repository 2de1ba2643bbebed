"""JSON and YAML of others: values as they are, and one kind of error for whatever takes too much or is no document."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.layouts import read_layouts
from quant import document
from quant.document import DocumentError, parse_json, parse_yaml, read_bounded
from quant.errors import InputError
from quant.manifest import load_manifest
from quant.recipe import load_recipe


def test_plain_documents() -> None:
    assert parse_json('{"a": [1, 2.5, null, "x"]}') == parse_json(b'{"a": [1, 2.5, null, "x"]}')
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: 1e3\nd: '<<'") == {"a": [1, 2], "b": [1, 2], "c": "1e3", "d": "<<"}
    assert parse_yaml("a: 2024-01-01\n2024-13-45: b") == {"a": "2024-01-01", "2024-13-45": "b"}


def doubling(levels: int, template: str) -> str:
    lines = [template.format(name="a0", value="[x, x]")]
    return "\n".join(lines + [template.format(name=f"a{i}", value=f"[*a{i - 1}, *a{i - 1}]") for i in range(1, levels)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (doubling(60, "{name}: &{name} {value}"), "anchors"),
        ("a: &a {k: 1}\nb: &b {<<: [*a, *a]}\nc: {<<: [*b, *b]}", "merging"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 20_000, "too deep"),
        ("a: " + ":".join(["1"] * 100_000), "too long"),
        ("a: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
        ("a: !!int ''", ""),
        ("a: !!bool maybe", ""),
        ("? [a, b]\n: c", "unhashable"),
        ("a: !!timestamp 2024-01-01", "could not determine a constructor"),
        ("a: !!binary eA==", "could not determine a constructor"),
        ("a: !!pairs [x: 1]", "could not determine a constructor"),
        ("a: !!omap [x: 1]", "could not determine a constructor"),
        ("a: !!set {x, y}", "could not determine a constructor"),
        ("a: \x00", ""),
    ],
    ids=lambda value: ascii(value[:40]),
)
def test_yaml_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(DocumentError, match=said) as caught:
        parse_yaml(text)
    assert str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 200_000, "9" * 10_000, b"\xff\xfe\xff", "nul"], ids=lambda text: ascii(text[:40])
)
def test_json_that_is_refused(text: str | bytes) -> None:
    with pytest.raises(DocumentError):
        parse_json(text)


def test_size_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "MOST_JSON", 10)
    monkeypatch.setattr(document, "MOST_YAML", 10)
    for parse in (parse_json, parse_yaml):
        with pytest.raises(DocumentError, match="more than 0 MiB"):
            parse("[1, 2, 3, 4, 5]")


def test_every_kind_of_value_is_counted() -> None:
    pair = (1, 2)
    assert document._size([pair, pair, {3, 4}, {"a": 5}], {}) == 1 + 3 + 3 + 3 + 2


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("recipe.yaml", lambda file: load_recipe(str(file))),
        ("instances.json", read_layouts),
        ("manifest.json", lambda file: load_manifest(file.parent)),
    ],
)
def test_a_file_that_is_too_large_is_not_read(
    name: str, read: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hole of a terabyte, which no machine could read."""
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(Path, "read_text", None)
    monkeypatch.setattr(Path, "read_bytes", None)
    with pytest.raises(InputError, match=name.partition(".")[0]):
        read(tmp_path / name)
    with pytest.raises(DocumentError, match="more than 1 MiB"):
        read_bounded(tmp_path / name, 1 << 20)


def test_a_file_of_the_most_bytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    assert read_bounded(tmp_path / "a", 4) == b"1234"
