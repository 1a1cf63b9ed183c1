"""The folder with data files that do not travel inside packages; there need not be one.

It is what `FOLDER` names in the environment. Which of these files meta-training may read is said by those who read
them: data sets on which rules are compared are not among them.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "NFN_OPTIM_DATA"
"""The environment variable that names the folder."""


def use_folder(path: str | None) -> None:
    """Let `path` be the data folder from now on; None leaves it as it is.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if path is None:
        return
    if not Path(path).is_dir():
        raise FileNotFoundError(f"expected a folder with data files, found none at {path}")
    os.environ[FOLDER] = path


def has_file(name: str) -> bool:
    """Whether there is a data folder with that file."""
    return FOLDER in os.environ and (Path(os.environ[FOLDER]) / name).exists()


def in_folder(name: str) -> Path:
    """The path of a data file.

    Raises:
        FileNotFoundError: There is no data folder, or it has no such file.
    """
    if not has_file(name):
        raise FileNotFoundError(
            f"expected the file {name} in the folder that {FOLDER} names, found {os.environ.get(FOLDER, 'no folder')}; "
            f"set {FOLDER} to a folder with that file, or leave this data out"
        )
    return Path(os.environ[FOLDER]) / name
