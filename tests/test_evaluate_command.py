"""`python -m meta_train evaluate` from the command line: killed, interrupted, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import command
import pytest

from meta_train.evaluation import tiny
from meta_train.evaluation.cache import Cache
from meta_train.evaluation.loop import train
from meta_train.evaluation.optimizers import PRIOR_ENTRIES
from meta_train.evaluation.splits import SPLITS
from meta_train.evaluation.study import Job, cache_key_of

WORDS = ["evaluate", "--split", "tiny", "--thorough", "--seeds", "2"]


def cached(folder: Path) -> dict[Path, int]:
    """Files of finished runs and their modification times."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}


def alive(pid: int) -> bool:
    """Whether a process runs and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def enable_interrupts() -> None:
    """Handle Ctrl-C as a foreground job does; background jobs of a shell ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(typed: list[str], signum: int, cache: Path, runs: int) -> subprocess.CompletedProcess[str]:
    """Start a command, send its process a signal when so many runs are kept, wait until its workers are gone too."""
    process = subprocess.Popen(typed, stderr=subprocess.PIPE, text=True, preexec_fn=enable_interrupts)  # noqa: PLW1509 - no threads
    while len(cached(cache)) < runs:
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    os.kill(process.pid, signum)
    _, stderr = process.communicate()
    while any(alive(pid) for pid in workers):  # or the test runs into its time limit
        time.sleep(0.02)
    return subprocess.CompletedProcess(typed, process.returncode, stderr=stderr)


@pytest.mark.exhaustive
def test_a_stopped_command_resumes_and_reports(tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    words = [*WORDS, "--cache", str(cache), "--out", str(out), "--data", str(tmp_path)]
    typed = [sys.executable, "-m", "meta_train", *words]
    stop([*typed, "--workers", "1"], signal.SIGKILL, cache, 3)
    before = cached(cache)
    interrupted = stop(typed, signal.SIGINT, cache, len(before) + 3)
    assert interrupted.returncode == 1
    assert interrupted.stderr.splitlines()[-1].endswith("an evaluation with the same command")
    assert "Traceback" not in interrupted.stderr
    assert before.items() < cached(cache).items()
    before = cached(cache)
    assert not out.exists()

    done = command.run("meta_train", *words, "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert before.items() <= cached(cache).items(), "a finished run was repeated"

    content = json.loads((out / "tiny.json").read_text())
    names = [row["optimizer"] for row in content["summary"]]
    assert names[:2] == ["AdamW tuned", "AdamW defaults"]
    assert names[-4:] == [
        "default",
        "default, horizon known",
        "default, horizon known, lr tuned",
        "default, without symmetry",
    ]
    assert len(names) == 2 + len(PRIOR_ENTRIES) + 4
    assert len(content["rows"]) == len(tiny.TASKS) * len(names)
    assert all(len(row["loss"]) == 2 and row["seconds"] > 0 for row in content["rows"])
    by_name = {(row["task"], row["optimizer"]): row["loss"] for row in content["rows"]}
    for task in tiny.TASKS:
        nominal, defaults = by_name[task.name, "nominal rule"], by_name[task.name, "AdamW defaults"]
        assert nominal == pytest.approx(defaults, rel=0.01)  # weight decay differs
    page = (out / "tiny.md").read_text()
    assert page in done.stdout
    assert all(f"| {name} |" in page for name in (*names, *(task.name for task in tiny.TASKS)))
    assert (out / "tiny_tasks.md").read_text().count("\n") == 2 + len(content["rows"])
    for plot in ("curves", "profile"):
        assert (out / f"tiny_{plot}.png").read_bytes().startswith(b"\x89PNG")

    grid = SPLITS["tiny"].reference.grid
    for setting in (grid[0], grid[-1]):  # runs do not depend on the process
        run = Cache(cache).get(cache_key_of(Job(tiny.TASKS[0], setting, 0), tmp_path))
        assert run is not None
        assert run.losses == pytest.approx(train(tiny.TASKS[0], setting, 0, tmp_path).losses, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "test"], "expected cifar10.npz in the data folder"),
        (["--split", "tiny", "--rule", "nonsense"], "expected a shipped rule"),
        (["--split", "tiny", "--seeds", "0"], "expected at least one seed"),
    ],
)
def test_invalid_inputs_print_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = command.run("meta_train", "evaluate", *arguments, "--data", str(tmp_path), folder=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
