"""The wheel, built and installed without extras: what it holds, and that it trains.

The environment is new and sees the distributions that the wheel requires, nothing else of those installed here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import nfn_optim

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PACKAGES = ("nfn_optim", "meta_train")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
THREE_STEPS = """
import importlib.util, sys
from importlib.metadata import version
import torch
import nfn_optim

assert nfn_optim.__file__.startswith(sys.prefix), nfn_optim.__file__
assert version("nfn-optim") == nfn_optim.__version__
assert not [name for name in ("rich", "tyro", "sklearn", "pytest") if importlib.util.find_spec(name)]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
optimizer = nfn_optim.NFNOptimizer(model)
x = torch.randn(32, 4)
losses = []
for _ in range(4):
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    losses.append(loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert optimizer.symmetry is not None
assert losses == sorted(losses, reverse=True), losses
"""


def make_venv(folder: Path, visible: set[str]) -> Path:
    """An environment without pip in which the named distributions of this one can be imported; its interpreter."""
    venv.create(folder, with_pip=False)
    links = folder / "links"
    links.mkdir()
    for name in visible:
        files = distribution(name).files or []
        top_level = {file.parts[0] for file in files} - {"..", "__pycache__"}
        for entry in top_level:
            link = links / entry
            if not link.exists():
                link.symlink_to(Path(str(distribution(name).locate_file(entry))))
    purelib = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
    Path(purelib, "links.pth").write_text(f"{links}\n")
    return folder / "bin" / "python"


def requirements(metadata: list[str]) -> set[str]:
    """Distributions required, directly or not, without extras."""
    found: set[str] = set()
    queue = metadata[:]
    while queue:
        requirement = Requirement(queue.pop())
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name not in found:
            found.add(requirement.name)
            queue += distribution(requirement.name).requires or []
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, where only setuptools can be imported."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in (*PACKAGES, "tests", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    python = make_venv(folder / "builder", {"setuptools"})
    subprocess.run([python, "-I", "-c", BUILD, folder], cwd=source, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_packages_with_their_data_and_nothing_else(wheel: Path) -> None:
    info = f"nfn_optim-{nfn_optim.__version__}.dist-info"
    names = {name for name in ZipFile(wheel).namelist() if not name.startswith(f"{info}/")}
    here = {path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    assert names == {path.as_posix() for path in here if "__pycache__" not in path.parts}
    data = {"nfn_optim/py.typed", "meta_train/py.typed"}
    assert names >= data | {f"nfn_optim/pretrained/base.{suffix}" for suffix in ("safetensors", "md")}
    assert f"{info}/licenses/LICENSE" in ZipFile(wheel).namelist()


def test_it_trains_where_it_is_installed_without_extras(wheel: Path, tmp_path: Path) -> None:
    info = f"nfn_optim-{nfn_optim.__version__}.dist-info"
    metadata = ZipFile(wheel).read(f"{info}/METADATA").decode()
    python = make_venv(tmp_path / "venv", requirements(re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(pip, check=True, capture_output=True, timeout=120)
    done = subprocess.run(
        [python, "-I", "-W", "error", "-c", THREE_STEPS], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {nfn_optim.__version__}\n" in (ROOT / "CITATION.cff").read_text()
