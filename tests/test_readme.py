"""The README is short and true: a script needs its first lines only, its commands exist, its tables are up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import command
import torch

from nfn_optim import NFNOptimizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_it_is_short() -> None:
    assert len(README.split()) < 1200
    table = README.split("<!-- table summary -->")[1].split("<!-- /table -->")[0]
    assert len(table.strip().splitlines()) <= 2 + 6


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
    shown = command.run("meta_train", "--help")
    assert shown.returncode == 0
    for name in re.findall(r"python -m meta_train (\w+)", README):
        assert name in shown.stdout


def test_the_tables_of_all_pages_are_up_to_date() -> None:
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
