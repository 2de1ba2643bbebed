"""Table structure: PaddleX's processing, TEDS, label formats, generated tables."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import yaml
from client_code import code_for, run_clients
from onnx import TensorProto, helper

from calib_data.generator import write_tables
from calib_data.registry import DatasetFolder, resolve_dataset
from calib_data.tables import TableWorld
from eval.dataset import read_dataset, read_image
from eval.metric import make_metric
from eval.statistics import estimate_drop
from eval.table_metric import canonical_structure, teds, with_texts
from quant.errors import InputError
from quant.recipe import load_recipe
from quant.runtime import open_session
from quant.task import TablePrediction, make_task

MODEL = "SLANet_plus"
STEPS, TOKENS = 12, 50
HTML = (
    '<html><body><table><thead><tr><td>a</td><td colspan="2">b</td></tr></thead><tbody>{}</tbody></table></body></html>'
)
TABLE = HTML.format('<tr><td rowspan="2">c</td><td>d</td><td>e</td></tr><tr><td>f</td><td></td></tr>')


def found(html: str) -> TablePrediction:
    return TablePrediction(html, [], 1.0)


def pooled_model(file: Path) -> None:
    """A model with SLANet's contract whose outputs depend on the picture: pooled strips of it."""

    def strips(output: str, numbers: int) -> list[Any]:
        sizes = helper.make_node("Resize", ["x", "", "", f"{output}_sizes"], [f"{output}_small"], mode="nearest")
        return [
            sizes,
            helper.make_node("ReduceMean", [f"{output}_small"], [f"{output}_mean"], axes=[1], keepdims=0),
            helper.make_node("Softmax" if numbers == TOKENS else "Sigmoid", [f"{output}_mean"], [output]),
        ]

    sizes = [
        helper.make_tensor(f"{name}_sizes", TensorProto.INT64, [4], [1, 3, STEPS, numbers])
        for name, numbers in (("boxes", 8), ("structure", TOKENS))
    ]
    graph = helper.make_graph(
        strips("boxes", 8) + strips("structure", TOKENS),
        "pooled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3, 488, 488])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [None, STEPS, 8]),
            helper.make_tensor_value_info("structure", TensorProto.FLOAT, [None, STEPS, TOKENS]),
        ],
        sizes,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)


def test_our_path_equals_the_clients_of_the_card(tmp_path: Path) -> None:
    inference = load_recipe(MODEL).inference
    folder = tmp_path / "deploy" / "artifact"
    folder.mkdir(parents=True)
    (folder / "inference.yml").write_text(yaml.safe_dump(inference, sort_keys=False), encoding="utf-8")
    pooled_model(folder / "inference.onnx")
    write_tables(tmp_path / "set", 3, seed=1)
    images = [read_image(path) for path in sorted((tmp_path / "set" / "images").iterdir())]
    left = run_clients(code_for("onnxruntime", "table_structure", MODEL), folder, images[-1])
    client = left["PaddleX"]["model"]
    adapter, session = make_task("table_structure", inference, MODEL), open_session("onnxruntime", folder, 1)
    predictions = set()
    for image in images:
        prepared = adapter.preprocess(image)
        table = adapter.postprocess(session.run(prepared.inputs), prepared.context)
        theirs = next(iter(client.predict(image)))
        assert isinstance(table, TablePrediction)
        assert table.html == "".join(theirs["structure"])
        assert table.boxes == [list(box) for box in theirs["bbox"]]
        predictions.add((table.html, str(table.boxes)))
    assert len(predictions) == 3  # the outputs do depend on the picture
    assert ["".join(names["result"]["structure"]) for names in left.values()] == [table.html] * 2


def test_the_adapter_leaves_the_recipe_as_it_is() -> None:
    """PaddleX's decoder changes the list of tokens that it is given."""
    inference = load_recipe(MODEL).inference
    before = json.dumps(inference)
    shapes = [make_task("table_structure", inference, MODEL).expected_shapes({}) for _ in range(2)]
    assert json.dumps(inference) == before
    assert shapes == [[(1, None, 8), (1, None, TOKENS)]] * 2


