"""The picture of docs/report.md, taken of a report's page in a headless Chromium.

    python benchmarks/report_picture.py results/report/report.html docs/report.png

Needs selenium (extra `dev`), chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from selenium import webdriver

WIDTH, HEIGHT = 1500, 2400
SCALE = 0.6
COLOURS = 128
MOST_BYTES = 300_000


def taken(page: Path) -> Image.Image:
    """The top of a page."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars", f"--force-device-scale-factor={SCALE}"):
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.set_window_size(WIDTH, HEIGHT)
        driver.get(page.absolute().as_uri())
        return Image.open(io.BytesIO(driver.get_screenshot_as_png()))
    finally:
        driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    taken(arguments.page).convert("RGB").quantize(COLOURS).save(arguments.picture, optimize=True)
    size = arguments.picture.stat().st_size
    print(f"{arguments.picture}: {size:,} bytes")
    if size > MOST_BYTES:
        raise SystemExit(f"more than {MOST_BYTES:,}: take fewer COLOURS")


if __name__ == "__main__":
    main()
