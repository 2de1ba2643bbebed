"""FP32 and INT8 side by side: who is judged, in which order, by how many workers, and which rows come out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from tiny_models import Array, TinyNet

from eval.dataset import Sample
from eval.evaluation import Outcomes, compare, evidence, judged_rows, load_outcomes, readable
from eval.gate import JudgedRow, SkippedRow, exit_code, verdict_text
from eval.metric import LineAccuracy
from quant.errors import InputError, Unavailable
from quant.recipe import load_recipe
from quant.runtime import Feed, Session, onnx_session
from quant.task import Prepared, TextPrediction

COLOURS = {"b": (200, 40, 40), "g": (40, 200, 40), "r": (40, 60, 200)}  # blue, green, red
RECIPE = load_recipe("PP-OCRv4_mobile_rec")
WAIT = 30  # seconds after which a worker that waits for the others gives up, so that a failing test ends


# --- a reader of colours, a picture each -----------------------------------------------------------


def colour_net(red: float) -> TinyNet:
    """The mean of each channel; red counts `red` times."""
    net = TinyNet((1, 3, 4, 4), free=(2, 3))
    weighed = net.op("Mul", "x", net.const(np.array([1, 1, red], dtype=np.float32).reshape(1, 3, 1, 1)))
    net.op("ReduceMean", weighed, axes=[2, 3], keepdims=0)
    return net


FP32, INT8 = colour_net(red=1.0).model(), colour_net(red=0.1).model()  # the second one takes red for green


class ColourReader:
    """Names the strongest channel by a letter; `context` is the size of the picture."""

    def preprocess(self, image: Array) -> Prepared:
        return Prepared({"x": image.transpose(2, 0, 1)[None].astype(np.float32)}, image.shape[:2])

    def postprocess(self, outputs: list[Array], context: Any) -> TextPrediction:
        assert len(context) == 2
        return TextPrediction("bgr"[int(outputs[0].argmax())], 1.0)


def open_pair() -> tuple[Session, Session]:
    return onnx_session(FP32, 1), onnx_session(INT8, 1)


def picture(file: Path, colour: str, size: int = 4) -> Path:
    image = np.full((size, size + 1, 3), COLOURS[colour], dtype=np.uint8)
    assert cv2.imwrite(str(file), image)
    return file


def samples_of(folder: Path, text: str, dataset: str = "lines") -> list[Sample]:
    """A picture for each letter; `-` makes one that cannot be decoded, `?` one that is not there."""
    samples = []
    for index, letter in enumerate(text):
        file = folder / f"{dataset}{index}.png"
        if letter == "-":
            file.write_bytes(b"no picture")
        elif letter != "?":
            picture(file, letter, size=4 + index % 3)
        samples.append(Sample(f"{dataset}-{index}", dataset, file, letter))
    return samples


def right(outcomes: Outcomes) -> tuple[list[float], list[float]]:
    """Which lines FP32 and INT8 read."""
    return outcomes.fp32[:, 0].tolist(), outcomes.int8[:, 0].tolist()


# --- comparing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_row_i_of_both_is_sample_i(tmp_path: Path, workers: int) -> None:
    text = "rgbbgrrbg" * 3
    samples = samples_of(tmp_path, text)
    outcomes = compare(open_pair, samples, ColourReader(), LineAccuracy(), workers)
    assert outcomes.ids == [sample.id for sample in samples]
    assert outcomes.datasets == ["lines"] * len(text)
    assert outcomes.fp32.shape == outcomes.int8.shape == (len(text), 3)
    assert right(outcomes) == ([1.0] * len(text), [float(letter != "r") for letter in text])
    assert outcomes.broken == []


def test_any_number_of_workers_gives_the_same_file(tmp_path: Path) -> None:
    samples = [*samples_of(tmp_path, "rgb-br?g"), *samples_of(tmp_path, "-bbrg", "more")]
    for workers in (1, 3):
        compare(open_pair, samples, ColourReader(), LineAccuracy(), workers).save(tmp_path / f"{workers}.npz")
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "3.npz").read_bytes()


class LastFirst(ColourReader):
    """The first picture is finished only after the third."""

    def __init__(self) -> None:
        self.third = threading.Event()
        self.order: list[int] = []

    def preprocess(self, image: Array) -> Prepared:
        if len(image) == 4:
            assert self.third.wait(WAIT)
        return super().preprocess(image)

    def postprocess(self, outputs: list[Array], context: Any) -> TextPrediction:
        self.order.append(context[0])
        if self.order.count(6) == 2:  # by FP32 and by INT8
            self.third.set()
        return super().postprocess(outputs, context)


def test_a_slow_picture_keeps_its_place(tmp_path: Path) -> None:
    adapter = LastFirst()
    outcomes = compare(open_pair, samples_of(tmp_path, "rgb"), adapter, LineAccuracy(), 3)
    assert [height for height in adapter.order if height != 5] == [6, 6, 4, 4]
    assert outcomes.ids == ["lines-0", "lines-1", "lines-2"]
    assert right(outcomes) == ([1, 1, 1], [0, 1, 1])


@dataclass
class Noting:
    """A session that notes which threads use it."""

    session: Session
    users: set[int] = field(default_factory=set)

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[Array]:
        self.users.add(threading.get_ident())
        return self.session.run(feed, outputs)


class Together(ColourReader):
    """The first three pictures wait for each other, so that three workers take one each."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(3)
        self.ready = threading.Event()

    def preprocess(self, image: Array) -> Prepared:
        if not self.ready.is_set():
            self.barrier.wait(WAIT)
            self.ready.set()
        return super().preprocess(image)


