"""FP32 and INT8 side by side on the same pictures: outcomes per sample, rows per data set and pooled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from calib_data.registry import GENERATED
from eval.dataset import BrokenPicture, Sample, picture_of, read_sample
from eval.gate import POOLED, Evidence, JudgedRow, SkippedRow, judge
from eval.metric import Metric
from eval.statistics import estimate_drop, samples_needed
from quant.arrays import arrays_bytes
from quant.errors import InputError, Unavailable
from quant.recipe import Recipe
from quant.runtime import Feed, Session, target_format
from quant.storage import write_bytes
from quant.target import TargetName


class Prepared(Protocol):
    """A pre-processed picture."""

    @property
    def inputs(self) -> Feed: ...
    @property
    def context(self) -> Any: ...


class Adapter(Protocol):
    """Pre- and post-processing of a task."""

    def preprocess(self, image: Any) -> Any: ...
    def postprocess(self, outputs: list[Any], context: Any) -> Any: ...


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of one session pair.

    Attributes:
        ids, datasets: of each judged sample.
        fp32, int8: counts [samples, counts] of the metric, row i of both is the same sample.
        broken: one sentence for each picture that could not be read.
    """

    ids: list[str]
    datasets: list[str]
    fp32: np.ndarray
    int8: np.ndarray
    broken: list[str]

    def only(self, chosen: np.ndarray) -> Outcomes:
        """The samples for which `chosen`, bool[samples], is true."""
        places = np.flatnonzero(chosen)
        ids, datasets = ([names[place] for place in places] for names in (self.ids, self.datasets))
        return Outcomes(ids, datasets, self.fp32[chosen], self.int8[chosen], self.broken)

    def to_bytes(self) -> bytes:
        """A file's content, which does not depend on which process judged which sample."""
        texts = {"ids": self.ids, "datasets": self.datasets, "broken": sorted(self.broken)}
        arrays = {name: np.array(values, dtype=np.str_) for name, values in texts.items()}
        return arrays_bytes(fp32=self.fp32, int8=self.int8, **arrays)

    def save(self, file: Path) -> None:
        """Write the file that `load_outcomes` reads."""
        write_bytes(file, self.to_bytes())


def load_outcomes(file: Path | IO[bytes]) -> Outcomes:
    """Read what `Outcomes.save` wrote, or `Outcomes.to_bytes` gave."""
    with np.load(file, allow_pickle=False) as stored:
        texts = {name: [str(text) for text in stored[name]] for name in ("ids", "datasets", "broken")}
        return Outcomes(texts["ids"], texts["datasets"], stored["fp32"], stored["int8"], texts["broken"])


def readable(samples: Sequence[Sample], adapter: Adapter, broken: list[str]) -> Iterator[tuple[Sample, Prepared]]:
    """Pre-processed pictures one at a time; those that cannot be read are named in `broken` and left out."""
    for sample in samples:
        try:
            prepared: Prepared = adapter.preprocess(read_sample(sample))
        except BrokenPicture as error:
            broken.append(str(error))
            continue
        yield sample, prepared


def compare(
    open_pair: Callable[[], tuple[Session, Session]],
    samples: Sequence[Sample],
    adapter: Adapter,
    metric: Metric,
    workers: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> Outcomes:
    """Run FP32 and INT8 sessions on every sample, one picture at a time in each worker.

    Args:
        open_pair: opens an FP32 and an INT8 session; called once in each worker.
        advance: called after each picture, in the order of the samples.

    Raises:
        InputError: none of the pictures can be read.
    """
    place = threading.local()

    def judge_one(sample: Sample) -> tuple[Any, Any] | BrokenPicture:
        if not hasattr(place, "pair"):
            place.pair = open_pair()
        try:
            prepared: Prepared = adapter.preprocess(read_sample(sample))
        except BrokenPicture as error:
            return error
        outputs = (session.run(prepared.inputs) for session in place.pair)
        fp32, int8 = (metric.score(adapter.postprocess(o, prepared.context), sample.label) for o in outputs)
        return fp32, int8

    kept: list[Sample] = []
    counts: list[tuple[Any, Any]] = []
    broken: list[str] = []
    with ThreadPoolExecutor(workers) as pool:
        for sample, result in zip(samples, pool.map(judge_one, samples), strict=True):
            if isinstance(result, BrokenPicture):
                broken.append(str(result))
            else:
                kept.append(sample)
                counts.append(result)
            advance()
    if not kept:
        raise InputError(f"none of the {len(samples)} pictures to be judged can be read; first: {broken[:1]}")
    fp32, int8 = (np.array(column) for column in zip(*counts, strict=True))
    return Outcomes([s.id for s in kept], [s.dataset for s in kept], fp32, int8, broken)


def judged_rows(
    recipe: Recipe, target: TargetName, outcomes: Outcomes, metric: Metric, facts: dict[str, Any]
) -> list[JudgedRow | SkippedRow]:
    """The pooled row, which gates, and a row for each data set, which informs.

    Args:
        facts: further fields of `JudgedRow`, the same for every row of the target.
    """
    names = sorted(set(outcomes.datasets))
    rows: list[JudgedRow | SkippedRow] = []
    for name in [POOLED, *names]:
        chosen = np.array([name in (POOLED, dataset) for dataset in outcomes.datasets])
        rows.append(_row(recipe, target, name, outcomes.only(chosen), metric, facts))
    return rows


def evidence(datasets: Sequence[str]) -> Evidence:
    """Generated data is no evidence, nor is a row that is drawn for the most part.

    Args:
        datasets: the set of each sample of a row.
    """
    drawn = sum(name.startswith(GENERATED) for name in datasets)
    return "generated" if 2 * drawn > len(datasets) else "real"


def _row(
    recipe: Recipe,
    target: TargetName,
    dataset: str,
    outcomes: Outcomes,
    metric: Metric,
    facts: dict[str, Any],
) -> JudgedRow | SkippedRow:
    fp32, int8 = outcomes.fp32, outcomes.int8
    try:
        estimate = estimate_drop(metric, fp32, int8, seed=recipe.seed, pictures=[picture_of(i) for i in outcomes.ids])
    except Unavailable as error:
        return SkippedRow(
            model=recipe.name, task=recipe.task, target=target, reason=f"{dataset}: {error.reason}", fix=error.fix
        )
    gate, kind = recipe.gate, evidence(outcomes.datasets)
    return JudgedRow(
        model=recipe.name,
        task=recipe.task,
        target=target,
        format=target_format(target),
        dataset=dataset,
        samples=estimate.samples,
        metric=metric.name,
        fp32=estimate.fp32,
        int8=estimate.int8,
        drop=estimate.drop,
        relative_drop=estimate.relative_drop,
        drop_upper95=estimate.drop_upper95,
        relative_drop_upper95=estimate.relative_drop_upper95,
        discordance=estimate.discordance,
        gate=judge(
            estimate.drop, estimate.relative_drop, estimate.drop_upper95, estimate.relative_drop_upper95, gate, kind
        ),
        samples_needed=samples_needed(estimate, gate.max_drop, gate.max_relative_drop),
        details={"fp32": metric.report(fp32), "int8": metric.report(int8)},
        **facts,
    )
