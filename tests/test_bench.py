"""`quant bench`: what is timed, on which shapes, and what the numbers advise. No timing is asserted."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_pipeline import HEIGHT, NAME, RECIPE, SETS, colour_reader, write_lines, write_model

from eval.benchmark import FEWEST_RUNS, WARM_UP, BenchReport, BenchRow, Timing, advise, interleaved_latency
from eval.gate import SkippedRow
from eval.report import print_bench
from quant import cli, latency
from quant.errors import Unavailable
from quant.job import Options, start
from quant.latency import bench_model, bench_target, misfit, time_turns
from quant.pipeline import run_model
from quant.recipe import Recipe, RecipeError, load_recipe
from quant.runtime import open_session

TARGETS = ["onnxruntime", "openvino"]
SHAPES = [[1, 3, HEIGHT, 40], [1, 3, HEIGHT, 80]]


class Sleeper:
    """A session that counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, feed: Any, outputs: Any = None) -> list[np.ndarray]:
        self.runs += 1
        return []


def row(target: str, *timings: Timing | None, default: Timing | None = None) -> list[BenchRow]:
    facts: dict[str, Any] = {"model": NAME, "task": "text_recognition", "fp32_bytes": 100, "int8_bytes": 30}
    note = "the model's batch is fixed at 1"
    return [
        BenchRow(**facts, target=target, shape=[1, 3, 4, 5], ms=ms, default_ms=ms and default, note="" if ms else note)
        for ms in timings
    ]


# --- numbers and what they advise ------------------------------------------------------------------


def test_sessions_take_turns_and_slow_ones_get_fewer() -> None:
    sessions = {"fp32": Sleeper(), "int8": Sleeper()}
    assert set(interleaved_latency(sessions, {}, 5)) == {"fp32", "int8"}
    assert [session.runs for session in sessions.values()] == [WARM_UP + 5] * 2
    assert interleaved_latency(sessions, {}, 50, seconds=0)["int8"] >= 0
    assert [session.runs for session in sessions.values()] == [WARM_UP + 5 + WARM_UP + FEWEST_RUNS] * 2


def test_int8_that_is_faster_is_advised() -> None:
    timings = [Timing(fp32=9, fp32_prepared=4, int8=2), Timing(fp32=90, fp32_prepared=40, int8=5)]
    (advice,) = advise(row("openvino", *timings))
    assert (advice.use, advice.cells, advice.faster) == ("int8", 2, 2)
    assert advice.speedup == pytest.approx(4), "geometric mean of 2 and 8"


def test_int8_that_only_beats_the_shipped_model_is_not_advised() -> None:
    timings = [Timing(fp32=9, fp32_prepared=4, int8=5), Timing(fp32=9, fp32_prepared=4, int8=3.9)]
    (advice,) = advise(row("onnxruntime", *timings))
    assert (advice.use, advice.cells, advice.faster) == ("fp32_prepared", 2, 1)
    assert "NOT faster" in advice.text and "use FP32 prepared" in advice.text


def test_without_a_prepared_model_the_shipped_one_is_the_rival() -> None:
    slow, fast = (advise(row("paddle", Timing(fp32=4, int8=ms)))[0] for ms in (8, 2))
    assert (slow.use, slow.speedup) == ("fp32", 0.5) and "use FP32 as shipped" in slow.text
    assert fast.use == "int8"


def test_a_tie_is_not_faster() -> None:
    assert advise(row("onnxruntime", Timing(fp32=4, fp32_prepared=2, int8=2)))[0].use == "fp32_prepared"


def test_each_target_and_precision_gets_its_own_advice_and_cells_without_times_none() -> None:
    fast, slow = Timing(fp32=4, fp32_prepared=4, int8=2), Timing(fp32=1, fp32_prepared=1, int8=2)
    rows = [*row("onnxruntime", slow, None), *row("openvino", fast, default=slow), *row("paddle", None)]
    found = {(advice.target, advice.precision): advice for advice in advise(rows)}
    assert {place: advice.use for place, advice in found.items()} == {
        ("onnxruntime", "f32"): "fp32_prepared",
        ("openvino", "f32"): "int8",
        ("openvino", "default"): "fp32_prepared",
    }
    assert found["onnxruntime", "f32"].cells == 1


@pytest.mark.parametrize(
    ("shape", "declared", "said"),
    [
        ([8, 3, 48, 320], (None, 3, 48, None), ""),
        ([8, 3, 48, 320], (1, 3, 48, None), "the model's batch is fixed at 1"),
        ([1, 3, 64, 320], (1, 3, 48, None), "the model's input is fixed at 1x3x48xany"),
        ([8, 3, 48, 320], (), ""),
    ],
)
def test_shapes_that_a_model_does_not_take(shape: list[int], declared: Any, said: str) -> None:
    assert misfit(shape, declared) == said


# --- a run of a tiny model -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe_and_options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Recipe, Options]]:
    """A finished run on the targets that take ONNX; nothing else on this machine is seen."""
    root = tmp_path_factory.mktemp("bench")
    for seed, (name, letters) in enumerate(SETS.items()):
        write_lines(root / "data" / name, 24, letters, seed)
    write_model(root / "model", colour_reader())
    timed = {"shape": [1, 3, HEIGHT, 80], "shapes": SHAPES, "runs": 1}
    (root / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "latency": timed}), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANT_CACHE", str(root / "cache"))
        patch.setenv("QUANT_DATA_HOME", str(root / "data"))
        patch.delenv("QUANT_MODEL_HOME", raising=False)
        recipe = load_recipe(str(root / "recipe.yaml"))
        kept = {name: recipe.targets[name] for name in recipe.targets if name in TARGETS}
        recipe = recipe.model_copy(update={"targets": kept})
        options = Options(root / "results", 2, lambda what, done, total: None, root / "model")
        run_model(recipe, options)
        yield recipe, options


