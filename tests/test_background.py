"""Compiling in another process: training goes on, and nothing depends on when or whether that ends."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from compiler import compiler
from recording import cached_rule, give_gradients, mlp, snapshot
from torch import Tensor, nn

from nfn_optim import NFNOptimizer, UpdateRule
from nfn_optim.engine import background, inductor
from nfn_optim.engine.inductor import Call, Graph

pytestmark = [compiler, pytest.mark.usefixtures("empty_cache")]


class Server:
    """Stands for the process that compiles: functions run as they are, from a copy, once that is allowed."""

    allowed: ClassVar[threading.Event]
    calls: ClassVar[list[Call]]
    error: ClassVar[Exception | None]

    def compile(self, request: bytes) -> Graph:
        call: Call = pickle.loads(request)
        assert self.allowed.wait(60)
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        return Graph(lambda *xs: [call(*xs)], lambda results: results[0], {}, ())

    def end(self) -> None:
        """Nothing to end."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> type[Server]:
    """In the place of the process."""
    monkeypatch.setattr(Server, "allowed", threading.Event(), raising=False)
    monkeypatch.setattr(Server, "calls", [], raising=False)
    monkeypatch.setattr(Server, "error", None, raising=False)
    monkeypatch.setattr(background, "_Server", Server)
    return Server


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compilation pays from the first step on, and has not failed yet; no job of another test is open."""
    monkeypatch.setattr("nfn_optim.optimizer.optimizer.COMPILE_AFTER", 0)
    monkeypatch.setattr(inductor, "_failures", [])
    background._of_process.cache_clear()
    yield
    background._of_process(os.getpid()).stop()
    background._of_process.cache_clear()


def train(model: nn.Module, optimizer: NFNOptimizer, steps: int, inputs: Tensor) -> None:
    """Take some steps."""
    for _ in range(steps):
        give_gradients(model, (inputs,))
        optimizer.step()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines on this package's log."""
    return [record.message for record in caplog.records if record.name.startswith("nfn_optim")]


