"""The report: everything that a run says stands in it, escaped, and it needs nothing from outside."""

from __future__ import annotations

import base64
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from report_runs import HOSTILE, copied, with_damages, with_differences
from small_run import write_small_run
from test_pipeline import NAME
from tiny_run import TinyRun

from eval.exhibits import load_exhibits
from eval.gate import verdict_text
from quant import report_page
from quant.advice import OperatorImpact
from quant.card import plain
from quant.charts import Dot, histogram, scatter
from quant.cli import _guarded
from quant.errors import InputError
from quant.histograms import RangeChart, load_ranges
from quant.manifest import EXHIBITS
from quant.plan import load_plan
from quant.report import read_run, write_report
from quant.report_markdown import report_markdown
from quant.report_page import report_page as page_of
from quant.report_page import table_cells
from quant.report_tables import diff_table, front_table, ladder_table, number, operator_table, size_table
from quant.sensitivity_report import Sensitivity

ADDRESS = re.compile(r"(?:https?:)?//", re.IGNORECASE)


class Elements(HTMLParser):
    """Every start tag with its attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def hostile(tiny: TinyRun, tmp_path: Path) -> Path:
    """A run whose names and texts are markup."""
    folder = with_damages(copied(tiny, tmp_path / "results"))
    with_differences(tiny, folder, "onnxruntime", HOSTILE)
    for name in ("metrics.json", "manifest.json"):
        document = json.loads((folder / name).read_text(encoding="utf-8"))
        for place in document["rows"] if name == "metrics.json" else [document]:
            place["model"] = HOSTILE
        if name == "metrics.json":
            for row in document["rows"]:
                row["dataset"] = row.get("dataset") and f"{HOSTILE} set"
        if name == "manifest.json":
            document["run"] = f"{HOSTILE} run"
            for rung in chain.from_iterable(document["ladder"].values()):
                rung["name"] = f"{HOSTILE} rung"
            document["source"] = document["processor"]["name"] = f'"><img src=x onerror=hack()>{HOSTILE}'
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    for file in folder.glob("plans/*/plan.json"):
        plan = json.loads(file.read_text(encoding="utf-8"))
        for operator in plan["operators"]:
            operator["name"] = f"{HOSTILE} {operator['name']}"
        file.write_text(json.dumps(plan), encoding="utf-8")
    file = folder / EXHIBITS / "onnxruntime" / "exhibits.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    for shown in (*record["rows"], *record["exhibits"]):
        shown["id"], shown["dataset"] = f"{HOSTILE} id", f"{HOSTILE} from"
    file.write_text(json.dumps(record), encoding="utf-8")
    return folder


def test_everything_from_files_is_escaped(hostile: Path) -> None:
    page = page_of([read_run(hostile)])
    found = Elements(page.html)
    kinds = [tag for tag, _ in found.tags]
    assert kinds.count("script") == 1 and "img" not in kinds and "iframe" not in kinds
    assert HOSTILE in found.text and page.html.count("&lt;script&gt;window.hacked") > 5
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]


def test_where_nothing_was_measured_there_is_no_ranking(tiny: TinyRun, tmp_path: Path) -> None:
    """Full INT8 passed on every target of the run; then one of them is measured, as `quant sensitivity` writes it."""
    folder = copied(tiny, tmp_path)
    targets = read_run(folder).targets
    assert all(op.damage is None for target in targets for op in target.plan.operators)
    command = f"quant sensitivity {NAME} --target"
    assert told(folder) == (
        [f"{command} {target.target} does that" for target in targets],
        "All that the recipe puts into INT8 passed, so nothing was measured operator by operator",
        0,
    )
    (operator, *_) = next(target for target in targets if target.target == "openvino").plan.operators
    write_sensitivity(folder, "openvino", operator.name)
    others = [target.target for target in targets if target.target != "openvino"]
    assert told(folder)[::2] == ([f"{command} {target} does that" for target in others], 1)


def told(folder: Path) -> tuple[list[str], str, int]:
    """What page and Markdown say alike of operators: commands, the reason, and the number of rankings."""
    run = read_run(folder)
    found, markdown = Elements(page_of([run]).html), report_markdown([run]).replace("\\", "")
    told = [
        (
            re.findall(r"quant sensitivity \S+ --target \w+ does that", text),
            "".join(set(re.findall(r"All that .*? operator by operator", text))),
            text.count(ranking),
        )
        for text, ranking in ((found.text, "What INT8 hurts most"), (markdown, "Operators that INT8 hurts most"))
    ]
    assert told[0] == told[1]
    return told[0]


def test_it_needs_nothing_from_outside(hostile: Path) -> None:
    found = Elements(page_of([read_run(hostile)]).html)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in found.tags:
        for name in ("href", "src", "action", "data", "srcset", "style"):
            value = attributes.get(name, "")
            if value.startswith("data:"):
                assert value == "data:," or value.startswith("data:image/jpeg;base64,"), value
                continue
            assert not ADDRESS.search(value) and "url(" not in value, (tag, name, value)
            assert not value or name == "style" or (value[0] == "#" and value[1:] in ids), (tag, name, value)
    policies = [a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies and policies[0].startswith("default-src 'none'; img-src data:;")


def test_the_page_shows_what_the_run_says(tiny: TinyRun, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    with_differences(tiny, folder, "openvino", "rgbrgb", count=3)
    run = read_run(folder)
    page = page_of([run])
    found = Elements(page.html)
    table = diff_table([run])
    assert len(table.rows) == len(run.rows) == 10 and table.marks.count("passed") == 3
    assert {"informs", "skipped"} < set(table.marks)
    for row in table.rows:
        assert all(cell.text in found.text for cell in row)
    assert page.pictures == 3 and page.left_out == 0
    kinds = [tag for tag, _ in found.tags]
    assert kinds.count("article") == 3 and kinds.count("symbol") == 3 and kinds.count("details") == 4
    assert "3 of 35 pictures came out differently" in re.sub(r"\d+ pictures came", "35 pictures came", found.text)
    for rung in run.manifest.ladder["openvino"]:
        assert rung.name in found.text
    for chart in load_ranges(folder / "plans" / "openvino" / "ranges.json"):
        assert chart.tensor in found.text
    assert "it keeps no histograms" in found.text, "PaddleSlim's targets"
    for target in run.targets:
        assert not target.pooled or f"(95 %), {verdict_text(target.pooled)}" in found.text
    again = page_of([read_run(folder)])
    assert again == page


def test_a_failed_step_says_which_limit_it_missed(tmp_path: Path) -> None:
    run = read_run(write_small_run(tmp_path))
    table = ladder_table(run.targets[0])
    assert [row[-1].text for row in table.rows] == ["failed: error above 8 %", "passed"]
    assert table.marks == ["failed", "passed"]
    assert "failed: error above 8 %" in page_of([run]).html and "| failed: error above 8 % |" in report_markdown([run])


def test_the_run_keeps_bounded_exhibits_of_judged_targets(tiny: TinyRun) -> None:
    assert sorted(path.name for path in (tiny.folder / EXHIBITS).iterdir()) == ["onnxruntime", "openvino", "paddle"]
    record = load_exhibits(tiny.folder / EXHIBITS / "paddle")
    assert record.differing == 0 and record.exhibits == [] and record.samples > 20
    assert {part.axis for part in record.slices} == {"data set", "text length", "script", "size of text"}
    assert all((part.fp32, part.int8) == (100, 100) for part in record.slices)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_ranges_are_those_of_the_plan(tiny: TinyRun, target: str) -> None:
    folder = tiny.folder / "plans" / target
    plan, charts = load_plan(folder), load_ranges(folder / "ranges.json")
    used = {**plan.used_activations(), **{q.tensor: q for q in plan.outputs.values()}}
    assert {chart.tensor for chart in charts} == set(used)
    for chart in charts:
        quantizer = used[chart.tensor]
        assert chart.high - chart.low == pytest.approx(255 * quantizer.scale)
        assert chart.low <= 0 <= chart.high and 0 <= chart.clipped < 0.01
        assert len(chart.counts) == 64 and sum(chart.counts) > 1000


def test_sizes_add_up_to_the_file(tiny: TinyRun) -> None:
    (target,) = [t for t in read_run(tiny.folder).targets if t.target == "onnxruntime"]
    rows = size_table(target).rows
    assert sum(row[4].value or 0 for row in rows) == (tiny.folder / "onnxruntime" / "inference.onnx").stat().st_size
    assert [row[0].text for row in operator_table(target).rows]


def test_pictures_stay_within_bounds(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(tiny, tmp_path)
    with_differences(tiny, folder, "onnxruntime", "x", count=8)
    monkeypatch.setattr(report_page, "MOST_PICTURES", 6)
    monkeypatch.setattr(report_page, "MOST_BYTES", 3000)
    page = page_of([read_run(folder)])
    assert page.pictures + page.left_out == 6 and page.left_out > 0
    assert f"{page.left_out} pictures are left out here" in page.html


def test_the_worst_pictures_of_every_target_come_first(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(tiny, tmp_path)
    worst = []
    for target in ("onnxruntime", "paddle"):
        with_differences(tiny, folder, target, "x")
        for file in (folder / EXHIBITS / target).glob("*.jpg"):
            file.write_bytes(file.read_bytes() + target.encode())  # else one picture would do for both
        worst.append((folder / EXHIBITS / target / "00.jpg").read_bytes())
    monkeypatch.setattr(report_page, "MOST_BYTES", sum(map(len, worst)))
    page = page_of([read_run(folder)])
    assert (page.pictures, page.left_out) == (2, 8)
    assert all(base64.b64encode(picture).decode() in page.html for picture in worst)


def test_the_command(tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, to = tmp_path / "results", tmp_path / "mine"
    copied(tiny, results)
    assert _guarded(["report", "--out", str(results)]) == 0
    assert (results / "report" / "report.html").is_file()
    assert _guarded(["report", NAME, "--out", str(results), "--to", str(to), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.split("\n", 2)[2])
    assert said == {
        "page": str(to / "report.html"),
        "markdown": str(to / "report.md"),
        "models": [NAME],
        "pictures": 0,
        "left_out": 0,
    }
    text = (to / "report.md").read_text(encoding="utf-8")
    assert "## FP32 against INT8" in text and "### openvino" in text and "| passed, " in text


def test_a_report_needs_a_whole_run(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run in .*quant run MODEL"):
        write_report(tmp_path / "none", [], tmp_path / "to")
    with pytest.raises(InputError, match="is not quantized yet: .*quant run other"):
        write_report(tmp_path / "none", ["other"], tmp_path / "to")
    folder = copied(tiny, tmp_path / "results")
    (folder / "plans" / "openvino" / "ranges.json").write_text("[{}]", encoding="utf-8")
    with pytest.raises(InputError, match=r"ranges.json: missing or damaged"):
        write_report(tmp_path / "results", [], tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("plans/openvino/search.json", "[1]"),
        ("plans/openvino/search.json", '[{"name": "a", "score": {}, "latency": 1, "front": true, "chosen": true}]'),
        ("plans/openvino/ranges.json", "{}"),
        (
            "plans/openvino/ranges.json",
            '[{"tensor": "x", "minimum": "low", "maximum": 1, "counts": [1], "low": 0, "high": 1, "clipped": 0}]',
        ),
        (
            "plans/openvino/ranges.json",
            '[{"tensor": "x", "minimum": 0, "maximum": 1, "counts": [-1], "low": 0, "high": 1, "clipped": 0}]',
        ),
        ("exhibits/openvino/exhibits.json", '{"schema": 1, "exhibits": [1]}'),
        ("../sensitivity/openvino.json", '{"model": 1, "target": "x", "operators": [{}], "groups": 1, "advice": 1}'),
    ],
)
def test_a_misshapen_file_of_a_run_is_named(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str
) -> None:
    results = tmp_path / "results"
    place = copied(tiny, results) / file
    place.parent.mkdir(exist_ok=True)
    place.write_text(content, encoding="utf-8")
    assert _guarded(["report", "--out", str(results)]) == 2
    said = capsys.readouterr().err
    assert place.name in said.replace("\n", "") and "damaged" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "changes",
    [
        {"ladder": {"openvino": [{}]}},
        {"ladder": {"openvino": [{"name": "ptq"}]}},
        {"recipe": {}},
        {"recipe": {"description": "x", "targets": {}}},
        {"recipe": {"description": "x", "targets": {}, "gate": {}, "ladder": {}}, "artifacts": {}},
        {"processor": {}},
    ],
)
def test_a_misshapen_manifest_is_named(tiny: TinyRun, tmp_path: Path, changes: dict[str, Any]) -> None:
    file = copied(tiny, tmp_path) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        read_run(file.parent)


def test_hostile_markdown_makes_no_markup(hostile: Path, tmp_path: Path) -> None:
    written = write_report(hostile.parents[1], [], tmp_path / "to")
    text = written.markdown.read_text(encoding="utf-8")
    assert "<script" not in text
    for name in ("set", "run", "rung", "id", "from"):
        assert plain(f"{HOSTILE} {name}") in text
    (operator, *_) = read_run(hostile).targets[0].plan.operators
    assert plain(operator.name) in text


def test_the_markdown_tells_the_front_and_the_ranges(tiny: TinyRun, tmp_path: Path) -> None:
    """A target that another beats in speed and in drop is not on the front."""
    run = read_run(copied(tiny, tmp_path))
    measured = {"onnxruntime": (1.2, 0.3), "openvino": (2.0, 0.5), "paddle": (1.5, 0.1)}
    targets = []
    for target in run.targets:
        speed, drop = measured.get(target.target, (None, 0.0))
        rows = [row for row in target.rows if row.status == "judged"]
        timed = [row.model_copy(update={"speedup": speed, "drop": drop}) for row in rows]
        targets.append(replace(target, rows=[*timed]))
    model = replace(run, targets=targets)
    front = [(row[0].text, row[1].text, row[-1].text) for row in front_table(model).rows]
    assert front == [("openvino", "2.00x", "yes"), ("paddle", "1.50x", "yes"), ("onnxruntime", "1.20x", "no")]
    text = report_markdown([model])
    assert "| openvino | 2.00x | 0.50 |" in text and "On the front" in text
    charts = load_ranges(run.folder / "plans" / "openvino" / "ranges.json")
    assert charts and all(
        f"| {plain(chart.tensor)} | {number(chart.minimum, 3).text} |" in text for chart in charts[:10]
    )


def test_boxes_without_partners_are_marked_and_explained(tmp_path: Path) -> None:
    """Also of pictures that were kept before labels without a partner were."""
    folder = write_small_run(tmp_path)
    file = folder / EXHIBITS / "onnxruntime" / "exhibits.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    square = {"points": [[0, 0], [9, 0], [9, 5]]}
    for side in ("fp32_found", "int8_found"):
        record["exhibits"][0][side] = {"shapes": [square]}
    record["task"] = "text_detection"
    file.write_text(json.dumps(record), encoding="utf-8")
    assert shape_kinds(folder) == ["shape", "shape"]
    record["exhibits"][0]["int8_found"] = {"shapes": [{**square, "alone": True, "extra": True}], "missed": [square]}
    file.write_text(json.dumps(record), encoding="utf-8")
    assert shape_kinds(folder) == ["shape", "shape alone extra", "shape missed"]
    legend = page_of([read_run(folder)]).html.partition('class="legend"')[2].partition("</p>")[0]
    assert all(f'"shape {kind}"' in legend for kind in ("extra", "missed", "alone"))


def shape_kinds(folder: Path) -> list[str]:
    gallery = page_of([read_run(folder)]).html.partition('class="gallery"')[2]
    return re.findall(r'<polygon class="([^"]*)"', gallery)


def test_tables_are_read_as_spans_alone() -> None:
    html = '<table><tr><td colspan="2" onclick="hack()">a</td></tr><tr><td rowspan=900>b</td><td></td></tr></table>'
    assert table_cells(html) == [[(1, 2)], [(50, 1), (1, 1)]]
    assert table_cells("<p>no table") == []


def test_charts_hold_any_numbers() -> None:
    names = RangeChart(f"{HOSTILE}", 0.0, 0.0, [0, 0], 0.0, 0.0, 0.0)
    drawn = histogram(names)
    assert "<script" not in drawn and "nan" not in drawn.lower()
    dots = [Dot(1.0, 0.0, HOSTILE, front=True, chosen=True), Dot(1.0, 0.0, "b")]
    assert "<script" not in scatter(dots, "x", "y", limit=1.0) and "nan" not in scatter(dots[:1], "x", "y").lower()


def test_a_bound_lies_inside_of_the_axes() -> None:
    drawn = scatter([Dot(1.0, 0.0, "a", bound=7.5), Dot(2.0, 0.5, "b", bound=-3.0)], "x", "y", limit=1.0)
    ends = [float(y) for y in re.findall(r'class="bound" d="M[\d.]+ [\d.]+V([\d.-]+)M', drawn)]
    points = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn)]
    top, bottom = (float(y) for y in re.findall(r'class="axis" d="M\d+ (\d+)V(\d+)', drawn)[0])
    assert top < ends[0] < points[0] < ends[1] < bottom, "up is more"
    assert "a: 1, 0, at most 7.5" in drawn
    assert "bound" not in scatter([Dot(1.0, 0.0, "a")], "x", "y")


@pytest.mark.parametrize(
    ("low", "high", "shade", "bars"), [(-1.0, 3.0, (0, 256), (64, 128)), (0.25, 0.5, (64, 64), (0, 256))]
)
def test_a_histogram_holds_the_values_and_the_range(
    low: float, high: float, shade: tuple[int, int], bars: tuple[int, int]
) -> None:
    drawn = histogram(RangeChart("x", 0.0, 1.0, [1] * 8, low, high, 0.0))
    assert re.findall(r'class="range" x="([\d.]+)" y="0" width="([\d.]+)"', drawn) == [tuple(f"{n:.1f}" for n in shade)]
    places = [
        (float(x), float(width)) for x, width in re.findall(r'class="bar[^"]*" x="([\d.]+)".*? width="([\d.]+)"', drawn)
    ]
    assert places[0][0] == bars[0] and bars[1] - 8 <= sum(places[-1]) <= bars[1]


def test_columns_of_numbers_stand_to_the_right(tiny: TinyRun, tmp_path: Path) -> None:
    table = diff_table([read_run(copied(tiny, tmp_path))])
    numbers = {heading for heading, numeric in zip(table.headings, table.numeric, strict=True) if numeric}
    assert numbers == set(table.headings) - {"Model", "Target", "Data set", "Metric", "Verdict"}
    found = Elements(page_of([read_run(tmp_path / NAME / tiny.folder.name)]).html)
    cells = [
        attributes for tag, attributes in found.tags if tag == "td" and attributes.get("data-heading") == "Rel. % ≤"
    ]
    assert cells and all(cell["class"] == "number" for cell in cells), "those without a number too"
    markdown = write_report(tmp_path, [], tmp_path / "to").markdown.read_text(encoding="utf-8")
    assert "| --- | --- | --- | ---: | --- | ---: |" in markdown


def test_a_run_from_before_pictures_were_kept(tiny: TinyRun, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    shutil.rmtree(folder / EXHIBITS)
    (folder / "plans" / "openvino" / "ranges.json").unlink()
    text = Elements(page_of([read_run(folder)]).html).text
    assert text.count("This run kept no pictures") == 3 and text.count("This run kept no histograms") == 1
    assert text.count("was not judged here") == 1 and text.count("PaddleSlim chose these ranges") == 2


def write_sensitivity(folder: Path, target: str, operator: str) -> None:
    """What `quant sensitivity` writes beside a run's folder."""
    numbers = {
        "macs_share": 0.5,
        "weights_share": 0.5,
        "damage": 0.125,
        "snr_db": 9.0,
        "discordance": 2.0,
        "drop": 0.75,
    }
    impact = OperatorImpact(name=operator, op_type="Conv", kind="Conv", position=1, channels=6, **numbers)
    (folder.parent / "sensitivity").mkdir()
    text = Sensitivity(NAME, target, [impact], [], []).to_json()
    (folder.parent / "sensitivity" / f"{target}.json").write_text(text, encoding="utf-8")


def test_a_search_and_a_sensitivity_are_shown_where_they_are(tiny: TinyRun, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    score = {"drop": 0.5, "relative_drop": 0.5, "discordance": 1.0, "samples": 9}
    point = {"name": "ladder", "score": score, "latency": 0.8, "front": True, "chosen": True}
    (folder / "plans" / "openvino" / "search.json").write_text(json.dumps([point]), encoding="utf-8")
    (target,) = [t for t in read_run(folder).targets if t.target == "openvino"]
    operator = target.plan.operators[0]
    write_sensitivity(folder, "openvino", operator.name)
    run = read_run(folder)
    assert "Plans that the search by latency tried" in page_of([run]).html
    (again,) = [t for t in run.targets if t.target == "openvino"]
    first = [cell.text for cell in operator_table(again).rows[0]]
    assert first[:4] == [operator.name, "Conv", "12.500", "0.75"]
