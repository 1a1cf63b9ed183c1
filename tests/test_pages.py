"""The pages are true: their code runs, what they say is printed is printed, and their links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
ELSEWHERE = {
    "docs/integrations.md": "tests/integrations/test_page.py",
    "docs/populations.md": "tests/test_populations.py",
}
"""Pages whose code needs more than a network, and the test that runs it."""

CODE = re.compile(r"```python\n(.*?)```(?:\n```\n(.*?)```)?", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SECTION = re.compile(r"^## (.+)\n((?:(?!## ).*\n)*)", re.MULTILINE)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def test_pages_that_are_run_elsewhere_are() -> None:
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ELSEWHERE])
def test_code_runs_and_prints_what_is_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All blocks of a page, one after the other; a network called `model` is there from the start."""
    blocks = CODE.findall((ROOT / name).read_text())
    torch.manual_seed(0)
    scope: dict[str, Any] = {
        "model": torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    }
    for code, output in blocks:
        capsys.readouterr()
        exec(code, scope)
        if output:
            assert capsys.readouterr().out == output


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(page.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / file)) if file else page
        assert target.exists(), link
        if anchor:
            headings = HEADING.findall(target.read_text())
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_cases_against_it_are_measured() -> None:
    """What a row says is in a table of one of the sections that it links to."""
    results = (ROOT / "docs" / "results.md").read_text()
    sections = {title.lower().replace(" ", "-"): text for title, text in SECTION.findall(results)}
    rows = [line for line in (ROOT / "docs" / "when_not.md").read_text().splitlines() if line.startswith("| **")]
    assert len(rows) > 1
    for row in rows:
        anchors = re.findall(r"results\.md#([\w-]+)", row)
        cells = "\n".join(line for anchor in anchors for line in sections[anchor].splitlines() if line.startswith("|"))
        for number in re.findall(r"\d+\.\d\d+", row):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", cells), (number, anchors)


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = " ".join(page.read_text() for page in PAGES if page.name == "index.md").split()
    for page in (ROOT / "docs").rglob("*.md"):
        if page.name != "index.md" or page.parent.name == "api":
            relative = page.relative_to(ROOT / "docs")
            assert {str(relative.with_suffix("")), relative.stem} & set(listed), relative


@pytest.mark.slow
def test_flags_of_meta_training_exist() -> None:
    page = (ROOT / "docs" / "meta_training.md").read_text()
    known = "--nproc-per-node --max-restarts --logdir --help"
    for command in ("train", "evaluate"):
        words = [sys.executable, "-m", "meta_train", command, "--help"]
        known += subprocess.run(words, capture_output=True, text=True, check=True).stdout
    for flag in re.findall(r"--[a-z][a-z-]+", page):
        assert flag in known, flag
