"""The table of all recipes in Markdown: what `docs/models.md` shows, written by `quant list --markdown`."""

from __future__ import annotations

from collections.abc import Sequence

from calib_data.registry import GENERATED
from quant.recipe import Recipe

_HEADINGS = (
    "Model",
    "Route: published form",
    "Calibration and evaluation sets",
    "Generated in their place",
    "Method (activations)",
    "Stays in FP32",
    "Published metric",
)
_FORMS = {"paddle": "old-IR", "pir": "PIR, bridged"}
"""By format; a PIR model gets an old-IR form by the bridge."""


def models_table(recipes: Sequence[Recipe]) -> str:
    """A row for each recipe, in the order of the list."""
    rows = [_HEADINGS, ("---",) * len(_HEADINGS), *map(_row, recipes)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _row(recipe: Recipe) -> tuple[str, ...]:
    forms = dict.fromkeys(_FORMS[archive.format] for archive in recipe.model.archives)
    split = recipe.data.splits
    shares = ", ".join(
        f"{round(100 * share)} % {what}"
        for share, what in ((split.calibration, "calibrate"), (split.search, "search"), (split.report, "judge"))
    )
    methods: dict[str, list[str]] = {}
    for target, choice in recipe.targets.items():
        methods.setdefault(f"{choice.method}, {choice.activations}", []).append(target)
    return (
        recipe.name,
        "; else ".join(forms),
        f"{', '.join(recipe.data.sets)} ({shares})",
        f"{GENERATED}{recipe.data.generated.kind}, {recipe.data.generated.samples:,}",
        "; ".join(f"{' and '.join(targets)}: {method}" for method, targets in methods.items()),
        "; ".join(kept.reason for kept in recipe.policy) or "what the ladder reverts, no more",
        f"{recipe.expect.metric} {recipe.expect.value:g} ({recipe.expect.source})",
    )
