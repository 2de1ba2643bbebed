"""The way from a model's published form to its artifacts, in words: what `quant describe` says beside the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from quant.recipe import Recipe, TargetChoice
from quant.source import local_format, local_source, without_places

_IMPORTS = {
    "paddle": "old-IR program (inference.pdmodel): paddle2onnx imports it, Paddle Inference runs the original as proof",
    "pir": "PIR program (inference.json): paddle2onnx imports it, Paddle Inference runs the original as proof",
}
_SLIM = {
    "paddle": "PaddleSlim PTQ on the folded graph, written back as an old-IR program",
    "pir": "PaddleSlim PTQ, which knows no PIR, on the folded graph, written back as an old-IR program",
}


@dataclass(frozen=True)
class Route:
    """Attributes: source: where the model is, or would come from; format: of its files; targets: how each is made."""

    source: str
    format: str
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
    targets = {str(target): _method(choice, kind) for target, choice in recipe.targets.items()}
    return Route(source, _IMPORTS[kind], targets)


def _method(choice: TargetChoice, kind: str) -> str:
    own = f"own PTQ ({choice.activations} activations) on the folded graph"
    return _SLIM[kind] if choice.method == "paddleslim" else own
