"""The manual cannot go stale: its commands parse, its example is a recipe, what it quotes stands in the program.

What the commands do is tried by tests/test_manual_commands.py.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from quant.cli import app
from quant.recipe import load_recipe, recipe_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = typer.main.get_command(app)
SETTING = re.compile(r"[A-Z_]+=.*")
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
    """Parsed as the program, make and pip do it, without doing anything."""
    words = shlex.split(line)
    environment = list(takewhile(SETTING.fullmatch, words))
    assert [name for name in map(setting_name, environment) if f'"{name}"' not in program()] == []
    words = words[len(environment) :]
    if words[0] == "make":
        words = made_of(words[1:])
    if words[0] == "pip":
        assert asked_of_pip(words[1:]), f"{page}: {line}"
    elif words[0] in ("quant", ".venv/bin/quant"):
        parse(words[1:])
    else:
        assert words[0] in (".venv/bin/pytest",), f"{page}: {line}"


def parse(words: list[str]) -> None:
    command, context, rest = COMMAND, COMMAND.make_context("quant", words, resilient_parsing=False), words
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, list(rest), parent=context)
    assert not context.args


def made_of(words: list[str]) -> list[str]:
    """What make would do last, once it has set up the environment with extras that there are."""
    # These tests may be run by make, which tells the makes below it its own flags, and they tell where they are.
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    command = ["make", "-n", *words]
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    settings = dict(word.split("=", 1) for word in words if SETTING.fullmatch(word))
    assert set(settings) <= set(re.findall(r"\$\((\w+)\)", read("Makefile")))
    assert {*settings.get("EXTRAS", "cpu").split(",")} <= set(extras())
    last = shlex.split(done.stdout.splitlines()[-1])
    assert "MODEL" not in settings or settings["MODEL"] in last
    return last


def asked_of_pip(words: list[str]) -> bool:
    """A wheel, this project with extras that it has, constrained as by the Makefile, or what that takes without needs."""
    if words[0] == "wheel":
        return words[1:] == ["--no-deps", "-w", "dist", "."]
    if words[1] == "--no-deps":
        return " ".join(words[2:]) in re.findall(r"^NO_DEPS := (.*)$", read("Makefile"), re.MULTILINE)
    install, option, constraints, project = words
    about = project_table()
    built = f"dist/{about['name'].replace('-', '_')}-{about['version']}-py3-none-any.whl"
    found = re.fullmatch(r"(.+)\[([\w,]+)\]", project)
    assert found is not None and found[1] in (".", built) and {*found[2].split(",")} <= set(extras())
    return install == "install" and f"{option} {constraints}" in read("Makefile")


def project_table() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))["project"]


def extras() -> list[str]:
    return list(project_table()["optional-dependencies"])


def setting_name(word: str) -> str:
    return word.split("=")[0]


@cache
def program() -> str:
    files = (file for name in ("quant", "eval", "calib_data") for file in (ROOT / name).rglob("*.py"))
    return "".join(file.read_text(encoding="utf-8") for file in files)


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
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    messages = [message for row in rows for message in MESSAGE.findall(row)]
    assert len(messages) > 15
    assert [message for message in messages if message not in program()] == []


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
