"""Everything a meta-training run needs to continue bit for bit, in one file that is always whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

NAME = "checkpoint.pt"


def save(folder: Path, content: dict[str, Any]) -> None:
    """Replace the checkpoint of a run: the old one stays whole until the new one is on disk.

    Args:
        folder: The run's folder.
        content: Tensors, numbers, texts, lists and dicts of them.
    """
    partial = folder / f".{NAME}.partial"
    with partial.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / NAME)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(folder: Path) -> dict[str, Any]:
    """Read the checkpoint of a run, without executing code from it.

    Raises:
        FileNotFoundError: The folder has none.
    """
    path = folder / NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a checkpoint at {path}, found none; give the folder that `train --out` was given, "
            f"or start with `python -m meta_train train RECIPE --out {folder}`"
        )
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content
