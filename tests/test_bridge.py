"""The bridge: PIR programs that Paddle writes here, one operator after the other, as equal old-IR programs."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_pir import pir_files, tiny_feeds, write_tiny_pir

from quant.bridge import Bridged, NotCarried, bridge
from quant.calibration import collect_statistics
from quant.errors import InputError
from quant.export import check_artifact, export_artifact, fitted
from quant.graph import Graph
from quant.lowering import unknown_kinds
from quant.observer import make_range_method
from quant.pir import all_kinds, kind_of, written_operators
from quant.plan import quantizable_operators
from quant.prepare import _bridged, old_ir_form, prepare
from quant.program import write_program
from quant.ptq import activation_tensors, make_plan
from quant.runtime import onnx_session, open_session
from quant.source import ModelFiles

_WRITER = """
import sys
import paddle
from paddle import nn
from paddle.nn import functional as F

class Shapes(nn.Layer):
    '''Operators that official models have, each on some part of a small map.'''

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2D(3, 8, 3, stride=2, padding=1)
        self.up = nn.Conv2DTranspose(8, 4, 2, stride=2)
        self.norm = nn.LayerNorm(8)
        self.table = self.create_parameter([16, 8])

    def forward(self, x):
        y = self.conv(x)                                             # [n, 8, 4, 8]
        size = paddle.shape(y)
        rows = paddle.transpose(paddle.flatten(y, 2, 3), [0, 2, 1])  # [n, 32, 8]
        rows = F.gelu(self.norm(rows)) + F.silu(rows) * F.swish(rows)
        picked, places = paddle.topk(rows.max(-1), 4)
        pairs = paddle.stack([paddle.zeros_like(places), places], -1)
        rows = paddle.gather_nd(rows, pairs)
        back = paddle.reshape(paddle.transpose(rows, [0, 2, 1]), [size[0], 8, 2, 2])
        back = F.interpolate(back, size=[4, 8], mode="nearest")
        first, second = paddle.split(y + back, 2, axis=1)
        three, five = paddle.split(y, [3, 5], axis=1)
        grid = paddle.stack([paddle.tanh(y[:, 0]), F.sigmoid(y[:, 1])], -1)
        seen = F.grid_sample(first, grid)
        steps = paddle.arange(0, 8, 1, dtype="float32").reshape([1, 1, 1, 8])
        steps = paddle.tile(steps, [1, 4, 4, 1])
        kept = paddle.where(steps > 3.5, seen, second) / (1.5 + F.relu(second))
        kept = paddle.clip(kept, -2.0, 2.0) + paddle.sqrt(paddle.abs(kept)) - paddle.exp(-paddle.abs(kept))
        wide = self.up(F.max_pool2d(paddle.concat([kept, three, five[:, :1]], 1), 2, 2))
        scores = paddle.matmul(F.adaptive_avg_pool2d(y, 1).squeeze([2, 3]), self.table, transpose_y=True)
        return F.softmax(scores + picked.sum(-1, keepdim=True)), F.leaky_relu(wide, 0.1), F.hardsigmoid(wide).mean([2, 3])

class Loop(nn.Layer):
    '''A greedy loop with a branch, as table and formula models have.'''

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2D(3, 8, 3, padding=1)
        self.cell = nn.Linear(8 + 5, 8)
        self.out = nn.Linear(8, 5)

    def forward(self, x):
        seen = F.relu(self.conv(x)).mean([2, 3])
        batch = paddle.shape(x)[0]
        state, token = seen, paddle.zeros([batch], "int32")
        found = paddle.zeros([batch, 6, 5], "float32")
        step, ended = paddle.full([], 0, "int64"), paddle.full([], False, "bool")
        while paddle.logical_and(step < 6, paddle.logical_not(ended)):
            state = paddle.tanh(self.cell(paddle.concat([state, F.one_hot(token, 5)], -1)))
            scores = self.out(state)
            found[:, step] = scores
            token = scores.argmax(-1, dtype="int32")
            if paddle.all(token == 4):
                ended = paddle.full([], True, "bool")
            step += 1
        return found[:, : 4], state

