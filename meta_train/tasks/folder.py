"""The optional folder of data files that are not part of packages, named by the environment variable `FOLDER`.

Meta-training reads only the files that modules of `meta_train.tasks` name; data sets of benchmarks are not among them.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "NFN_OPTIM_DATA"
"""The environment variable that names the folder."""


def use_folder(path: str | None) -> None:
    """Set the data folder; None leaves it unchanged.

    Raises:
        FileNotFoundError: The folder does not exist.
    """
    if path is None:
        return
    if not Path(path).is_dir():
        raise FileNotFoundError(f"expected a folder with data files, found none at {path}")
    os.environ[FOLDER] = path


def has_file(name: str) -> bool:
    """Whether the data folder has a file."""
    return FOLDER in os.environ and (Path(os.environ[FOLDER]) / name).exists()


def in_folder(name: str) -> Path:
    """The path of a data file.

    Raises:
        FileNotFoundError: There is no data folder, or the file is not in it.
    """
    if not has_file(name):
        raise FileNotFoundError(
            f"expected the file {name} in the folder that {FOLDER} names, found {os.environ.get(FOLDER, 'no folder')}; "
            f"set {FOLDER} to a folder with that file, or leave this data out"
        )
    return Path(os.environ[FOLDER]) / name
