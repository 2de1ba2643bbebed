"""Recipes: one YAML per model that holds facts and choices, checked against this schema.

A recipe may name a `base` in `recipes/_base/`; mappings are merged key by key, the recipe wins.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from quant.document import MOST_YAML, DocumentError, parse_yaml, read_bounded
from quant.errors import InputError
from quant.storage import is_file
from quant.target import TARGETS, ActivationType, EqualizationScope, Placement, TargetName

SCHEMA_VERSION = 1

Task = Literal[
    "text_detection",
    "text_recognition",
    "image_classification",
    "layout_detection",
    "table_structure",
    "formula_recognition",
]
MethodName = Literal["ptq", "paddleslim"]
BiasCorrection = Literal["none", "fast", "full"]
Learned = Literal["weights", "biases", "scales", "ranges"]
LadderMethod = Literal["auto", "ptq", "recon", "qat"]
Quantizers = Literal["lsq", "pact", "moving_average"]
OutputLoss = Literal["soft_labels", "logits", "probabilities"]
RangeMethod = Literal["minmax", "percentile", "mse", "entropy", "moving_average", "per_tensor"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Sizes = Annotated[list[PositiveInt], Field(min_length=4, max_length=4)]
Angle = Literal[0, 90, 180, 270]

METRICS: dict[Task, tuple[str, ...]] = {
    "text_detection": ("hmean",),
    "text_recognition": ("line_accuracy",),
    "image_classification": ("top1",),
    "layout_detection": ("map50", "map"),
    "table_structure": ("teds_struct",),
    "formula_recognition": ("bleu",),
}
"""Names of the metrics in eval.metric that can judge each task; a table, as eval.metric loads numpy and shapely."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Expectation(_Part):
    """The officially published FP32 metric, for orientation only."""

    metric: str
    value: float
    source: str


class Archive(_Part):
    """An official archive of the FP32 inference model."""

    url: str = Field(pattern=r"^https?://")
    packed: bool = Field(True, description="false: the address of a folder, whose files are fetched one by one")
    format: Literal["paddle", "pir"] = Field(description="paddle = old-IR .pdmodel, pir = inference.json")
    sha256: Sha256 | None = Field(None, description="of the archive; without it: trust on first use")
    files: dict[str, Sha256] = Field(default_factory=dict, description="sha256 of files inside")
    edition: str = Field("", description="which weights, where several were published under one name")
    expect: Expectation | None = Field(None, description="of these weights, where it is not the recipe's")

    @field_validator("sha256")
    @classmethod
    def _hashes_of_files(cls, sha256: Sha256 | None, info: ValidationInfo) -> Sha256 | None:
        if sha256 and not info.data.get("packed", True):  # absent where packed itself is wrong
            raise ValueError("sha256 is that of an archive; give those of the files where packed is false")
        return sha256


class WheelSource(_Part):
    """FP32 weights that an installed Python package ships."""

    package: str = Field(description="import name of the package")
    folder: str = Field(description="folder of the model inside the package")


class PackageFile(_Part):
    """A file that an installed Python package ships."""

    package: str = Field(description="import name of the package")
    path: str = Field(description="path inside the package")


class ModelSource(_Part):
    licence: str = Field("", description="terms of the weights, as their publisher names them; for the model card")
    archives: list[Archive] = Field(default_factory=list)
    wheel: WheelSource | None = None
    character_dict: PackageFile | None = Field(
        None, description="one character a line, for sources without inference.yml"
    )


class Splits(_Part):
    """Shares of every data set; a sample's split follows from the hash of its content."""

    calibration: Fraction
    search: Fraction
    report: Fraction

    @model_validator(mode="after")
    def _sum_to_one(self) -> Splits:
        total = self.calibration + self.search + self.report
        if abs(total - 1) > 1e-6:
            raise ValueError(f"calibration + search + report must be 1, not {total:g}")
        return self


class GeneratedSet(_Part):
    """The built-in set, used when no other set can be had."""

    kind: Literal["text_lines", "text_pages", "document_pages", "layout_pages", "tables", "formulas"]
    samples: int = Field(ge=8, le=100_000)
    seed: int = Field(0, ge=0)


