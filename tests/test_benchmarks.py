"""Benchmarks start, and fit the code that they measure."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/gpu.py`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def gpu_parts(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> dict[str, Any]:
    """What the command writes in tiny sizes."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(folder), *words])
    gpu.main()
    torch.set_num_threads(threads)
    parts: dict[str, Any] = json.loads((folder / "gpu.json").read_text())["parts"]
    return parts


@pytest.mark.slow
def test_the_benchmark_of_gpus_runs_without_one(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = gpu_parts(gpu, monkeypatch, tmp_path)
    assert list(parts) == ["steps", "waits", "training", "capture"]
    uncompiled, compiled = ([row for row in parts["steps"] if row["compiled"] is x] for x in (False, True))
    kinds = [(weights, dtype) for weights in ("1k", "4k") for dtype in ("float32", "bfloat16")]
    assert [(row["weights"], row["dtype"]) for row in uncompiled] == kinds
    for row in uncompiled:
        assert row["milliseconds"] > 0 < row["adamw_milliseconds"]
        assert row["pairs"] >= gpu.MIN_PAIRS
        assert row["state_bytes"] > 12  # three moments in float32, whatever the parameters are
        assert row["adamw_state_bytes"] == pytest.approx(8 if row["dtype"] == "float32" else 4, abs=0.1)
        assert row["transient_bytes"] == "needs a GPU"
    assert all("needs a GPU" in row["skipped"] for row in (*compiled, *parts["waits"], *parts["capture"]))
    losses = {row["optimizer"]: row["loss"] for row in parts["training"]}
    assert [sum(title.startswith(x) for title in losses) for x in ("NFNOptimizer", "AdamW", "Muon")] == [2, 4, 4]
    assert all(row["curve"][-1] < row["curve"][0] for row in parts["training"])
    assert all(row["free_axes"] > 0 for row in parts["training"] if row["optimizer"].startswith("NFN"))
    assert max(losses.values()) < math.log(gpu.CODES) + 0.1
    page = (tmp_path / "gpu.md").read_text()
    assert "measure nothing" in page
    assert page.count("needs a GPU") >= len(compiled) + len(parts["waits"]) + len(parts["capture"])


def test_the_benchmark_of_gpus_says_what_did_not_fit_in(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = gpu_parts(gpu, monkeypatch, tmp_path, "--minutes", "0", "--parts", "steps", "training")
    assert [len(rows) for rows in parts.values()] == [8, 10]
    uncompiled = [row for row in parts["steps"] if not row["compiled"]]
    assert all("left" in row["skipped"] for row in (*uncompiled, *parts["training"]))


def test_the_benchmark_of_gpus_measures_every_kind_of_step_once(gpu: ModuleType) -> None:
    found = gpu.kinds(list(gpu.FULL.networks))
    kinds = set(product(gpu.NETWORKS, (torch.float32, torch.bfloat16), (False, True)))
    assert sorted(found, key=str) == sorted(kinds, key=str)
    weights = {name: 8 * width**2 * blocks for name, (width, blocks) in gpu.NETWORKS.items()}
    expected = {"1M": 1e6, "10M": 1e7, "100M": 1e8, "1B": 1e9}
    assert weights == pytest.approx(expected, rel=0.06)
    setup = gpu.FULL
    with torch.device("meta"):
        model = gpu.GPT(gpu.CODES, setup.context, setup.width, setup.depth)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(30e6, rel=0.06)


def test_the_benchmark_of_gpus_keeps_what_is_done(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a part that fails, and the parts after it."""

    def broken(setup: Any, deadline: float) -> Any:
        yield {"row": setup}
        raise RuntimeError("out of memory")

    kept: list[str] = []
    monkeypatch.setattr(gpu, "PARTS", {"first": (broken, 1.0), "second": (lambda *_: iter([{"row": 2}]), 1.0)})
    gpu.run(["first", "second"], 1, 1.0, lambda rows: kept.append(json.dumps(rows)))
    assert [json.loads(text) for text in kept] == [
        {"first": [{"row": 1}]},
        {"first": [{"row": 1}, {"failed": "RuntimeError: out of memory"}]},
        {"first": [{"row": 1}, {"failed": "RuntimeError: out of memory"}], "second": [{"row": 2}]},
    ]


def test_a_training_that_does_not_fit_in_stops(gpu: ModuleType) -> None:
    setting, moment = gpu.contenders()["AdamW, lr 0.001, warm-up, cosine"], time.monotonic()
    row = gpu.train(gpu.TINY, setting, moment)
    assert row["skipped"] == "no time left after 1 steps"
    assert len(row["curve"]) == row["steps"] == 1
    long = replace(gpu.TINY, steps=10**9)
    assert set(gpu.train(long, setting, moment + 3600)) == {"skipped"}


def test_calls_that_wait_are_counted(gpu: ModuleType) -> None:
    names = ["aten::copy_", "cudaLaunchKernel", "cudaStreamSynchronize", "Memcpy DtoH (Device -> Pageable)"]
    assert gpu.waits_in([*names, "cudaStreamSynchronize"]) == {"cudaStreamSynchronize": 2, "Memcpy DtoH": 1}
    assert gpu.waits_in(names[:2]) == {}


@pytest.mark.parametrize("allowed", [True, False])
def test_a_captured_interval_is_compared_with_as_many_steps(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    """On a stand-in for a GPU, on which steps are taken at capture instead of at the first replay, or not at all."""

    def graph(_: Any) -> AbstractContextManager[None]:
        if not allowed:
            raise RuntimeError("operation not permitted\nwhen a stream is capturing")
        return nullcontext()

    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda _: 8.0)
    stand_ins = {"synchronize": lambda: None, "graph": graph, "Event": lambda enable_timing: event}
    stand_ins["CUDAGraph"] = lambda: SimpleNamespace(replay=lambda: None)
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(gpu.Setup, "on_gpu", True)
    (row,) = gpu.capture(gpu.TINY, time.monotonic() + 60)
    if allowed:
        assert row == {"milliseconds": 2.0, "eager_milliseconds": 2.0, "relative_error": 0.0}
    else:
        assert row == {"failed": "not supported: RuntimeError: operation not permitted"}


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
