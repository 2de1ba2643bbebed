"""What training gives where every convolution and matrix product is in INT8: PTQ, reconstruction, QAT.

    .venv/bin/python benchmarks/qat.py PP-OCRv4_mobile_rec [--target onnxruntime] [--minutes 45] [--set KEY=VALUE]

Each method starts from the same PTQ plan and ends as an artifact that is judged on its own runtime, on the report
split; the difference to PTQ comes with the bound of the paired bootstrap, and so does that of the outputs' error,
which tells more: it changes on every picture, outcomes on few. The error is a share of what FP32 writes, so a picture
on which it writes next to nothing outweighs all others in the mean; the change of a picture is therefore given as
well, as a geometric mean over pictures. Writes results/qat-MODEL-TARGET.json, the table and the learning curve beside
it; where reconstruction is in closed form, the operators with the largest error, and what would be left of it if their
weights were not rounded; and the error of the whole PTQ plan if none of its weights were, or with ranges chosen on the
very picture that is judged. Methods that are not asked for stay. What is done is kept in the cache of stages, an
interrupted QAT goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.evaluation import readable
from eval.gate import judge
from eval.metric import Metric, make_metric
from eval.statistics import estimate_drop
from quant.bias import sequential_biases
from quant.calibration import collect_statistics
from quant.card import markdown_table
from quant.equalization import equalize
from quant.graph import Graph
from quant.job import Job, Options, first_feeds, prepared_graph, start
from quant.judging import outcomes_of
from quant.ladder import read_seconds
from quant.manifest import processor, products_saturate
from quant.observer import MeanSquaredError
from quant.pipeline import Quantized, quantize
from quant.plan import IntegerWeight, QuantPlan, corrected_graph
from quant.ptq import activation_tensors, observed_outputs, read_activations, scales_for_biases, stored_outputs
from quant.recipe import limited_to, load_recipe
from quant.runtime import Feed, onnx_session
from quant.sensitivity import relative_errors
from quant.simulation import simulated_session
from quant.stage import code_digest

METHODS = ("ptq", "recon", "qat", "recon+qat")
"""By the name of a row; QAT from the PTQ plan, and from what reconstruction left, as `--method qat` does it."""

RESULTS = Path(__file__).parents[1] / "results"

FINER = 256
"""How many times as fine the steps of weights are that count as not rounded."""

IDEALS = ("weights_not_rounded", "ranges_of_the_picture")
"""Parts of PTQ's row that are measured where it is asked for."""

JUDGED = 24
"""Pictures of the report split that ranges are chosen on, one by one."""

