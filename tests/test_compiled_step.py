"""Whole steps, traced and compiled, equal eager ones; and which are compiled, when, and how often."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compiler import compiler
from recording import cached_rule, give_gradients, mlp, record, snapshot
from rules import random_rule
from scalar_recorder import ScalarRecorder
from torch import nn
from zoo import BY_NAME

from nfn_optim import NFNOptimizer, watch
from nfn_optim.engine import inductor
from nfn_optim.optimizer import compiled_step
from nfn_optim.optimizer.compiled_step import is_small


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """See `record`."""
    return record(monkeypatch)


MIXED = ("attention", "reused", "depthwise_separable", "gru_both_ways", "group_norm", "tied_autoencoder")


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        *(pytest.param("cached", name, marks=pytest.mark.slow) for name in MIXED),
        pytest.param("default", "residual_cnn", marks=pytest.mark.slow),
        pytest.param("rounded", "reused", marks=pytest.mark.slow),
        ("adamw", "attention"),
    ],
)
def test_what_is_recorded_is_the_step(rule: str, name: str, recorded: list[int]) -> None:
    """To the last bit, where numbers are the same in all precisions, in at most two graphs."""
    network = BY_NAME[name]
    used = cached_rule() if rule in ("cached", "rounded") else rule
    state_dtype = torch.bfloat16 if rule == "rounded" else None
    found = []
    for how in (False, True):
        torch.manual_seed(0)
        model, inputs = network.module(), network.inputs()
        numbers = {"lr": 2**-9, "weight_decay": 0.125, "total_steps": 20}
        optimizer = NFNOptimizer(model, **numbers, rule=used, state_dtype=state_dtype, compile=how)
        for _ in range(7):
            give_gradients(model, inputs)
            optimizer.step()
        found.append(snapshot(optimizer))
    assert len(recorded) == (1 if rule == "adamw" else 2)
    for eager, graph in zip(*found, strict=True):
        assert torch.equal(eager, graph)


@pytest.mark.exhaustive
@pytest.mark.parametrize("horizon_known", [False, True])
def test_numbers_change_without_another_graph(horizon_known: bool, recorded: list[int]) -> None:
    """Two groups, rates that a schedule moves from zero, weight decay and theta; a step at rate 0 is none."""
    found = []
    rule = cached_rule()
    for how in (False, True):
        model = mlp()
        first, *others = model.parameters()
        groups: list[dict[str, Any]] = [{"params": [first], "lr": 1e-2}, {"params": others, "weight_decay": 0.1}]
        torch.manual_seed(1)
        mine = copy.deepcopy(rule)
        x = torch.randn(8, 3)
        optimizer = NFNOptimizer(groups, model=model, rule=mine, total_steps=30 if horizon_known else None, compile=how)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 10)
        for step in range(12):
            before = snapshot(optimizer) if step else [p.clone() for p in model.parameters()]
            give_gradients(model, (x,))
            optimizer.step()
            if step == 0:
                assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
            schedule.step()
            optimizer.param_groups[1]["weight_decay"] *= 0.9
            with torch.no_grad():
                next(mine.parameters()).mul_(1.01)
        found.append(snapshot(optimizer))
    assert len(recorded) == 2
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_rate_may_be_a_tensor(recorded: list[int]) -> None:
    found = []
    for lr in (1e-2, torch.tensor(1e-2), torch.tensor([1e-2])):
        model = mlp()
        optimizer = NFNOptimizer(model, lr=lr, rule="adamw", compile=True)
        for _ in range(3):
            give_gradients(model, (torch.ones(4, 3),))
            optimizer.step()
        found.append(snapshot(optimizer))
    assert len(recorded) == 3
    for others in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], others, strict=True))


@pytest.mark.exhaustive
def test_kinds_of_steps_are_bounded(recorded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients for other parameters at every step: the first kinds are compiled, all steps are right."""
    monkeypatch.setattr(compiled_step, "MAX_GRAPHS", 3)
    found = []
    for how in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(3, 2) for _ in range(5)])
        optimizer = NFNOptimizer(model, rule=cached_rule(), compile=how)
        x = torch.randn(5, 3)
        for step in range(10):
            optimizer.zero_grad()
            torch.autograd.backward(model[step // 2](x).square().mean())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # no symmetry can be traced
                optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    assert len(recorded) == 3
    assert all(torch.equal(eager, graph) for eager, graph in zip(*found, strict=True))


def test_gradients_that_lie_strangely_in_memory(recorded: list[int]) -> None:
    """Expanded ones are not for a graph; transposed ones are, for one of their own."""
    found = []
    for how in (False, True):
        model = nn.Linear(3, 3, bias=False)
        nn.init.eye_(model.weight)
        optimizer = NFNOptimizer(model, rule="adamw", compile=how)
        for step in range(6):
            plain = torch.arange(9.0).reshape(3, 3) + step
            model.weight.grad = (plain, plain.T, plain[:1].expand(3, 3))[step % 3]
            optimizer.step()
        found.append(snapshot(optimizer))
    assert len(recorded) == 2
    assert all(torch.equal(eager, graph) for eager, graph in zip(*found, strict=True))


def test_watching_does_not_change_how_steps_are_run(recorded: list[int]) -> None:
    """A watched step is compiled like any other, and its gains are those of an uncompiled one."""
    gains = []
    for compiled in (False, True):
        model, recorder = mlp(), ScalarRecorder()
        optimizer = NFNOptimizer(model, rule=random_rule(), compile=compiled)
        with watch(optimizer, recorder, every=1):
            for _ in range(3):
                give_gradients(model, (torch.ones(4, 3),))
                optimizer.step()
        gains.append([recorder.scalars["optimizer.gain/all"], optimizer.skipped_steps])
    assert len(recorded) == 1
    assert gains[0] == gains[1]
    assert len(gains[0][0]) == 3


@pytest.mark.exhaustive
def test_copies_and_files_carry_no_graphs(recorded: list[int], tmp_path: Path) -> None:
    """An optimizer with graphs can be copied and pickled, and the copy goes on in the same way."""
    model = mlp()
    optimizer = NFNOptimizer(model, rule=random_rule(refresh_every=2), compile=True)
    for _ in range(3):
        give_gradients(model, (torch.ones(4, 3),))
        optimizer.step()
    file = tmp_path / "both"
    file.write_bytes(pickle.dumps((model, optimizer)))
    for others in (copy.deepcopy((model, optimizer)), pickle.loads(file.read_bytes())):
        other, its = others
        for _ in range(2):
            give_gradients(other, (torch.ones(4, 3),))
            its.step()
        assert its.param_groups[0]["steps_taken"] == 5
    assert len(recorded) == 1 + 2 + 2  # the first steps always refresh


def test_large_networks_are_not_compiled_whole(recorded: list[int]) -> None:
    assert is_small({"w": torch.empty(compiled_step.MAX_WEIGHTS)})
    assert not is_small({"w": torch.empty(compiled_step.MAX_WEIGHTS), "b": torch.empty(1)})
    assert not is_small({str(k): torch.empty(1) for k in range(compiled_step.MAX_TENSORS + 1)})
    model = nn.ParameterList([torch.ones(1) for _ in range(compiled_step.MAX_TENSORS + 1)])
    optimizer = NFNOptimizer(model, rule="adamw", compile=True)
    for p in model:
        p.grad = torch.ones(1)
    optimizer.step()
    assert not recorded


# ------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.exhaustive
@compiler
@pytest.mark.timeout(900)
@pytest.mark.parametrize("what", ["random rule", "default rule"])
def test_compiled_training_is_training(what: str) -> None:
    """In double precision, whose rounding is too small to be amplified.

    200 steps of a kernel, a matrix and vectors; and steps of the default rule with larger matrices, which meet faults
    of the compiler (`nfn_optim.engine.inductor_faults`).
    """
    network, found = BY_NAME["conv3d"], []
    used = cached_rule() if what == "random rule" else "default"
    for how in (False, True):
        torch.manual_seed(0)
        model, inputs = network.module().double(), network.inputs()
        if what == "default rule":
            layers = nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
            model, inputs = nn.Sequential(*layers).double(), (torch.randn(8, 3),)
        inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        optimizer = NFNOptimizer(model, rule=used, compile=how)
        for _ in range(200 if what == "random rule" else 20):
            give_gradients(model, inputs)
            optimizer.step()
        found.append(snapshot(optimizer))
        assert not inductor.has_failed()
        assert optimizer.fallbacks == optimizer.skipped_steps == 0
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-7)


@pytest.fixture
def unfailing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compilation is as if it had never been tried."""
    monkeypatch.setattr(inductor, "_failures", [])
    yield


@pytest.mark.usefixtures("unfailing")
def test_a_compiler_that_fails_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("torch._inductor.compile", refuse)
    found = []
    for how in (False, True):
        model = mlp()
        optimizer = NFNOptimizer(model, rule="adamw", compile=how)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                give_gradients(model, (torch.ones(4, 3),))
                optimizer.step()
        assert [("no compiler here" in str(w.message), "compile=False" in str(w.message)) for w in caught] == (
            [(True, True)] if how else []
        )
        found.append(snapshot(optimizer))
    assert all(torch.equal(eager, graph) for eager, graph in zip(*found, strict=True))
