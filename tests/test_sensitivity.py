"""Sensitivity: what damage and signal-to-noise ratio are, who is scored, and what follows from the numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pipeline import NAME, Place, noted_stages, place
from test_plan import plan_of
from tiny_models import TinyNet, run, simulate, simulated_model, small_detector, small_recognizer

from quant import cli, sensitivity_report
from quant.advice import GroupImpact, OperatorImpact, advise, most_damaging
from quant.job import prepared_graph, start
from quant.ladder import SearchScore
from quant.plan import QuantPlan, load_plan
from quant.planning import SearchJudge, alone_errors, alone_stage
from quant.runtime import onnx_session
from quant.sensitivity import (
    MOST_SCORED,
    PATIENCE,
    OutputError,
    compare_outputs,
    kernel_groups,
    kernel_kind,
    load_errors,
    measure_errors,
    output_channels,
    output_error,
    save_errors,
    score_worst,
)
from quant.sensitivity_report import (
    Sensitivity,
    _measure,
    draw_sensitivity,
    load_sensitivity,
    report_sensitivity,
)
from quant.simulation import simulated_session

__all__ = ["place"]  # the fixture


def alone(net: TinyNet, count: int = 1, **changes: Any) -> dict[str, OutputError]:
    """Errors of every operator alone."""
    plan = plan_of(net, **changes)
    parts = {name: {name} for name in plan.quantized()}
    return measure_errors(net.graph(), plan, parts, [], [net.feed(seed) for seed in range(count)], 1)


# --- errors of the outputs -------------------------------------------------------------------------


def test_errors_are_those_of_the_outputs_with_one_operator_in_int8() -> None:
    net = small_recognizer()
    graph, plan = net.graph(), plan_of(net)
    errors = alone(net, 2)
    assert list(errors) == [op.name for op in plan.operators]
    for name, error in errors.items():
        exact = [run(graph.to_model(), net.feed(seed))[0].astype(np.float64) for seed in range(2)]
        model = simulated_model(graph, plan.with_only({name}, ""))
        found = [simulate(model, net.feed(seed))[0] for seed in range(2)]
        relative = [np.abs(f - e).sum() / np.abs(e).sum() for f, e in zip(found, exact, strict=True)]
        assert error.damage == pytest.approx(float(np.mean(relative)), rel=1e-4)
        noise = np.concatenate([(f - e).ravel() for f, e in zip(found, exact, strict=True)])
        signal = np.concatenate([e.ravel() for e in exact])
        assert error.snr_db == pytest.approx(10 * np.log10((signal @ signal) / (noise @ noise)), rel=1e-4)


def test_a_part_of_several_operators_is_in_int8_at_once() -> None:
    net = small_detector()
    graph, plan = net.graph(), plan_of(net)
    names = [op.name for op in plan.operators]
    steps: list[int] = []
    parts = {"two": set(names[:2]), "all": set(names), "none": set()}
    errors = measure_errors(graph, plan, parts, [], [net.feed()], 2, lambda: steps.append(1))
    assert len(steps) == 3
    session = simulated_session(graph, plan.with_only(set(names[:2]), ""), 1)
    exact = [run(graph.to_model(), net.feed())]
    assert errors["two"].damage == pytest.approx(output_error(session, [net.feed()], exact), rel=1e-4)
    assert errors["none"] == OutputError(0.0, None)
    assert errors["all"].damage != errors["two"].damage


def test_the_operator_with_the_bad_range_is_the_most_damaging() -> None:
    net = small_detector()
    plan = plan_of(net)
    culprit = plan.operators[2]
    tensor = culprit.activations[0]
    bad = {**plan.activations, tensor: plan.activations[tensor].model_copy(update={"scale": 100.0})}
    errors = alone(net, activations=bad)
    assert max(errors, key=lambda name: errors[name].damage) == culprit.name
    assert min(errors, key=lambda name: errors[name].snr_db or 0) == culprit.name


def test_errors_are_taken_over_all_outputs_and_pictures() -> None:
    found = [[np.array([2.0, 1.0]), np.array([3.0])], [np.array([0.0, 1.0]), np.array([4.0])]]
    exact = [[np.array([1.0, 1.0]), np.array([3.0])], [np.array([0.0, 3.0]), np.array([4.0])]]
    error = compare_outputs(found, exact)
    assert error.damage == pytest.approx((1 / 5 + 2 / 7) / 2)
    assert error.snr_db == pytest.approx(10 * np.log10((1 + 1 + 9 + 9 + 16) / (1 + 4)))


def test_equal_or_empty_outputs_have_no_ratio() -> None:
    ones, zeros = [[np.ones(2, np.float32)]], [[np.zeros(2, np.float32)]]
    assert compare_outputs(ones, ones) == OutputError(0.0, None)
    assert compare_outputs(ones, zeros).snr_db is None
    net = TinyNet((1, 2))
    net.op("Relu", "x")
    assert output_error(onnx_session(net.model(), 1), [{"x": np.zeros((1, 2), np.float32)}], [[zeros[0][0][None]]]) == 0


def test_errors_come_back_from_their_file_in_order(tmp_path: Path) -> None:
    errors = {"b": OutputError(0.1, 12.345678901234567), "a": OutputError(0.0, None)}
    save_errors(errors, tmp_path / "errors.json")
    assert list(load_errors(tmp_path / "errors.json").items()) == list(errors.items())


# --- kinds -----------------------------------------------------------------------------------------


def test_operators_that_share_a_kernel_are_a_group() -> None:
    detector, recognizer = small_detector(), small_recognizer()
    names = [op.name for op in plan_of(detector).operators]
    groups = kernel_groups(detector.graph(), plan_of(detector).operators)
    assert groups == {
        "kxk conv": {names[0]},
        "depthwise conv": {names[1]},
        "ConvTranspose": {names[2]},
        "1x1 conv": {names[3]},
    }
    operators = plan_of(recognizer).operators
    groups = kernel_groups(recognizer.graph(), operators)
    assert {kind: len(members) for kind, members in groups.items()} == {
        "kxk conv": 1,
        "MatMul by weights": 3,
        "MatMul of activations": 2,
    }
    assert groups["MatMul of activations"] == {op.name for op in operators if op.op_type == "MatMul" and not op.weight}


def test_grouped_and_single_channel_convolutions_are_not_depthwise() -> None:
    net = TinyNet((1, 4, 6, 6))
    grouped = net.conv("x", 4, 8, group=2)
    single = net.conv(net.conv(grouped, 8, 1, kernel=1, pad=0), 1, 3)
    kinds = {name: kind for kind, names in kernel_groups(net.graph(), plan_of(net).operators).items() for name in names}
    assert (kinds[grouped], kinds[single]) == ("kxk conv", "kxk conv")


def test_kind_and_channels_are_known_where_the_plan_names_an_equalized_weight() -> None:
    net = small_detector()
    graph, operator = net.graph(), plan_of(net).operators[1]
    equalized = operator.model_copy(update={"weight": f"{operator.name}_equalized_weight"})
    assert (kernel_kind(graph, equalized), output_channels(graph, equalized)) == ("depthwise conv", 8)


def test_channels_are_those_of_the_output() -> None:
    net = small_detector()
    assert [output_channels(net.graph(), op) for op in plan_of(net).operators] == [8, 8, 4, 1]
    net = small_recognizer()
    channels = {op.name: output_channels(net.graph(), op) for op in plan_of(net).operators}
    assert sorted(channels.values(), key=str) == [6, 6, 6, 9, None, None]


# --- who is scored ---------------------------------------------------------------------------------


def scored(damages: dict[str, float], discordances: dict[str, float]) -> list[str]:
    errors = {name: OutputError(damage, None) for name, damage in damages.items()}
    scores = score_worst(errors, lambda name: SearchScore(0.0, 0.0, discordances.get(name, 0.0), 10))
    assert all(scores[name].discordance == discordances.get(name, 0.0) for name in scores)
    return list(scores)


def test_the_worst_are_scored_until_several_in_a_row_change_nothing() -> None:
    damages = {str(i): float(i) for i in range(30)}
    assert scored(damages, {}) == ["29", "28", "27"][:PATIENCE]
    assert scored(damages, {"28": 1.0, "25": 1.0}) == ["29", "28", "27", "26", "25", "24", "23", "22"]
    assert scored({"a": 1.0, "b": 2.0}, {}) == ["b", "a"]


def test_no_more_than_some_are_scored() -> None:
    damages = {str(i): float(i) for i in range(30)}
    assert scored(damages, dict.fromkeys(damages, 1.0)) == [str(29 - i) for i in range(MOST_SCORED)]


# --- advice ----------------------------------------------------------------------------------------


def one(name: str, damage: float, position: int = 1, **changes: Any) -> OperatorImpact:
    usual: dict[str, Any] = {
        "op_type": "Conv",
        "kind": "kxk conv",
        "channels": 64,
        "macs_share": 0.01,
        "weights_share": 0.01,
        "snr_db": 20.0,
        "discordance": None,
        "drop": None,
    }
    return OperatorImpact(name=name, damage=damage, position=position, **{**usual, **changes})


def group(kind: str, operators: int, discordance: float, drop: float) -> GroupImpact:
    return GroupImpact(
        kind=kind, operators=operators, macs_share=0.1, weights_share=0.1, damage=0.1, snr_db=None,
        discordance=discordance, drop=drop,
    )  # fmt: skip


def model_with(*worst: OperatorImpact) -> list[OperatorImpact]:
    """These and 18 operators with little damage behind them."""
    return [*worst, *(one(f"late{i}", 0.001, position=i + 3) for i in range(18))]


def test_the_fewest_that_make_up_most_of_the_squared_damage() -> None:
    operators = [one("a", 0.3), one("b", 0.2), one("c", 0.1), one("d", 0.05)]  # squares 0.09, 0.04, 0.01, 0.0025
    assert [op.name for op in most_damaging(operators)] == ["a", "b"]
    assert most_damaging([one("a", 0.0)]) == []


def test_few_bad_operators_are_to_be_kept_in_fp32() -> None:
    worst = [one("a", 0.2, 2, discordance=3.0, drop=1.5), one("b", 0.2, 1, discordance=0.0, drop=0.0)]
    first, early, last = advise("net", model_with(*(replace(op, channels=16) for op in worst)), [], 0.13)
    assert (
        first
        == "The 2 worst (a and b) make up 100 % of the summed squared damage and 2 % of the work: keep them in FP32."
    )
    assert early == (
        "They are convolutions among the first 2 of 20 operators, with at most 16 channels where the model's median is 64."
    )
    assert last.startswith("`quant run net` decides this by itself")


def test_nothing_is_said_of_early_convolutions_that_are_wide_or_late_or_no_convolutions() -> None:
    for changes in ({"channels": 64}, {"channels": 8, "position": 20}, {"channels": 8, "op_type": "MatMul"}):
        operator = replace(one("a", 0.2, discordance=1.0), **changes)
        assert len(advise("net", model_with(operator), [], 0.13)) == 2, changes


def test_one_bad_operator_is_spoken_of_in_the_singular() -> None:
    first, early, _ = advise("net", model_with(one("a", 0.2, channels=8, discordance=1.0)), [], 0.13)
    assert first.startswith("The worst operator (a) makes up ") and first.endswith("keep it in FP32.")
    assert early.startswith("It is a convolution among the first 1 of 19 operators, with 8 channels")


def test_operators_that_change_no_outcome_need_no_fp32() -> None:
    first = advise("net", model_with(one("a", 0.2, discordance=0.0, drop=0.0)), [], 0.13)[0]
    assert first.endswith("but alone it changes no outcome on the search split.")


def test_work_beyond_what_the_recipe_allows_is_said() -> None:
    first = advise("net", model_with(one("a", 0.2, discordance=1.0, macs_share=0.3)), [], 0.13)[0]
    assert "30 % of the work: more work than the 13 % that the recipe lets go back to FP32" in first


def test_spread_damage_has_no_few_worst() -> None:
    operators = [one(str(i), 0.1, i + 1, discordance=1.0) for i in range(21)]
    first = advise("net", operators, [], 0.13)[0]
    assert first.startswith("The damage is spread: it takes 17 of 21 operators to make up 81 % of")


def test_no_damage_needs_no_advice() -> None:
    assert advise("net", [one("a", 0.0)], [], 0.1) == [
        "No operator alone moves the outputs: everything can be in INT8."
    ]


def test_harmless_kinds_and_the_most_harmful_are_named() -> None:
    groups = [group("1x1 conv", 5, 0.0, 0.0), group("kxk conv", 2, 4.0, 1.0), group("depthwise conv", 3, 2.0, 2.0)]
    sentences = advise("net", model_with(one("a", 0.2, discordance=1.0)), groups, 0.13)
    assert "Harmless, no outcome changes with all of the kind in INT8 at once: 1x1 conv (5)." in sentences
    worst = "The kind that changes most outcomes is kxk conv (2): 4.00 % of them, a drop of 1.00 points."
    assert worst in sentences
    assert not any(s.startswith("Harmless") for s in advise("net", model_with(one("a", 0.2)), groups[1:], 0.13))


# --- from end to end -------------------------------------------------------------------------------


def test_the_command_measures_once_and_leaves_json_and_a_plot(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    built = noted_stages(monkeypatch)
    model = [str(place.root / "recipe.yaml"), "--model-dir", str(place.root / "model"), "--threads", "2"]
    command = ["sensitivity", *model, "--out", str(tmp_path), "--quiet"]
    assert cli._guarded(command) == 0
    out = capfd.readouterr().out
    files = [tmp_path / NAME / "sensitivity" / f"onnxruntime.{kind}" for kind in ("json", "svg")]
    assert "".join(f"written: {file}\n" for file in files) in out
    assert {"full", "damage", "sensitivity"} <= set(built)
    before = [file.read_bytes() for file in files]
    built.clear()
    assert cli._guarded([*command, "--json"]) == 0
    said = capfd.readouterr().out
    assert built == [], "the second call does no work"
    assert said.encode() == before[0]
    assert [file.read_bytes() for file in files] == before
    check_document(json.loads(said), out)


def check_document(document: dict[str, Any], table: str) -> None:
    assert set(document) == {"schema", "model", "target", "operators", "groups", "advice"}
    assert (document["schema"], document["model"], document["target"]) == (1, NAME, "onnxruntime")
    numbers = {"kind", "macs_share", "weights_share", "damage", "snr_db", "discordance", "drop"}
    operators, groups = document["operators"], document["groups"]
    assert len(operators) == 3 and sorted(op["position"] for op in operators) == [1, 2, 3]
    assert [op["damage"] for op in operators] == sorted((op["damage"] for op in operators), reverse=True)
    assert all(set(op) == numbers | {"name", "op_type", "position", "channels"} for op in operators)
    assert all(set(entry) == numbers | {"operators"} for entry in groups)
    assert {entry["kind"]: entry["operators"] for entry in groups} == {
        "kxk conv": 1,
        "1x1 conv": 1,
        "MatMul by weights": 1,
    }
    for entry in groups:
        (member,) = [op for op in operators if op["kind"] == entry["kind"]]
        assert entry["damage"] == pytest.approx(member["damage"])
        assert entry["snr_db"] == pytest.approx(member["snr_db"])
        assert entry["discordance"] is not None and member["discordance"] == entry["discordance"]
    assert sum(op["macs_share"] for op in operators) == pytest.approx(1)
    assert sum(op["weights_share"] for op in operators) == pytest.approx(1)
    assert all(sentence in table for sentence in document["advice"])
    assert all(op["name"] in table for op in operators)


def test_single_operators_are_scored_on_fewer_pictures(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    job = start(place.recipe, place.options())
    choice = job.recipe.targets["onnxruntime"]
    monkeypatch.setattr(sensitivity_report, "SCORED", 3)
    pictures: list[tuple[int, int]] = []
    plain = SearchJudge.score

    def noted(judge: SearchJudge, plan: QuantPlan) -> SearchScore:
        found = plain(judge, plan)
        pictures.append((len(plan.quantized()), found.samples))
        return found

    monkeypatch.setattr(SearchJudge, "score", noted)
    plan = load_plan(alone_stage(job, choice))
    operators, groups = _measure(job, prepared_graph(job), plan, alone_errors(job, choice))
    every = len(job.selection.search)
    assert every > 3
    assert pictures == [(1, 3)] * len(operators) + [(group.operators, every) for group in groups]


def test_targets_of_their_own_and_unknown_ones(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    job = start(place.recipe, place.options())
    result, files = report_sensitivity(job, "openvino")
    assert result.target == "openvino" and [file.name for file in files] == ["openvino.json", "openvino.svg"]
    assert load_sensitivity(files[0]) == result
    assert cli._guarded(["sensitivity", str(place.root / "recipe.yaml"), "--target", "abacus"]) == 2
    assert "has no target 'abacus'" in capfd.readouterr().err


def test_the_plot_has_the_same_bytes_and_every_kind(tmp_path: Path) -> None:
    operators = [one("a", 0.2, 2), one("b", 0.1, 1, kind="1x1 conv")]
    result = Sensitivity("net", "paddle", operators, [], [])
    for name in ("first.svg", "second.svg", "other.svg"):
        draw_sensitivity(replace(result, model="net" if name != "other.svg" else "ten"), tmp_path / name)
    first = (tmp_path / "first.svg").read_bytes()
    assert first == (tmp_path / "second.svg").read_bytes() != (tmp_path / "other.svg").read_bytes()
    assert b"<dc:date>" not in first
    assert all(f"<!-- {word} -->".encode() in first for word in ("kxk conv", "1x1 conv"))
