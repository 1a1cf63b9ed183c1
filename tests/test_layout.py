"""The house stays in order: folders import downwards only, without cycles; files are nouns and short."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up; a folder may import those before it, and those on the same line do not know each other.
FLOORS = (
    {"symmetry", "engine"},
    {"layers"},
    {"rule", "populations"},
    {"pretrained"},
    {"optimizer"},
    {"monitor"},
    {"nfn_optim"},  # what stands in the root of the package
    {"meta_train"},
)
FLOOR = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
NOT_NOUNS = {"utils", "util", "common", "helpers", "helper", "misc", "base"}
MAX_LINES = 420
ROOT_FILES = 4
MODULES = {
    path.relative_to(ROOT).with_suffix(""): path
    for package in ("nfn_optim", "meta_train")
    for path in sorted((ROOT / package).rglob("*.py"))
}
SOURCES = {".".join(p.parts[:-1] if p.name == "__init__" else p.parts): path for p, path in MODULES.items()}


def folder_of(module: str) -> str:
    """The folder of a module: one of nfn_optim, the root of nfn_optim, or all of meta_train."""
    package, *inner = module.split(".")
    is_folder = inner and (ROOT / package / inner[0]).is_dir() and package == "nfn_optim"
    return inner[0] if is_folder else package


def imports_of(source: str) -> set[str]:
    """The modules of both packages that a source imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else str(node.module) for name in names}
    return {name for name in found if name.split(".")[0] in ("nfn_optim", "meta_train")}


def violations(module: str, source: str) -> list[str]:
    """Imports of a module that do not point down."""
    own = folder_of(module)
    others = [(other, folder_of(other)) for other in sorted(imports_of(source))]
    return [other for other, folder in others if folder != own and FLOOR[folder] >= FLOOR[own]]


def test_imports_point_down_and_have_no_cycles() -> None:
    texts = {name: path.read_text(encoding="utf-8") for name, path in SOURCES.items()}
    assert {name: found for name, text in texts.items() if (found := violations(name, text))} == {}
    TopologicalSorter({name: imports_of(text) - {name} for name, text in texts.items()}).prepare()  # raises CycleError


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("nfn_optim.symmetry.symmetry", "from nfn_optim.engine import passes"),
        ("nfn_optim.rule.update_rule", "import nfn_optim.optimizer.optimizer"),
        ("nfn_optim.monitor.observer", "from nfn_optim import watch"),
        ("nfn_optim.rule.update_rule", "def late():\n    from nfn_optim import pretrained"),
        ("nfn_optim.optimizer.optimizer", "from meta_train import trainer"),
    ],
)
def test_a_planted_violation_is_found(module: str, line: str) -> None:
    assert len(violations(module, line)) == 1


def test_files_are_nouns_and_short() -> None:
    assert not {path.stem for path in SOURCES.values()} & NOT_NOUNS
    assert {n: lines for n, p in SOURCES.items() if (lines := len(p.read_text().splitlines())) > MAX_LINES} == {}
    assert len([path for path in (ROOT / "nfn_optim").iterdir() if path.is_file()]) <= ROOT_FILES


def test_tests_do_not_import_tests() -> None:
    """What several of them need stands in a module of its own, named by a noun."""
    for path in (ROOT / "tests").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        names += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
        assert not [name for name in names if name.rpartition(".")[2].startswith("test_")], path.name


@pytest.mark.slow
def test_importing_loads_no_extra_and_opens_no_connection() -> None:
    script = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("a connection was opened")
socket.socket.connect = refuse
import nfn_optim
heavy = {"tensorboard", "sklearn", "higher", "mlxtend", "matplotlib", "tyro", "meta_train"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