WORST = 10
"""Operators whose error is in the table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--minutes", type=float, default=45, help="of QAT, and of reconstruction by gradients")
    parser.add_argument("--methods", default=",".join(METHODS), help="ptq, the start of the others, is always run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    outcomes, errors = {}, {}
    file = RESULTS / f"qat-{arguments.model}-{arguments.target}.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["methods"] if file.is_file() else {}
    report: dict[str, Any] = {"model": arguments.model, "target": arguments.target}
    report |= {"processor": processor(), "saturating": products_saturate(), "methods": kept}
    before = {name: part for name, part in kept.get("ptq", {}).items() if name in IDEALS}
    asked = arguments.methods.split(",")
    for method in dict.fromkeys(["ptq", *asked]):
        job = _job(arguments, method)
        done = quantize(job, arguments.target)
        outcomes[method] = outcomes_of(job, arguments.target, done.artifact, job.selection.report)
        errors[method] = _errors(job, done.plan)
        report["methods"][method] = found = _compared(job, done, outcomes, method)
        found["output_error"] = float(errors[method].mean())
        if method == "ptq":
            found |= _ideal(job, done.plan, errors["ptq"]) if "ptq" in asked else before
        else:
            found["output_error_change"] = changes(errors["ptq"], errors[method], job.recipe.seed)
        print(json.dumps({method: found}, indent=1), flush=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(table(report), encoding="utf-8")
    if curves := {method: found["curve"] for method, found in report["methods"].items() if "curve" in found}:
        draw_curves(curves, f"{arguments.model} on {arguments.target}, all in INT8", file.with_suffix(".svg"))
    print(f"written: {file}")


def _job(arguments: argparse.Namespace, method: str) -> Job:
    begin = "recon" if "+" in method else "ptq"
    fixed = [f"ladder.method={method.rpartition('+')[2]}", f"qat.start={begin}", "ladder.coverage_steps=[]"]
    fixed.append(f"targets.{arguments.target}.min_coverage=1")
    fixed.append("ladder.fit_samples=0")  # plain PTQ is what the others start from
    limits = [f"{part}.minutes={arguments.minutes}" for part in ("reconstruction", "qat")]
    recipe = load_recipe(arguments.model, [*fixed, *limits, *arguments.overrides])
    options = Options(RESULTS, arguments.threads, lambda what, done, total: None)
    return start(limited_to(recipe, [arguments.target]), options)


def _compared(job: Job, done: Quantized, outcomes: dict[str, Any], method: str) -> dict[str, Any]:
    """A method against FP32, and against the PTQ that it started from: a negative drop is a gain."""
    metric, mine = make_metric(job.recipe.metric), outcomes[method]
    found: dict[str, Any] = {
        "code": code_digest(),
        "coverage": done.plan.coverage(),
        "ladder": [rung.document() for rung in done.rungs],
        "seconds": read_seconds(done.planned),
        "against_fp32": _estimate(metric, mine.fp32, mine.int8),
    }
    drop = found["against_fp32"]
    bounds = (drop["drop"], drop["relative_drop"], drop["drop_upper95"], drop["relative_drop_upper95"])
    found["gate"] = judge(*bounds, job.recipe.gate, "real").model_dump()
    if method != "ptq":
        found["against_ptq"] = _estimate(metric, outcomes["ptq"].int8, mine.int8)
    for name, file in (("curve", "qat.json"), ("operators", "recon.json")):
        if (done.planned / file).is_file():
            found[name] = json.loads((done.planned / file).read_text(encoding="utf-8"))
    return found


def _errors(job: Job, plan: QuantPlan) -> np.ndarray:
    """Relative L1 error of the plan's outputs for each picture of the report split, float64[pictures]."""
    graph, threads = prepared_graph(job), job.options.threads
    exact, simulated = onnx_session(graph.to_model(), threads), simulated_session(graph, plan, threads)
    feeds = (prepared.inputs for _, prepared in readable(job.selection.report, job.adapter, []))
    return np.array([relative_errors([simulated.run(feed)], [exact.run(feed)])[0] for feed in feeds])


def weights_not_rounded(job: Job, plan: QuantPlan) -> QuantPlan:
    """The plan with weights on steps so fine that rounding them does nothing, and biases corrected for these."""
    graph = prepared_graph(job)
    exact, integers = corrected_graph(graph, plan).constants, {}
    for name, weight in plan.integers.items():
        places = [1] * weight.values.ndim
        places[plan.weights[name].axis] = -1
        fine = (weight.scale / FINER).astype(np.float32)
        integers[name] = IntegerWeight(np.rint(exact[name] / fine.reshape(places)).astype(np.int32), fine)
    finer = replace(plan, integers=integers)
    feeds = first_feeds(job, job.selection.calibration, job.recipe.calibration.bias_samples)
    return replace(finer, bias_shifts=sequential_biases(graph, finer, feeds, job.options.threads))


def _ideal(job: Job, plan: QuantPlan, errors: np.ndarray) -> dict[str, Any]:
    """What weights that are not rounded, and what ranges of the judged picture would change of the PTQ plan."""
    free = _errors(job, weights_not_rounded(job, plan))
    weights = {"output_error": float(free.mean()), **changes(errors, free, job.recipe.seed)}
    return dict(zip(IDEALS, (weights, _changed_by_ranges(job, plan)), strict=True))


