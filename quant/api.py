"""The Python API: what `quant run` and `quant eval` do, as functions.

Both return plain values: folders, and rows of results as `eval.gate` defines them. What is wrong with an input is an
`InputError` with one sentence that says how to mend it; what cannot be had is its subclass `Unavailable`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from eval.gate import EvalReport
from quant.archive import Progress
from quant.errors import InputError, Unavailable
from quant.job import Options
from quant.judging import evaluate_model
from quant.pipeline import Finished, run_model
from quant.recipe import Recipe, limited_to, load_recipe

__all__ = ["EvalReport", "Finished", "InputError", "Recipe", "Unavailable", "evaluate", "load_recipe", "quantize"]


def quantize(
    recipe: Recipe | str,
    *,
    targets: str | Sequence[str] = (),
    data: str | Path | Sequence[str | Path] = (),
    model_dir: str | Path | None = None,
    results: str | Path = "results",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Finished:
    """Quantize, export, evaluate and gate a model; a run that was done before is found, not repeated.

    Args:
        recipe: from `load_recipe`, or the name of a model.
        targets: of the recipe's, all by default.
        data: registered sets or labelled folders in place of the recipe's sets.
        model_dir: folder of the FP32 model; by default it is looked for as the command line does.
        results: the folder below which the run's folder is made.
        threads: of a runtime, all cores by default; they are part of what names a run.
        progress: told `(what, done, total)` as long steps move on.

    Returns:
        `folder` of the run, with a folder for each target that clients load; the rows of `report`; `reused`, whether
        the run had been done before.

    Raises:
        InputError: an input is broken.
        Unavailable: the model, the data or every runtime cannot be had.
        OSError: there is no room, or no right to write; names the place.

    Example:
        >>> recipe = load_recipe("recipe.yaml", ["gate.max_drop=0.5"])
        >>> run = quantize(recipe, targets=["onnxruntime"], model_dir="model", threads=2)
        >>> sorted(path.name for path in (run.folder / "onnxruntime").iterdir())
        ['README.md', 'inference.onnx', 'inference.yml']
        >>> [row.gate.passed for row in run.report.rows if row.status == "judged" and row.gates]
        [True]
    """
    options = _options(data, model_dir, results, threads, progress)
    return run_model(limited_to(_recipe(recipe), _several(targets)), options)


def evaluate(
    recipe: Recipe | str,
    *,
    targets: str | Sequence[str] = (),
    data: str | Path | Sequence[str | Path] = (),
    model_dir: str | Path | None = None,
    results: str | Path = "results",
    threads: int | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Judge the artifacts of a model's newest run against FP32.

    Args:
        data: sets or labelled folders, of which every sample counts that calibration and search have not seen; by
            default the report split of the recipe's sets. The others are those of `quantize`.

    Returns:
        `rows`: for each target one of every set and the `pooled` one that gates. What could not be judged is a row
        with `status` "skipped", a `reason` and a `fix`.

    Raises:
        InputError: a set is broken, or the run has seen every sample of it.
        OSError: as of `quantize`.

    Example:
        >>> report = evaluate("recipe.yaml", data=["my_lines"], model_dir="model", targets=["onnxruntime"], threads=2)
        >>> for row in report.rows:
        ...     print(row.dataset, row.samples, row.fp32, row.int8)
        pooled 6 100.0 100.0
        my_lines 6 100.0 100.0
    """
    options = _options(data, model_dir, results, threads, progress)
    return evaluate_model(limited_to(_recipe(recipe), _several(targets)), options)


def _several(words: str | Path | Sequence[str | Path]) -> list[str]:
    """One word alone is a list of one, not of its letters."""
    return [str(words)] if isinstance(words, (str, Path)) else list(map(str, words))


def _recipe(recipe: Recipe | str) -> Recipe:
    return load_recipe(recipe) if isinstance(recipe, str) else recipe


def _options(
    data: str | Path | Sequence[str | Path],
    model_dir: str | Path | None,
    results: str | Path,
    threads: int | None,
    progress: Progress | None,
) -> Options:
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads}: must be at least 1")
    os.environ.setdefault("FLAGS_enable_pir_api", "0")  # before any import of paddle
    return Options(
        results=Path(results).absolute(),
        threads=threads or os.cpu_count() or 1,
        progress=progress or _silent,
        model_dir=None if model_dir is None else Path(model_dir),
        data=tuple(_several(data)),
    )


def _silent(what: str, done: int, total: int | None) -> None:
    """Progress of a caller who wants to hear of none."""
