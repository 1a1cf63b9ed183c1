"""What an experiment found, as a table on the screen, in Markdown and in JSON, all from the same rows."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nfn_optim.engine.replaced_file import replaced


@dataclass
class Report:
    """Rows of an experiment.

    Attributes:
        title: One line.
        columns: Heads of the table.
        rows: Cells, as texts.
        notes: Lines below the table.
        data: Everything that the rows were made of, for JSON.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """Title, table and notes."""
        lines = ["| " + " | ".join(cells) + " |" for cells in [self.columns, ["---"] * len(self.columns), *self.rows]]
        return "\n".join([self.title, "", *lines, "", *(f"- {note}" for note in self.notes)]).rstrip() + "\n"

    def __str__(self) -> str:
        """The table with aligned columns."""
        cells = [list(self.columns), *map(list, self.rows)]
        widths = [max(len(row[n]) for row in cells) for n in range(len(self.columns))]
        lines = ["  ".join(x.ljust(width) for x, width in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([self.title, "", *lines, "", *self.notes])

    def write(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        """Write `NAME.json` and `NAME.md`, each at once or not at all.

        Args:
            folder: Made if it is missing.
            name: Of the files.
            settings: The arguments of the command; folders are left out.
        """
        folder.mkdir(parents=True, exist_ok=True)
        stated = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
        found = {
            "title": self.title,
            "settings": {k: str(v) for k, v in settings.items() if not isinstance(v, Path)},
            **stated,
            **self.data,
        }
        for file, text in ((f"{name}.json", json.dumps(found, indent=1) + "\n"), (f"{name}.md", self.markdown())):
            with replaced(folder / file) as partial:
                partial.write_text(text, encoding="utf-8")