def _changed_by_ranges(job: Job, plan: QuantPlan) -> dict[str, Any]:
    """What ranges can give at most: chosen on the very picture that is judged, which no calibration can do."""
    graph, threads = prepared_graph(job), job.options.threads
    exact, errors = onnx_session(graph.to_model(), threads), []
    for feed in first_feeds(job, job.selection.report, JUDGED):
        plans = [plan, _on(plan, graph, feed, threads)]
        plans = [replace(p, bias_shifts=sequential_biases(graph, p, [feed], threads)) for p in plans]
        found = [simulated_session(graph, p, threads).run(feed) for p in plans]
        errors.append([relative_errors([outputs], [exact.run(feed)])[0] for outputs in found])
    before, after = np.array(errors).T
    return {"pictures": len(errors), "before": float(before.mean()), "after": float(after.mean())} | changes(
        before, after, job.recipe.seed
    )


def _on(plan: QuantPlan, graph: Graph, feed: Feed, threads: int) -> QuantPlan:
    """The plan with ranges of the least squared error on a picture."""
    equalized = equalize(graph, plan.equalizers, plan.equalizers)
    observed, outputs = observed_outputs(equalized, plan.operators) if plan.outputs else (equalized, {})
    statistics = collect_statistics(observed, [*activation_tensors(plan.operators), *outputs.values()], [feed], threads)
    dtype, method = next(iter(plan.activations.values())).dtype, MeanSquaredError()
    changed = replace(
        plan,
        activations=read_activations(plan.operators, statistics, method, dtype),
        outputs=stored_outputs(outputs, statistics, method, dtype),
    )
    return replace(changed, integers=scales_for_biases(equalized, changed))


def changes(before: np.ndarray, after: np.ndarray, seed: int) -> dict[str, Any]:
    """By how much errors changed, as shares, with the ranges that hold 95 % of a paired bootstrap (2,000 draws).

    Args:
        before: error of each picture, float64[pictures], above 0; `after` likewise.

    Returns:
        mean: change of the mean error; picture: of a picture's error, as a geometric mean; nearer: share of pictures
        whose error fell.
    """
    draws = np.random.default_rng(seed).integers(len(before), size=(2000, len(before)))
    ratios = np.log(after / before)
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "mean": lambda drawn: after[drawn].mean(axis=-1) / before[drawn].mean(axis=-1) - 1,
        "picture": lambda drawn: np.expm1(ratios[drawn].mean(axis=-1)),
    }
    found: dict[str, Any] = {}
    for name, measure in measures.items():
        low, high = np.quantile(measure(draws), [0.025, 0.975])
        found[name] = {"change": float(measure(np.arange(len(before)))), "low": float(low), "high": float(high)}
    return {**found, "nearer": float((after < before).mean())}


def _estimate(metric: Metric, before: Any, after: Any) -> dict[str, float]:
    return asdict(estimate_drop(metric, before, after))


def table(report: dict[str, Any]) -> str:
    """What each method gave, in Markdown; changes are those against PTQ."""
    headings = ["Method", "Coverage", "Drop (95 % bound)", "Gate", "Discordance", "Error of outputs", "Its change"]
    headings += ["Change of a picture", "Nearer", "Seconds"]
    methods = report["methods"]
    rows = [_row(name, found, methods["ptq"]) for name, found in methods.items()]
    samples = methods["ptq"]["against_fp32"]["samples"]
    title = f"# {report['model']} on {report['target']}, every convolution and matrix product in INT8"
    text = (
        f"Written by `benchmarks/qat.py`. {samples} samples of the report split. Drop in points against FP32; the "
        "changes of the error against PTQ, of the mean and of a picture (geometric mean), with 95 % of their paired "
        "bootstraps in brackets; the share of pictures that came nearer to FP32. Seconds are those of the "
        f"method after PTQ, beside other work. {report['processor']['cores']} cores, "
        f"{', '.join(report['processor']['features']) or 'no vector instructions known here'}"
        f"{': products saturate there, so weights have 7 bits' if report['saturating'] else ''}."
    )
    return "\n\n".join([title, text, markdown_table(headings, rows), *_ideals(report), *_limits(report)]) + "\n"