def test_every_worker_has_a_pair_of_sessions_of_its_own(tmp_path: Path) -> None:
    opened: list[Noting] = []

    def open_noting() -> tuple[Session, Session]:
        pair = Noting(onnx_session(FP32, 1)), Noting(onnx_session(INT8, 1))
        opened.extend(pair)
        return pair

    outcomes = compare(open_noting, samples_of(tmp_path, "rgb"), Together(), LineAccuracy(), 3)
    assert right(outcomes) == ([1, 1, 1], [0, 1, 1])
    assert [len(session.users) for session in opened] == [1] * 6
    assert len(set.union(*(session.users for session in opened))) == 3


@pytest.mark.parametrize("workers", [1, 3])
def test_pictures_that_cannot_be_read_are_named_and_left_out(tmp_path: Path, workers: int) -> None:
    samples = samples_of(tmp_path, "-rg?b-")
    outcomes = compare(open_pair, samples, ColourReader(), LineAccuracy(), workers)
    assert outcomes.ids == ["lines-1", "lines-2", "lines-4"]
    assert right(outcomes) == ([1, 1, 1], [0, 1, 1])
    assert len(outcomes.broken) == 3
    for sentence, index, why in zip(outcomes.broken, (0, 3, 5), ("decoded", "read", "decoded"), strict=True):
        assert str(samples[index].image) in sentence
        assert f"cannot be {why}" in sentence


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("text", ["-", "-?-?-"])
def test_no_picture_can_be_read(tmp_path: Path, text: str, workers: int) -> None:
    samples = samples_of(tmp_path, text)
    with pytest.raises(InputError, match=f"none of the {len(text)} pictures") as caught:
        compare(open_pair, samples, ColourReader(), LineAccuracy(), workers)
    assert str(samples[0].image) in str(caught.value)


@pytest.mark.parametrize("workers", [1, 3])
def test_progress_moves_once_a_picture_also_for_broken_ones(tmp_path: Path, workers: int) -> None:
    steps: list[None] = []
    compare(
        open_pair, samples_of(tmp_path, "rg-b?bb"), ColourReader(), LineAccuracy(), workers, lambda: steps.append(None)
    )
    assert len(steps) == 7


class Refusing:
    """A session that fails on every picture."""

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[Array]:
        raise RuntimeError("the runtime refuses")