class Rotations(_Part):
    """How upright pictures become labelled ones: each is turned by every angle, the class is the angle's index."""

    of: Task = Field(description="task whose sets hold the upright pictures")
    angles: list[Angle] = Field(min_length=2, description="clockwise, in the order of the model's classes")
    min_aspect: float = Field(0, ge=0, description="least width / height of an upright picture")

    @field_validator("angles")
    @classmethod
    def _distinct(cls, angles: list[Angle]) -> list[Angle]:
        if len(set(angles)) < len(angles):
            raise ValueError("an angle stands twice")
        return angles


class Data(_Part):
    sets: list[str] = Field(description="names in calib_data/, pooled")
    splits: Splits
    generated: GeneratedSet
    rotations: Rotations | None = Field(None, description="of upright pictures, for classifiers of orientation")


class Calibration(_Part):
    samples: int = Field(ge=1, description="pictures taken from the calibration split")
    range: RangeMethod = Field(description="how ranges of activations are chosen; per_tensor: what hurts readers least")
    percentile: float = Field(
        99.999, gt=50, le=100, description="values kept by range: percentile, in percent; per_tensor's first candidate"
    )
    momentum: Fraction = Field(
        0.9, description="of range: moving_average; what is kept of the pictures before, in the order of the pictures"
    )
    range_samples: int = Field(16, ge=1, description="calibration pictures that range: per_tensor compares on")
    rounding: Literal["nearest", "second_moment"] = Field(
        "second_moment", description="of weights; second_moment minds what the layer's inputs do together"
    )
    rounding_samples: int = Field(48, ge=1, description="calibration pictures that the moments are taken from")
    bias_correction: BiasCorrection = Field(
        "full", description="of convolutions, on average; fast: as if all before were exact; full: front to back"
    )
    bias_samples: int = Field(32, ge=1, description="calibration pictures for bias_correction: full, kept in memory")


class Ladder(_Part):
    """PTQ first; then the operators that hurt most go back to FP32 while the search split fails; then training."""

    method: LadderMethod = Field(
        "ptq", description="auto: what failed is trained; recon, qat: everything in INT8, then trained by this method"
    )
    search_samples: int = Field(ge=1, description="pictures of the search split that judge a rung")
    damage_samples: int = Field(
        ge=1,
        description="pictures that rank the operators: of the search split, and as many to correct biases on",
    )
    error_samples: int = Field(ge=1, description="pictures of the search split that max_error is measured on")
    fit_samples: int = Field(
        16, ge=0, description="calibration pictures that a step's weights are fitted on where it fails; 0: never"
    )
    coverage_steps: list[float] = Field(description="coverages to stop at on the way down, falling")
    min_coverage: float = Field(ge=0, le=1, description="never revert below this share of INT8 work")
    min_weights: float = Field(ge=0, le=1, description="never revert below this share of INT8 weights: it bounds size")
    max_discordance: float = Field(gt=0, le=100, description="percent of search samples whose outcome may differ")
    max_error: float = Field(gt=0, description="mean relative L1 error of the outputs: steadier than the metric")
    margin: float = Field(ge=0, description="points below the gate's limit that the search drop must keep")


class Search(_Part):
    """After the ladder: a faster plan that passes too, by latency measured on the target (see `quant.search`)."""

    minutes: float = Field(0, ge=0, description="of looking for it; 0: the ladder decides, by coverage alone")


class Reconstruction(_Part):
    """Fitting part by part to FP32 (see `quant.least_squares` and `quant.reconstruction`)."""

    method: Literal["least_squares", "gradients"] = Field(
        "least_squares", description="in closed form, layer by layer; gradients: what stands below learns"
    )
    samples: int = Field(64, ge=2, description="calibration pictures, whose values at one cut are kept in memory")
    operators: int = Field(1, ge=1, description="with weights, that gradients train together")
    learned: list[Learned] = Field(
        ["weights", "biases", "scales"], min_length=1, description="by gradients; ranges: scales of activations"
    )
    learning_rate: float = Field(1.5e-2, gt=0, description="integer steps per iteration, about, for weights")
    warm_up: int = Field(10, ge=0, description="iterations over which the rate rises")
    batch: int = Field(4, ge=1, description="pictures, of one size")
    iterations: int = Field(100, ge=1, description="for each part")
    minutes: float = Field(5, gt=0, description="parts that gradients do not reach by then stay as they are")


