"""JSON and YAML of others: values as they are, and one kind of error for whatever takes too much or is no document."""

from __future__ import annotations

import time

import pytest

from quant import document
from quant.document import DocumentError, parse_json, parse_yaml


def test_plain_documents() -> None:
    assert parse_json('{"a": [1, 2.5, null, "x"]}') == parse_json(b'{"a": [1, 2.5, null, "x"]}')
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: 1e3\nd: '<<'") == {"a": [1, 2], "b": [1, 2], "c": "1e3", "d": "<<"}


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
        ("a: !!timestamp x", ""),
        ("a: !!int ''", ""),
        ("a: !!bool maybe", ""),
        ("? [a, b]\n: c", "unhashable"),
        ("a: 2024-13-45", "month"),
        ("a: \x00", ""),
    ],
)
def test_yaml_that_is_refused(text: str, said: str) -> None:
    start = time.monotonic()
    with pytest.raises(DocumentError, match=said) as caught:
        parse_yaml(text)
    assert str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("text", ["", "{", "[" * 200_000, "9" * 10_000, b"\xff\xfe\xff", "nul"])
def test_json_that_is_refused(text: str | bytes) -> None:
    with pytest.raises(DocumentError):
        parse_json(text)


def test_size_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "MOST_JSON", 10)
    monkeypatch.setattr(document, "MOST_YAML", 10)
    for parse in (parse_json, parse_yaml):
        with pytest.raises(DocumentError, match="more than 0 MiB"):
            parse("[1, 2, 3, 4, 5]")
