"""Put the tables of `benchmarks/results/` where README.md, the cards of the shipped rules and the docs show them.

    python benchmarks/tables.py

A table stands between `<!-- table NAME -->` and `<!-- /table -->`. It is the text of `benchmarks/results/NAME.md`, or a
selection from a JSON file in that folder, made by the function in `SELECTIONS`. With `--check` nothing is written, and
the exit status says whether all are up to date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CARDS = sorted((ROOT / "nfn_optim" / "pretrained").glob("*.md"))
PAGES = (ROOT / "README.md", *CARDS, *sorted((ROOT / "docs").rglob("*.md")))
MARKS = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)

CONTENDERS = {  # how the README calls the optimizers of a report
    "AdamW tuned": "AdamW, tuned",
    "AdamW defaults": "AdamW, defaults",
    "Muon tuned": "Muon, tuned",
    "schedule-free tuned": "schedule-free, tuned",
    "SOAP tuned": "SOAP, tuned",
    "SOAP-Muon stack tuned": "SOAP-Muon stack, tuned",
    "base": "**NFNOptimizer**",
    "base, horizon known": "**with `total_steps`**",
}


def summary() -> str:
    """The test tasks, one line for each optimizer."""
    found = {row["optimizer"]: row for row in json.loads((RESULTS / "test_part.json").read_text())["summary"]}
    lines = [
        "| | settings tried | times fewer steps | times faster | loss as good | held-out loss | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in CONTENDERS.items():
        if (row := found.get(name)) is not None:
            numbers = (f"{row[key][0]:.2f}" for key in ("reduction", "wall_reduction"))
            shares = (f"{100 * row[key]:.0f} %" for key in ("as_good", "generalises", "accurate"))
            lines.append(f"| {title} | {row['settings']} | {' | '.join((*numbers, *shares))} |")
    return "\n".join(lines)


SELECTIONS: dict[str, Callable[[], str]] = {"summary": summary}


def content_of(name: str) -> str:
    """The text of a table."""
    return SELECTIONS[name]() if name in SELECTIONS else (RESULTS / f"{name}.md").read_text().strip()


def filled(page: str) -> str:
    """The text of a page with every table up to date."""
    return MARKS.sub(lambda found: f"{found[1]}\n{content_of(found[2])}\n\n{found[3]}", page)


def main() -> None:
    """Fill in, or check."""
    stale = [path for path in PAGES if filled(path.read_text()) != path.read_text()]
    if "--check" in sys.argv:
        sys.exit(f"not up to date: {[str(path.relative_to(ROOT)) for path in stale]}" if stale else 0)
    for path in stale:
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
