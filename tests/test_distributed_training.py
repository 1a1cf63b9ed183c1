"""Meta-training in several processes, started by torchrun: the same theta as in one, also after a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import command
import pytest
import torch

from meta_train import checkpoint, trainer
from meta_train.config import Config
from meta_train.distributed import SINGLE_PROCESS, Ranks

ARGUMENTS = (
    "smoke",
    "--tasks",
    "2",
    "--inner-runs",
    "4",
    "--iterations",
    "10",
    "--checkpoint-every",
    "2",
    "--validate-every",
    "5",
)


def torchrun(*arguments: str, restarts: int = 0) -> list[str]:
    """Two processes on this machine."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return [*launcher, "--max-restarts", str(restarts), "-m", "meta_train", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def finish(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment(), check=False)


@pytest.fixture(scope="module")
def single_process_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process on the same tasks."""
    out = tmp_path_factory.mktemp("runs") / "single"
    done = command.run("meta_train", "train", *ARGUMENTS, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


def same(one: Path, other: Path) -> bool:
    """Whether two runs have bit-identical theta, best theta, outer optimizer and inner runs."""
    files = all((one / n).read_bytes() == (other / n).read_bytes() for n in (trainer.THETA, trainer.BEST))
    ours, theirs = ({**checkpoint.load(folder), "seconds": 0, "describe": 0} for folder in (one, other))
    return files and equal(ours, theirs)


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.slow
def test_two_ranks_give_the_theta_of_one_process(tmp_path: Path, single_process_run: Path) -> None:
    done = finish(torchrun("train", *ARGUMENTS, "--out", str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    assert same(tmp_path, single_process_run)


def children(pid: int) -> list[int]:
    """The child processes of a process."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in pids]


def kill_a_rank(run: subprocess.Popen[str], out: Path) -> None:
    """Kill one of two ranks once there is a checkpoint of the fourth iteration."""
    deadline = time.monotonic() + 120
    while not checkpoint.paths(out) or checkpoint.load(out)["iteration"] < 4:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(children(run.pid)[-1], signal.SIGKILL)


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks through /proc")
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_dies(tmp_path: Path, single_process_run: Path, restarts: int) -> None:
    """Without restarts the job fails and is resumed manually by one process; with them it resumes automatically."""
    arguments = torchrun("train", *ARGUMENTS, "--out", str(tmp_path), restarts=restarts)
    run = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    kill_a_rank(run, tmp_path)
    _, stderr = run.communicate(timeout=240)
    assert (run.returncode == 0) == (restarts == 1), stderr
    if not restarts:
        assert 4 <= checkpoint.load(tmp_path)["iteration"] < 10
        done = command.run("meta_train", "resume", str(tmp_path))
        assert done.returncode == 0, done.stderr
    assert same(tmp_path, single_process_run)


def test_slices_are_gathered_in_order() -> None:
    items = list(range(7))
    slices = [Ranks(rank, 3).slice_of(items) for rank in range(3)]
    assert slices == [[0, 3, 6], [1, 4], [2, 5]]
    assert SINGLE_PROCESS.gather(SINGLE_PROCESS.slice_of(items)) == items
    assert SINGLE_PROCESS.is_main


@pytest.mark.parametrize(("tasks", "inner_runs", "processes"), [(1, 16, 2), (2, 3, 2), (3, 6, 2)])
def test_tasks_that_cannot_be_divided_among_processes_are_refused(tasks: int, inner_runs: int, processes: int) -> None:
    with pytest.raises(ValueError, match="give each process the same number of tasks"):
        Config(tasks=tasks, inner_runs=inner_runs).check(processes)