class Training(_Part):
    """Training the whole network against FP32 (see `quant.qat`)."""

    start: Literal["ptq", "recon"] = Field(
        "recon", description="what --method qat begins with: the plan itself, or that plan reconstructed"
    )
    outputs: OutputLoss = Field(
        "soft_labels", description="divergence from FP32's probabilities; logits, probabilities: squared distance"
    )
    nodes: list[str | Annotated[int, Field(lt=0)]] = Field(
        [],
        description="inner tensors that are to be like FP32's, by name; -3: what the third last operator with weights "
        "reads, whatever an export named it",
    )
    every: int = Field(
        3, ge=0, description="of so many operators with weights, what one writes is to be like FP32's, too; 0: none"
    )
    nodes_weight: float = Field(1.0, gt=0, description="of all inner tensors together, beside an output")
    learned: list[Learned] = Field(
        ["weights"],
        min_length=1,
        description="ranges: scales of activations; biases that are not learned are corrected at every look",
    )
    quantizers: Quantizers = Field("lsq", description="how ranges move, where they are learned; see `quant.quantizer`")
    momentum: Fraction = Field(0.9, description="of quantizers: moving_average; what is kept of the batches before")
    samples: int = Field(128, ge=1, description="calibration pictures")
    average: Fraction = Field(
        0.9, description="what is measured and kept is a moving average of the states; so much of it stays at a step"
    )
    learning_rate: float = Field(5e-3, gt=0, description="integer steps per iteration, about, for weights")
    warm_up: int = Field(10, ge=0, description="iterations over which the rate rises")
    batch: int = Field(8, ge=1, description="pictures, of one size")
    processes: int = Field(
        1, ge=1, description="of Paddle's launcher, with a batch each: on a GPU each where there are as many"
    )
    iterations: int = Field(60, ge=1)
    minutes: float = Field(20, gt=0, description="no iteration begins later")
    evaluate_every: int = Field(10, ge=1, description="iterations between two looks at pictures of the search split")
    patience: int = Field(4, ge=1, description="looks without a better state before it stops")

    @model_validator(mode="after")
    def _moves_something(self) -> Training:
        if self.quantizers != "lsq" and "ranges" not in self.learned:
            raise ValueError(f"quantizers: {self.quantizers} moves ranges; add ranges to learned")
        return self


class PaddleSlim(_Part):
    """Arguments of paddleslim.quant.quant_post_static."""

    algo: Literal["hist", "avg", "abs_max", "mse", "KL", "emd"]  # it writes no scales for min_max
    hist_percent: float = Field(0.9999, gt=0.5, le=1)
    samples: int = Field(ge=1, description="pictures, one a batch")


class TargetChoice(_Part):
    method: MethodName = "ptq"
    activations: ActivationType = Field(
        "uint8", description="uint8 asymmetric, int8 symmetric; left out: the target's first"
    )
    equalization: EqualizationScope = Field(
        "depthwise", description="convolutions whose input channels are evened out; all: dense ones are centred too"
    )
    placement: Placement = Field(
        "inputs",
        description="inputs: what convolutions are given is in INT8; outputs: what they write, too, for integer "
        "kernels; left out: the target's first",
    )
    weights: Literal["auto", "full", "reduced"] = Field(
        "auto", description="reduced: 7 bits, for processors whose 8-bit products saturate; auto: where this one does"
    )
    fp32: list[str] = Field(default_factory=list, description="operators that stay in FP32, by their output tensors")
    min_coverage: float | None = Field(None, ge=0, le=1, description="overrides ladder.min_coverage")
    judged_in: Literal["threads", "processes"] = Field(
        "threads", description="processes: one for each thread, for small pictures on Paddle (see quant.shares)"
    )


