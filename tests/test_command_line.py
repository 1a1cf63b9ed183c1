"""The command `python -m nfn_optim`, run in a subprocess."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import pytest

MODELS = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(4, 3)

def keywords():
    network = nn.Bilinear(3, 4, 2)
    return network, {"input1": torch.randn(2, 3), "input2": torch.randn(2, 4)}

class Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x).real.sum(-1)

def opaque():
    return nn.Sequential(nn.Linear(3, 5), Spectrum()), torch.randn(4, 3)

pair = make()
wrong = 3
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "my_models.py").write_text(MODELS)
    return command.run("nfn_optim", "symmetry", *arguments, folder=folder)


def run_in_a_shell(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own."""
    (folder / "my_models.py").write_text(MODELS)
    typed = [sys.executable, "-m", "nfn_optim", "symmetry", *arguments]
    return subprocess.run(typed, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "how"), [pytest.param("make", run_in_a_shell, marks=pytest.mark.slow), ("make", run), ("pair", run)]
)
def test_prints_and_certifies(tmp_path: Path, name: str, how: Callable[..., Any]) -> None:
    done = how(tmp_path, f"my_models:{name}", "--search")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:4] == ["0.weight  h0 in0", "0.bias    h0", "2.weight  out0 h0", "2.bias    out0"]
    assert lines[-1] == "certified: 1 free axes, tolerance 1e-08"


def test_takes_keyword_inputs(tmp_path: Path) -> None:
    assert "weight  out0 in0 in1" in run(tmp_path, "my_models:keywords").stdout


def test_warns_about_ops_without_a_rule(tmp_path: Path) -> None:
    assert "warning: no rule for the op aten::_fft" in run(tmp_path, "my_models:opaque").stdout


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_models", "expected module:function"),
        ("my_models:nothing", "expected a function 'nothing'"),
        ("no_such_module:make", "expected a function 'make' in a module 'no_such_module'"),
        ("my_models:wrong", "to return (network, inputs), found int"),
    ],
)
def test_invalid_targets_end_with_a_one_line_error(tmp_path: Path, target: str, message: str) -> None:
    done = run(tmp_path, target)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