def test_a_file_without_tokens() -> None:
    inference = {**load_recipe(MODEL).inference, "PostProcess": {"name": "TableLabelDecode"}}
    with pytest.raises(InputError, match="HTML tokens"):
        make_task("table_structure", inference, MODEL)


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        (TABLE, 1.0),  # eleven nodes: the table, three rows, seven cells
        (TABLE.replace("<td></td>", ""), 10 / 11),
        (TABLE.replace(' colspan="2"', ""), 10 / 11),
        ("<html><body><table></table></body></html>", 1 / 11),
    ],
)
def test_teds_counts_changed_nodes(html: str, expected: float) -> None:
    assert teds(html, TABLE, structure_only=True) == pytest.approx(expected)


def test_heads_need_not_be_marked() -> None:
    plain = TABLE.replace("<thead>", "").replace("</thead>", "").replace("<tbody>", "").replace("</tbody>", "")
    assert list(make_metric("teds_struct").score(found(plain), TABLE)) == [1, 1, 1, 1]


def test_texts_go_to_cells_in_the_order_of_reading() -> None:
    skeleton = "<table><tr><td></td></tr><tr><td></td><td></td></tr></table>"
    assert with_texts(skeleton, "<table><tr><td>a <b>b</b></td><td>c</td></tr></table>") == (
        "<table><tr><td>a <b>b</b></td></tr><tr><td>c</td><td></td></tr></table>"
    )


def test_structures_are_equal_however_they_are_written() -> None:
    one = '<tr><td rowspan="2" colspan="3">x</td><td></td></tr>'
    other = '<thead><tr>\n<td colspan="3" rowspan="2"></td> <td rowspan="1">y</td></tr></thead>'
    assert canonical_structure(one) == canonical_structure(other) == "<tr><td colspan=3 rowspan=2></td><td></td></tr>"


def test_html_that_is_no_table_scores_low_and_does_not_stop() -> None:
    broken = '<html><body><table></td></tr><td<tr> colspan="3"></table></body></html>'
    teds_struct, exact, _, count = make_metric("teds_struct").score(found(broken), TABLE)
    assert 0 <= teds_struct < 0.3
    assert (exact, count) == (0, 1)


def test_scores_between_0_and_1_have_a_bound() -> None:
    """Ten tables of which INT8 loses a little on one: the estimate is the mean, the bound is above it and below 100."""
    metric = make_metric("teds_struct")
    fp32 = np.array([metric.score(found(TABLE), TABLE)] * 10)
    int8 = fp32.copy()
    int8[0] = metric.score(found(TABLE.replace("<td></td>", "")), TABLE)
    estimate = estimate_drop(metric, fp32, int8)
    assert estimate.fp32 == pytest.approx(100)
    assert estimate.drop == pytest.approx(100 / 11 / 10)
    assert estimate.drop < estimate.drop_upper95 < 40
    assert estimate.discordance == pytest.approx(10)
    assert set(metric.details(int8.sum(axis=0))) == {"teds_struct", "exact_structure", "teds"}


def table_set(folder: Path, *entries: Any) -> DatasetFolder:
    (folder / "val").mkdir(parents=True)
    for index, name in enumerate(("0.png", "val/1.png")):
        cv2.imwrite(str(folder / name), np.full((40, 60, 3), 100 + index, np.uint8))
    lines = (entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)
    (folder / "label.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return resolve_dataset(folder, "table_structure")


def test_labels_as_html_and_as_pubtabnets_tokens(tmp_path: Path) -> None:
    tokens = [
        "<thead>",
        "<tr>",
        "<td",
        ' colspan="2"',
        ">",
        "</td>",
        "</tr>",
        "</thead>",
        "<tr>",
        "<td>",
        "</td>",
        "</tr>",
    ]
    cells = [{"tokens": ["<b>", "H", "</b>"], "bbox": [0, 0, 1, 1]}, {"tokens": []}]
    pubtabnet = {"filename": "1.png", "split": "val", "html": {"structure": {"tokens": tokens}, "cells": cells}}
    html = "text <table border=1>\n<tr><th scope='row' rowspan=2>a</th> <td style='x'>b</td></tr></table> more"
    data = read_dataset(table_set(tmp_path, {"filename": "0.png", "html": html}, pubtabnet))
    assert [sample.label for sample in data.samples] == [
        '<html><body><table border=1>\n<tr><td rowspan="2">a</td> <td>b</td></tr></table></body></html>',
        '<html><body><table><thead><tr><td colspan="2"><b>H</b></td></tr></thead><tr><td></td></tr></table></body></html>',
    ]
    assert data.samples[1].image == tmp_path / "val" / "1.png"


def test_paddlexs_folder_of_tables(tmp_path: Path) -> None:
    folder = table_set(tmp_path, {"filename": "0.png", "html": "<table><tr><td>a</td></tr></table>"})
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).write_bytes(folder.label_files[0].read_bytes())
    folder.label_files[0].unlink()
    assert [path.name for path in resolve_dataset(tmp_path, "table_structure").label_files] == ["train.txt", "val.txt"]
    assert len(read_dataset(resolve_dataset(tmp_path, "table_structure")).samples) == 1


