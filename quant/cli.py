"""The command line: a table of plain functions. Heavy packages are imported inside the commands."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quant import __version__
from quant.errors import HANDED_OVER, INPUT_ERROR, HandedOver, InputError, Unavailable
from quant.target import TARGETS

if TYPE_CHECKING:
    from eval.gate import JudgedRow, SkippedRow
    from quant.archive import Progress
    from quant.job import Options
    from quant.recipe import Recipe
    from quant.sensitivity_report import Sensitivity
    from quant.work import Ended, ModelJob

INTERNAL_ERROR, INTERRUPTED = 70, 130
_OPERATORS_SHOWN = 20
_ROOM = "Free space there, or choose other folders with --out, QUANT_CACHE and TMPDIR"
_RIGHTS = "Allow it to be read and written, or choose other folders with --out and QUANT_CACHE"
_PATH = "Give another path"
_DISK = "Look at the disk or the network that it is on"
# A full disk, a read-only folder and the like are the user's to mend, not ours.
_STORAGE_ERRORS = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EEXIST: "A folder is needed there: remove the file, or give another path",
    errno.ENOTDIR: _PATH,
    errno.EISDIR: _PATH,
    errno.ENAMETOOLONG: _PATH,
    errno.ELOOP: _PATH,
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
}

# typer brings a click of its own and names only its subclasses; `BadParameter`'s parent is click's UsageError.
_UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="quant",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="INT8 versions of PaddleOCR / PaddleX models, with proof that at most 1 % of accuracy was lost.",
)
models_app = typer.Typer(no_args_is_help=True, help="FP32 models: list, fetch, verify.")
data_app = typer.Typer(no_args_is_help=True, help="Data sets: list, fetch, verify.")
app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")

Models = Annotated[list[str] | None, typer.Argument(help="Model names; see `quant list`.", show_default=False)]
Everything = Annotated[bool, typer.Option("--all", help="Every model that has a recipe.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe field.")]
DataNames = Annotated[
    list[str] | None, typer.Option("--data", metavar="NAME|DIR", help="A registered set or a labelled folder.")
]
ModelDir = Annotated[Path | None, typer.Option("--model-dir", help="Folder of the FP32 inference model.")]
Out = Annotated[Path | None, typer.Option("--out", file_okay=False, help="Folder of results; `results` by default.")]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", help=f"{', '.join(TARGETS)}; repeatable. All of the recipe's by default."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of every random choice.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of a runtime; all cores by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Only JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
WithTwins = Annotated[
    bool, typer.Option("--twins", help="Small stand-ins of models whose weights are hard to get; see `quant twins`.")
]
Jobs = Annotated[
    str,
    typer.Option("--jobs", metavar="N|auto", help="Models at a time; auto: as cores (see --threads) and memory allow."),
]
Executor = Annotated[str, typer.Option("--executor", help="Where several models are worked on: local, or ray.")]
Address = Annotated[str | None, typer.Option("--address", help="Of the Ray cluster; RAY_ADDRESS by default.")]
ShardSamples = Annotated[
    int | None,
    typer.Option("--shard-samples", min=1, help="Larger evaluations are cut into tasks; 500 for several models."),
]
Offers = Annotated[Path | None, typer.Option("--offer", hidden=True, help="Folder for evaluations that others judge.")]
MethodName = Annotated[
    str | None,
    typer.Option("--method", help="ptq, recon: this alone; qat: after recon; auto: trained where PTQ fails."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Find model and data, say what would be done; generate and train nothing.")
]


def main() -> None:
    """Entry point of `quant`; turns every outcome into an exit code (see DESIGN: 0, 1, 2, 70, 130)."""
    sys.exit(_guarded(sys.argv[1:]))


def _guarded(arguments: list[str]) -> int:
    try:
        result = app(args=arguments, prog_name="quant", standalone_mode=False)
        if result == INTERRUPTED:  # typer turns Ctrl-C into this number by itself
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except InputError as error:
        return _failed(str(error), INPUT_ERROR)
    except HandedOver:
        return HANDED_OVER
    except _UsageError as error:
        if error.__class__.__name__ == "NoArgsIsHelpError":
            error.show()
            return INPUT_ERROR
        return _failed(error.format_message(), INPUT_ERROR)
    except (KeyboardInterrupt, typer.Abort) as error:
        if isinstance(error.__cause__, EOFError):  # typer takes the end of any file for that of its input
            return _internal_error(error.__cause__)
        return _failed("interrupted; the next run goes on from the last finished step", INTERRUPTED)
    except OSError as error:
        if error.errno == errno.ENOENT and _ours(error.filename):
            said = "vanished while it was needed; run the command again when nothing clears the folder"
            return _failed(f"{error.filename} {said}", INPUT_ERROR)
        fix, place = _STORAGE_ERRORS.get(error.errno or 0), error.filename2 or error.filename
        if fix is None or (error.errno == errno.EEXIST and not _is_file(place)):
            return _internal_error(error)
        return _failed(f"{place or 'the output or cache folder'}: {error.strerror}. {fix}", INPUT_ERROR)
    except Exception as error:  # the last resort: an error of ours gets its own exit code and a log
        return _internal_error(error)


def _ours(file: Any) -> bool:
    """Whether a file is one of the cache, or of a folder of results that is being written."""
    from quant.source import cache_dir

    if not isinstance(file, str | Path):
        return False
    return Path(file).is_relative_to(cache_dir()) or any(part.endswith(".part") for part in Path(file).parts)


def _is_file(place: Any) -> bool:
    """Whether a file stands where a folder should be made."""
    return isinstance(place, str | Path) and Path(place).is_file()


def _failed(message: str, code: int) -> int:
    print(f"quant: {message}", file=sys.stderr)
    return code


def _internal_error(error: BaseException) -> int:
    report = "please report it"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="quant-error-", suffix=".log", delete=False) as log:
            traceback.print_exception(error, file=log)
        report += f" with {log.name}"
    except OSError as full:
        report += f"; there is no log, since it could not be written ({full})"
    return _failed(f"internal error ({error.__class__.__name__}: {error}); {report}", INTERNAL_ERROR)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command("list")
def list_recipes(
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The table of docs/models.md.")] = False,
) -> None:
    """List the recipes."""
    from quant.recipe import load_recipe, recipe_names

    recipes = [load_recipe(name) for name in recipe_names()]
    if as_markdown:
        from quant.catalogue import models_table

        print(models_table(recipes), end="")
        return
    if as_json:
        _print_json(
            [
                {"model": r.name, "task": r.task, "targets": list(r.targets), "description": r.description}
                for r in recipes
            ]
        )
        return
    _print_table(
        ["Model", "Task", "Targets", "Description"],
        [[r.name, r.task, ", ".join(r.targets), r.description] for r in recipes],
    )


@app.command()
def describe(model: str, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print a recipe as it is used, merged with its base and with --set applied, and the route its model takes.

    Example: quant describe PP-OCRv4_mobile_det --set calibration.samples=64
    """
    import yaml

    from quant.recipe import load_recipe
    from quant.route import route_of

    recipe = load_recipe(model, overrides or ())
    document, route = recipe.model_dump(mode="json", by_alias=True), route_of(recipe)
    if as_json:
        _print_json({**document, "route": vars(route)})
        return
    print(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), end="")
    print(f"# source: {route.source}\n# input: {route.format}\n# why: {route.why}")
    if route.bridge:
        print(f"# bridge: {route.bridge}")
    for target, how in route.targets.items():
        print(f"# target {target}: {how}")


