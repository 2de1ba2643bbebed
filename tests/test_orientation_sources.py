"""Where the orientation models come from: archives, folders of single files, and two weight sets under one name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from official_host import OfficialHost
from test_archive import files_below, tar_of
from tiny_pir import write_tiny_pir

from quant import archive
from quant.errors import InputError, Unavailable
from quant.recipe import Recipe, RecipeError, load_recipe
from quant.source import cached_dir, install_model, resolve_model

NAME = "PP-LCNet_x0_25_textline_ori"


@pytest.fixture(autouse=True)
def cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(archive, "_unreachable", {})
    return own_cache


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    model = write_tiny_pir(tmp_path_factory.mktemp("tiny"))
    described = yaml.safe_dump(load_recipe(NAME).inference).encode()
    parts = {path.name: path.read_bytes() for path in (model.model, model.params)}
    return {**parts, "inference.yml": described}


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != "inference.yml"}


def put_files(host: OfficialHost, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        host.put(f"/repo/{name}", data)
    return f"{host.url}/repo"


def recipe_of(*archives: dict[str, Any]) -> Recipe:
    return load_recipe(NAME, [f"model.archives={json.dumps([{'format': 'pir', **facts} for facts in archives])}"])


def test_a_folder_of_files_is_fetched_once(host: OfficialHost, files: dict[str, bytes], cache: Path) -> None:
    recipe = recipe_of(
        {"url": put_files(host, files), "packed": False, "files": hashes(files), "edition": "the old set"}
    )
    found = resolve_model(recipe)
    assert found.source == f"the official archive {host.url}/repo, the old set"
    assert (found.format, found.folder) == ("pir", cached_dir(recipe))
    assert resolve_model(recipe).source == f"the cache {cached_dir(recipe)}, from {host.url}/repo, the old set"
    assert sorted(host.requests) == [f"/repo/{name}" for name in sorted(files)]
    assert files_below(cache / "downloads") == [
        name for name in files_below(cache / "downloads") if name.endswith(".pin.json")
    ]


def test_a_mirror_serves_where_the_archive_is_gone(host: OfficialHost, files: dict[str, bytes]) -> None:
    recipe = recipe_of({"url": f"{host.url}/none.tar"}, {"url": put_files(host, files), "packed": False})
    assert install_model(recipe).source == f"the official archive {host.url}/repo"


def test_a_mirror_that_lacks_a_file_leaves_nothing(host: OfficialHost, files: dict[str, bytes], cache: Path) -> None:
    url = put_files(host, {name: data for name, data in files.items() if name != "inference.yml"})
    with pytest.raises(Unavailable, match="404"):
        install_model(recipe_of({"url": url, "packed": False}))
    assert not cached_dir(load_recipe(NAME)).exists()
    assert all(name.endswith(".pin.json") for name in files_below(cache))


def test_a_mirror_with_other_weights_is_refused(host: OfficialHost, files: dict[str, bytes]) -> None:
    known = {**hashes(files), "inference.pdiparams": "0" * 64}
    with pytest.raises(InputError, match="inference.pdiparams"):
        install_model(recipe_of({"url": put_files(host, files), "packed": False, "files": known}))
    assert not cached_dir(load_recipe(NAME)).exists()


def test_two_sets_under_one_name(host: OfficialHost, files: dict[str, bytes], tmp_path: Path) -> None:
    """Known hashes name the set wherever its files lie; a set without hashes is named by its address."""
    tar = tar_of({f"top/{name}": data for name, data in files.items()})
    old = {"url": "http://127.0.0.1:1/old.tar", "files": hashes(files), "edition": "the old set"}
    new = {"url": host.put("/new.tar", tar), "edition": "the new set"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert resolve_model(recipe_of(new, old), tmp_path).source == f"--model-dir ({tmp_path.name}), the old set"
    assert resolve_model(recipe_of(new), tmp_path).source == f"--model-dir ({tmp_path.name})"
    assert install_model(recipe_of(new)).source == f"the official archive {host.url}/new.tar, the new set"


def test_a_folder_has_no_checksum_of_its_own() -> None:
    with pytest.raises(RecipeError, match="sha256 is that of an archive"):
        recipe_of({"url": "https://host/repo", "packed": False, "sha256": "0" * 64})
