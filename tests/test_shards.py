"""Evaluations in shards: the same outcomes as from the whole, here and with all files brought along."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from test_pipeline import write_lines
from tiny_run import TinyRun

from eval.dataset import Sample
from eval.evaluation import Outcomes
from quant import judging
from quant.cluster import perform_shard, program_digest
from quant.errors import HandedOver
from quant.judging import Evaluation, find_evaluation, judge_target, offer_evaluations
from quant.plan import load_plan
from quant.shards import Offer, cut, for_others, joined, machine, offered, take_outcomes
from quant.shares import Share
from quant.stage import digest
from quant.target import TargetName

SIZE = 9
SEEDS = count(91)  # outcomes that one test has are not judged in the next: each has lines of its own


@pytest.mark.parametrize(
    ("total", "size", "lengths"), [(1, 5, [1]), (5, 5, [5]), (6, 5, [3, 3]), (10, 3, [2, 3, 2, 3])]
)
def test_pieces_are_neighbours_of_about_one_length(total: int, size: int, lengths: list[int]) -> None:
    samples = [Sample(str(index), "lines", Path("x.png"), "x") for index in range(total)]
    share = Share("paddle", Path("a"), Path("b"), 1, "text_recognition", {}, "m", "line_accuracy", samples)
    pieces = cut(share, size)
    assert [len(piece.samples) for piece in pieces] == lengths
    assert [sample for piece in pieces for sample in piece.samples] == samples


@pytest.fixture
def evaluation(tiny: TinyRun, tmp_path: Path) -> Evaluation:
    """Of the finished run, on other lines, one of them broken; larger evaluations than SIZE are offered."""
    lines = write_lines(tmp_path / "lines", 20, 3, next(SEEDS))
    (tmp_path / "offers").mkdir()
    options = tiny.place.options(data=(str(lines),), offers=tmp_path / "offers", shard_samples=SIZE)
    found = find_evaluation(tiny.place.recipe, options)
    samples = found.job.selection.report
    (tmp_path / "broken.png").write_bytes(b"no picture")
    samples[3] = replace(samples[3], image=tmp_path / "broken.png")
    return found


def handed_over(evaluation: Evaluation, *targets: TargetName) -> list[Offer]:
    job, folder = evaluation.job, evaluation.folder
    with pytest.raises(HandedOver):
        offer_evaluations(job, {target: folder / target for target in targets}, job.selection.report)
    assert job.options.offers
    return offered(job.options.offers, SIZE)


def whole(offer: Offer) -> Share:
    return replace(offer.pieces[0], samples=[sample for piece in offer.pieces for sample in piece.samples])


def test_shards_are_the_whole_to_the_byte(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the job goes on from them, without judging a sample."""
    offers = handed_over(evaluation, "onnxruntime", "openvino", "tensorrt")
    assert [offer.pieces[0].target for offer in offers].count("tensorrt") == 0 and len(offers) == 2
    for offer in offers:
        assert [len(piece.samples) for piece in offer.pieces] == [6, 7, 7]
        outcomes = joined(piece.judged(lambda: None).to_bytes() for piece in offer.pieces)
        assert outcomes == whole(offer).judged(lambda: None).to_bytes()
        take_outcomes({offer.stage: outcomes})
    monkeypatch.delattr(judging, "outcomes_of")
    job, folder = evaluation.job, evaluation.folder
    for target in ("onnxruntime", "openvino"):
        plan = load_plan(folder / "plans" / target)
        pooled, *_ = judge_target(job, target, plan, folder / target, job.selection.report, "run")
        assert pooled.status == "judged" and pooled.samples == 19


def test_a_shard_brings_its_files_along(evaluation: Evaluation, tmp_path: Path) -> None:
    """A machine without the models and pictures, in a process of its own; what is broken is named as here."""
    (offer,) = handed_over(evaluation, "onnxruntime")
    (given,) = for_others([offer])
    number = next(n for n, piece in enumerate(given.pieces) if any("broken" in s.image.name for s in piece.samples))
    expected = offer.pieces[number].judged(lambda: None).to_bytes()
    moved = replace(given.pieces[number], fp32=Path("no"), int8=Path("no"))
    ended = perform_shard(moved, given.models, given.pictures[number], program_digest(), machine())
    assert ended.code == 0, ended.stderr
    assert ended.checked_parcel() == expected and b"broken.png" in expected.replace(b"\0", b"")


def test_pictures_of_several_targets_are_packed_and_sent_once(evaluation: Evaluation) -> None:
    offers = for_others(handed_over(evaluation, "onnxruntime", "openvino"))
    one, other = pickle.loads(pickle.dumps(offers))
    assert len(one.pictures) == 3 and all(a is b for a, b in zip(one.pictures, other.pictures, strict=True))
    assert one.models != other.models


def test_the_order_in_which_pictures_were_found_broken_leaves_no_trace() -> None:
    one, other = (Outcomes(["a"], ["set"], np.ones((1, 1)), np.ones((1, 1)), list(order)) for order in ("xy", "yx"))
    assert one.to_bytes() == other.to_bytes()


def test_another_kind_of_machine_judges_nothing(evaluation: Evaluation) -> None:
    (offer,) = handed_over(evaluation, "onnxruntime")
    with pytest.raises(RuntimeError, match="another processor"):
        perform_shard(offer.pieces[0], b"", b"", program_digest(), "another machine")


def test_small_evaluations_and_those_judged_before_are_not_offered(evaluation: Evaluation) -> None:
    job, artifacts = evaluation.job, {"onnxruntime": evaluation.folder / "onnxruntime"}
    samples = job.selection.report
    offer_evaluations(job, artifacts, samples[:SIZE])  # type: ignore[arg-type]
    (offer,) = handed_over(evaluation, "onnxruntime")
    take_outcomes({offer.stage: b""})
    offer_evaluations(job, artifacts, samples)  # type: ignore[arg-type]
    assert job.options.offers and len(list(job.options.offers.iterdir())) == 1


def test_another_description_of_the_model_is_another_evaluation(evaluation: Evaluation) -> None:
    """With the same weights: pictures go into the model in another way."""
    job, artifact, samples = evaluation.job, evaluation.folder / "onnxruntime", evaluation.job.selection.report
    described = {**job.files.inference_yml, "PreProcess": {}}
    other = replace(job, files=replace(job.files, inference_yml=described))
    assert len({digest(judging._judged_key(j, "onnxruntime", artifact, samples)) for j in (job, other)}) == 2
