"""The table of all models in the docs is the one that the recipes give."""

from __future__ import annotations

from pathlib import Path

from quant.catalogue import models_table
from quant.recipe import load_recipe, recipe_names

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"


def test_the_document_shows_the_recipes() -> None:
    table = models_table([load_recipe(name) for name in recipe_names()])
    assert DOCUMENT.read_text(encoding="utf-8").endswith(f"\n\n{table}"), "write it anew: quant list --markdown"
    assert table.count("\n") == 2 + 11


def test_a_row_says_what_stays_in_fp32() -> None:
    kept = '[{"reason": "boxes are numbers", "kinds": ["MatMul"]}]'
    assert "| boxes are numbers |" in models_table([load_recipe("PP-DocLayout-S", [f"policy={kept}"])])
