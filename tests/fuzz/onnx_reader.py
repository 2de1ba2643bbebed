"""The child of the ONNX cases: reads, folds and runs a model as `prepare` does with an import."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from quant.child import answer_job
from quant.fold import fold
from quant.loop import with_clean_bodies
from quant.prepare import _cleaned
from quant.runtime import onnx_session


def read(folder: Path, shape: tuple[int, ...]) -> None:
    from quant.graph import Graph

    graph = _cleaned(Graph(with_clean_bodies(onnx.load(folder / "inference.onnx"))))
    fold(graph)
    onnx_session(graph.to_model(), 1).run({"x": np.zeros(shape, np.float32)})


if __name__ == "__main__":
    answer_job(lambda job: read(Path(job["folder"]), tuple(job["shape"])))