@app.command()
def validate(
    files: Annotated[list[str] | None, typer.Argument(help="Models or YAML files; all recipes by default.")] = None,
    overrides: Overrides = None,
) -> int:
    """Check recipes and name every problem: file, key, value, what is allowed."""
    from quant.recipe import RecipeError, load_recipe, recipe_names

    problems = 0
    for name in files or recipe_names():
        try:
            load_recipe(name, overrides or ())
            print(f"{name}: valid")
        except InputError as error:
            problems += len(error.problems) if isinstance(error, RecipeError) else 1
            print(error)
    return INPUT_ERROR if problems else 0


@app.command()
def run(
    models: Models = None,
    everything: Everything = False,
    overrides: Overrides = None,
    data: DataNames = None,
    model_dir: ModelDir = None,
    out: Out = None,
    targets: Targets = None,
    seed: Seed = None,
    threads: Threads = None,
    as_json: AsJson = False,
    twins: WithTwins = False,
    jobs: Jobs = "auto",
    executor: Executor = "local",
    address: Address = None,
    shard_samples: ShardSamples = None,
    offers: Offers = None,
    method: MethodName = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> int:
    """Quantize, export, evaluate, gate and report; with --twins the twins of the models in their place.

    Examples:

      quant run PP-OCRv4_mobile_det

      quant run --twins PP-OCRv4_server_det

      quant run PP-OCRv4_mobile_rec --target onnxruntime --data my_lines --set calibration.samples=256

      quant run PP-OCRv4_mobile_rec --target onnxruntime --method qat --set qat.minutes=20
    """
    from quant.pipeline import run_model

    _check_twins(twins, model_dir)
    overrides = [*(overrides or []), *([f"ladder.method={method}"] if method else [])]
    recipes = _recipes(models, everything, overrides, seed, targets, twins)
    with _working(out, threads, model_dir, data, quiet, as_json, offers, shard_samples) as (options, stdout):

        def chosen(recipe: Recipe) -> Options:
            return _with_twin(recipe, options, train=True) if twins else options

        if dry_run:
            return _print_dry_runs(recipes, lambda recipe: _dry_run(recipe, options, twins), as_json, stdout)
        outcome = _Outcome()
        work = _Spread("run", executor, jobs, address, threads, shard_samples)
        if offers is None and work.wanted(recipes):
            common = _arguments(overrides, data, model_dir, targets, seed)
            given = [[name, *common, *(["--twins"] if twins else [])] for name in _asked(models, recipes)]
            return work.finish(recipes, given, [twins] * len(recipes), options, as_json, stdout)
        for recipe in recipes:
            with outcome.collecting(recipe, alone=len(recipes) == 1, twin=twins):
                finished = run_model(recipe, chosen(recipe))
                outcome.rows += finished.report.rows
                outcome.folders.append((finished.folder, finished.reused))
        if outcome.folders:
            _write_results_readme(options.results)
        return _finish(outcome, as_json, stdout)


@app.command("eval")
def evaluate(
    models: Models = None,
    everything: Everything = False,
    overrides: Overrides = None,
    data: DataNames = None,
    model_dir: ModelDir = None,
    out: Out = None,
    targets: Targets = None,
    seed: Seed = None,
    threads: Threads = None,
    as_json: AsJson = False,
    twins: WithTwins = False,
    jobs: Jobs = "auto",
    executor: Executor = "local",
    address: Address = None,
    shard_samples: ShardSamples = None,
    offers: Offers = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
) -> int:
    """Compare FP32 with the newest INT8 artifacts: the diff table; with --twins also of the models' twins.

    Examples:

      quant eval --all --twins

      quant eval PP-OCRv4_mobile_rec --data my_lines --data more_lines --json
    """
    from quant.judging import evaluate_model, find_evaluation
    from quant.outline import eval_outline

    _check_twins(twins, model_dir)
    recipes = _recipes(models, everything, overrides, seed, targets)
    with _working(out, threads, model_dir, data, quiet, as_json, offers, shard_samples) as (options, stdout):
        options = replace(options, asked=tuple(_arguments(overrides, data, model_dir, targets, seed)))
        if dry_run:

            def outline(recipe: Recipe) -> dict[str, Any]:
                return eval_outline(find_evaluation(recipe, options))

            return _print_dry_runs(recipes, outline, as_json, stdout)
        known = _twin_names() if twins else []
        work = _Spread("eval", executor, jobs, address, threads, shard_samples)
        if offers is None and work.wanted(recipes):
            common, both = _arguments(overrides, data, model_dir, targets, seed), [r.name in known for r in recipes]
            names = zip(_asked(models, recipes), both, strict=True)
            given = [[name, *common, *(["--twins"] if twin else [])] for name, twin in names]
            return work.finish(recipes, given, both, options, as_json, stdout)
        asked = [(recipe, False) for recipe in recipes] + [(r, True) for r in recipes if r.name in known]
        outcome = _Outcome()
        for recipe, twin in asked:
            with outcome.collecting(recipe, alone=len(asked) == 1, twin=twin):
                chosen = _with_twin(recipe, options, train=False) if twin else options
                outcome.rows += evaluate_model(recipe, chosen).rows
        return _finish(outcome, as_json, stdout)


@app.command()
def bench(
    models: Models = None,
    everything: Everything = False,
    overrides: Overrides = None,
    model_dir: ModelDir = None,
    out: Out = None,
    targets: Targets = None,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:
    """Time the newest INT8 artifacts against FP32 as shipped and as prepared: batches, input sizes, bytes.

    Examples:

      quant bench PP-OCRv4_mobile_rec --threads 1

      quant bench PP-OCRv4_mobile_det --target openvino --set latency.shapes=[[1,3,736,736]] --json
    """
    from eval.benchmark import BenchReport, BenchRow, advise
    from quant.latency import bench_model
    from quant.manifest import processor, versions

    recipes = _recipes(models, everything, overrides, None, targets)
    with _working(out, threads, model_dir, None, quiet, as_json) as (options, stdout):
        options = replace(options, asked=tuple(_arguments(overrides, None, model_dir, targets, None)))
        rows: list[BenchRow | SkippedRow] = []
        for recipe in recipes:
            rows += bench_model(recipe, options)
        timed = [row for row in rows if isinstance(row, BenchRow) and row.ms]
        advice = advise(timed)
        report = BenchReport(
            processor=processor(), versions=versions(), threads=options.threads, rows=rows, advice=advice
        )
        if as_json:
            stdout.write(report.to_json())
            stdout.flush()
        else:
            from eval.report import print_bench

            print_bench(report)
        return 0 if timed else INPUT_ERROR


@app.command()
def sensitivity(
    model: str,
    target: Annotated[str | None, typer.Option("--target", help="Its plan is measured; the recipe's first.")] = None,
    overrides: Overrides = None,
    data: DataNames = None,
    model_dir: ModelDir = None,
    out: Out = None,
    seed: Seed = None,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure what INT8 does operator by operator and kind by kind, and say what to keep in FP32.

    Example: quant sensitivity PP-OCRv4_mobile_rec --target openvino
    """
    from quant.job import start
    from quant.sensitivity_report import report_sensitivity

    (recipe,) = _recipes([model], False, overrides, seed, [target] if target else None)
    with _working(out, threads, model_dir, data, quiet, as_json) as (options, stdout):
        result, places = report_sensitivity(start(recipe, options), next(iter(recipe.targets)))
        if as_json:
            stdout.write(result.to_json())
            stdout.flush()
            return
        _print_sensitivity(result, places)


def _print_sensitivity(result: Sensitivity, places: list[Path]) -> None:
    _print_table(*result.table(_OPERATORS_SHOWN))
    if len(result.operators) > _OPERATORS_SHOWN:
        print(f"{len(result.operators) - _OPERATORS_SHOWN} more operators with less damage stand in {places[0]}\n")
    _print_table(*result.group_table())
    for sentence in result.advice:
        print(f"* {sentence}")
    for place in places:
        print(f"written: {place}")


@app.command()
def export(
    model: str,
    to: Annotated[Path, typer.Option("--to", file_okay=False, help="Folder that receives one folder per target.")],
    targets: Targets = None,
    out: Out = None,
    model_dir: ModelDir = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="The prepared FP32 model as well: folded, as ONNX.")] = False,
) -> None:
    """Copy the newest artifacts to a folder, ready for PaddleX, PaddleOCR, RapidOCR and OpenVINO.

    Examples:

      quant export PP-OCRv4_mobile_det --to deploy --target onnxruntime

      quant export PP-OCRv4_mobile_det --to deploy --fp32
    """
    import shutil

    from quant.archive import staged
    from quant.job import runs_folder
    from quant.manifest import load_manifest, newest_run
    from quant.recipe import load_recipe
    from quant.verification import seal

    recipe = load_recipe(model)
    runs = runs_folder(recipe, _results_dir(out), model_dir)
    folder = newest_run(runs.parent, runs.name)
    if folder is None:
        raise InputError(f"{recipe.name} is not quantized yet: no run in {runs}. Run `quant run {recipe.name}`")
    manifest = load_manifest(folder)
    if not manifest.intact(folder):
        raise InputError(f"files in {folder} are not what was written; run `quant run {recipe.name}` again")
    wanted = targets or list(manifest.artifacts)
    places = {target: to / f"{recipe.name}_{target}_int8" for target in wanted}
    for target, place in places.items():
        if target not in manifest.artifacts:
            raise InputError(f"{folder} has no artifact for target '{target}'; it has {', '.join(manifest.artifacts)}")
        if place.exists():
            raise InputError(f"{place} exists already; remove it or choose another folder with --to")
    prepared = to / f"{recipe.name}_fp32"
    if fp32 and prepared.exists():
        raise InputError(f"{prepared} exists already; remove it or choose another folder with --to")
    for target, place in places.items():
        with staged(place) as temporary:
            shutil.copytree(folder / target, temporary)
            seal(temporary, recipe.name, folder.name, target)
        print(f"{place}: written; gate: {_verdict(folder, target)}")
    if fp32:
        _export_fp32(recipe, prepared, out, model_dir)
        print(f"{prepared}: FP32, folded")


def _export_fp32(recipe: Recipe, place: Path, out: Path | None, model_dir: Path | None) -> None:
    """Copy the prepared FP32 model with its `inference.yml`."""
    import shutil

    from quant.archive import staged
    from quant.export import write_inference_yml
    from quant.job import fp32_folders
    from quant.judging import find_evaluation
    from quant.verification import seal

    with _working(out, None, model_dir, None, True, False) as (options, _), staged(place) as temporary:
        found = find_evaluation(recipe, options)
        shutil.copytree(fp32_folders(found.job, "onnxruntime")["fp32_prepared"], temporary)
        write_inference_yml(found.job.files.inference_yml, temporary)
        seal(temporary, recipe.name, found.folder.name, "fp32")


@app.command("verify")
def verify_folders(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Runs, artifacts, exported folders, or folders of these.")
    ],
    as_json: AsJson = False,
) -> int:
    """Compare folders with their manifests; name every file that is missing, changed or added.

    Examples:

      quant verify deploy/PP-OCRv4_mobile_det_onnxruntime_int8

      quant verify deploy results
    """
    from quant.verification import verify_all

    found = [one for folder in folders for one in verify_all(folder)]
    if as_json:
        _print_json([one.document() for one in found])
    else:
        for one in found:
            print(f"{one.folder}: {one.verdict}")
            for problem in one.problems:
                print(f"  {problem}")
    return 0 if all(one.good for one in found) else INPUT_ERROR


def _verdict(run: Path, target: str) -> str:
    """What the run's gate said of a target."""
    from eval.gate import JudgedRow, verdict_text
    from quant.pipeline import read_report

    rows = [row for row in read_report(run).rows if isinstance(row, JudgedRow) and row.gates and row.target == target]
    return verdict_text(rows[0]) if rows else "not judged"


@app.command()
def report(
    models: Models = None,
    out: Out = None,
    to: Annotated[
        Path | None, typer.Option("--to", file_okay=False, help="Folder of the report; `report` in the results.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write what the newest runs found as Markdown and as one HTML page that needs nothing else.

    Examples:

      quant report

      quant report PP-OCRv4_mobile_det --to my_report
    """
    from quant.report import FOLDER, write_report

    results = _results_dir(out)
    written = write_report(results, models or [], to or results / FOLDER)
    if as_json:
        _print_json({name: str(v) if isinstance(v, Path) else v for name, v in vars(written).items()})
        return
    print(f"written: {written.page} ({written.pictures} pictures, {written.left_out} left out)")
    print(f"written: {written.markdown}")


@app.command()
def doctor(as_json: AsJson = False) -> int:
    """Versions, processor features, devices and caches; what is missing and how to get it."""
    from quant.doctor import examine

    checks = examine()
    if as_json:
        _print_json([vars(check) for check in checks])
    else:
        _print_table(
            ["", "What", "Found", "How to mend it"], [["ok" if c.ok else "!!", c.what, c.found, c.fix] for c in checks]
        )
    return 0 if all(check.ok for check in checks) else INPUT_ERROR


@app.command("twins")
def train_twins(
    models: Models = None,
    out: Annotated[
        Path | None, typer.Option("--out", file_okay=False, help="Folder for a folder per twin; the cache by default.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the training, below 1000.")] = 0,
    minutes: Annotated[float | None, typer.Option("--minutes", help="The most that a training may take.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train twins: small networks that stand in for models whose weights are hard to get; all of them by default.

    A twin has its model's inputs, outputs and operators, and is trained and judged on generated pictures. It goes
    where its model goes: `quant run --twins MODEL`, or --model-dir with its folder.

    Example: quant twins PP-OCRv4_server_det --out models
    """
    from quant.recipe import load_recipe
    from quant.twins import MINUTES, checked_module, ready_twin, train_twin, twin_names

    limit = MINUTES if minutes is None else minutes
    recipes = [load_recipe(name) for name in models or twin_names()]
    for recipe in recipes:
        checked_module(recipe.name, seed, limit)
    with _progress(quiet) as progress:
        for recipe in recipes:
            name = recipe.name
            if out is None:
                print(f"{name}: {ready_twin(recipe, progress, seed, limit).folder}")
                continue
            folder = out.absolute() / name
            if folder.exists():
                raise InputError(f"{folder} exists already; remove it or choose another folder with --out")
            train_twin(recipe, folder, seed, limit)
            print(f"{name}: {folder}")


@models_app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """Say where each FP32 model would come from, without downloading."""
    from quant.recipe import load_recipe, recipe_names
    from quant.source import local_source

    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        rows.append([name, local_source(recipe) or "not here", *[archive.url for archive in recipe.model.archives[:1]]])
    if as_json:
        _print_json([dict(zip(("model", "here", "archive"), row, strict=False)) for row in rows])
    else:
        _print_table(["Model", "Here", "Official archive"], rows)


@models_app.command("fetch")
def fetch_models(models: Models = None, everything: Everything = False, quiet: Quiet = False) -> None:
    """Download official archives into the cache."""
    from quant.source import install_model

    with _progress(quiet) as progress:
        for recipe in _recipes(models, everything, None, None, None):
            files = install_model(recipe, progress)
            print(f"{recipe.name}: {files.folder}")


@models_app.command("verify")
def verify_models(models: Models = None, everything: Everything = False, model_dir: ModelDir = None) -> None:
    """Check that an FP32 model is complete, loads in Paddle, and writes what the recipe's task decodes."""
    from quant.prepare import check_kind
    from quant.source import resolve_model
    from quant.task import make_task

    for recipe in _recipes(models, everything, None, None, None):
        files = resolve_model(recipe, model_dir)
        check_kind(files, make_task(recipe.task, files.inference_yml, recipe.name))
        print(f"{recipe.name}: good, from {files.source}")
        for name, sha256 in files.sha256.items():
            print(f"  {sha256}  {name}")


@data_app.command("list")
def list_data(as_json: AsJson = False) -> None:
    """List the registered data sets with licence and address."""
    from calib_data.registry import dataset_names, load_entry

    entries = [load_entry(name) for name in dataset_names()]
    if as_json:
        _print_json([entry.model_dump(mode="json", by_alias=True) for entry in entries])
    else:
        _print_table(
            ["Set", "Task", "Licence", "Address"],
            [[e.name, e.task, e.licence, e.archive.url if e.archive else e.homepage] for e in entries],
        )


@data_app.command("fetch")
def fetch_data(names: Annotated[list[str], typer.Argument(help="Registered sets.")], quiet: Quiet = False) -> None:
    """Download public sets into the cache."""
    from calib_data.registry import install_dataset

    with _progress(quiet) as progress:
        for name in names:
            print(f"{name}: {install_dataset(name, progress).folder}")


@data_app.command("verify")
def verify_data(
    names: Annotated[list[str], typer.Argument(help="Registered sets or labelled folders.")],
    task: Annotated[str, typer.Option("--task", help="What labelled folders are for.")] = "text_recognition",
) -> int:
    """Read sets, decode every picture and name what is broken."""
    from calib_data.registry import FORMATS, dataset_names, load_entry, resolve_dataset
    from eval.dataset import BrokenPicture, read_dataset, read_image

    broken = 0
    for name in names:
        known = load_entry(name).task if name in dataset_names() else task
        if known not in FORMATS:
            raise InputError(f"--task {known}: must be one of {', '.join(FORMATS)}")
        dataset = read_dataset(resolve_dataset(name, known))
        sentences = list(dataset.broken)
        for sample in dataset.samples:
            try:
                read_image(sample.image)
            except BrokenPicture as error:
                sentences.append(str(error))
        print(f"{name}: {len(dataset.samples)} samples, {len(sentences)} broken, from {dataset.folder.source}")
        for sentence in sentences:
            print(f"  {sentence}")
        broken += len(sentences)
    return INPUT_ERROR if broken else 0


def _recipes(
    models: list[str] | None,
    everything: bool,
    overrides: list[str] | None,
    seed: int | None,
    targets: list[str] | None,
    twins: bool = False,
) -> list[Recipe]:
    """The recipes asked for; where all are, only those with a twin if `twins` says so."""
    from quant.recipe import limited_to, load_recipe, recipe_names

    names = (_twin_names() if twins else recipe_names()) if everything else models or []
    if not names:
        raise InputError("name a model (see `quant list`) or give --all")
    extra = [*(overrides or []), *([f"seed={seed}"] if seed is not None else [])]
    return [limited_to(load_recipe(name, extra), targets or []) for name in names]


def _twin_names() -> list[str]:
    from quant.twins import twin_names

    return twin_names()


def _check_twins(twins: bool, model_dir: Path | None) -> None:
    """Refuse what contradicts itself once, not for each model."""
    if twins and model_dir is not None:
        raise InputError("--twins finds the folders of the twins by itself; leave out --model-dir, or --twins")


def _with_twin(recipe: Recipe, options: Options, train: bool) -> Options:
    """Options for the twin of a recipe's model, on pictures of its own world unless --data names others.

    Raises:
        Unavailable: it is not trained yet, and shall not be now.
    """
    from quant.twins import find_twin, ready_twin

    try:
        twin = ready_twin(recipe, options.progress) if train else find_twin(recipe)
    except Unavailable as error:
        raise Unavailable(error.reason, f"Run `{options.run_command(recipe.name, twin=True)}`") from error
    if options.data:
        return replace(options, model_dir=twin.folder)
    return replace(options, model_dir=twin.folder, data=(str(twin.world),), report_split=True)


@contextmanager
def _working(
    out: Path | None,
    threads: int | None,
    model_dir: Path | None,
    data: list[str] | None,
    quiet: bool,
    as_json: bool,
    offers: Path | None = None,
    shard_samples: int | None = None,
) -> Iterator[tuple[Options, Any]]:
    """Options for the pipeline, and the true standard output: libraries print to stderr meanwhile."""
    from quant.job import Options

    warnings.filterwarnings("ignore")
    os.environ.setdefault("FLAGS_enable_pir_api", "0")  # before any import of paddle
    results = _results_dir(out)
    # The log within the progress: it is written above the bars.
    with _own_stdout(as_json) as stdout, _progress(quiet) as progress, _log_shown(quiet):
        options = Options(results, threads or os.cpu_count() or 1, progress, model_dir, tuple(data or ()))
        yield replace(options, offers=offers, shard_samples=shard_samples or 0), stdout


@contextmanager
def _own_stdout(as_json: bool) -> Iterator[Any]:
    """Keep descriptor 1 for JSON: native libraries that print to it are sent to stderr."""
    if not as_json:
        yield sys.stdout
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(kept, "w", encoding="utf-8") as stdout:
        try:
            yield stdout
        finally:
            sys.stdout.flush()
            os.dup2(stdout.fileno(), 1)


@contextmanager
def _log_shown(quiet: bool) -> Iterator[None]:
    """What is left out is said on standard error, also with --quiet and whatever libraries do to the root logger."""
    handler, log = logging.StreamHandler(sys.stderr), logging.getLogger("quant")
    handler.setFormatter(_Sentence())
    log.addHandler(handler)
    log.propagate, before = False, log.level
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(handler)
        log.propagate = True


class _Sentence(logging.Formatter):
    """Warnings begin with the program's name: where several models are worked on, they are told from the rest by it."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{'quant: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}"


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    from quant.archive import console_progress

    if quiet:
        yield lambda what, done, total: None
        return
    with console_progress() as progress:
        yield progress


def _results_dir(out: Path | None) -> Path:
    """--out, else `results` of the checkout one stands in, else `results` in the working folder."""
    if out is not None:
        return out.absolute()
    checkout = Path(__file__).parents[1]
    inside = (checkout / "recipes").is_dir() and Path.cwd().is_relative_to(checkout)
    return (checkout if inside else Path.cwd()) / "results"


@dataclass
class _Outcome:
    """Rows of several models, folders written or found unchanged, and whether an input was broken."""

    rows: list[JudgedRow | SkippedRow] = field(default_factory=list)
    folders: list[tuple[Path, bool]] = field(default_factory=list)
    broken: bool = False

    @contextmanager
    def collecting(self, recipe: Recipe, alone: bool, twin: bool = False) -> Iterator[None]:
        """What is missing becomes skipped rows; so does what is broken, unless the model was asked for alone."""
        from eval.gate import of_twins
        from quant.judging import skipped_rows

        def skip(reason: str, fix: str) -> None:
            rows = skipped_rows(recipe, list(recipe.targets), reason, fix)
            self.rows += of_twins(rows) if twin else rows

        try:
            yield
        except Unavailable as error:
            skip(error.reason, error.fix)
        except InputError as error:
            if alone:
                raise
            self.broken = True
            skip(str(error), f"Mend it, then run the command for {recipe.name} again")


@dataclass(frozen=True)
class _Spread:
    """How several models are worked on: each by a command of its own, one after the other or side by side."""

    action: Literal["run", "eval"]
    executor: str
    jobs: str
    address: str | None
    threads: int | None
    shard_samples: int | None

    def wanted(self, recipes: list[Recipe]) -> bool:
        """Whether commands of their own do the work: several models always, so that none takes the others with it.

        On a cluster one model has shards, and so it has here, where that was asked for and there is room.
        """
        if self.executor not in ("local", "ray"):
            raise InputError(f"--executor {self.executor}: must be local or ray")
        if self.shard_samples and not self._side_by_side:
            sentence = "--shard-samples is not used: one thing is done at a time; give --jobs 2, or fewer --threads"
            logging.getLogger("quant.cli").warning(sentence)
        return self.executor == "ray" or len(recipes) > 1 or (self._side_by_side and self.shard_samples is not None)

    def finish(
        self,
        recipes: list[Recipe],
        given: list[list[str]],
        twins: list[bool],
        options: Options,
        as_json: bool,
        stdout: Any,
    ) -> int:
        """Have all commands done; print the rows of all, in the order of the models."""
        from quant.executor import spread
        from quant.manifest import now
        from quant.work import ModelJob

        cores = os.cpu_count() or 1
        threads = self.threads or (max(1, cores // (self._count() or 1)))
        jobs = [
            ModelJob(self.action, recipe.name, (*arguments, "--threads", str(threads)), threads, twin)
            for recipe, arguments, twin in zip(recipes, given, twins, strict=True)
        ]
        asked = dict(zip(jobs, recipes, strict=True))  # a model that is named twice ends once
        begun, ended = now(), {}
        options.progress(f"quant {self.action}: models", 0, len(asked))
        where = (self.executor, self._count(), self.address, self._largest_evaluation, options.progress)
        for job, how in spread(jobs, options.results, *where):  # type: ignore[arg-type]
            ended[job] = how
            options.progress(f"quant {self.action}: models", len(ended), len(asked))
        outcome = self._gathered(asked, ended, options.results, begun)
        if outcome.folders:
            _write_results_readme(options.results)
        code = _finish(outcome, as_json, stdout)
        return INTERNAL_ERROR if any(how.internal for how in ended.values()) else code

    def _gathered(
        self, recipes: dict[ModelJob, Recipe], ended: dict[ModelJob, Ended], results: Path, begun: str
    ) -> _Outcome:
        """What all commands came to, in the order of the models."""
        from eval.gate import EvalReport

        outcome = _Outcome()
        for job, recipe in recipes.items():
            for sentence in ended[job].warnings:
                print(sentence, file=sys.stderr)
            with outcome.collecting(recipe, alone=False, twin=job.twins and self.action == "run"):
                rows = EvalReport.model_validate({"rows": ended[job].rows()}).rows
                outcome.rows += rows
                if self.action == "run":
                    judged = any(row.status == "judged" for row in rows)
                    outcome.folders += _left_behind(job, judged, results, begun)
        return outcome

    @property
    def _side_by_side(self) -> bool:
        """Whether more than one thing can be done at a time."""
        count, cores = self._count(), os.cpu_count() or 1
        return self.executor == "ray" or (cores // (self.threads or cores) if count is None else count) > 1

    @property
    def _largest_evaluation(self) -> int:
        """Samples from which on an evaluation is cut; 0 where nobody would judge a part of it meanwhile."""
        from quant.shards import SHARD_SAMPLES

        return (self.shard_samples or SHARD_SAMPLES) if self._side_by_side else 0

    def _count(self) -> int | None:
        if self.jobs == "auto":
            return None
        if not self.jobs.isdecimal() or not 0 < int(self.jobs) < 10_000:
            raise InputError(f"--jobs {self.jobs}: must be a number of processes, or auto")
        return int(self.jobs)


def _left_behind(job: ModelJob, judged: bool, results: Path, begun: str) -> list[tuple[Path, bool]]:
    """The run that a command made, or found unchanged; none where it said that it has none."""
    from quant.job import TWINS
    from quant.manifest import load_manifest, newest_run

    folder = newest_run(results / TWINS if job.twins else results, job.model)
    if folder is None:
        return []
    reused = load_manifest(folder).created < begun
    return [] if reused and not judged else [(folder, reused)]


def _asked(models: list[str] | None, recipes: list[Recipe]) -> list[str]:
    """The models as they were named; files among them by their whole paths, since a node stands elsewhere."""
    names = models if models and len(models) == len(recipes) else [recipe.name for recipe in recipes]
    return [str(Path(name).absolute()) if name.endswith((".yaml", ".yml")) else name for name in names]


def _arguments(
    overrides: list[str] | None,
    data: list[str] | None,
    model_dir: Path | None,
    targets: list[str] | None,
    seed: int | None,
) -> list[str]:
    """Options that hold for every model, as they were given."""
    folders = [str(Path(name).absolute()) if Path(name).is_dir() else name for name in data or []]
    given = {"--set": overrides or [], "--data": folders, "--target": targets or []}
    single = {"--model-dir": model_dir and str(model_dir.absolute()), "--seed": seed}
    listed = [word for option, values in given.items() for value in values for word in (option, value)]
    return listed + [word for option, value in single.items() if value is not None for word in (option, str(value))]


def _finish(outcome: _Outcome, as_json: bool, stdout: Any) -> int:
    from eval.gate import EvalReport, exit_code

    if as_json:
        stdout.write(EvalReport(rows=outcome.rows).to_json())
        stdout.flush()
    else:
        from eval.report import print_report

        print_report(outcome.rows)
        for folder, reused in outcome.folders:
            _print_ladder(folder)
            print(f"{'unchanged, nothing to do' if reused else 'written'}: {folder}")
    return exit_code(outcome.rows) or (INPUT_ERROR if outcome.broken else 0)


def _print_ladder(folder: Path) -> None:
    """What each rung gave, which limits it missed and, where weights were trained, what it cost."""
    from quant.ladder import RUNG_HEADINGS, Limits, rung_rows
    from quant.manifest import load_manifest

    manifest = load_manifest(folder)
    if any(len(rungs) > 1 for rungs in manifest.ladder.values()):
        limits, ladder = Limits.of_recipe(manifest.recipe), manifest.ladder.items()
        _print_table(RUNG_HEADINGS, [row for target, rungs in ladder for row in rung_rows(target, rungs, limits)])


def _dry_run(recipe: Recipe, options: Options, twins: bool) -> dict[str, Any]:
    """What `quant run` would do."""
    from quant.outline import run_outline, twin_outline

    try:
        chosen = _with_twin(recipe, options, train=False) if twins else options
    except Unavailable:
        return twin_outline(recipe, options)
    return run_outline(recipe, chosen)


def _print_dry_runs(
    recipes: list[Recipe], outline: Callable[[Recipe], dict[str, Any]], as_json: bool, stdout: Any
) -> int:
    """What would be done for each model; what cannot be had hides nothing of the others."""
    import yaml

    outlines: list[dict[str, Any]] = []
    for recipe in recipes:
        try:
            outlines.append(outline(recipe))
        except InputError as error:
            if len(recipes) == 1:
                raise
            outlines.append({"model": recipe.name, "skipped": str(error)})
    if as_json:
        stdout.write(json.dumps(outlines, indent=2, ensure_ascii=False) + "\n")
    else:
        stdout.write(yaml.safe_dump(outlines, sort_keys=False, allow_unicode=True, width=160))
    stdout.flush()
    return INPUT_ERROR if all("skipped" in one for one in outlines) else 0


def _write_results_readme(results: Path) -> None:
    from eval.report import read_reports, results_readme
    from quant.archive import staged
    from quant.job import TWINS
    from quant.manifest import newest_runs

    runs = [*newest_runs(results), *newest_runs(results / TWINS)]
    with staged(results / "README.md") as temporary:
        temporary.write_text(results_readme(read_reports(runs)), encoding="utf-8")


def _print_table(headings: list[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    Console(highlight=False, width=console.width if console.is_terminal else 160).print(table, markup=False)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    from quant.child import follow_parent

    follow_parent()
    main()
