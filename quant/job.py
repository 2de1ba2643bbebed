"""What every stage starts from: the recipe, the model, the samples, and the prepared FP32 model."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx

from eval.dataset import SPLITS, Sample
from eval.evaluation import readable
from quant.archive import Progress
from quant.conversion import reference_outputs
from quant.errors import InputError
from quant.graph import Graph
from quant.loop import has_loop
from quant.manifest import products_saturate, versions
from quant.prepare import check_outputs, prepare_apart
from quant.recipe import Recipe
from quant.runtime import Feed, target_format
from quant.selection import Selection, select, warn_of_few
from quant.source import SHIPPED_FILES, ModelFiles, cache_dir, is_twin, resolve_model, unchanged
from quant.stage import StageStore, code_digest, digest
from quant.target import TargetName
from quant.task import TaskAdapter, make_task

PROOF_PICTURES = 3
LOOP_PICTURES = 8
"""Of the calibration split, to count how many steps a loop takes."""
TWINS = "twins"
"""Folder of results that holds the runs of twins."""

Item = TypeVar("Item")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What the command line says beside the recipe.

    Attributes:
        data: sets or folders in place of the recipe's sets.
        asked: words of the command line that a suggested command needs as well.
        report_split: whether an evaluation takes the report split of `data`, as a run does, and not all of it.
        offers, shard_samples: folder in which evaluations of more samples are left for others to judge, if there are
            others (see `quant.shards`).
    """

    results: Path
    threads: int
    progress: Progress
    model_dir: Path | None = None
    data: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()
    report_split: bool = False
    offers: Path | None = None
    shard_samples: int = 0

    def run_command(self, model: str, twin: bool = False) -> str:
        """What quantizes a model or its twin, for the user to type."""
        return shlex.join(["quant", "run", *(["--twins"] if twin else []), model, *self.asked])


@dataclass(frozen=True)
class Job:
    """Everything a run starts from.

    Attributes:
        targets: that the work is for, which its progress says; none: for all of the recipe.
    """

    recipe: Recipe
    options: Options
    files: ModelFiles
    selection: Selection
    store: StageStore
    targets: tuple[TargetName, ...] = ()

    def title(self, step: str) -> str:
        """How progress names a step."""
        served = f" for {', '.join(self.targets)}" if self.targets else ""
        return f"{self.recipe.name}: {step}{served}"

    @property
    def key(self) -> dict[str, Any]:
        """What every stage of the model depends on."""
        return {
            "model": self.files.sha256,
            "inference": digest(self.files.inference_yml),
            "threads": self.options.threads,
            "versions": versions(),
            "saturating": products_saturate(),
            "task": self.recipe.task,
        }

    @property
    def adapter(self) -> TaskAdapter:
        return make_task(self.recipe.task, self.files.inference_yml, self.recipe.name)

    @property
    def run_name(self) -> str:
        selection = self.selection
        splits = (selection.calibration, selection.search, selection.report)
        return digest(
            {
                **self.key,
                "code": code_digest(),
                "recipe": self.recipe.content_hash(),
                "samples": [sample_ids(split) for split in splits],
                "labels": labels_digest([*selection.search, *selection.report]),
            }
        )[:12]


def start(recipe: Recipe, options: Options) -> Job:
    """Find the model and the data of a run."""
    files = resolve_model(recipe, options.model_dir, options.progress)
    selection = select(recipe, options.data, options.progress)
    warn_of_few(recipe, selection)
    return Job(recipe, options, files, selection, StageStore(cache_dir() / "stages"))


def say_inputs(job: Job) -> None:
    """Say which weights and which pictures the work is done with."""
    selection, name = job.selection, job.recipe.name
    log.info("%s: weights: %s", name, job.files.source)
    splits = {"evaluation" if split == "report" else split: getattr(selection, split) for split in SPLITS}
    counts = "; ".join(f"{use}: {len(samples)} samples" for use, samples in splits.items() if samples)
    places = {found: f" ({record.source})" for found, record in selection.records.items()}
    sets = sorted({sample.dataset for samples in splits.values() for sample in samples})
    log.info("%s: %s; from %s", name, counts, ", ".join(f"{found}{places.get(found, '')}" for found in sets))


def runs_folder(recipe: Recipe, results: Path, model_dir: Path | None) -> Path:
    """The folder of a model's runs; those of twins lie apart, where none passes for one of the official model."""
    parent = results / TWINS if is_twin(recipe, model_dir) else results
    return parent / recipe.name


