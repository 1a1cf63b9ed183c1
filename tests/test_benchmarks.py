"""Benchmarks start, and fit the code that they measure."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from meta_train.evaluation.study import Study

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
