"""The child of the ONNX cases: reads, folds and runs a model as `prepare` does with an import."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx

from quant.child import answer
from quant.fold import fold
from quant.loop import with_clean_bodies
from quant.prepare import _cleaned
from quant.runtime import onnx_session


def read(folder: Path) -> None:
    from quant.graph import Graph

    graph = _cleaned(Graph(with_clean_bodies(onnx.load(folder / "inference.onnx"))))
    fold(graph)
    shape = (1, 3, 8, 8) if "map" in graph.outputs else (1, 3, 4, 8)
    onnx_session(graph.to_model(), 1).run({"x": np.zeros(shape, np.float32)})


if __name__ == "__main__":
    _folder = Path(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["folder"])
    answer(_folder, lambda: read(_folder))
