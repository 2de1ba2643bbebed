"""The way from a model's published form to its artifacts, in words: what `quant describe` says beside the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from quant.document import MOST_JSON, parse_json, read_bounded
from quant.lowering import unknown_kinds
from quant.pir import all_kinds
from quant.recipe import Recipe, TargetChoice
from quant.source import local_format, local_program, local_source, without_places
from quant.target import TARGETS, TargetName

_IMPORTS = {
    "paddle": "old-IR program (inference.pdmodel): paddle2onnx imports it, Paddle Inference runs the original as proof",
    "pir": "PIR program (inference.json): paddle2onnx imports it, Paddle Inference runs the original as proof",
}
_SLIM = {
    "paddle": "PaddleSlim PTQ on an old-IR program of the folded graph",
    "pir": "PaddleSlim PTQ, which knows no PIR, on an old-IR program of the folded graph",
}
_WRITTEN_IN_STEPS = ("table_structure", "formula_recognition")
"""Tasks whose models end in a loop."""

_LOOP = "paddle2onnx imports no old-IR loop that runs, and the Paddle artifact takes the loop from the PIR program"
_PIR_ALONE = "no old-IR form is published"
_BRIDGE = (
    "rebuilt as an equal old-IR program for PaddleSlim's training and for what the Paddle artifact leaves as it is"
)


@dataclass(frozen=True)
class Route:
    """The way of a model.

    Attributes:
        source: where the model is, or would come from.
        format: of its files, and how they are imported.
        why: it is this form, where a model is published in several, or what a form costs.
        bridge: whether a PIR model gets an old-IR form, and why not; empty for old-IR models.
        targets: how each target's plan is made, and what becomes of it.
    """

    source: str
    format: str
    why: str
    bridge: str
    targets: dict[str, str]


def route_of(recipe: Recipe) -> Route:
    """The route that a recipe's model takes on this machine; nothing is downloaded."""
    here = local_source(recipe)
    first = recipe.model.archives[0] if recipe.model.archives else None
    if here is None:
        source = f"not on this machine; first address: {first.url}" if first else "not on this machine"
        kind = first.format if first else "paddle"
    else:
        source, kind = without_places(here), local_format(recipe) or "paddle"
    targets = {
        str(target): f"{_method(choice, kind)}; {_artifact(target)}" for target, choice in recipe.targets.items()
    }
    bridge = _bridge(recipe) if kind == "pir" else ""
    return Route(source, _IMPORTS[kind], _why(recipe, kind), bridge, targets)


def _why(recipe: Recipe, kind: str) -> str:
    """Old-IR first, as PaddleSlim knows no other form; PIR where no old-IR is published, or where there is a loop."""
    published = {archive.format for archive in recipe.model.archives}
    if recipe.task in _WRITTEN_IN_STEPS:
        if kind == "paddle":
            return f"{_LOOP}; give its PIR form, inference.json, by --model-dir"
        return f"PIR before the published old-IR form: {_LOOP}" if "paddle" in published else _PIR_ALONE
    if kind == "paddle":
        return "old-IR is what PaddleSlim knows, so it comes first wherever it is published"
    if "paddle" in published:
        return (
            "this form lies here; an old-IR one, which PaddleSlim knows, is published too and comes first in downloads"
        )
    return _PIR_ALONE


def _bridge(recipe: Recipe) -> str:
    model = local_program(recipe)
    if model is None:
        return f"{_BRIDGE}, if it knows all operators: that shows when the model is here"
    try:
        document = parse_json(read_bounded(model, MOST_JSON))
        unknown, loops = unknown_kinds(document), "while" in all_kinds(document)
    except (OSError, ValueError, LookupError, TypeError):
        return f"none: {model.name} is damaged, or no PIR program"
    if unknown:
        without = "; no Paddle artifact then, which takes the loop from there" if loops else ""
        return f"none: the bridge does not know {', '.join(unknown)}{without}; targets that take ONNX are not concerned"
    return f"{_BRIDGE}: it knows all operators"


def _method(choice: TargetChoice, kind: str) -> str:
    own = f"own PTQ ({choice.activations} activations) on the folded graph"
    return _SLIM[kind] if choice.method == "paddleslim" else own


def _artifact(target: TargetName) -> str:
    known = TARGETS[target]
    return f"{known.format} artifact, {'run and judged' if known.executed else 'its structure checked, not run'}"
