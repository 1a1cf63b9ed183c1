"""Many processes that meta-train one theta, started by torchrun: the same theta, and nothing lost when one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from meta_train import checkpoint, trainer
from meta_train.config import Config
from meta_train.distributed import ALONE, Ranks

WORDS = (
    "smoke",
    "--tasks",
    "2",
    "--slots",
    "4",
    "--iterations",
    "10",
    "--checkpoint-every",
    "2",
    "--validate-every",
    "5",
)


def torchrun(*words: str, restarts: int = 0) -> list[str]:
    """Two processes on this machine."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return [*launcher, "--max-restarts", str(restarts), "-m", "meta_train", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def finish(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment(), check=False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the same tasks."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    done = finish([sys.executable, "-m", "meta_train", "train", *WORDS, "--out", str(out)])
    assert done.returncode == 0, done.stderr
    return out


def same(one: Path, other: Path) -> bool:
    """Whether two runs have the same theta, best theta, outer optimizer and inner runs, to the last bit."""
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


def test_two_ranks_give_the_theta_of_one_process(tmp_path: Path, alone: Path) -> None:
    done = finish(torchrun("train", *WORDS, "--out", str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    assert same(tmp_path, alone)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def kill_a_rank(run: subprocess.Popen[str], out: Path) -> None:
    """Kill one of two ranks once there is a checkpoint of the fourth iteration."""
    deadline = time.monotonic() + 120
    while not checkpoint.paths(out) or checkpoint.load(out)["iteration"] < 4:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(children(run.pid)[-1], signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks through /proc")
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_dies(tmp_path: Path, alone: Path, restarts: int) -> None:
    """Without restarts the job ends with an error and resumes by hand, alone; with them it resumes by itself."""
    words = torchrun("train", *WORDS, "--out", str(tmp_path), restarts=restarts)
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    kill_a_rank(run, tmp_path)
    _, said = run.communicate(timeout=240)
    assert (run.returncode == 0) == (restarts == 1), said
    if not restarts:
        assert 4 <= checkpoint.load(tmp_path)["iteration"] < 10
        done = finish([sys.executable, "-m", "meta_train", "resume", str(tmp_path)])
        assert done.returncode == 0, done.stderr
    assert same(tmp_path, alone)


def test_shares_are_dealt_out_and_put_back() -> None:
    items = list(range(7))
    shares = [Ranks(rank, 3).share(items) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    assert ALONE.gather(ALONE.share(items)) == items
    assert ALONE.first


@pytest.mark.parametrize(("tasks", "slots", "processes"), [(1, 16, 2), (2, 3, 2), (3, 6, 2)])
def test_work_that_cannot_be_dealt_out_is_refused(tasks: int, slots: int, processes: int) -> None:
    with pytest.raises(ValueError, match="give each process the same number of tasks"):
        Config(tasks=tasks, slots=slots).check(processes)
