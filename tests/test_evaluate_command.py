"""`python -m meta_train evaluate`, as a user calls it, kills it and calls it again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meta_train.evaluation import tiny
from meta_train.evaluation.cache import Cache
from meta_train.evaluation.loop import train
from meta_train.evaluation.optimizers import OTHERS
from meta_train.evaluation.splits import SPLITS
from meta_train.evaluation.study import Job, stamp_of

TINY = [sys.executable, "-m", "meta_train", "evaluate", "--split", "tiny", "--thorough", "--seeds", "2"]


def kept(folder: Path) -> dict[Path, int]:
    """Finished runs and when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def heed_interrupts() -> None:
    """As a shell's foreground job; those in the background begin with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stopped(command: list[str], by: int, cache: Path, runs: int) -> subprocess.CompletedProcess[str]:
    """Start a command, send its process a signal when so many runs are kept, wait until its workers are gone too."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)  # noqa: PLW1509 - no threads
    while len(kept(cache)) < runs:
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    os.kill(process.pid, by)
    _, said = process.communicate()
    while any(alive(pid) for pid in workers):  # or the test runs into its time limit
        time.sleep(0.02)
    return subprocess.CompletedProcess(command, process.returncode, stderr=said)


def test_a_command_that_was_stopped_continues_and_reports(tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    command = [*TINY, "--cache", str(cache), "--out", str(out), "--data", str(tmp_path)]
    stopped([*command, "--workers", "1"], signal.SIGKILL, cache, 3)
    before = kept(cache)
    interrupted = stopped(command, signal.SIGINT, cache, len(before) + 3)
    assert interrupted.returncode == 1
    assert interrupted.stderr.splitlines()[-1].endswith("an evaluation with the same command")
    assert "Traceback" not in interrupted.stderr
    assert before.items() < kept(cache).items()
    before = kept(cache)
    assert not out.exists()

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert before.items() <= kept(cache).items(), "a finished run was made again"

    content = json.loads((out / "tiny.json").read_text())
    names = [row["optimizer"] for row in content["summary"]]
    assert names[:2] == ["AdamW tuned", "AdamW defaults"]
    assert names[-4:] == ["default", "default, told", "default, told, lr tuned", "default, told, tensors apart"]
    assert len(names) == 2 + len(OTHERS) + 4
    assert len(content["rows"]) == len(tiny.TASKS) * len(names)
    assert all(len(row["loss"]) == 2 and row["seconds"] > 0 for row in content["rows"])
    by_name = {(row["task"], row["optimizer"]): row["loss"] for row in content["rows"]}
    for task in tiny.TASKS:
        nominal, defaults = by_name[task.name, "nominal rule"], by_name[task.name, "AdamW defaults"]
        assert nominal == pytest.approx(defaults, rel=0.01)  # but for weight decay
    page = (out / "tiny.md").read_text()
    assert page in done.stdout
    assert all(f"| {name} |" in page for name in (*names, *(task.name for task in tiny.TASKS)))
    assert (out / "tiny_tasks.md").read_text().count("\n") == 2 + len(content["rows"])
    for picture in ("curves", "profile"):
        assert (out / f"tiny_{picture}.png").read_bytes().startswith(b"\x89PNG")

    grid = SPLITS["tiny"].reference.grid
    for setting in (grid[0], grid[-1]):  # what was made there is what is made here
        run = Cache(cache).get(stamp_of(Job(tiny.TASKS[0], setting, 0), tmp_path))
        assert run is not None
        assert run.losses == pytest.approx(train(tiny.TASKS[0], setting, 0, tmp_path).losses, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--split", "test"], "expected cifar10.npz in the data folder"),
        (["--split", "tiny", "--rule", "nonsense"], "expected a shipped rule"),
        (["--split", "tiny", "--seeds", "0"], "expected at least one seed"),
    ],
)
def test_wrong_inputs_end_with_one_line(tmp_path: Path, words: list[str], says: str) -> None:
    command = [sys.executable, "-m", "meta_train", "evaluate", *words, "--data", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
