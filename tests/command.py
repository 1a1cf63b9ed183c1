"""Commands of the packages, run in this process: to start another one and import torch in it takes seconds."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch


def run(package: str, *words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What `python -m package words` does in a folder; an exception other than SystemExit is raised here.

    Args:
        package: It has a `__main__` with a function `main`.
        words: Of the command line.
        folder: To be in meanwhile. Modules that are imported from it are forgotten.
    """
    main = importlib.import_module(f"{package}.__main__").main
    threads = torch.get_num_threads()
    out, err, code, known = io.StringIO(), io.StringIO(), 0, set(sys.modules)
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for context in (mock.patch.dict(os.environ), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
            stack.enter_context(context)
        patch.setattr(sys, "argv", [f"python -m {package}", *words])
        patch.setattr(sys, "path", [*sys.path])
        if folder is not None:
            patch.chdir(folder)
        try:
            main()
        except SystemExit as stop:  # of which Python prints a text, and then returns 1
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            err.write("" if isinstance(stop.code, int | None) else f"{stop.code}\n")
    torch.set_num_threads(threads)
    for name in set(sys.modules) - known:
        if folder is not None and (getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]
    return subprocess.CompletedProcess([package, *words], code, out.getvalue(), err.getvalue())
