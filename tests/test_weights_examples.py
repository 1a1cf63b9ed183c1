"""The experiments on networks over weights run from the command line and write what they say, shortened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = {
    "predict_generalization": ["--runs", "50", "--sizes", "30", "60", "--steps", "6", "--zoo-steps", "20"],
    "edit_images": ["--count", "40", "--held-out", "10", "--fit-steps", "20", "--epochs", "1", "--channels", "4"],
}
WRITTEN = {
    "predict_generalization": ["weights_generalization" + end for end in (".json", ".md", "_scatter.png", "_tau.png")],
    "edit_images": ["weights_editing" + end for end in (".json", ".md", "_dilate.png")],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("predict_generalization", marks=pytest.mark.exhaustive), "edit_images"])
def test_an_experiment_writes_one_table_with_all_baselines(name: str, tmp_path: Path) -> None:
    folders = ["--populations", str(tmp_path / "networks"), "--out", str(tmp_path / "out")]
    command = [sys.executable, f"examples/weights/{name}.py", "--quick", *TINY[name], *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == WRITTEN[name]
    table = (tmp_path / "out" / WRITTEN[name][1]).read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    for method in ("nfn's recipe", "flat perceptron, permuted", "Pointwise"):
        assert any(row.startswith(f"| {method}") for row in rows), method
    assert len(rows) >= 10
    assert done.stdout.count("\n") > len(rows)
    found = json.loads((tmp_path / "out" / WRITTEN[name][0]).read_text())
    by_seed = found["tau"]["Predictor"]["60"] if "tau" in found else found["no edit"]["mse"] + found["Pointwise"]["mse"]
    assert len(by_seed) >= 3
    assert all(0 < abs(x) < 1 for x in by_seed)