@pytest.mark.parametrize(
    "entry",
    [
        "no JSON",
        {"filename": "0.png"},
        {"filename": "0.png", "html": "<p>no table</p>"},
        {"filename": "0.png", "html": "<table><tr><td>a<table><tr><td>b</td></tr></table></td></tr></table>"},
        {"filename": "0.png", "html": "<table><tr><td>a</tr></table>"},
        {"filename": "0.png", "html": {"structure": {"tokens": ["<td>", "</td>"]}, "cells": []}},
        {"filename": "0.png", "html": {"structure": {"tokens": [1, "</td>"]}, "cells": []}},
        {"filename": 7, "html": "<table><tr><td>a</td></tr></table>"},
        {"filename": "a" * 5000, "html": "<table><tr><td>a</td></tr></table>", "split": "val"},
    ],
)
def test_broken_table_labels(entry: Any, tmp_path: Path) -> None:
    good = {"filename": "val/1.png", "html": "<table><tr><td>a</td></tr></table>"}
    data = read_dataset(table_set(tmp_path, good, entry))
    assert len(data.samples) == len(data.broken) == 1


@pytest.mark.parametrize("name", ["pubtabnet_table", "icdar2013_table", "omnidocbench_table"])
def test_real_sets_where_they_are_installed(name: str) -> None:
    if not (Path(os.environ.get("QUANT_DATA_HOME", "")) / name).is_dir():
        pytest.skip(f"no {name} in QUANT_DATA_HOME")
    data = read_dataset(resolve_dataset(name, "table_structure"))
    assert not data.broken
    assert all(teds(str(s.label), str(s.label)) == 1 for s in data.samples[:5])


def test_generated_tables_are_repeatable_and_whole(tmp_path: Path) -> None:
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        write_tables(tmp_path / name, 12, seed)
    first, again, other = (
        {str(p.relative_to(tmp_path / n)): p.read_bytes() for p in sorted((tmp_path / n).rglob("*.*"))}
        for n in ("first", "again", "other")
    )
    assert first == again != other
    data = read_dataset(resolve_dataset(tmp_path / "first", "table_structure"))
    assert len(data.samples) == 12
    assert any("span=" in str(sample.label) for sample in data.samples)
    for sample in data.samples:
        assert covered(str(sample.label))


def covered(html: str) -> bool:
    """Whether rows, columns and spans of a table fill a rectangle, every place once."""
    taken: dict[tuple[int, int], int] = {}
    rows = canonical_structure(html).split("<tr>")[1:]
    for row, text in enumerate(rows):
        column = 0
        for cell in text.split("<td")[1:]:
            spans = {name: int(n) for name, _, n in (p.partition("=") for p in cell.split(">")[0].split())}
            while (row, column) in taken:
                column += 1
            for down in range(spans.get("rowspan", 1)):
                for along in range(spans.get("colspan", 1)):
                    taken[row + down, column + along] = taken.get((row + down, column + along), 0) + 1
    width = max(column for _, column in taken) + 1
    return len(taken) == width * len(rows) and set(taken.values()) == {1}


def test_a_narrow_world_of_tables(tmp_path: Path) -> None:
    write_tables(tmp_path, 6, 0, world=TableWorld(rows=(2, 3), columns=(2, 2), spans=0, heads=0))
    for line in (tmp_path / "label.jsonl").read_text(encoding="utf-8").splitlines():
        html = json.loads(line)["html"]
        assert html.count("<tr>") in (2, 3)
        assert html.count("<td>") == 2 * html.count("<tr>")