def refused_at_opening() -> tuple[Session, Session]:
    raise Unavailable("the runtime is not installed", "install it")


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("opening", "error"),
    [(lambda: (Refusing(), Refusing()), RuntimeError), (refused_at_opening, Unavailable)],
)
def test_what_goes_wrong_in_a_worker_comes_out(
    tmp_path: Path, workers: int, opening: Callable[[], tuple[Session, Session]], error: type[Exception]
) -> None:
    with pytest.raises(error, match="the runtime"):
        compare(opening, samples_of(tmp_path, "rgb"), ColourReader(), LineAccuracy(), workers)


def test_readable_pictures_one_at_a_time(tmp_path: Path) -> None:
    samples = samples_of(tmp_path, "r-g")
    broken: list[str] = []
    pictures = readable(samples, ColourReader(), broken)
    sample, prepared = next(pictures)
    assert (sample, prepared.context, broken) == (samples[0], (4, 5), [])
    assert [sample for sample, _ in pictures] == [samples[2]]
    assert len(broken) == 1 and str(samples[1].image) in broken[0]


# --- outcomes on disk ------------------------------------------------------------------------------


def test_outcomes_come_back_as_they_were(tmp_path: Path) -> None:
    samples = samples_of(tmp_path, "rg-b", "建物")
    outcomes = compare(open_pair, samples, ColourReader(), LineAccuracy())
    outcomes.save(tmp_path / "outcomes.npz")
    restored = load_outcomes(tmp_path / "outcomes.npz")
    assert (restored.ids, restored.datasets, restored.broken) == (outcomes.ids, outcomes.datasets, outcomes.broken)
    assert all(type(text) is str for text in [*restored.ids, *restored.datasets, *restored.broken])
    for name in ("fp32", "int8"):
        before, after = getattr(outcomes, name), getattr(restored, name)
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


def test_outcomes_without_broken_pictures_come_back(tmp_path: Path) -> None:
    counts = np.ones((1, 3))
    Outcomes(["a"], ["lines"], counts, counts, []).save(tmp_path / "outcomes.npz")
    assert load_outcomes(tmp_path / "outcomes.npz").broken == []


# --- rows ------------------------------------------------------------------------------------------


def outcomes_of(**sets: tuple[str, str]) -> Outcomes:
    """Set -> which lines FP32 and which INT8 reads, `1` or `0` a line."""
    rows = [
        (f"{name}{index}", name.replace("_", "-"), [float(f), float(f), 1.0], [float(i), float(i), 1.0])
        for name, (fp32, int8) in sets.items()
        for index, (f, i) in enumerate(zip(fp32, int8, strict=True))
    ]
    ids, datasets, before, after = zip(*rows, strict=True)
    return Outcomes(list(ids), list(datasets), np.array(before), np.array(after), [])


def all_rows_of(outcomes: Outcomes, **facts: Any) -> list[JudgedRow | SkippedRow]:
    return judged_rows(RECIPE, "openvino", outcomes, LineAccuracy(), facts)


def rows_of(outcomes: Outcomes, **facts: Any) -> dict[str, Any]:
    rows = {row.dataset: row for row in all_rows_of(outcomes, **facts) if isinstance(row, JudgedRow)}
    assert next(iter(rows)) == "pooled"
    return rows


def test_a_pooled_row_and_one_for_each_set() -> None:
    street, receipts = ("1111", "1110"), ("100000", "100001")
    rows = rows_of(outcomes_of(street=street, receipts=receipts))
    assert list(rows) == ["pooled", "receipts", "street"]
    found = {name: (row.samples, row.fp32, row.int8, row.drop) for name, row in rows.items()}
    assert found["street"] == (4, 100, 75, 25)
    assert found["receipts"] == pytest.approx((6, 100 / 6, 200 / 6, -100 / 6))
    assert found["pooled"] == (10, 50, 50, 0)
    assert (rows["street"].relative_drop, rows["street"].discordance) == (25, 25)
    assert rows["pooled"].discordance == 20
    assert [row.gates for row in rows.values()] == [True, False, False]


def test_rows_do_not_depend_on_the_order_of_the_sets() -> None:
    one, other = {"a": ("11", "10")}, {"b": ("110", "110")}
    assert list(rows_of(outcomes_of(**one, **other))) == list(rows_of(outcomes_of(**other, **one)))


