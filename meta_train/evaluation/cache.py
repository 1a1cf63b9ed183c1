"""Finished runs on disk, keyed by everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nfn_optim.engine.replaced_file import replaced

CacheKey = dict[str, Any]
"""Everything that a run depends on, as JSON; files are named by its hash."""


@dataclass(frozen=True)
class Run:
    """The record of training one network once.

    Attributes:
        losses: The loss of every batch before its step; infinite from the step at which training broke off.
        held_out: (step, scores) at every check; see `Scores`.
        seconds: Wall-clock time without checks; of runs in parallel, so for planning only.
        skipped: Steps that a learned optimizer skipped because of a non-finite gradient.
        fallbacks: Number of times that a learned optimizer fell back to the nominal update for a tensor.
    """

    losses: list[float]
    held_out: list[tuple[int, dict[str, float]]]
    seconds: float
    skipped: int = 0
    fallbacks: int = 0


class Cache:
    """A folder of runs. Several processes may use it at once: files are written atomically.

    Args:
        folder: Its path; it is created if needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: CacheKey) -> Path:
        """The file of a run."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"

    def get(self, key: CacheKey) -> Run | None:
        """A finished run; None if its file is missing or damaged."""
        try:
            content = json.loads(self.path(key).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        run = content["run"]
        return Run(**(run | {"held_out": [(step, scores) for step, scores in run["held_out"]]}))

    def put(self, key: CacheKey, run: Run) -> None:
        """Write a run."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial:
            partial.write_text(json.dumps({"key": key, "run": asdict(run)}), encoding="utf-8")
