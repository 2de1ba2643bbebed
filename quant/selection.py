"""Which pictures serve what: calibration, search and report never share one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from calib_data.registry import DatasetFolder, generated_dataset, resolve_dataset
from eval.dataset import SPLITS, Dataset, Sample, Split, check_disjoint, pick, read_dataset, split
from quant.archive import Progress
from quant.errors import InputError, Unavailable
from quant.manifest import DataRecord
from quant.recipe import Recipe
from quant.source import without_places


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
    for dataset in datasets:
        chosen = split(dataset.samples, recipe.data.splits)
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


def find_datasets(
    recipe: Recipe, data: Sequence[str], progress: Progress | None
) -> tuple[list[Dataset], dict[str, str]]:
    """The sets that can be had, and why others cannot.

    Sets that are named in `data` must exist; those of the recipe may be missing.
    """
    if data:
        return [read_dataset(resolve_dataset(name, recipe.task, progress)) for name in data], {}
    found: list[DatasetFolder] = []
    unavailable = {}
    for name in recipe.data.sets:
        try:
            found.append(resolve_dataset(name, recipe.task, progress))
        except Unavailable as error:
            unavailable[name] = without_places(error.reason)
    if not found:
        generated = recipe.data.generated
        found = [generated_dataset(generated.kind, generated.samples, generated.seed, progress)]
    return [read_dataset(folder) for folder in found], unavailable


def unused(datasets: Sequence[Dataset], used: Collection[str]) -> tuple[list[Sample], int]:
    """All samples but those whose id is in `used`, and how many were dropped."""
    samples = list({sample.id: sample for dataset in datasets for sample in dataset.samples}.values())
    kept = [sample for sample in samples if sample.id not in used]
    return kept, len(samples) - len(kept)
