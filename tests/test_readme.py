"""The README is true: its examples run, its commands exist, its tables are what the results files say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nfn_optim import NFNOptimizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_what_it_says_is_printed_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.findall(r"```python\n([^`]*)```\n```\n([^`]*)```", README)
    assert shown
    for code, output in shown:
        exec(code, {})
        assert capsys.readouterr().out == output


def test_the_first_line_of_code_is_all_that_a_script_needs() -> None:
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert first is not None
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    scope = {"model": model}
    exec(first[1], scope)
    optimizer = scope["optimizer"]
    assert isinstance(optimizer, NFNOptimizer)
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(200):
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert optimizer.fallbacks == 0


def test_its_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    said = subprocess.run([sys.executable, "-m", "meta_train", "--help"], capture_output=True, text=True, check=True)
    for command in re.findall(r"^python -m meta_train (\w+)", README, re.MULTILINE):
        assert command in said.stdout


def test_its_tables_are_the_newest() -> None:
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
