"""Every recipe's addresses, with a server on this machine in the place of the official hosts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from official_host import OfficialHost
from test_archive import files_below, tar_of
from test_source import shipped
from tiny_pir import write_tiny_pir

from quant import archive
from quant.errors import InputError, Unavailable
from quant.recipe import Archive, Recipe, load_recipe, recipe_names
from quant.source import cached_dir, resolve_model

MODELS = recipe_names()


@pytest.fixture(autouse=True)
def cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("QUANT_MODEL_HOME", raising=False)
    monkeypatch.setattr(archive, "_unreachable", {})
    return own_cache


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe, str], dict[str, bytes]]:
    """Files of a model in a format: small ones, described as the recipe's own."""
    tiny = write_tiny_pir(tmp_path_factory.mktemp("tiny"))
    models = {
        "pir": {path.name: path.read_bytes() for path in (tiny.model, tiny.params)},
        "paddle": {path.name: path.read_bytes() for path in shipped("PP-OCRv4_mobile_det").glob("inference.pd*")},
    }

    def files(recipe: Recipe, kind: str) -> dict[str, bytes]:
        described = recipe.inference
        if recipe.task == "text_recognition":
            described = {**described, "PostProcess": {**described["PostProcess"], "character_dict": ["a", "b"]}}
        return {**models[kind], "inference.yml": yaml.safe_dump(described).encode()}

    return files


def each_address() -> list[tuple[str, int]]:
    return [(name, place) for name in MODELS for place in range(len(load_recipe(name).model.archives))]


def served(
    host: OfficialHost, name: str, place: int, published: Callable[[Recipe, str], dict[str, bytes]], known: str = ""
) -> tuple[Recipe, list[str]]:
    """The recipe with one of its addresses, moved to this machine, and the paths that are asked for.

    Args:
        known: an sha256 of the weights in place of the recipe's own, which official weights alone have.
    """
    recipe = load_recipe(name)
    chosen = recipe.model.archives[place]
    files = published(recipe, chosen.format)
    path = urlsplit(chosen.url).path
    if chosen.packed:
        host.put(path, tar_of({f"{name}_infer/{file}": data for file, data in files.items()}))
        paths = [path]
    else:
        paths = [f"{path}/{file}" for file in files]
        for file, data in files.items():
            host.put(f"{path}/{file}", data)
    digests = {file: known or hashlib.sha256(files[file]).hexdigest() for file in chosen.files if file in files}
    moved = Archive(url=f"{host.url}{path}", format=chosen.format, packed=chosen.packed, files=digests)
    overrides = [f"model.archives={json.dumps([moved.model_dump(exclude_none=True)])}", "model.wheel=null"]
    return load_recipe(name, overrides), paths


def test_all_models_have_addresses_of_several_hosts() -> None:
    assert len(MODELS) == 11
    for name in MODELS:
        assert len({urlsplit(archive.url).hostname for archive in load_recipe(name).model.archives}) > 1, name


@pytest.mark.parametrize(("name", "place"), each_address())
def test_a_model_is_fetched_unpacked_verified_and_kept(
    host: OfficialHost, name: str, place: int, published: Callable[[Recipe, str], dict[str, bytes]]
) -> None:
    recipe, paths = served(host, name, place, published)
    found = resolve_model(recipe)
    assert found.source.startswith(f"the official archive {recipe.model.archives[0].url}")
    assert found.folder == cached_dir(recipe) and found.inference_yml["Global"]["model_name"] == name
    assert sorted(host.requests) == sorted(paths)
    assert resolve_model(recipe).source.startswith("the cache ")
    assert len(host.requests) == len(paths), "a second time nothing is fetched"


@pytest.mark.parametrize(("name", "place"), each_address())
def test_other_weights_than_the_published_ones_are_refused(
    host: OfficialHost, name: str, place: int, published: Callable[[Recipe, str], dict[str, bytes]]
) -> None:
    """Where the recipe knows no hash, what the first download brought is what later ones have to bring."""
    recipe, paths = served(host, name, place, published, known="0" * 64)
    if not recipe.model.archives[0].files:
        resolve_model(recipe)
        for path in paths:
            host.files[path] = host.files[path] + os.urandom(512)
        folder = cached_dir(recipe)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    with pytest.raises(InputError, match=r"inference\.pd|checksum"):
        resolve_model(recipe)
    assert not cached_dir(recipe).exists()


@pytest.mark.parametrize(("name", "place"), each_address())
def test_a_broken_download_goes_on(
    host: OfficialHost,
    name: str,
    place: int,
    published: Callable[[Recipe, str], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
) -> None:
    recipe, paths = served(host, name, place, published)
    path = max(paths, key=lambda path: len(host.files[path]))
    # Small files come in one piece: what is left away at the end of them is not kept. Blanks do no harm behind JSON.
    host.files[path] += (bytes(1) if recipe.model.archives[0].packed else b" ") * (1 << 20)
    host.tags[path] = '"one"'
    host.cut_off.add(path)
    with pytest.raises(Unavailable, match="broke off"):
        resolve_model(recipe)
    monkeypatch.setattr(archive, "_unreachable", {})
    assert any(file.endswith(".part") for file in files_below(cache))
    host.cut_off.clear()
    found = resolve_model(recipe)
    assert host.ranges and found.folder == cached_dir(recipe)
    assert not any(file.endswith(".part") for file in files_below(cache))
