"""A newcomer's path by the README alone, in an empty clone: every step is done and its seconds are noted.

    python benchmarks/newcomer.py [--place FOLDER] [--out results/newcomer.md]

Clones this repository's last commit into an empty folder with a home of its own and no data or models from outside,
then, by the README's own lines: `make quant`, own pictures as calibration data, the report in a headless Chromium (left
out where there is none), export, verify, and its code for PaddleX and RapidOCR; last a wheel, installed with all that
it needs into an empty environment and used outside of the clone. Needs git, make, Python and a network; ends with 1
where a step fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURES = """
from pathlib import Path

from calib_data.generator import write_text_lines, write_text_pages

write_text_lines(Path("my_lines"), 1200, seed=77)
write_text_pages(Path("my_pages"), 1, seed=77)
"""
"""Somebody's own pictures: others than those of the built-in set."""

FEW = ["data.generated.samples=60", "calibration.samples=8", "ladder.search_samples=8"]
"""Sizes for a run that only has to come to its end."""

BROWSER = """
import sys, shutil
from selenium import webdriver
from selenium.webdriver.common.by import By

options = webdriver.ChromeOptions()
options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
for flag in ("--headless=new", "--no-sandbox"):
    options.add_argument(flag)
driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
driver.get(sys.argv[1])
errors = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
rows = len(driver.find_elements(By.CSS_SELECTOR, "table tbody tr"))
driver.quit()
print(f"{rows} rows, {len(errors)} errors in the console")
sys.exit(1 if errors or not rows else 0)
"""


@dataclass
class Newcomer:
    """Somebody in front of a terminal.

    Attributes:
        steps: what was done, in how many seconds, and the last line that it said.
    """

    place: Path
    steps: list[tuple[str, float, str]] = field(default_factory=list)

    @property
    def repository(self) -> Path:
        return self.place / "repository"

    def told(self, begin: str, *more: str, programs: Path = Path()) -> None:
        """Do what the README says in the line that begins so."""
        (line,) = [line for line in readme_commands(self.repository) if line.startswith(begin)]
        program, *words = shlex.split(line)
        self.do(" ".join([line, *more]), [str(programs / program), *words, *more])

    def do(self, what: str, command: list[str], folder: Path | None = None) -> None:
        """Run a command; raises SystemExit with what it said if it fails."""
        environment, here = {"PATH": os.environ["PATH"], "HOME": str(self.place / "home")}, folder or self.repository
        start = time.monotonic()
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
        said = [line.strip() for line in done.stdout.replace("\r", "\n").splitlines() if line.strip()]
        last = said[-1].replace(f"{here}/", "") if said else ""
        self.steps.append((what, time.monotonic() - start, last))
        print(f"{what}: {self.steps[-1][1]:.0f} s; {self.steps[-1][2]}", flush=True)
        if done.returncode:
            raise SystemExit(f"{what} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")

    def python(self, what: str, code: str, *arguments: str) -> None:
        self.do(what, [".venv/bin/python", "-c", code, *arguments])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--place", type=Path, help="an empty folder that stays; else a temporary one")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "newcomer.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        newcomer = Newcomer(arguments.place or Path(temporary))
        walk(newcomer)
        arguments.out.write_text(page(newcomer), encoding="utf-8")
    print(f"written: {arguments.out}")


def walk(newcomer: Newcomer) -> None:
    (newcomer.place / "home").mkdir(parents=True)
    newcomer.do("git clone", ["git", "clone", "-q", str(ROOT), str(newcomer.repository)], newcomer.place)
    newcomer.told("make quant MODEL=PP-OCRv4_mobile_det")
    newcomer.do("room for .venv", ["du", "-sh", ".venv"])
    newcomer.do("room for the cache", ["du", "-sh", ".cache/paddle-quant"], newcomer.place / "home")
    newcomer.python("own pictures", PICTURES)
    newcomer.told(".venv/bin/quant run PP-OCRv4_mobile_rec", "--target", "onnxruntime")
    newcomer.told(".venv/bin/quant report")
    if shutil.which("chromedriver"):
        report = newcomer.repository / "results" / "report" / "report.html"
        newcomer.python("the report in Chromium", BROWSER, report.as_uri())
    for model in ("PP-OCRv4_mobile_det", "PP-OCRv4_mobile_rec"):
        newcomer.told(f".venv/bin/quant export {model}")
    newcomer.told(".venv/bin/quant verify")
    for source, name in (("my_lines", "line.jpg"), ("my_pages", "page.jpg")):
        first = min((newcomer.repository / source / "images").iterdir())
        newcomer.do(f"a picture as {name}", ["cp", str(first), name])
    for code in readme_blocks(newcomer.repository, "python"):
        newcomer.python(f"the README's code for {code.split()[1]}", code)
    install_and_use(newcomer)


def install_and_use(newcomer: Newcomer) -> None:
    """The README's section on the package: a wheel in an environment that is empty, used where no clone is."""
    environment, elsewhere = newcomer.place / "environment", newcomer.place / "elsewhere"
    elsewhere.mkdir()
    newcomer.do("an empty environment", [".venv/bin/python", "-m", "venv", str(environment)])
    for begin in ("pip wheel", "pip install -c", "pip install --no-deps"):
        newcomer.told(begin, programs=environment / "bin")
    few = [word for setting in FEW for word in ("--set", setting)]
    run = ["run", "PP-OCRv4_mobile_det", "--target", "onnxruntime", *few]
    for words in (["doctor"], run, ["report"]):
        what = f"quant {' '.join(words)}, from the wheel"
        newcomer.do(what, [str(environment / "bin" / "quant"), *words], elsewhere)


def readme_commands(repository: Path) -> list[str]:
    lines = "\n".join(readme_blocks(repository, "sh")).splitlines()
    return [line.split("#")[0].strip() for line in lines]


def readme_blocks(repository: Path, kind: str) -> list[str]:
    text = (repository / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def page(newcomer: Newcomer) -> str:
    commit = subprocess.run(
        ["git", "-C", str(newcomer.repository), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    rows = [f"| {what} | {seconds:.0f} | {said.replace('|', '/')[:160]} |" for what, seconds, said in newcomer.steps]
    note = (
        f"Written by `benchmarks/newcomer.py` in an empty clone of {commit.stdout.strip()}, without data from outside."
    )
    head = ["| Step | Seconds | Its last line |", "| --- | ---: | --- |"]
    return "\n".join(["# A newcomer's path", "", note, "", *head, *rows, ""])


if __name__ == "__main__":
    main()