@pytest.mark.parametrize("whole", [True, False])
def test_training_goes_on_until_all_is_compiled(
    whole: bool, server: type[Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps are equal to the last bit: what runs is the same."""
    monkeypatch.setattr("nfn_optim.optimizer.optimizer.is_small", lambda _: whole)
    inputs = torch.randn(8, 3)
    found = []
    for how in (False, None):
        model = nn.Sequential(nn.Linear(3, 150), nn.Tanh(), nn.Linear(150, 140), nn.Tanh(), nn.Linear(140, 2))
        torch.manual_seed(0)
        model.apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None)
        optimizer = NFNOptimizer(model, rule=cached_rule(), compile=how)
        train(model, optimizer, 5, inputs)  # with and without a refresh
        if how is None:
            assert not server.calls
            assert len(said(caplog)) == 1
            assert "in the background" in said(caplog)[0]
            server.allowed.set()
            background.wait()
        train(model, optimizer, 6, inputs)
        found.append(snapshot(optimizer))
    assert len(server.calls) == 2 if whole else len(server.calls) > 2
    assert len(said(caplog)) == 2
    assert "from step 6 on" in said(caplog)[1]
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-6)


def test_a_failure_is_said_once_and_training_goes_on(server: type[Server]) -> None:
    server.allowed.set()
    server.error = RuntimeError("no compiler there")
    model, inputs = mlp(), torch.randn(8, 3)
    optimizer = NFNOptimizer(model, rule="adamw")
    train(model, optimizer, 1, inputs)
    background.wait()
    with pytest.warns(UserWarning, match=r"no compiler there.*compile=True.*compile=False") as caught:
        train(model, optimizer, 3, inputs)
    assert len(caught) == 1
    assert optimizer.param_groups[0]["steps_taken"] == 4


def test_a_rule_that_cannot_be_pickled(server: type[Server]) -> None:
    class Local(UpdateRule):
        """Cannot be imported by another process."""

    model, inputs = mlp(), torch.randn(8, 3)
    optimizer = NFNOptimizer(model, rule=Local())
    train(model, optimizer, 1, inputs)
    with pytest.warns(UserWarning, match=r"Local.*compile=True"):
        train(model, optimizer, 1, inputs)
    train(model, optimizer, 1, inputs)
    assert not server.calls


def test_copies_and_states_while_it_compiles(server: type[Server]) -> None:
    """A copy compiles for itself; a loaded state goes on."""
    model, inputs = mlp(), torch.randn(8, 3)
    optimizer = NFNOptimizer(model, rule="adamw")
    train(model, optimizer, 2, inputs)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    everything = [(model, optimizer), *copies]
    for its_model, its_optimizer in everything:
        train(its_model, its_optimizer, 2, inputs)
    server.allowed.set()
    background.wait()
    for its_model, its_optimizer in everything:
        train(its_model, its_optimizer, 2, inputs)
    assert len(server.calls) == 3
    for _, its_optimizer in copies:
        for x, y in zip(snapshot(its_optimizer), snapshot(optimizer), strict=True):
            torch.testing.assert_close(x, y)


def test_a_fork_starts_afresh(server: type[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen by a process with another number, where no thread of this one runs."""
    model, inputs = mlp(), torch.randn(8, 3)
    optimizer = NFNOptimizer(model, rule="adamw")
    train(model, optimizer, 1, inputs)
    parent, pid = background._of_process(os.getpid()), os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    parent.stop()  # at its exit
    assert parent._thread is not None
    train(model, optimizer, 2, inputs)
    server.allowed.set()
    background.wait()
    train(model, optimizer, 1, inputs)
    assert not inductor.has_failed()
    monkeypatch.undo()


def test_what_must_be_repeatable_is_compiled_in_the_foreground() -> None:
    cpu = torch.device("cpu")
    assert background.is_possible(cpu)
    assert not background.is_possible(torch.device("meta"))
    torch.use_deterministic_algorithms(True)
    try:
        assert not background.is_possible(cpu)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("how", [True, False])
def test_only_the_default_compiles_in_the_background(how: bool, server: type[Server]) -> None:
    optimizer = NFNOptimizer(mlp(), rule="adamw", compile=how)
    assert not optimizer._execution(10**10, torch.device("cpu")).background
    assert not server.calls


SCRIPT = """
import os, signal, sys, time, torch
import nfn_optim.optimizer.optimizer as o
from nfn_optim.engine import background
o.COMPILE_AFTER = 0
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background ignores
model = torch.nn.Linear(3, 2)
optimizer = o.NFNOptimizer(model)
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
own = background._of_process(os.getpid())
while own._server is None:
    pass
print(own._server._process.pid, own._server._folder.name, flush=True)
"""
ENDS = {
    "exception": 'raise RuntimeError("of the user")',
    "interrupt": "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)",
    "kill": "if os.fork():\n    os.kill(os.getpid(), signal.SIGKILL)\nos.close(1)\nos.close(2)\ntime.sleep(60)",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
def test_the_process_ends_with_its_client(how: str) -> None:
    """And its folder; even where a fork of the client lives on."""
    command = [sys.executable, "-c", SCRIPT + ENDS[how]]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode != 0
    assert result.stderr.count("Traceback") == (how != "kill")
    pid, folder = result.stdout.split()
    deadline = time.monotonic() + (60 if how == "kill" else 0)
    while (is_running(int(pid)) or Path(folder).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(int(pid))
    assert not Path(folder).exists()


def is_running(pid: int) -> bool:
    """Whether there is a process, other than one that waits to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("whole", "learned"),
    [
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.exhaustive),
        pytest.param(False, True, marks=pytest.mark.exhaustive),
    ],
)
def test_steps_are_uncompiled_and_then_compiled(
    whole: bool, learned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In double precision, whose rounding is too small to be amplified."""
    monkeypatch.setattr("nfn_optim.optimizer.optimizer.is_small", lambda _: whole)
    torch.manual_seed(0)
    first = (nn.Sequential(nn.Linear(150, 140), nn.Tanh(), nn.Linear(140, 2)) if not whole else mlp()).double()
    inputs = torch.randn(8, 150 if not whole else 3).double()
    found = []
    for how in (False, None):
        model = copy.deepcopy(first)
        optimizer = NFNOptimizer(model, rule=cached_rule() if learned else "adamw", compile=how)
        train(model, optimizer, 5, inputs)
        if how is None:
            assert not inductor.graph_count()
            background.wait()
        train(model, optimizer, 20, inputs)
        found.append(snapshot(optimizer))
    steps = optimizer._compiled_steps
    assert all(callable(run) for run in steps._runs.values()) if whole else inductor.graph_count() > 0
    assert len(steps._runs if whole else steps._passes) == 1 + learned
    assert all(word in line for line, word in zip(said(caplog), ("background", "step 6"), strict=True))
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-6, atol=1e-9)
