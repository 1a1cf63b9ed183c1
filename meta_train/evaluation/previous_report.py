"""The tuned settings and losses of the baselines in a previous report."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meta_train.evaluation.figures import Row

Names = tuple[str, str]
"""Of a task and an optimizer."""


@dataclass(frozen=True)
class PreviousReport:
    """Settings and losses from a report; empty by default.

    Attributes:
        settings: The setting that was selected, as text.
        losses: Of the runs with it, one per seed; None for a run that diverged.
    """

    settings: Mapping[Names, str] = field(default_factory=dict)
    losses: Mapping[Names, Sequence[float | None]] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path, split: str, optimizers: Collection[str]) -> PreviousReport:
        """Read the rows of some optimizers.

        Args:
            file: `NAME.json`, as written by `report.write`.
            split: The benchmark that the report must be on.
            optimizers: Their names; those that are not in the report are skipped.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: It is not a report, or one on another benchmark.
        """
        if not file.is_file():
            raise FileNotFoundError(f"expected the JSON file of a previous report, found none at {file}")
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            rows = {(row["task"], row["optimizer"]): row for row in content["rows"]}
            previous_split = content["split"]
            settings = {names: str(row["setting"]) for names, row in rows.items() if names[1] in optimizers}
            losses = {names: list(rows[names]["loss"]) for names in settings}
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"expected a report that `python -m meta_train evaluate` wrote, found {file}: {error!r}"
            ) from error
        if previous_split != split:
            raise ValueError(
                f"expected a report on {split!r}, found one on {previous_split!r}; give --tuned another file"
            )
        return cls(settings, losses)

    def comparison(self, rows: Sequence[Row]) -> str:
        """A sentence that compares new losses with the previous ones, with a leading space; empty without a report.

        Args:
            rows: The new rows, of all tasks and optimizers.
        """
        if not self.settings:
            return ""
        pairs = [
            (new, old)
            for row in rows
            for new, old in zip(row.loss, self.losses.get((row.task, row.optimizer), ()), strict=False)
        ]
        ratios = [new / old for new, old in pairs if old is not None and new < float("inf")]
        changed = [ratio for ratio in ratios if ratio != 1]
        difference = f", the others differ by factors of {min(changed):.2f} to {max(changed):.2f}" if changed else ""
        return (
            f" Baselines with the settings selected in a previous report: {len(ratios) - len(changed)} of "
            f"{len(ratios)} losses are identical to the previous ones{difference}."
        )