class KeptOperators(_Part):
    """Operators that stay in FP32 on every target; what is left out matches any (see `quant.policy`)."""

    reason: str = Field(min_length=1, description="why, for the plan and its readers")
    kinds: list[Literal["Conv", "ConvTranspose", "MatMul"]] = []
    names: list[str] = Field([], description="what the names of their output tensors start with")
    weights: bool | None = Field(None, description="true: those by constant weights, false: of activations alone")
    after: list[str] = Field([], description="ONNX kinds; those whose input depends on an operator of these kinds")
    loops: bool | None = Field(None, description="true: those inside of loops, false: those outside")
    inputs: list[str] = Field([], description="inputs of the model; those that read one of them")

    @model_validator(mode="after")
    def _names_something(self) -> KeptOperators:
        if all(value in ([], None) for key, value in self if key != "reason"):
            raise ValueError("names no operator: give kinds, names, weights, after, loops or inputs")
        return self


class Gate(_Part):
    max_drop: float = Field(ge=0, description="points of the metric in percent")
    max_relative_drop: float = Field(ge=0, description="percent of the FP32 metric")


class Latency(_Part):
    shape: Sizes = Field(description="of the input; timed, counted for coverage")
    shapes: list[Sizes] = Field([], description="what `quant bench` times, at several batches; empty: shape alone")
    runs: int = Field(ge=1)


class Recipe(_Part):
    """Facts and choices for one model; `load_recipe` also checks that they fit each other."""

    schema_: Literal[1] = Field(alias="schema")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str
    task: Task
    model: ModelSource
    expect: Expectation
    inference: dict[str, Any] = Field(description="inference.yml for sources that ship none (PaddleX layout)")
    data: Data
    calibration: Calibration
    ladder: Ladder
    search: Search = Field(default_factory=lambda: Search(minutes=0))
    reconstruction: Reconstruction = Field(default_factory=lambda: Reconstruction.model_validate({}))
    qat: Training = Field(default_factory=lambda: Training.model_validate({}))
    paddleslim: PaddleSlim
    targets: dict[TargetName, TargetChoice] = Field(min_length=1)
    policy: list[KeptOperators] = Field([], description="operators that stay in FP32 by what they are")
    metric: str
    gate: Gate
    latency: Latency
    tolerance: float = Field(gt=0, description="largest difference allowed between original and prepared")
    seed: int = Field(0, ge=0)

    @field_validator("targets", mode="before")
    @classmethod
    def _as_the_targets_want(cls, targets: Any) -> Any:
        """What is left out of a choice is taken from its target; what is no choice is left to the next check."""
        if not isinstance(targets, dict):
            return targets
        return {name: _completed(name, choice) for name, choice in targets.items()}

    @property
    def clocked(self) -> bool:
        """Whether the clock may decide what comes out: in a search, or where `minutes` end a training."""
        return self.search.minutes > 0 or self.ladder.method != "ptq"

    def content_hash(self) -> str:
        """Hex sha256 of everything the recipe says, after merging and overriding."""
        text = json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _completed(name: Any, choice: Any) -> Any:
    if name not in TARGETS or not isinstance(choice, dict):
        return choice
    target = TARGETS[name]
    return {"activations": target.activations[0], "placement": target.placements[0], **choice}


def class_labels(recipe: Recipe) -> list[str]:
    """Names of the classes that a classifier or a layout model knows, by their index; none for other tasks."""
    place: Any = recipe.inference
    for key in ("label_list",) if recipe.task == "layout_detection" else ("PostProcess", "Topk", "label_list"):
        place = place.get(key) if isinstance(place, dict) else None
    return [str(label) for label in place] if isinstance(place, list) else []


@dataclass(frozen=True)
class RecipeProblem:
    """One thing that is wrong in a recipe file."""

    file: str
    key: str
    value: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key} = {self.value}: {self.allowed}"


