"""Finished runs on disk, each under the hash of all that it depends on."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Stamp = dict[str, Any]
"""What a run depends on, as JSON."""


@dataclass(frozen=True)
class Run:
    """What is kept of training one network once.

    Attributes:
        losses: The loss of every batch before its step; where training broke off, infinite from there on.
        held_out: (step, scores) at every check; see `Scores`.
        seconds: Of wall-clock, checks not counted; of a run among others, so good for planning only.
        skipped: Steps that a learned optimizer did not take because of a gradient that was not finite.
        fallbacks: How often a learned optimizer took the nominal update for a tensor.
    """

    losses: list[float]
    held_out: list[tuple[int, dict[str, float]]]
    seconds: float
    skipped: int = 0
    fallbacks: int = 0


class Cache:
    """A folder of runs. Several processes may use it at once: every file is whole, or not there.

    Args:
        folder: Where; it is made if needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, stamp: Stamp) -> Path:
        """Where a run is kept."""
        digest = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"

    def get(self, stamp: Stamp) -> Run | None:
        """A finished run; None where there is none, or only what is left of one."""
        try:
            content = json.loads(self.path(stamp).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        kept = content["run"]
        return Run(**(kept | {"held_out": [(step, scores) for step, scores in kept["held_out"]]}))

    def put(self, stamp: Stamp, run: Run) -> None:
        """Keep a run."""
        path = self.path(stamp)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps({"stamp": stamp, "run": asdict(run)}), encoding="utf-8")
        os.replace(partial, path)
