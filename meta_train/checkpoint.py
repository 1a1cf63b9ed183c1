"""Checkpoints, from which a meta-training run resumes bit for bit.

A checkpoint is written to a temporary file, flushed to disk and renamed, and older ones are removed only then. If the
newest cannot be read, the one before is loaded.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

MAX_KEPT = 2  # checkpoints of a run
FORMAT = 2  # of the content; raise it when names in it change
_NAME = re.compile(r"checkpoint-(\d+)\.pt")


def paths(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    matches = {path: match for path in folder.glob("checkpoint-*.pt") if (match := _NAME.fullmatch(path.name))}
    return sorted(matches, key=lambda path: int(matches[path][1]), reverse=True)


def save(folder: Path, iteration: int, content: dict[str, Any]) -> None:
    """Write a checkpoint, and remove all but the last `MAX_KEPT`.

    Args:
        folder: The run's folder.
        iteration: Number of the iteration.
        content: Tensors, numbers, strings, lists and dicts of them.
    """
    partial = folder / ".checkpoint.partial"
    with partial.open("wb") as file:
        torch.save({"format": FORMAT, "content": content}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / f"checkpoint-{iteration:07d}.pt")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for old in paths(folder)[MAX_KEPT:]:
        old.unlink(missing_ok=True)


def load(folder: Path) -> dict[str, Any]:
    """Read the newest intact checkpoint of a run, without executing code from it.

    Raises:
        FileNotFoundError: The folder has no checkpoint.
        ValueError: None of the checkpoints can be read, or they have another format.
    """
    candidates = paths(folder)
    if not candidates:
        raise FileNotFoundError(
            f"expected a checkpoint in {folder}, found none; give the folder that `train --out` was given, "
            f"or start with `python -m meta_train train RECIPE --out {folder}`"
        )
    for path in candidates:
        try:
            saved: dict[str, Any] = torch.load(path, weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            warnings.warn(f"{path} cannot be read ({error}); loading the checkpoint before it", stacklevel=2)
            continue
        if (written := saved.get("format", 1)) != FORMAT:
            raise ValueError(
                f"expected a checkpoint of format {FORMAT}, found format {written} in {path}; resume the run with the "
                f"version that started it, or start a new one"
            )
        content: dict[str, Any] = saved["content"]
        return content
    raise ValueError(f"expected an intact checkpoint in {folder}, found {len(candidates)} unreadable ones; start again")