def _ideals(report: dict[str, Any]) -> list[str]:
    """Paragraphs on what rounding the weights of the PTQ plan costs, and on what other ranges could give."""
    ptq, texts = report["methods"]["ptq"], []
    if free := ptq.get("weights_not_rounded"):
        texts.append(
            "With the PTQ plan's ranges and places, but weights that are not rounded and biases corrected for these, "
            f"the error of the outputs would be {free['output_error']:.4f}: {_shares(free)[0]} of the mean, "
            f"{_shares(free)[1]} of a picture. The rest is that of activations in 8 bits."
        )
    if judged := ptq.get("ranges_of_the_picture"):
        texts.append(
            "With ranges of the least squared error on the very picture that is judged, and biases corrected on it "
            f"either way, the error of {judged['pictures']} pictures of the report split would go from "
            f"{judged['before']:.4f} to {judged['after']:.4f}: {_shares(judged)[0]} of the mean, "
            f"{_shares(judged)[1]} of a picture."
        )
    return texts


def _shares(change: dict[str, Any]) -> list[str]:
    """The changes of the mean and of a picture, with their bounds."""
    ranges = (change["mean"], change["picture"])
    return [f"{100 * r['change']:+.1f} % ({100 * r['low']:+.1f} to {100 * r['high']:+.1f})" for r in ranges]


def _limits(report: dict[str, Any]) -> list[str]:
    """Paragraphs on the operators that keep the largest error after reconstruction, and on what it is made of."""
    parts = report["methods"].get("recon", {}).get("operators", [])
    if not parts or parts[0]["exact"] is None:
        return []
    keys = ("before", "exact", "after", "solved")
    means = {key: float(np.mean([part[key] for part in parts])) for key in keys}
    shown = [*sorted(parts, key=lambda part: -part["after"])[:WORST], {"aim": f"mean of all {len(parts)}", **means}]
    rows = [[f"`{part['aim']}`", *(f"{100 * part[key]:.2f} %" for key in keys)] for part in shown]
    text = (
        "What is left, operator by operator: the squared error of what it writes, as a share of the variance of what "
        "FP32 writes there, on calibration pictures that reconstruction did not learn from, everything before it "
        "quantized and reconstructed. Exact weights are those of FP32, not rounded: this error comes from what the "
        "operator reads. Solved weights are those of least squares before they are rounded."
    )
    headings = ["Operator", "PTQ's weights", "Exact weights", "Reconstructed", "Solved weights"]
    return [text, markdown_table(headings, rows)]


def _row(name: str, found: dict[str, Any], ptq: dict[str, Any]) -> list[str]:
    drop = found["against_fp32"]
    shares = [f"{found['coverage']:.3f}", f"{drop['drop']:.2f} ({drop['drop_upper95']:.2f})"]
    errors = [f"{drop['discordance']:.1f} %", f"{found['output_error']:.4f}"]
    rung, change = found["ladder"][-1], found.get("output_error_change", {})
    if name == "ptq":
        changed = ["", "", ""]
    elif found["output_error"] == ptq["output_error"]:
        kept = f"plan kept: the search split gave {rung['error']:.4f} after {found['ladder'][0]['error']:.4f}"
        kept += f", and a drop of {rung['score']['drop']:.2f}" if rung["score"] else ""
        changed = [kept, "", ""]
    else:
        changed = [*_shares(change), f"{100 * change['nearer']:.0f} %"]
    gate = found["gate"]
    verdict = "certified" if gate["certified"] else "passed" if gate["passed"] else "failed"
    seconds = f"{sum(found['seconds'].values()):.0f}" if found.get("seconds") else ""
    return [name, *shares, verdict, *errors, *changed, seconds]


def draw_curves(curves: dict[str, list[dict[str, Any]]], title: str, file: Path) -> None:
    """The error on held-out pictures and the loss, by iteration, of each method that trains."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "quant"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    losses = axes.twinx()
    for method, curve in curves.items():
        (line,) = axes.plot([p["iteration"] for p in curve], [p["error"] for p in curve], "o-", label=method)
        trained = [point for point in curve if point["loss"] is not None]
        iterations = [point["iteration"] for point in trained]
        losses.plot(iterations, [point["loss"] for point in trained], "--", color=line.get_color(), alpha=0.4)
    axes.set(title=title, xlabel="iteration", ylabel="error of the outputs, search split")
    axes.set_ylim(bottom=0)
    axes.legend()
    losses.set_ylabel("loss, calibration split (dashed)")
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
