"""Benchmarks start, and fit the code that they measure."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_folder import with_random_images

from meta_train.evaluation.study import Study
from nfn_optim import NFNOptimizer

ROOT = Path(__file__).parent.parent
BENCHMARKS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in BENCHMARKS if path.stem != "tables"], ids=lambda path: path.stem)
def test_commands_start(path: Path) -> None:
    command = [sys.executable, str(path), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_the_figure_of_the_readme_takes_the_settings_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the training runs."""
    studies = []
    monkeypatch.setattr(Study, "run", lambda study, workers: studies.append(study) or [])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    curves = importlib.import_module("curves")
    content = curves.measured(Path("data"), Path("cache"), seeds=2, workers=1)
    (study,) = studies
    assert {task.name for task in study.tasks} == set(content["tasks"]) == set(curves.TASKS)
    assert {(task, "AdamW tuned") for task in curves.TASKS} <= set(study.selected)
    for task in study.tasks:
        for contender in study.contenders:
            assert study._grid(task, contender)


@pytest.mark.slow
def test_federated_averaging_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    federated = importlib.import_module("federated")
    monkeypatch.setattr(federated, "IMAGES", 60)
    monkeypatch.setattr(federated, "RATES", (1e-3, 1e-2))
    x, y = torch.randn(300, 1, 14, 14), torch.arange(300) % 3
    clients = federated.shares_of_clients((x, y), 0)
    counts = [torch.bincount(own, minlength=3).tolist() for _, own in clients]
    assert all(sum(count) == 60 for count in counts)
    assert len({max(range(3), key=count.__getitem__) for count in counts}) > 1, "they prefer different classes"
    assert all(any((image == x[k]).all() for k in range(300)) for image in clients[0][0][:5])
    networks = [torch.nn.Linear(2, 1) for _ in range(3)]
    federated.average(networks[0], networks[1:])
    torch.testing.assert_close(networks[0].weight, (networks[1].weight + networks[2].weight) / 2)

    federated.main(with_random_images(tmp_path), tmp_path, seeds=1, rounds=2, steps=2)
    rows = json.loads((tmp_path / "federated.json").read_text())["rows"]
    assert [(row["optimizer"], row["kept"]) for row in rows[-3:]] == [
        ("NFNOptimizer", True),
        ("with `total_steps`", False),
        ("with `total_steps`", True),
    ]
    assert len({tuple(row["rounds"][-1]) for row in rows}) == len(rows) == 2 * 4, "every run is another one"
    assert (tmp_path / "federated.md").read_text().splitlines()[-1].startswith("| with `total_steps` | ")


def test_clients_learn_together_what_none_of_them_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients with one class each, which the server tells apart."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    federated = importlib.import_module("federated")
    torch.manual_seed(0)
    x = torch.randn(80, 1, 14, 14) + torch.arange(80).remainder(2).mul(2).sub(1).view(-1, 1, 1, 1)
    y = torch.arange(80) % 2
    data = [(x[y == k][:30], y[y == k][:30]) for k in range(2)]
    for kept in (False, True):
        found = federated.run(lambda m, _: NFNOptimizer(m), kept, data, (x[60:], y[60:]), 8, 3, 0)
        assert len(found) == 8
        assert found[-1][1] == 1.0