class Windows(nn.Layer):
    '''Attention inside of a window, with relative positions, as the encoder of PP-FormulaNet-L has it.'''

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2D(3, 8, 4, 4)
        self.all = nn.Linear(8, 24)
        self.rows, self.columns = self.create_parameter([5, 4]), self.create_parameter([5, 4])
        self.scale = self.create_parameter([8])

    def forward(self, x):
        x = paddle.repeat_interleave(x[:, :1], 3, 1)                 # of a grey picture, as it is one there
        y = self.patches(x).transpose([0, 2, 3, 1])                  # [n, 2, 4, 8]
        y = F.pad(y, (0, 0, 0, 1, 0, 0, 0, 0))[:, :, :3, :]          # [n, 3, 3, 8]
        parts = self.all(y).reshape([-1, 9, 3, 2, 4]).transpose([2, 0, 3, 1, 4])
        queries, keys, values = parts.reshape([3, -1, 9, 4]).unbind(0)
        apart = paddle.arange(3).unsqueeze(1) - paddle.arange(3).unsqueeze(0) + 2
        asked = queries.reshape([-1, 3, 3, 4])
        down = paddle.einsum("nhwc,hkc->nhwk", asked, self.rows[apart])
        along = paddle.einsum("nhwc,wkc->nhwk", asked, self.columns[apart])
        match = (queries @ keys.transpose([0, 2, 1])).reshape([-1, 3, 3, 3, 3])
        match = (match + down.unsqueeze(-1) + along.unsqueeze(-2)).reshape([-1, 9, 9])
        seen = (F.softmax(match, -1) @ values).reshape([-1, 2, 9, 4]).transpose([0, 2, 1, 3]).reshape([-1, 9, 8])
        centred = seen - seen.mean(-1, keepdim=True)
        return self.scale * centred / paddle.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)

class Decoder(nn.Layer):
    '''Three tokens at a step, with a cache of keys and a mask, as the decoder of PP-FormulaNet-S writes them.'''

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2D(3, 8, 3, padding=1)
        self.tokens, self.places = nn.Embedding(11, 8, 1), nn.Embedding(32, 8)
        self.ask, self.key, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, x):
        seen = self.conv(x).mean([2, 3]).unsqueeze(1)
        count = paddle.shape(x)[0]
        token = paddle.zeros([count, 3], "int64")
        ids, unfinished, keys = token, paddle.ones_like(token), paddle.zeros([count, 0, 8])
        paddle.jit.api.set_dynamic_shape(keys, [-1, -1, -1])
        step = paddle.full([], 0, "int64")
        while step < 5:
            places = paddle.arange(keys.shape[1], keys.shape[1] + 3, dtype="int64").expand([count, -1])
            y = self.tokens(token) * 8**0.5 + self.places(places + 2) + seen
            keys = paddle.concat([keys, self.key(y)], 1)
            hidden = (1.0 - paddle.ones(paddle.shape(ids))).unsqueeze(1).expand([count, 3, -1])
            hidden = hidden.masked_fill(hidden.cast("bool"), -1e30)
            match = F.softmax(paddle.bmm(self.ask(y), keys.transpose([0, 2, 1])) + hidden, -1)
            token = self.out(paddle.bmm(match, keys) + y).argmax(-1)
            token = token * unfinished + 1 - unfinished
            ids = paddle.concat([ids, token], 1)
            unfinished = unfinished & ~(token == 2).cast("int64")
            if (paddle.cumsum((ids == 2).cast("int64"), 1)[:, -1] >= 1).all():
                break
            step += 1
        return ids, keys

