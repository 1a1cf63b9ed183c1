"""Everything a meta-training run needs to continue bit for bit; the last checkpoints of a run are always whole.

A checkpoint is written under another name, flushed to disk and renamed, and older ones are removed only then. Where the
newest cannot be read, the one before is taken.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

KEEP = 2  # checkpoints of a run
_NAME = re.compile(r"checkpoint-(\d+)\.pt")


def paths(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = {path: match for path in folder.glob("checkpoint-*.pt") if (match := _NAME.fullmatch(path.name))}
    return sorted(found, key=lambda path: int(found[path][1]), reverse=True)


def save(folder: Path, iteration: int, content: dict[str, Any]) -> None:
    """Add a checkpoint, and remove all but the last `KEEP`.

    Args:
        folder: The run's folder.
        iteration: Its number.
        content: Tensors, numbers, texts, lists and dicts of them.
    """
    partial = folder / ".checkpoint.partial"
    with partial.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / f"checkpoint-{iteration:07d}.pt")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for old in paths(folder)[KEEP:]:
        old.unlink(missing_ok=True)


def load(folder: Path) -> dict[str, Any]:
    """Read the newest checkpoint of a run that is whole, without executing code from it.

    Raises:
        FileNotFoundError: The folder has none.
        ValueError: It has some, and none can be read.
    """
    found = paths(folder)
    if not found:
        raise FileNotFoundError(
            f"expected a checkpoint in {folder}, found none; give the folder that `train --out` was given, "
            f"or start with `python -m meta_train train RECIPE --out {folder}`"
        )
    for path in found:
        try:
            content: dict[str, Any] = torch.load(path, weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            warnings.warn(f"{path} cannot be read ({error}); taking the checkpoint before it", stacklevel=2)
        else:
            return content
    raise ValueError(f"expected a whole checkpoint in {folder}, found {len(found)} that cannot be read; start again")
