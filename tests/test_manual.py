"""The manual cannot go stale: its commands parse, its example is a recipe, what it quotes stands in the program.

What the commands do is tried by tests/test_manual_commands.py.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from quant.cli import app
from quant.recipe import load_recipe, recipe_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = typer.main.get_command(app)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
MESSAGE = re.compile(r"`([^`]+)`")


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for line in "\n".join(blocks(page, "sh")).splitlines():
            words = line.split("#")[0].strip()
            if words:
                yield page.name, words


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_a_command_is_one_that_the_program_knows(page: str, line: str) -> None:
    """Parsed as the program does it, without doing anything."""
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
        return
    if words[:2] == ["pip", "install"]:
        assert asked_of_pip(words[2:]), f"{page}: {line}"
        return
    assert words[0] in ("quant", ".venv/bin/quant"), f"{page}: {line}"
    command, context, rest = COMMAND, COMMAND.make_context("quant", words[1:], resilient_parsing=False), words[1:]
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, list(rest), parent=context)
    assert not context.args


def asked_of_pip(words: list[str]) -> bool:
    """This project with extras that it has, as the Makefile constrains it, or what the Makefile takes without needs."""
    if words[0] == "--no-deps":
        return " ".join(words[1:]) in re.findall(r"^NO_DEPS := (.*)$", read("Makefile"), re.MULTILINE)
    option, constraints, project = words
    extras = re.fullmatch(r"\.\[([\w,]+)\]", project)
    known = re.findall(r"^(\w+) = \[", read("pyproject.toml"), re.MULTILINE)
    return extras is not None and {*extras[1].split(",")} <= {*known} and f"{option} {constraints}" in read("Makefile")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("line", [line for _, line in commands() if "--set" in line])
def test_a_setting_is_one_that_recipes_know(line: str) -> None:
    words = shlex.split(line)
    settings = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    for model in [word for word in words if word in recipe_names()]:
        assert load_recipe(model, settings) != load_recipe(model)


def test_the_example_is_a_recipe(tmp_path: Path) -> None:
    (text,) = blocks(ROOT / "docs" / "adding-a-model.md", "yaml")
    file = tmp_path / "english.yaml"
    file.write_text(text, encoding="utf-8")
    recipe = load_recipe(str(file), ["calibration.samples=64", "data.splits.report=0.58"])
    assert (recipe.name, recipe.task) == (yaml.safe_load(text)["name"], "text_detection")


def test_quoted_messages_stand_in_the_program() -> None:
    program = "".join(
        file.read_text(encoding="utf-8")
        for name in ("quant", "eval", "calib_data")
        for file in (ROOT / name).rglob("*.py")
    )
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    messages = [message for row in rows for message in MESSAGE.findall(row)]
    assert len(messages) > 15
    assert [message for message in messages if message not in program] == []


def test_named_tests_are_tests() -> None:
    named = [found for page in PAGES for found in TEST.findall(page.read_text(encoding="utf-8"))]
    assert len(named) > 5
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for place, heading in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.name}: {place}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