def prepared_stage(job: Job) -> Path:
    """Stage: the folded FP32 model in `prepared`, the model as shipped in both formats in `shipped`, and the proof."""

    def build(folder: Path) -> None:
        feeds = first_feeds(job, job.selection.calibration or job.selection.report, PROOF_PICTURES)
        job.options.progress(f"{job.recipe.name}: importing and folding", 0, 1)
        shipped, prepared = folder / "shipped", folder / "prepared"
        with unchanged(job.files):
            prepare_apart(job.files, feeds, job.recipe.tolerance, job.options.threads, folder)
            check_outputs(job.files, job.adapter, feeds[0], reference_outputs(folder / "import"))
            for old, new in (("imported.onnx", shipped), ("prepared.onnx", prepared)):
                new.mkdir()
                (folder / old).rename(new / "inference.onnx")
            for source, name in zip((job.files.model, job.files.params), SHIPPED_FILES[job.files.format], strict=True):
                shutil.copyfile(source, shipped / name)
        shutil.rmtree(folder / "import")
        job.options.progress(f"{job.recipe.name}: importing and folding", 1, 1)

    return job.store.result("prepared", {**job.key, "tolerance": job.recipe.tolerance}, build)


def fp32_folders(job: Job, target: TargetName) -> dict[str, Path]:
    """Folders of FP32 as shipped, `fp32`, and for targets that take ONNX as prepared, `fp32_prepared`."""
    stage = prepared_stage(job)
    folders = {"fp32": stage / "shipped"}
    return folders if target_format(target) == "paddle" else {**folders, "fp32_prepared": stage / "prepared"}


def prepared_graph(job: Job) -> Graph:
    return Graph(onnx.load(prepared_stage(job) / "prepared" / "inference.onnx"))


def latency_feed(job: Job) -> Feed:
    """Inputs of the recipe's latency shape; with a loop, whose length hangs on it, a real picture."""
    if has_loop(prepared_graph(job)):
        return first_feeds(job, job.selection.calibration or job.selection.report, 1)[0]
    return feed_of(job, job.recipe.latency.shape)


def work_feeds(job: Job) -> list[Feed]:
    """Inputs that the work of each operator is counted on: several pictures where a loop decides how much there is."""
    if has_loop(prepared_graph(job)):
        return first_feeds(job, job.selection.calibration or job.selection.report, LOOP_PICTURES)
    return [latency_feed(job)]


def feed_of(job: Job, shape: Sequence[int]) -> Feed:
    """Inputs to time a model with: noise as the picture, of a given shape, beside it what goes with such a picture.

    Args:
        shape: batch, channels, height, width.
    """
    batch, _, height, width = shape
    inputs = job.adapter.preprocess(np.full((height, width, 3), 128, dtype=np.uint8)).inputs
    picture = picture_input(inputs)
    beside = {name: np.repeat(values, batch, axis=0) for name, values in inputs.items() if name != picture}
    return {picture: noise(job.recipe, shape), **beside}


def picture_input(inputs: Feed) -> str:
    """Name of the input that holds the picture; others hold numbers about it."""
    return next(name for name, values in inputs.items() if values.ndim == 4)


def noise(recipe: Recipe, shape: Sequence[int]) -> np.ndarray:
    """An input to time a model with: float32, between -1 and 1."""
    return np.random.default_rng(recipe.seed).uniform(-1, 1, shape).astype(np.float32)


def calibration_feeds(job: Job, step: str, limit: int | None = None) -> Iterator[Feed]:
    samples = job.selection.calibration[:limit]
    pictures = readable(samples, job.adapter, [])
    for _, prepared in tracked(pictures, job.options.progress, job.title(step), len(samples)):
        yield prepared.inputs


def first_feeds(job: Job, samples: Sequence[Sample], count: int) -> list[Feed]:
    """The first pictures that can be read."""
    feeds = [prepared.inputs for _, prepared in islice(readable(samples, job.adapter, []), count)]
    if not feeds:
        raise InputError(f"none of {len(samples)} pictures can be read, first {samples[0].image}; give another --data")
    return feeds


def tracked(items: Iterable[Item], progress: Progress, what: str, total: int) -> Iterator[Item]:
    """Report every item that has been worked on."""
    progress(what, 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        progress(what, done, total)


def counted(progress: Progress, what: str, total: int) -> Callable[[], None]:
    """A callable that reports one more of `total`."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    progress(what, 0, total)
    return step


def sample_ids(samples: Sequence[Sample]) -> list[str]:
    return [sample.id for sample in samples]


def labels_digest(samples: Sequence[Sample]) -> str:
    """Hash of sets and labels: a label that was mended is another input."""
    return digest([(sample.dataset, str(sample.label)) for sample in samples])