class RecipeError(InputError):
    """All problems of one recipe at once."""

    def __init__(self, problems: list[RecipeProblem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def recipes_dir() -> Path:
    """The folder of the recipes: inside the installed package, else beside it in a checkout."""
    installed = Path(__file__).parent / "_recipes"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge, override and check the recipe of a model.

    Args:
        name: a model name, see `recipe_names`, or the path of a YAML file.
        overrides: `key=value` pairs; dots descend into mappings and, by index, into lists; the value is YAML.

    Raises:
        InputError: no such recipe.
        RecipeError: the overrides or what they make of the file is wrong; lists every problem.

    Example:
        >>> load_recipe("PP-OCRv4_mobile_rec", ["calibration.samples=64"]).calibration.samples
        64
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else recipes_dir() / f"{name}.yaml"
    if not is_file(path) or (Path(name).name != name and not name.endswith((".yaml", ".yml"))):
        known = ", ".join(recipe_names())
        raise InputError(f"no recipe for model '{name}'. Known models: {known} (see `quant list`)")
    document = _merged(path)
    _apply(overrides, document)
    return _checked(path.name, document)


def limited_to(recipe: Recipe, targets: Sequence[str]) -> Recipe:
    """The recipe with only some of its targets, all where none is given; raises InputError for an unknown one."""
    unknown = [name for name in targets if name not in recipe.targets]
    if unknown:
        raise InputError(f"{recipe.name} has no target '{unknown[0]}'; it has {', '.join(recipe.targets)}")
    kept = {name: choice for name, choice in recipe.targets.items() if not targets or name in targets}
    return recipe.model_copy(update={"targets": kept})


def _merged(path: Path) -> dict[str, Any]:
    document = _read_mapping(path)
    base = document.pop("base", None)
    if base is None:
        return document
    known = {base_path.stem: base_path for base_path in sorted((recipes_dir() / "_base").glob("*.yaml"))}
    if not isinstance(base, str) or base not in known:
        raise RecipeError([RecipeProblem(path.name, "base", _short(base), f"must be one of {', '.join(known)}")])
    return _deep_merge(_merged(known[base]), document)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        document = parse_yaml(read_bounded(path, MOST_YAML).decode("utf-8"))
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())
        raise RecipeError([RecipeProblem(path.name, "(file)", "unreadable", line)]) from error
    if not isinstance(document, dict):
        kind = type(document).__name__
        raise RecipeError([RecipeProblem(path.name, "(file)", kind, "must be a mapping of keys")])
    return document


def _deep_merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _deep_merge(merged[key], value) if both else value
    return merged


def _apply(overrides: Sequence[str], document: dict[str, Any]) -> None:
    """Write all overrides into the document, or name every one that cannot be written."""
    problems: list[RecipeProblem] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        try:
            if not equals or not key:
                raise ValueError("write it as key=value, for example --set calibration.samples=64")
            if key.count(".") > _DEEPEST_KEY:
                raise ValueError("there is no such key; `quant describe MODEL` shows all keys")
            _write(document, key, _yaml_value(text))
        except ValueError as error:
            value = _short(text) if equals else "(missing)"
            problems.append(RecipeProblem("--set", key or "(missing)", value, str(error)))
    if problems:
        raise RecipeError(problems)


def _yaml_value(text: str) -> Any:
    try:
        return parse_yaml(text)
    except DocumentError as error:
        raise ValueError("is not a YAML value") from error


def _write(document: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    place: Any = document
    for parent in parents:
        slot = _slot(place, parent)
        place = place.setdefault(slot, {}) if isinstance(place, dict) else place[slot]
    place[_slot(place, last)] = value


def _slot(place: Any, part: str) -> str | int:
    """What a part of a dotted key is in `place`: a key of a mapping, an index of a list."""
    if isinstance(place, dict):
        return part
    if not isinstance(place, list):
        raise ValueError("there is no such key; `quant describe MODEL` shows all keys")
    indexes = [str(index) for index in range(len(place))]
    if part not in indexes:
        raise ValueError(f"'{part}' must be an index, counted from 0, of a list of length {len(place)}")
    return int(part)


def _checked(file: str, document: dict[str, Any]) -> Recipe:
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError([_problem(file, detail) for detail in error.errors()]) from error
    problems = [RecipeProblem(file, key, _short(value), allowed) for key, value, allowed in _misfits(recipe)]
    if problems:
        raise RecipeError(problems)
    return recipe


_DEEPEST_KEY = 20
"""Dots in a key of --set."""

Misfit = tuple[str, Any, str]
"""Dotted key, value, what is allowed."""


def _misfits(recipe: Recipe) -> Iterator[Misfit]:
    """What is wrong only beside other fields. Outside of pydantic, which would name the first alone, without a key."""
    yield from _not_json("inference", recipe.inference)
    yield from _not_computed(recipe.targets)
    yield from _foreign_sets(recipe)
    rotations, labels = recipe.data.rotations, class_labels(recipe)
    if rotations and len(rotations.angles) != len(labels):
        angles = rotations.angles
        yield "data.rotations.angles", angles, f"has {len(angles)} angles, inference names {len(labels)} classes"
    if recipe.metric not in METRICS[recipe.task]:
        yield "metric", recipe.metric, f"must be one of {', '.join(METRICS[recipe.task])} for {recipe.task}"


def _not_json(key: str, value: Any) -> Iterator[Misfit]:
    """What YAML's plain values have and JSON's have not: .inf, .nan, and keys that are no text."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _not_json(f"{key}.{name}", item)
            if not isinstance(name, str):
                yield f"{key}.{name}", name, "a key must be text; write it in quotes"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_json(f"{key}.{index}", item)
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, value, "must be a finite number; write text in quotes"


def _not_computed(targets: dict[TargetName, TargetChoice]) -> Iterator[Misfit]:
    """Choices that a target's runtime does not compute or does not run."""
    for name, choice in targets.items():
        target = TARGETS[name]
        allowed: dict[str, tuple[str, ...]] = {
            "activations": target.activations,
            "equalization": target.equalizations,
            "placement": target.placements,
        }
        for key, values in allowed.items():
            value = getattr(choice, key)
            if value not in values:
                yield (
                    f"targets.{name}.{key}",
                    value,
                    f"{name} does not compute it rightly; allowed: {', '.join(values)}",
                )


def _foreign_sets(recipe: Recipe) -> Iterator[Misfit]:
    """Sets that are not registered, or serve neither the task nor the one whose pictures are turned."""
    from calib_data.registry import dataset_names, load_entry  # not above: it imports this module

    rotations, known = recipe.data.rotations, dataset_names()
    tasks = {recipe.task, rotations.of} if rotations else {recipe.task}
    # Files of sets are read when they are named here; all of them only where there is something to say.
    foreign = [name for name in recipe.data.sets if name not in known or load_entry(name).task not in tasks]
    if foreign:
        allowed = [name for name in known if load_entry(name).task in tasks]
        yield "data.sets", foreign, f"must be of {', '.join(allowed)}; folders are given with --data"


def _problem(file: str, detail: Any) -> RecipeProblem:
    key = ".".join(str(part) for part in detail["loc"]) or "(file)"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        allowed = f"unknown key; allowed here: {_siblings(detail['loc'])}"
        return RecipeProblem(file, key, _short(detail["input"]), allowed)
    if detail["type"] == "missing":
        return RecipeProblem(file, key, "(missing)", "is required")
    return RecipeProblem(file, key, _short(detail["input"]), message)


def _siblings(location: tuple[int | str, ...]) -> str:
    """Keys allowed beside an unknown one, found by walking the schema."""
    schema = Recipe.model_json_schema()
    place = schema
    for part in location[:-1]:
        if "$ref" in place:
            place = schema["$defs"][place["$ref"].rsplit("/", 1)[1]]
        if isinstance(part, int):
            place = place.get("items", {})
        else:
            place = place.get("properties", {}).get(part) or place.get("additionalProperties") or {}
        for option in place.get("anyOf", []):
            if "$ref" in option:
                place = option
    if "$ref" in place:
        place = schema["$defs"][place["$ref"].rsplit("/", 1)[1]]
    return ", ".join(place.get("properties", {})) or "none"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
