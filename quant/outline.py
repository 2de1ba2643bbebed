"""What a command would do, as plain values for `--dry-run`: no picture is drawn for it, and no twin trained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from calib_data.registry import GENERATED, generated_folder
from eval.dataset import SPLITS
from quant.job import TWINS, Job, Options, runs_folder, start
from quant.judging import Evaluation
from quant.recipe import Recipe
from quant.selection import Selection, select, why_generated
from quant.source import resolve_model

Outline = dict[str, Any]

_NAMELESS = "the run has no name before, and what training would take is not known"


def run_outline(recipe: Recipe, options: Options) -> Outline:
    """What `quant run` would do.

    Raises:
        Unavailable: the model, or a set that was asked for by name, cannot be had.
        InputError: the model or a set is broken.
    """
    unavailable = why_generated(recipe, options.data, options.progress)
    if unavailable is None:
        return _outline_of(start(recipe, options))
    source = resolve_model(recipe, options.model_dir, options.progress).source
    generated = recipe.data.generated
    damaged = generated_folder(generated.kind, generated.samples, generated.seed).is_dir()
    anew = " anew, since those in the cache are damaged" if damaged else ""
    drawn = f"the built-in generator would draw {generated.samples} pictures{anew} (seed {generated.seed})"
    pictures = _expected(recipe, f"{GENERATED}{generated.kind}", drawn)
    folder = runs_folder(recipe, options.results, options.model_dir)
    state = "damaged" if damaged else "not drawn yet"
    note = f"the pictures are {state}, their numbers are those to be expected; {_NAMELESS}"
    return _nameless(recipe, source, {**pictures, "unavailable": unavailable}, folder, note)


def twin_outline(recipe: Recipe, options: Options) -> Outline:
    """What `quant run --twins` would do where the twin is not trained yet.

    Raises:
        InputError: the model has no twin.
    """
    from quant.twins import MINUTES, check_known

    check_known(recipe.name)
    source = f"its twin, which would be trained before, in at most {MINUTES:g} minutes"
    if options.data:
        pictures = _counted(select(recipe, options.data, options.progress))
    else:
        drawn = f"{recipe.data.generated.samples} pictures of its world would be drawn"
        pictures = _expected(recipe, f"{GENERATED}twin", drawn)
    note = f"the twin is not trained yet; {_NAMELESS}"
    return _nameless(recipe, source, pictures, options.results / TWINS / recipe.name, note)


def eval_outline(found: Evaluation) -> Outline:
    """What `quant eval` would do."""
    samples = found.job.selection.report
    return {
        "model": found.job.recipe.name,
        "source": found.job.files.source,
        "data": dict(sorted(Counter(sample.dataset for sample in samples).items())),
        "samples": {"report": len(samples), "left out, seen before": found.dropped},
        "targets": {target: "judged" for target in found.job.recipe.targets if target in found.manifest.artifacts},
        "folder": str(found.folder),
    }


def _outline_of(job: Job) -> Outline:
    """Of a run whose model and pictures are there."""
    folder = runs_folder(job.recipe, job.options.results, job.options.model_dir)
    # What hangs on the clock is part of the run's name.
    named = None if job.recipe.clocked else folder / job.run_name
    return {
        "model": job.recipe.name,
        "source": job.files.source,
        **_counted(job.selection),
        **_choices(job.recipe),
        **_training(job),
        "folder": str(named or folder),
        "done": named is not None and named.is_dir(),
    }


def _nameless(recipe: Recipe, source: str, pictures: Outline, folder: Path, note: str) -> Outline:
    """Of a run that something has to be made for."""
    made = {"folder": str(folder), "done": False, "note": note}
    return {"model": recipe.name, "source": source, **pictures, **_choices(recipe), **made}


def _counted(selection: Selection) -> Outline:
    samples = {purpose: len(getattr(selection, purpose)) for purpose in SPLITS}
    data = {name: record.model_dump(mode="json") for name, record in selection.records.items()}
    return {"data": data, "unavailable": selection.unavailable, "samples": samples}


def _expected(recipe: Recipe, name: str, drawn: str) -> Outline:
    """What `_counted` would be about, of a set that would be generated."""
    rotations, count = recipe.data.rotations, recipe.data.generated.samples
    each = len(rotations.angles) if rotations else 1
    expected = {purpose: each * round(share * count) for purpose, share in recipe.data.splits}
    most = {"calibration": recipe.calibration.samples, "search": recipe.ladder.search_samples}
    samples = {purpose: min(number, most.get(purpose, number)) for purpose, number in expected.items()}
    return {"data": {name: {"source": drawn, **expected}}, "unavailable": {}, "samples": samples}


def _choices(recipe: Recipe) -> Outline:
    targets = {name: f"{choice.method}, {choice.activations} activations" for name, choice in recipe.targets.items()}
    return {"targets": targets, "ladder": recipe.ladder.method}


def _training(job: Job) -> Outline:
    """At most how many minutes training would take, from one iteration; nothing where none is asked for."""
    if job.recipe.ladder.method == "ptq":
        return {}
    from quant.rungs import estimated_minutes  # not above: Paddle is wanted where something is trained

    return {"training, at most minutes a plan": estimated_minutes(job)}
