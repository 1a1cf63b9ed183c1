"""The output of a benchmark: NAME.md and NAME.json, with a line on the environment."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nfn_optim.engine.replaced_file import replaced


def setting(*packages: str) -> str:
    """Date, package versions, machine and threads of a measurement, in one line."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{date.today()}, {versions}, {platform.machine()}, one thread of {os.cpu_count()}"


def save(folder: Path, name: str, text: str, content: dict[str, Any]) -> None:
    """Write a result to a folder as NAME.md and NAME.json; each is replaced at once or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, written in ((folder / f"{name}.md", text), (folder / f"{name}.json", json.dumps(content, indent=1))):
        with replaced(path) as partial:
            partial.write_text(written + "\n")


def write(folder: Path, name: str, text: str, content: dict[str, Any]) -> None:
    """Print a result and `save` it."""
    save(folder, name, text, content)
    print(text)