def test_every_batch_of_every_shape_is_timed(recipe_and_options: tuple[Recipe, Options]) -> None:
    recipe, options = recipe_and_options
    rows = bench_model(recipe, options)
    wanted = [[batch, *shape[1:]] for batch in (1, 8) for shape in SHAPES]
    for target in TARGETS:
        cells = [found for found in rows if isinstance(found, BenchRow) and found.target == target]
        assert [cell.shape for cell in cells] == wanted
        for cell in cells:
            assert cell.ms and cell.ms.fp32 > 0 and cell.ms.int8 > 0 and (cell.ms.fp32_prepared or 0) > 0
            assert not cell.note and cell.fp32_bytes > 0 and cell.int8_bytes > 0
            assert (cell.default_ms is not None) == (target == "openvino")
    assert len(rows) == len(wanted) * len(TARGETS)


def test_a_batch_that_the_model_does_not_take_says_so(
    recipe_and_options: tuple[Recipe, Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, options = recipe_and_options
    monkeypatch.setattr(latency, "declared_picture", lambda job: (1, 3, HEIGHT, None))
    rows = [found for found in bench_model(recipe, options) if isinstance(found, BenchRow)]
    assert {found.note for found in rows if found.shape[0] == 8} == {"the model's batch is fixed at 1"}
    assert all(found.ms and not found.note for found in rows if found.shape[0] == 1)


def test_a_size_that_breaks_a_runtime_costs_its_cell_alone(recipe_and_options: tuple[Recipe, Options]) -> None:
    recipe, options = recipe_and_options
    odd = recipe.latency.model_copy(update={"shapes": [[1, 4, HEIGHT, 40], SHAPES[0]]})
    job = start(recipe.model_copy(update={"latency": odd}), options)
    folder = next((options.results / NAME).iterdir())

    def open_all(precision: Any) -> dict[str, Any]:
        return {name: open_session("onnxruntime", folder / "onnxruntime", 1) for name in ("fp32", "int8")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "declared_picture", lambda job: ())
        cells = [turns.cell() for turns in time_turns(job, "onnxruntime", open_all)]
    assert [bool(cell.note) for cell in cells] == [True, False, True, False]
    assert cells[0].ms is None and "does not run at this size" in cells[0].note


def test_what_is_missing_is_skipped(recipe_and_options: tuple[Recipe, Options], tmp_path: Path) -> None:
    recipe, options = recipe_and_options
    (first, second) = bench_model(recipe, replace(options, results=tmp_path))
    assert isinstance(first, SkippedRow) and isinstance(second, SkippedRow)
    assert first.reason == "not quantized yet" and "quant run" in first.fix


def test_the_command_prints_json_alone_or_a_table(
    recipe_and_options: tuple[Recipe, Options], capfd: pytest.CaptureFixture[str]
) -> None:
    _, options = recipe_and_options
    root = options.results.parent
    common = ["bench", str(root / "recipe.yaml"), "--out", str(options.results), "--model-dir", str(root / "model")]
    arguments = [*common, "--threads", "2", "--quiet"]
    assert cli._guarded([*arguments, "--target", "onnxruntime", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["schema"] == 1 and document["threads"] == 2 and document["processor"]["cores"]
    assert {found["target"] for found in document["rows"]} == {"onnxruntime"}
    assert document["rows"][0]["ms"]["int8"] > 0
    assert [advice["target"] for advice in document["advice"]] == ["onnxruntime"]
    assert BenchReport.model_validate(document).rows
    assert cli._guarded([*common, "--quiet", "--target", "paddle"]) == 2, "nothing was timed"
    assert "skipped" in capfd.readouterr().out


def test_the_table_shows_times_notes_and_advice() -> None:
    fast = Timing(fp32=9.25, fp32_prepared=4.5, int8=1.5)
    rows: list[BenchRow | SkippedRow] = [*row("openvino", fast, None, default=fast)]
    rows.append(SkippedRow(model=NAME, task="t", target="paddle", reason="no [such] run", fix="Run it"))
    facts: dict[str, Any] = {"processor": {"name": "a processor", "features": ["avx512_vnni"]}, "versions": {}}
    timed = [found for found in rows if isinstance(found, BenchRow)]
    file = io.StringIO()
    print_bench(BenchReport(**facts, threads=2, rows=rows, advice=advise(timed)), file)
    text = file.getvalue()
    for fact in ["9.25", "4.50", "1.50", "3.00x", "1x3x4x5", "fixed at 1", "INT8 is faster", "avx512_vnni", "0.30"]:
        assert fact in text
    assert "skipped: colour_reader, paddle: no [such] run. Run it" in text


def test_shapes_have_four_sizes() -> None:
    with pytest.raises(RecipeError, match="latency.shapes"):
        load_recipe("PP-OCRv4_mobile_rec", ["latency.shapes=[[1, 3, 48]]"])


def test_a_target_without_a_runtime_is_not_timed(recipe_and_options: tuple[Recipe, Options]) -> None:
    recipe, options = recipe_and_options
    with pytest.raises(Unavailable, match="no runtime of tensorrt here"):
        bench_target(start(recipe, options), "tensorrt", options.results)
