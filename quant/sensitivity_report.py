"""The sensitivity of a model on one target: measured once, told as a table, JSON, a plot and advice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quant.advice import GroupImpact, OperatorImpact, advise
from quant.archive import staged
from quant.graph import Graph
from quant.job import Job, counted, labels_digest, prepared_graph, runs_folder, sample_ids
from quant.ladder import SearchScore
from quant.plan import QuantPlan, load_plan
from quant.planning import SearchJudge, alone_errors, alone_stage, least_coverage, part_errors
from quant.record import read_record
from quant.sensitivity import (
    OutputError,
    kernel_groups,
    kernel_kind,
    output_channels,
    score_worst,
    worst_first,
)
from quant.stage import file_digests
from quant.target import TargetName

COLUMNS = ("Damage %", "SNR dB", "Work %", "Weights %", "Disc. %", "Drop")
NOT_KNOWN = "-"

SCORED = 200
"""Pictures of the search split that single operators are scored on: a pass over all of them for each is most of the
time. Kinds change more, and are few: they are scored on all."""


@dataclass(frozen=True)
class Sensitivity:
    """What INT8 does to a model, the worst first.

    Attributes:
        groups: operators that share a kernel, all of them in INT8 at once.
    """

    model: str
    target: str
    operators: list[OperatorImpact]
    groups: list[GroupImpact]
    advice: list[str]

    def to_json(self) -> str:
        return json.dumps({"schema": 1, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    def table(self, most: int) -> tuple[list[str], list[list[str]]]:
        """Headings and rows of the worst operators."""
        rows = [[op.name, op.kind, str(op.position), *_cells(op)] for op in self.operators[:most]]
        return ["Operator", "Kind", "Position", *COLUMNS], rows

    def group_table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows of the groups."""
        rows = [[group.kind, str(group.operators), *_cells(group)] for group in self.groups]
        return ["All of a kind at once", "Operators", *COLUMNS], rows


def load_sensitivity(file: Path) -> Sensitivity:
    """Read what `Sensitivity.to_json` wrote."""
    return read_record(file, Sensitivity)


def report_sensitivity(job: Job, target: TargetName) -> tuple[Sensitivity, list[Path]]:
    """Measure, or find measured, and write `<results>/<model>/sensitivity/<target>.json` and `.svg`.

    Returns:
        The result, and the two files.
    """
    folder = _sensitivity_stage(job, target)
    runs = runs_folder(job.recipe, job.options.results, job.options.model_dir)
    places = []
    for name in ("sensitivity.json", "sensitivity.svg"):
        place = runs / "sensitivity" / f"{target}{Path(name).suffix}"
        with staged(place) as temporary:
            shutil.copyfile(folder / name, temporary)
        places.append(place)
    return load_sensitivity(folder / "sensitivity.json"), places


def _sensitivity_stage(job: Job, target: TargetName) -> Path:
    """Stage: `sensitivity.json` and `sensitivity.svg` of a target."""
    job, recipe, choice = replace(job, targets=(target,)), job.recipe, job.recipe.targets[target]
    full = alone_stage(job, choice)
    minimum = least_coverage(recipe, choice)
    search = job.selection.search
    key = {
        **job.key,
        "plan": file_digests(full),
        "name": recipe.name,
        "target": target,
        "samples": sample_ids(search),
        "labels": labels_digest(search),
        "metric": recipe.metric,
        "seed": recipe.seed,
        "damage_samples": recipe.ladder.damage_samples,
        "calibration": [recipe.calibration.model_dump(), sample_ids(job.selection.calibration)],
        "min_coverage": minimum,
    }

    def build(folder: Path) -> None:
        operators, groups = _measure(job, prepared_graph(job), load_plan(full), alone_errors(job, choice))
        advice = advise(recipe.name, operators, groups, 1 - minimum)
        result = Sensitivity(recipe.name, target, operators, groups, advice)
        (folder / "sensitivity.json").write_text(result.to_json(), encoding="utf-8")
        draw_sensitivity(result, folder / "sensitivity.svg")

    return job.store.result("sensitivity", key, build)


def _measure(
    job: Job, graph: Graph, plan: QuantPlan, errors: Mapping[str, OutputError]
) -> tuple[list[OperatorImpact], list[GroupImpact]]:
    operators = plan.quantized()
    on_all, on_few = SearchJudge(job, graph), SearchJudge(job, graph, SCORED)
    position = {name: index for index, name in enumerate(operators, start=1)}

    def score(names: set[str], judge: SearchJudge) -> SearchScore:
        return judge.score(plan.with_only(names, "measured without it"))

    scores = score_worst(errors, lambda name: score({name}, on_few))
    groups = kernel_groups(graph, operators.values())
    advance = counted(job.options.progress, job.title("damage per kind"), len(groups))
    group_errors = part_errors(job, plan, groups, advance)
    return (
        [
            OperatorImpact(
                name=name,
                op_type=operators[name].op_type,
                kind=kernel_kind(graph, operators[name]),
                position=position[name],
                channels=output_channels(graph, operators[name]),
                **_numbers(plan, {name}, errors[name], scores.get(name)),
            )
            for name in worst_first(errors)
        ],
        [
            GroupImpact(
                kind=kind,
                operators=len(groups[kind]),
                **_numbers(plan, groups[kind], group_errors[kind], score(groups[kind], on_all)),
            )
            for kind in worst_first(group_errors)
        ],
    )


def _numbers(plan: QuantPlan, names: set[str], error: OutputError, score: SearchScore | None) -> dict[str, Any]:
    """The fields of `Impact` but its kind."""
    work, weights = sum(op.macs for op in plan.operators) or 1, sum(op.parameters for op in plan.operators) or 1
    chosen = [op for op in plan.operators if op.name in names]
    return {
        "macs_share": sum(op.macs for op in chosen) / work,
        "weights_share": sum(op.parameters for op in chosen) / weights,
        "damage": error.damage,
        "snr_db": error.snr_db,
        "discordance": None if score is None else score.discordance,
        "drop": None if score is None else score.drop,
    }


def _cells(impact: OperatorImpact | GroupImpact) -> list[str]:
    shares = [f"{100 * share:.2f}" for share in (impact.macs_share, impact.weights_share)]
    return [
        f"{100 * impact.damage:.3g}",
        _number(impact.snr_db, 1),
        *shares,
        _number(impact.discordance, 2),
        _number(impact.drop, 2),
    ]


def _number(value: float | None, digits: int) -> str:
    return NOT_KNOWN if value is None else f"{value:.{digits}f}"


def draw_sensitivity(result: Sensitivity, file: Path) -> None:
    """Damage of each operator in the order of the graph as SVG, a colour for each kind; same result, same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kinds: Sequence[str] = sorted({op.kind for op in result.operators})
    with rc_context({"svg.hashsalt": f"{result.model} {result.target}"}):
        figure = Figure(figsize=(max(6.0, 0.12 * len(result.operators)), 4), layout="tight")
        axes = figure.add_subplot()
        for index, kind in enumerate(kinds):
            bars = [op for op in result.operators if op.kind == kind]
            heights = [100 * op.damage for op in bars]
            axes.bar([op.position for op in bars], heights, color=f"C{index}", label=kind)
        axes.set_title(f"{result.model} for {result.target}: one operator in INT8")
        axes.set_xlabel("operator, in the order of the graph")
        axes.set_ylabel("damage to the outputs, %")
        axes.legend()
        figure.savefig(file, format="svg", metadata={"Date": None})
