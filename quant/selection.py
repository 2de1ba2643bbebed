"""Which pictures serve what: calibration, search and report never share one."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from calib_data.registry import (
    FORMATS,
    GENERATED,
    DatasetFolder,
    generated_dataset,
    generated_folder,
    resolve_dataset,
)
from eval.dataset import (
    SPLITS,
    Dataset,
    Sample,
    Split,
    check_disjoint,
    in_model_words,
    pick,
    picture_of,
    read_dataset,
    split,
    turned,
)
from quant.archive import Progress
from quant.errors import InputError, Unavailable
from quant.manifest import DataRecord
from quant.recipe import Recipe, Task, class_labels
from quant.source import without_places
from quant.stage import whole

log = logging.getLogger(__name__)
NAMED = 5  # broken lines that are named on the terminal; the manifest has all

_SPARE = 1.2  # splits follow from hashes: now and then a share is a little smaller than it should be
_SHARES_OF_FEW: dict[Split, float] = {"calibration": 0.5, "search": 0.2, "report": 0.3}


@dataclass(frozen=True)
class Selection:
    """Samples by purpose, and where they came from."""

    calibration: list[Sample]
    search: list[Sample]
    report: list[Sample]
    records: dict[str, DataRecord]
    unavailable: dict[str, str]


def select(recipe: Recipe, data: Sequence[str], progress: Progress | None) -> Selection:
    """Split the recipe's sets, or the ones given, by content hash.

    Without any set that can be had, the built-in generator makes one.

    Raises:
        InputError: a set is broken, or a split is empty.
        Unavailable: a set that was asked for by name cannot be had.
    """
    datasets, unavailable = find_datasets(recipe, data, progress)
    parts: dict[Split, list[Sample]] = {name: [] for name in SPLITS}
    records = {}
    seen: set[str] = set()
    for dataset in datasets:
        fresh = [sample for sample in dataset.samples if sample.id not in seen]
        seen |= {sample.id for sample in fresh}
        chosen = split(fresh, recipe.data.splits)
        for purpose in SPLITS:
            parts[purpose] += chosen[purpose]
        records[dataset.folder.name] = DataRecord(
            source=without_places(dataset.folder.source),
            licence=dataset.folder.licence,
            broken=[without_places(sentence) for sentence in dataset.broken],
            calibration=len(chosen["calibration"]),
            search=len(chosen["search"]),
            report=len(chosen["report"]),
        )
    for purpose, samples in parts.items():
        if not samples:
            sets = ", ".join(records)
            raise InputError(f"the {purpose} split of {sets} is empty: too few pictures. Give a larger set with --data")
    check_disjoint(parts["calibration"], parts["search"], parts["report"])
    return Selection(
        pick(parts["calibration"], recipe.calibration.samples, recipe.seed),
        pick(parts["search"], recipe.ladder.search_samples, recipe.seed),
        parts["report"],
        records,
        unavailable,
    )


def warn_of_few(recipe: Recipe, selection: Selection) -> None:
    """Say where fewer samples calibrate than the recipe asks for, and how to have more."""
    found, asked = len(selection.calibration), recipe.calibration.samples
    if found >= asked:
        return
    mend = "give more by --data"
    if all(name.startswith(GENERATED) for name in selection.records):
        enough = math.ceil(_SPARE * recipe.data.generated.samples * asked / found)
        mend = f"generate more by --set data.generated.samples={enough}"
    if (share := recipe.data.splits.calibration) < _SHARES_OF_FEW["calibration"]:
        shares = ", ".join(f"{purpose}: {wide}" for purpose, wide in _SHARES_OF_FEW.items())
        mend += f", or take a larger share than {share:g} of them by --set 'data.splits={{{shares}}}'"
    log.warning("%s: %d samples calibrate, the recipe asks for %d; %s", recipe.name, found, asked, mend)


def find_datasets(
    recipe: Recipe, data: Sequence[str], progress: Progress | None
) -> tuple[list[Dataset], dict[str, str]]:
    """The sets that can be had, and why others cannot.

    Sets that are named in `data` must exist; those of the recipe may be missing.
    """
    if data:
        given = [_read(resolve_dataset(name, recipe.task, progress, _upright(recipe)), recipe) for name in data]
        return _named_apart(given), {}
    found, unavailable = _sets_at_hand(recipe, progress)
    if not found:
        generated = recipe.data.generated
        found = [generated_dataset(generated.kind, generated.samples, generated.seed, progress)]
    return [_read(folder, recipe) for folder in found], unavailable


def why_generated(recipe: Recipe, data: Sequence[str], progress: Progress | None) -> dict[str, str] | None:
    """Why no set can be had, where a run would first make the built-in one; None where all pictures are there."""
    if data:
        return None
    found, unavailable = _sets_at_hand(recipe, progress)
    generated = recipe.data.generated
    if found or whole(generated_folder(generated.kind, generated.samples, generated.seed)):
        return None
    return unavailable


def _sets_at_hand(recipe: Recipe, progress: Progress | None) -> tuple[list[DatasetFolder], dict[str, str]]:
    """The recipe's sets that can be had, and why others cannot."""
    found: list[DatasetFolder] = []
    unavailable = {}
    for name in recipe.data.sets:
        try:
            found.append(resolve_dataset(name, recipe.task, progress, _upright(recipe)))
        except Unavailable as error:
            unavailable[name] = without_places(error.reason)
    return found, unavailable


def _upright(recipe: Recipe) -> Task | None:
    """The other task whose sets will do, since their pictures are turned."""
    return recipe.data.rotations.of if recipe.data.rotations else None


def _named_apart(datasets: Sequence[Dataset]) -> list[Dataset]:
    """Sets whose folders bear one name get a number, so that each has a row of its own."""
    taken: Counter[str] = Counter()
    result = []
    for dataset in datasets:
        name = dataset.folder.name
        taken[name] += 1
        if taken[name] > 1:
            name = f"{name}-{taken[name]}"
            samples = tuple(replace(sample, dataset=name) for sample in dataset.samples)
            dataset = replace(dataset, folder=replace(dataset.folder, name=name), samples=samples)
        result.append(dataset)
    return result


def _read(folder: DatasetFolder, recipe: Recipe) -> Dataset:
    """A set as the recipe's task wants it: upright pictures are turned, classes are those of the model."""
    rotations = recipe.data.rotations
    if rotations and folder.format == FORMATS[rotations.of]:
        return turned(_read_lines(folder), rotations)
    known = class_labels(recipe)
    if folder.format == "coco":
        return in_model_words(_read_lines(folder), known)
    if folder.classes and len(folder.classes) != len(known):
        raise InputError(
            f"the data set {folder.name} has the classes {', '.join(folder.classes)}, "
            f"the model {recipe.name} has {', '.join(known)}; give another set"
        )
    return _read_lines(folder)


def _read_lines(folder: DatasetFolder) -> Dataset:
    dataset = read_dataset(folder)
    if count := len(dataset.broken):
        named = "; ".join(dataset.broken[:NAMED])
        more = "" if count <= NAMED else f"; and {count - NAMED} more, see `quant data verify`"
        log.warning("%s: %d broken label lines or pictures are left out: %s%s", folder.name, count, named, more)
    return dataset


def unused(samples: Iterable[Sample], used: Collection[str]) -> tuple[list[Sample], int]:
    """All samples but those made from a picture whose samples `used` names, and how many were dropped."""
    pictures = {picture_of(sample_id) for sample_id in used}
    different = {sample.id: sample for sample in samples}.values()
    kept = [sample for sample in different if sample.picture not in pictures]
    return kept, len(different) - len(kept)
