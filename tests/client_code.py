"""The lines of Python that model cards print, run in this process, since importing a client takes seconds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2

from quant.clients import PICTURE, snippets
from quant.target import TargetName


def code_for(target: TargetName, task: str, model: str) -> dict[str, str]:
    """Client -> the code that cards print for it; inputs and loops matter to runtimes alone."""
    return {snippet.client: snippet.code for snippet in snippets(target, task, model, {}, steps=False)}


def run_clients(code: Mapping[str, str], folder: Path, image: Any) -> dict[str, dict[str, Any]]:
    """PaddleX and PaddleOCR -> what their code leaves behind, its `model` and its last `result` among it.

    The picture is put where the code reads it.
    """
    assert cv2.imwrite(str(folder / PICTURE), image)
    return {client: run_code(code[client], folder) for client in ("PaddleX", "PaddleOCR")}


def run_code(code: str, folder: Path) -> dict[str, Any]:
    """The names that code leaves behind, run as it is printed inside of the artifact's folder."""
    names: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(code, names)
    finally:
        os.chdir(before)
    return names
