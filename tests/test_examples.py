"""The examples run as a newcomer would run them, shortened."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def replace_adam() -> ModuleType:
    spec = importlib.util.spec_from_file_location("replace_adam", ROOT / "examples" / "replace_adam.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["replace_adam"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.exhaustive
def test_replace_adam_writes_what_it_says(tmp_path: Path) -> None:
    command = [sys.executable, "examples/replace_adam.py", "--steps", "3", "--seeds", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "replace_adam.json").read_text())["rows"]
    assert len(rows) == 3 * 4  # tasks x optimizers
    assert all(len(row["final"]) == 2 for row in rows)
    assert len({tuple(row["final"]) for row in rows if row["task"] == "digits, MLP"}) >= 3  # they do differ
    assert (tmp_path / "replace_adam.md").read_text().count("\n") == 2 + len(rows)
    assert (tmp_path / "replace_adam.png").read_bytes().startswith(b"\x89PNG")
    runs = {path.name: EventAccumulator(str(path)).Reload() for path in (tmp_path / "events").iterdir()}
    assert sorted(runs) == ["AdamW 1e-3", "AdamW tuned", "NFNOptimizer", "NFNOptimizer, total_steps"]
    for run in runs.values():
        tags = [f"training loss/{task}" for task in ("MNIST-5k, CNN", "MNIST-5k, MLP", "digits, MLP")]
        assert sorted(run.Tags()["scalars"]) == tags
        assert all([event.step for event in run.Scalars(tag)] == [1, 2, 3] for tag in tags)
    table = [line for line in done.stdout.splitlines() if line.lstrip().startswith(("AdamW", "tuned", "NFNOptimizer"))]
    assert len(table) == len(rows)  # no line is wrapped
    assert all(len(line) <= 80 for line in done.stdout.splitlines()[:-2])  # paths may be long


def test_tensorboard_shows_the_runs_of_the_demo_at_once(replace_adam: ModuleType, tmp_path: Path) -> None:
    """It selects all runs as long as there are at most 40; those of earlier calls are gone."""
    from torch.utils.tensorboard import SummaryWriter

    for seed in range(50):
        with SummaryWriter(str(tmp_path / "AdamW 0.001" / "digits, MLP" / f"seed{seed}")) as writer:
            writer.add_scalar("loss", 1.0, 1)
    (tmp_path / "notes.txt").write_text("mine")
    optimizers = ("AdamW 1e-3", "tuned: AdamW 0.004", "NFNOptimizer", "NFNOptimizer, total_steps")
    tasks = ("digits, MLP", "MNIST-5k, MLP")
    rows = [{"optimizer": name, "task": task, "curves": [[2.0, 1.0]] * 3} for name in optimizers for task in tasks]
    for _ in range(2):
        replace_adam.write_events(rows, tmp_path)
        multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
        multiplexer.Reload()
        assert sorted(multiplexer.Runs()) == ["AdamW 1e-3", "AdamW tuned", "NFNOptimizer", "NFNOptimizer, total_steps"]
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.exhaustive
def test_differentiate_through_training_tells_labels_apart(tmp_path: Path) -> None:
    """In the direction, from few windows."""
    command = [sys.executable, "examples/differentiate_through_training.py", "--windows", "20", "--seeds", "1"]
    command += ["--steps", "5", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "differentiate_through_training.json").read_text())
    assert found["weight of right labels"] > found["weight of wrong labels"] + 0.1
    assert [len(runs) for runs in found["accuracy"].values()] == [1, 1, 1]
    assert (tmp_path / "differentiate_through_training.md").read_text().count("\n") == 4 + 3


@pytest.mark.slow
def test_watch_in_tensorboard_writes_charts(tmp_path: Path) -> None:
    command = [sys.executable, "examples/watch_in_tensorboard.py", "--steps", "60", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"tensorboard --logdir {tmp_path}" in done.stdout
    (run,) = tmp_path.iterdir()
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()
    assert "custom_scalars__config__" in tags["tensors"]
    assert tags["histograms"]
    assert [event.step for event in events.Scalars("optimizer.cosine/head")] == [1, 50]
    assert events.Scalars("optimizer.final/accuracy")[0].value > 0.2


@pytest.mark.exhaustive
def test_meta_train_your_own_writes_a_rule(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "examples/meta_train_your_own.py", "--iterations", "2", "--seeds", "1", "--steps", "3"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "meta_train_your_own.json").read_text())
    assert rows["NFNOptimizer"] != rows["NFNOptimizer, yours"]
    assert f"NFNOptimizer(model, rule='{out}/theta.safetensors')" in done.stdout.replace("\n", "")


def test_steps_to_a_loss_are_counted_on_the_running_mean(replace_adam: ModuleType) -> None:
    slow = [10.0] * 100 + [1.0] * 100
    fast = [10.0] * 20 + [1.0] * 180
    assert replace_adam.reduction(fast, slow) == pytest.approx(200 / 50)  # 30 batches of 1 after the first 20
    assert replace_adam.reduction(slow, [0.5] * 200) is None


@pytest.mark.slow
def test_the_data_is_cut_once_and_standardised(replace_adam: ModuleType) -> None:
    for load, train in ((replace_adam.digits, 1500), (replace_adam.mnist, 4000)):
        x, y, held_x, held_y = load()
        assert (len(x), len(y)) == (train, train)
        assert len(held_x) == len(held_y) > 0
        assert abs(x.mean().item()) < 1e-3
        assert abs(x.std().item() - 1) < 1e-3
        assert set(y.tolist()) == set(held_y.tolist()) == set(range(10))
