"""Runs to report on: copies of a finished run, to which pictures are added on which FP32 and INT8 differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from test_pipeline import NAME
from tiny_run import TinyRun

from eval.dataset import Sample
from eval.evaluation import Outcomes
from eval.exhibits import write_exhibits
from eval.metric import make_metric
from quant.job import start
from quant.manifest import EXHIBITS
from quant.task import TextPrediction

HOSTILE = "<script>window.hacked = true</script>"


def copied(tiny: TinyRun, results: Path, name: str = NAME) -> Path:
    """The run's folder below other results, and under another model's name in what it says."""
    folder = Path(shutil.copytree(tiny.folder, results / name / tiny.folder.name))
    for file in ("metrics.json", "manifest.json"):
        document = json.loads((folder / file).read_text(encoding="utf-8"))
        for place in document["rows"] if file == "metrics.json" else [document]:
            place["model"] = name
        (folder / file).write_text(json.dumps(document), encoding="utf-8")
    return folder


def with_damages(folder: Path) -> Path:
    """The run as if full INT8 had failed on every target: what each operator costs alone is known."""
    for file in folder.glob("plans/*/plan.json"):
        plan = json.loads(file.read_text(encoding="utf-8"))
        for place, operator in enumerate(plan["operators"], start=1):
            operator["damage"] = place / 100
        file.write_text(json.dumps(plan), encoding="utf-8")
    return folder


def with_differences(tiny: TinyRun, folder: Path, target: str, read: str, count: int = 5) -> list[Sample]:
    """INT8 reads `read` where FP32 is right; returns the samples that differ, in no order."""
    samples = list(start(tiny.place.recipe, tiny.place.options()).selection.report)
    place = folder / EXHIBITS / target
    shutil.rmtree(place)
    predict = {s.id: (TextPrediction(str(s.label), 1.0), TextPrediction(read, 0.5)) for s in samples[:count]}
    same = [(TextPrediction(str(s.label), 1.0),) * 2 for s in samples[count:]]
    _write(place, samples, [*predict.values(), *same], predict)
    return samples[:count]


def _write(place: Path, samples: Sequence[Sample], found: Sequence[Any], predict: dict[str, Any]) -> None:
    metric = make_metric("line_accuracy")
    fp32, int8 = (
        np.array([metric.score(pair[side], s.label) for pair, s in zip(found, samples, strict=True)]) for side in (0, 1)
    )
    outcomes = Outcomes([s.id for s in samples], [s.dataset for s in samples], fp32, int8, [])
    write_exhibits(
        place, "text_recognition", metric, outcomes, samples, lambda sample: predict[sample.id], lambda w, h: (w, 48)
    )
