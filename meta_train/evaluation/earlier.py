"""What an earlier report knows: which settings of the baselines are best, and how far they go."""

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
class Earlier:
    """What is taken over from a report; nothing by default.

    Attributes:
        settings: The setting that was chosen, as text.
        losses: Those of the runs with it, one for each seed; None where a run diverged.
    """

    settings: Mapping[Names, str] = field(default_factory=dict)
    losses: Mapping[Names, Sequence[float | None]] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path, split: str, optimizers: Collection[str]) -> Earlier:
        """Take over what a report says of some optimizers.

        Args:
            file: `NAME.json`, as `report.write` made it.
            split: The benchmark that it has to be of.
            optimizers: Their names; of those that are not in the report nothing is taken over.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no report, or of another benchmark.
        """
        if not file.is_file():
            raise FileNotFoundError(f"expected the JSON file of an earlier report, found none at {file}")
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            rows = {(row["task"], row["optimizer"]): row for row in content["rows"]}
            of = content["split"]
            settings = {names: str(row["setting"]) for names, row in rows.items() if names[1] in optimizers}
            losses = {names: list(rows[names]["loss"]) for names in settings}
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"expected a report that `python -m meta_train evaluate` wrote, found {file}: {error!r}"
            ) from error
        if of != split:
            raise ValueError(f"expected a report on {split!r}, found one on {of!r}; give --tuned another file")
        return cls(settings, losses)

    def compared(self, rows: Sequence[Row]) -> str:
        """A sentence on the losses of now and then, with a space before it; empty where nothing was taken over.

        Args:
            rows: Of all tasks and optimizers, now.
        """
        if not self.settings:
            return ""
        pairs = [
            (now, then)
            for row in rows
            for now, then in zip(row.loss, self.losses.get((row.task, row.optimizer), ()), strict=False)
        ]
        ratios = [now / then for now, then in pairs if then is not None and now < float("inf")]
        others = [ratio for ratio in ratios if ratio != 1]
        how_far = f", the others {min(others):.2f} to {max(others):.2f} times them" if others else ""
        return (
            f" Baselines with the settings chosen in an earlier report: of {len(ratios)} losses "
            f"{len(ratios) - len(others)} are those of that one to the last digit{how_far}."
        )