paddle.seed(0)
net = {"shapes": Shapes, "loop": Loop, "windows": Windows, "decoder": Decoder}[sys.argv[2]]()
net.eval()
paddle.jit.save(net, sys.argv[1], input_spec=[paddle.static.InputSpec([None, 3, 8, 16], "float32", "x")])
"""


def written(folder: Path, kind: str) -> ModelFiles:
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "writer.py"  # Paddle reads the source of what it traces
    script.write_text(_WRITER, encoding="utf-8")
    command = [sys.executable, str(script), str(folder / "inference"), kind]
    subprocess.run(command, env=os.environ | {"FLAGS_enable_pir_api": "1"}, check=True, capture_output=True)
    return pir_files(folder)


def document_of(files: ModelFiles) -> dict[str, Any]:
    return dict(json.loads(files.model.read_text(encoding="utf-8")))


def bridged(files: ModelFiles, folder: Path) -> Bridged:
    found = bridge(files, tiny_feeds(2), folder)
    assert found.files.format == "paddle" and found.files.sha256.keys() == {"inference.pdmodel", "inference.pdiparams"}
    assert sorted(path.name for path in folder.iterdir()) == ["bridge.log", "inference.pdiparams", "inference.pdmodel"]
    return found


def test_a_network_with_batch_norm_is_equal_bit_for_bit(tmp_path: Path) -> None:
    assert bridged(write_tiny_pir(tmp_path / "pir"), tmp_path / "old").difference == 0


def test_operators_of_official_models_are_equal_bit_for_bit(tmp_path: Path) -> None:
    files = written(tmp_path / "pir", "shapes")
    kinds = {kind_of(operator) for operator in written_operators(document_of(files))}
    assert {"grid_sample", "topk", "gather_nd", "where", "split", "nearest_interp", "conv2d_transpose"} <= kinds
    assert bridged(files, tmp_path / "old").difference == 0


def test_a_loop_with_a_branch_is_equal_bit_for_bit(tmp_path: Path) -> None:
    files = written(tmp_path / "pir", "loop")
    assert "while" in {kind_of(operator) for operator in written_operators(document_of(files))}
    old = bridged(files, tmp_path / "old")
    assert old.difference == 0
    # paddle2onnx makes no ONNX model of the old form that loads, so nothing is quantized from it.
    with pytest.raises(InputError, match=r"no ONNX model that onnxruntime loads\. Give its PIR form"):
        prepare(old.files, tiny_feeds(1), 1e-4, 1, tmp_path)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("windows", {"einsum", "pad", "pow", "repeat_interleave", "unbind"}),
        ("decoder", {"bitwise_and", "bitwise_not", "bmm", "cumsum", "embedding", "greater_equal", "masked_fill"}),
    ],
)
def test_operators_of_formula_models_are_equal_bit_for_bit(network: str, expected: set[str], tmp_path: Path) -> None:
    files = written(tmp_path / "pir", network)
    assert expected <= all_kinds(document_of(files))
    assert bridged(files, tmp_path / "old").difference == 0


def test_a_paddle_artifact_takes_the_loop_from_the_original(tmp_path: Path) -> None:
    """Convolutions in INT8 by the plan, the loop behind them as the original has it."""
    files = written(tmp_path / "pir", "loop")
    feeds = tiny_feeds(3)
    proof = prepare(files, feeds, 1e-4, 1, tmp_path)
    original = old_ir_form(tmp_path)
    assert proof.bridge == "equal bit for bit" and original is not None
    graph = Graph(onnx.load(tmp_path / "prepared.onnx"))
    assert "Loop" in {node.op_type for node in graph.nodes}
    with pytest.raises(InputError, match="operator Expand|operator Loop"):
        write_program(graph, tmp_path / "alone")
    write_program(graph, tmp_path / "fp32", None, original)
    expected = onnx_session(graph.to_model(), 1).run(feeds[0])
    for one, other in zip(open_session("paddle", tmp_path / "fp32", 1).run(feeds[0]), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    operators = quantizable_operators(graph, {})
    statistics = collect_statistics(graph, activation_tensors(operators), feeds, 1)
    method = make_range_method("minmax", 100)
    plan = make_plan(graph, operators, statistics, method, model="test", dtype="int8", prepared_sha256="")
    plan = fitted("paddle", graph, plan, original)
    assert [op.op_type for op in plan.quantized().values()] == ["Conv"]
    export_artifact("paddle", graph, plan, {}, tmp_path / "int8", original)
    check_artifact("paddle", tmp_path / "int8", graph, plan, feeds, 1)


def test_weights_stay_trainable_under_their_names(tmp_path: Path) -> None:
    """In a process of its own: PaddleSlim's training finds the parameters, and not batch norm's statistics."""
    files = write_tiny_pir(tmp_path / "pir")
    found = bridged(files, tmp_path / "old")
    check = (
        "import sys; from quant.program import import_paddle; paddle = import_paddle();"
        "executor = paddle.static.Executor(paddle.CPUPlace());"
        "program, _, _ = paddle.static.load_inference_model(sys.argv[1], executor,"
        " model_filename='inference.pdmodel', params_filename='inference.pdiparams');"
        "print(*sorted(p.name for p in program.all_parameters()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", check, str(found.files.folder)], check=True, capture_output=True, text=True
    )
    weights = {op["A"][3] for op in written_operators(document_of(files)) if op["#"] == "p" and op["OA"][2]}
    assert set(run.stdout.split()) == weights


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    files = write_tiny_pir(tmp_path / "pir")
    document = document_of(files)
    assert unknown_kinds(document) == []
    changed = json.loads(files.model.read_text(encoding="utf-8").replace('"1.hardswish"', '"1.fft"'))
    files.model.write_text(json.dumps(changed), encoding="utf-8")
    assert unknown_kinds(changed) == ["fft"]
    with pytest.raises(NotCarried, match="PIR operator fft.*: the old IR's form of it is not known here"):
        bridge(files, tiny_feeds(1), tmp_path / "old")


def test_a_full_disk_and_a_limit_are_no_property_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are raised, so that no stage keeps for good that the model is not carried."""
    files, folder = write_tiny_pir(tmp_path / "pir"), tmp_path / "bridged"
    folder.mkdir()
    (folder / "inference.pdmodel").symlink_to("/dev/full")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        _bridged(files, tiny_feeds(1)[0], 1e-4, 1, tmp_path)
    (folder / "inference.pdmodel").unlink()
    monkeypatch.setenv("QUANT_CHILD_GIB", "0.1")
    with pytest.raises(InputError, match=r"more than 0\.1 GiB of memory"):
        _bridged(files, tiny_feeds(1)[0], 1e-4, 1, tmp_path)
