"""Put the tables of `benchmarks/results/` where README.md, the card of the shipped rule and the docs show them.

    python benchmarks/tables.py

A table stands between `<!-- table NAME -->` and `<!-- /table -->` and is the text of `benchmarks/results/NAME.md`. With
`--check` nothing is written, and the exit status says whether all are the newest.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "nfn_optim" / "pretrained" / "default.md",
    ROOT / "docs" / "monitoring.md",
    ROOT / "docs" / "meta_training.md",
)
PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def filled(page: str) -> str:
    """The text of a page with every table as the results have it."""

    def table(found: re.Match[str]) -> str:
        content = (ROOT / "benchmarks" / "results" / f"{found[2]}.md").read_text()
        return f"{found[1]}\n{content.strip()}\n\n{found[3]}"

    return PLACE.sub(table, page)


def main() -> None:
    """Fill in, or check."""
    stale = [path for path in PAGES if filled(path.read_text()) != path.read_text()]
    if "--check" in sys.argv:
        sys.exit(f"not the newest tables: {stale}" if stale else 0)
    for path in stale:
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