def test_every_row_carries_its_facts() -> None:
    rows = rows_of(outcomes_of(street=("11", "11"), receipts=("11", "11")), coverage=0.9, method="ptq", int8_ms=2.5)
    for row in rows.values():
        assert (row.model, row.task, row.target, row.format) == (RECIPE.name, RECIPE.task, "openvino", "onnx")
        assert (row.metric, row.coverage, row.method, row.int8_ms) == ("line_accuracy", 0.9, "ptq", 2.5)
        assert (row.gate.max_drop, row.gate.max_relative_drop) == (RECIPE.gate.max_drop, RECIPE.gate.max_relative_drop)
        both = {"line_accuracy": 100.0, "normalized_edit_similarity": 100.0}
        assert row.details == {"fp32": both, "int8": both}


def test_only_the_pooled_row_decides() -> None:
    rows = rows_of(outcomes_of(street=("1" * 300, "1" * 300), small=("10", "01")))
    assert exit_code(rows.values()) == 0
    assert verdict_text(rows["pooled"]).startswith("passed, not certified")
    lost = rows_of(outcomes_of(street=("1" * 300, "1" * 290 + "0" * 10), small=("11", "11")))
    assert exit_code(lost.values()) == 1
    assert verdict_text(lost["pooled"]) == "FAILED"
    assert verdict_text(lost["small"]) == "informs only"


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["generated-text_lines"], "generated"),
        (["generated-text_lines", "generated-text_pages"], "generated"),
        (["generated-text_lines", "iiit5k_rec"], "real"),
        (["generated-text_lines", "generated-text_lines", "iiit5k_rec"], "generated"),
        (["iiit5k_rec"], "real"),
    ],
)
def test_samples_that_are_mostly_drawn_are_no_evidence(names: list[str], kind: str) -> None:
    assert evidence(names) == kind


def test_each_row_says_what_its_own_samples_are_evidence_of() -> None:
    lines = ("1" * 400, "1" * 400)
    mixed = rows_of(outcomes_of(generated_lines=lines, street=lines))
    assert {name: row.gate.evidence for name, row in mixed.items()} == {
        "pooled": "real",
        "generated-lines": "generated",
        "street": "real",
    }
    alone = rows_of(outcomes_of(generated_lines=lines))
    assert alone["pooled"].gate.evidence == "generated"
    assert verdict_text(alone["pooled"]) == "passed on generated data, not evidence"
    assert verdict_text(mixed["pooled"]) == "passed, certified"


def test_a_set_that_fp32_cannot_read_is_named_and_counts_in_the_pooled_row() -> None:
    rows = all_rows_of(outcomes_of(street=("11", "11"), foreign=("00", "01")))
    judged = {row.dataset: row for row in rows if isinstance(row, JudgedRow)}
    assert list(judged) == ["pooled", "street"]
    assert (judged["pooled"].samples, judged["pooled"].fp32, judged["pooled"].int8) == (4, 50, 75)
    (left,) = [row for row in rows if isinstance(row, SkippedRow)]
    assert left.reason.startswith("foreign: FP32 has a line_accuracy of 0 on 2 samples")


def test_where_fp32_reads_nothing_there_is_no_verdict() -> None:
    rows = all_rows_of(outcomes_of(street=("00", "01")))
    assert [type(row) for row in rows] == [SkippedRow, SkippedRow]


def test_rotations_of_one_picture_are_no_independent_evidence() -> None:
    """The same losses on four rotations of ten pictures say less than on forty pictures."""
    fp32, int8 = "1" * 40, "0" * 4 + "1" * 36
    apart = outcomes_of(street=(fp32, int8))
    ids = [f"{index // 4}-{90 * (index % 4)}" for index in range(40)]
    turned, single = (rows_of(replace(apart, ids=names))["pooled"] for names in (ids, apart.ids))
    assert turned.drop == single.drop
    assert turned.drop_upper95 > single.drop_upper95 + 5
