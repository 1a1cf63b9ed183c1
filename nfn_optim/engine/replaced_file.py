"""Files that are replaced at once or not at all: a killed process or a full disk leaves what was there before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to, beside the file, whose place it takes at the end; after an exception it is removed.

    Args:
        path: Of the file; its folder exists. Several processes may write it, the last one counts.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
