"""The report in a real browser: it opens without complaint, filters, sorts, and fits a phone."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import HOSTILE, copied, with_damages, with_differences
from small_run import write_small_run
from tiny_run import TinyRun

from quant.report import write_report

pdfium = pytest.importorskip("pypdfium2", reason="pypdfium2 is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
Keys = webdriver.Keys

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium with chromedriver on this machine"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,1000",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, tiny: TinyRun, tmp_path: Path) -> Any:
    """Two models, one with a hostile name, with pictures on which INT8 reads something else."""
    results = tmp_path / "results"
    with_differences(tiny, with_damages(copied(tiny, results)), "onnxruntime", HOSTILE)
    with_differences(tiny, copied(tiny, results, "another<b>"), "openvino", "rgb", count=4)
    page = write_report(results, [], tmp_path / "report").page
    browser.get_log("browser")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(page.as_uri())
    return browser


def cells(browser: Any, column: int, table: str = "diff") -> list[str]:
    """Text of the visible cells of a column."""
    script = """return [...document.getElementById(arguments[0]).tBodies[0].rows]
        .filter((row) => !row.hidden).map((row) => row.cells[arguments[1]].textContent)"""
    return list(browser.execute_script(script, table, column))


def click(browser: Any, heading: str) -> None:
    browser.find_element("xpath", f"//table[@id='diff']//button[text()='{heading}']").click()


def test_it_opens_without_complaint(opened: Any) -> None:
    assert opened.title == "INT8 report"
    assert opened.execute_script("return window.hacked") is None
    assert opened.execute_script("return document.scripts.length") == 1
    drawn = (
        "return [...document.querySelectorAll('.exhibit svg')].every((svg) => svg.getBoundingClientRect().height > 1)"
    )
    opened.execute_script("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert opened.execute_script("return document.querySelectorAll('.exhibit').length") == 9
    assert opened.execute_script(drawn)
    assert opened.get_log("browser") == []


def test_it_sorts(opened: Any) -> None:
    click(opened, "Pictures")
    numbers = [int(text) for text in cells(opened, 3) if text != "-"]
    assert numbers == sorted(numbers) and len(set(numbers)) > 1
    assert cells(opened, 3)[-1] == "-", "what has no number stands last"
    click(opened, "Pictures")
    assert [int(text) for text in cells(opened, 3) if text != "-"] == sorted(numbers, reverse=True)
    assert cells(opened, 3)[-1] == "-", "downwards too"
    click(opened, "Target")
    assert cells(opened, 1) == sorted(cells(opened, 1))
    sorted_by = opened.execute_script("return [...document.querySelectorAll('[aria-sort]')].map((e) => e.textContent)")
    assert sorted_by == ["Target"]


def test_it_filters(opened: Any) -> None:
    everything = len(cells(opened, 0))
    field = opened.find_element("css selector", "[data-filter=diff]")
    field.send_keys("openvino another")
    assert set(cells(opened, 1)) == {"openvino"} and set(cells(opened, 0)) == {"another<b>"}
    said = opened.find_element("css selector", "output[for=diff]").text
    assert said == f"3 of {everything}"
    opened.find_element("css selector", "[data-marks=diff] option[value=passed]").click()
    assert cells(opened, 2) == ["pooled"]
    field.clear()
    field.send_keys("no such thing")
    assert cells(opened, 0) == []
    opened.execute_script("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    gallery = opened.find_element("css selector", "[data-filter$=pictures]")
    gallery.send_keys("iiit5k")
    shown = "return [...document.querySelectorAll('.gallery')][0].innerText"
    assert "icdar2015_rec" not in opened.execute_script(shown)
    assert opened.get_log("browser") == []


def test_its_tables_are_whole(opened: Any) -> None:
    """On a small screen, with headings above their numbers, and on a phone, with headings beside each value."""
    opened.execute_script("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    hidden = """return [...document.querySelectorAll('.wide')]
        .filter((place) => place.scrollWidth > place.clientWidth).map((place) => place.firstElementChild.id)"""
    aligned = """const side = (cell) => getComputedStyle(cell).textAlign;
        return [...document.querySelectorAll('.sortable')].every((table) => [...table.tBodies[0].rows].every((row) =>
            [...row.cells].every((cell, column) => side(cell) === side(table.tHead.rows[0].cells[column]))))"""
    heading = "return getComputedStyle(document.querySelector('#diff td[data-heading=Drop]'), '::before').content"
    sides = "return [...document.querySelectorAll('#diff th')].map((cell) => getComputedStyle(cell).textAlign)"
    for width, said in ((1280, "none"), (390, '"Drop"')):
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert opened.execute_script(hidden) == [], width
        assert opened.execute_script(heading) == said
        if width == 1280:
            assert opened.execute_script(aligned) and set(opened.execute_script(sides)) == {"left", "right"}


def test_it_fits_a_phone_and_follows_the_dark(opened: Any) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    opened.execute_script("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert opened.execute_script("return document.documentElement.scrollWidth") <= 390
    colours = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        colours.append(opened.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 24, 27)"]


def sizes(browser: Any, chosen: str) -> list[tuple[int, int]]:
    """Width and height on the screen of every element that a selector finds."""
    script = """return [...document.querySelectorAll(arguments[0])].map((part) => part.getBoundingClientRect())
        .map((place) => [Math.round(place.width), Math.round(place.height)])"""
    return [(width, height) for width, height in browser.execute_script(script, chosen)]


@pytest.mark.parametrize(("width", "mobile"), [(1400, False), (390, True)])
def test_a_picture_is_enlarged_and_escape_closes_it(opened: Any, width: int, mobile: bool) -> None:
    """By a click and by the keyboard alone, over the whole window; the picture stands in the page once."""
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": mobile}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened.execute_script("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    embedded = len(opened.find_elements("css selector", "image"))
    thumbnail = opened.find_element("css selector", ".enlarge")
    (small, _), *_ = sizes(opened, ".enlarge svg")
    assert sizes(opened, "#large") == [(0, 0)]
    for press in (thumbnail.click, lambda: thumbnail.send_keys(Keys.ENTER)):
        press()
        assert sizes(opened, "#large") == [(width, 844)]
        (((large, height)),) = sizes(opened, "#large .sheet > svg")
        assert large > 1.5 * small and height > 30
        shown = opened.find_element("id", "large").text
        for said in ("labelled", "FP32", "INT8", opened.find_element("css selector", ".exhibit code").text):
            assert said in shown
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
        opened.switch_to.active_element.send_keys(Keys.ESCAPE)
        assert sizes(opened, "#large") == [(0, 0)]
        assert opened.switch_to.active_element == thumbnail
    assert len(opened.find_elements("css selector", "image")) == embedded
    assert opened.get_log("browser") == []


def test_what_was_found_is_compared_on_the_same_place(browser: Any, tmp_path: Path) -> None:
    write_small_run(tmp_path / "results")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(write_report(tmp_path / "results", [], tmp_path / "report").page.as_uri())
    browser.find_element("css selector", ".source .enlarge").click()
    shapes = "return document.querySelectorAll('#large .shape').length"
    chosen = "return document.querySelector('#large [aria-pressed=true]').textContent"
    seen = []
    for key in ("", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT):
        browser.switch_to.active_element.send_keys(key)
        seen.append((browser.execute_script(chosen), browser.execute_script(shapes)))
    assert seen == [("picture", 0), ("INT8", 1), ("picture", 0), ("INT8", 1)]
    browser.find_element("xpath", "//dialog//nav/button[text()='picture']").click()
    assert browser.execute_script(chosen) == "picture"
    assert "Close" not in printed(browser)
    browser.find_element("css selector", "#large .close").click()
    assert sizes(browser, "#large") == [(0, 0)]
    assert browser.get_log("browser") == []


def printed(browser: Any) -> str:
    """What can be read on the sheets, without blanks: lines break anywhere there."""
    sheets = pdfium.PdfDocument(base64.b64decode(browser.print_page()))
    return dense("".join(sheet.get_textpage().get_text_bounded() for sheet in sheets))


def dense(text: str) -> str:
    return re.sub(r"[\s\u200b\ufffe]", "", text)


def test_it_prints(opened: Any) -> None:
    """All that is folded on the screen, the last operator of the last target too, and every table to its last column."""
    tables = opened.execute_script("""return [...document.querySelectorAll('.sortable')].map((table) => [table.id,
        [...table.tHead.rows[0].cells].map((cell) => cell.textContent),
        [...[...table.tBodies[0].rows].at(-1).cells].map((cell) => cell.textContent)])""")
    shut = "return [...document.querySelectorAll('details')].filter((part) => !part.open).length"
    assert opened.execute_script(shut) > 0
    page = printed(opened)
    rows = {name: dense("".join(cells)) for name, *lines in tables for cells in lines}
    assert sum(name.endswith("-operators") for name in rows) > 2
    missing = [cell for _, *lines in tables for cells in lines for cell in cells if dense(cell) not in page]
    assert missing == []
    assert [name for name, row in rows.items() if name.endswith("-operators") and row not in page] == []
