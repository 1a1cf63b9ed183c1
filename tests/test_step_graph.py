"""Whole steps, recorded and compiled, are steps; and what is compiled, when, and how often."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from test_equivalence import random_rule
from test_kernel import ZOO, compiler
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from nfn_optim import NFNOptimizer
from nfn_optim.engine import inductor
from nfn_optim.engine.inductor import Graph
from nfn_optim.optimizer import compiled_step
from nfn_optim.optimizer.compiled_step import is_small
from nfn_optim.rule import RuleConfig, UpdateRule


def sparse_rule() -> UpdateRule:
    """One of which nothing is zero, with orthogonal directions and growth, whose neurons talk at every second step."""
    rule = UpdateRule(RuleConfig(rank=3, growth=1.0, talk_every=2))
    learned = dict(random_rule(rank=3).named_parameters())
    with torch.no_grad():
        for name, value in rule.named_parameters():
            value.copy_(learned.get(name, value))
    return rule


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 2))


def give_gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Those of a loss on the output of a network."""
    for p in model.parameters():
        p.grad = None
    torch.autograd.backward((model(*inputs).double() - 1).square().mean())


def snapshot(optimizer: NFNOptimizer) -> list[Tensor]:
    """Every parameter and all that is remembered of it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [x.detach().clone() for p in params for x in (p, *optimizer.state[p].values())]


def record(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let graphs run as they are recorded, since to compile takes long; numbers of inputs of those that are."""
    found: list[int] = []

    def graph_of(function: Callable[..., Any], args: list[Any]) -> Graph:
        found.append(len(args))
        return Graph(make_fx(function)(*args), tuple, {}, ())

    monkeypatch.setattr(compiled_step, "graph_of", graph_of)
    return found


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """See `record`."""
    return record(monkeypatch)


MIXED = (
    "attention",
    "residual_cnn",
    "reused",
    "depthwise_separable",
    "gru_both_ways",
    "group_norm",
    "tied_autoencoder",
)


@pytest.mark.parametrize(
    ("rule", "name"), [*product(["sparse"], MIXED), *product(["default", "adamw", "rounded"], MIXED[:2])]
)
def test_what_is_recorded_is_the_step(rule: str, name: str, recorded: list[int]) -> None:
    """To the last bit, where numbers are the same in all precisions, in at most two graphs."""
    network = ZOO[name]
    used = sparse_rule() if rule in ("sparse", "rounded") else rule
    kept_in = torch.bfloat16 if rule == "rounded" else None
    found = []
    for how in (False, True):
        torch.manual_seed(0)
        model, inputs = network.module(), network.inputs()
        numbers = {"lr": 2**-9, "weight_decay": 0.125, "total_steps": 20}
        optimizer = NFNOptimizer(model, **numbers, rule=used, state_dtype=kept_in, compile=how)
        for _ in range(7):
            give_gradients(model, inputs)
            optimizer.step()
        found.append(snapshot(optimizer))
    assert len(recorded) == (1 if rule == "adamw" else 2)
    for eager, graph in zip(*found, strict=True):
        assert torch.equal(eager, graph)


@pytest.mark.parametrize("told", [False, True])
def test_numbers_change_without_another_graph(told: bool, recorded: list[int]) -> None:
    """Two groups, rates that a schedule moves from zero, weight decay and theta; a step at rate 0 is none."""
    found = []
    rule = sparse_rule()
    for how in (False, True):
        model = mlp()
        first, *others = model.parameters()
        groups: list[dict[str, Any]] = [{"params": [first], "lr": 1e-2}, {"params": others, "weight_decay": 0.1}]
        torch.manual_seed(1)
        mine = copy.deepcopy(rule)
        x = torch.randn(8, 3)
        optimizer = NFNOptimizer(groups, model=model, rule=mine, total_steps=30 if told else None, compile=how)
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


def test_kinds_of_steps_are_bounded(recorded: list[int]) -> None:
    """Gradients for other parameters at every step: the first kinds are compiled, all steps are right."""
    found = []
    for how in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(3, 2) for _ in range(12)])
        optimizer = NFNOptimizer(model, rule=sparse_rule(), compile=how)
        x = torch.randn(5, 3)
        for step in range(24):
            optimizer.zero_grad()
            torch.autograd.backward(model[step // 2](x).square().mean())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # no symmetry can be traced
                optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    assert len(recorded) == compiled_step.MOST_GRAPHS
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


def test_who_listens_hears(recorded: list[int]) -> None:
    """A hook on what the neurons say is called at every step, compiled or not."""
    model, heard = mlp(), []
    optimizer = NFNOptimizer(model, rule=random_rule(), compile=True)
    handle = optimizer.rule.gains.register_forward_hook(lambda *_: heard.append(True))
    for _ in range(3):
        give_gradients(model, (torch.ones(4, 3),))
        optimizer.step()
    assert len(heard) == 3
    assert not recorded
    handle.remove()
    optimizer.step()
    assert len(recorded) == 1


def test_copies_and_files_carry_no_graphs(recorded: list[int], tmp_path: Path) -> None:
    """An optimizer with graphs can be copied and pickled, and the copy goes on in the same way."""
    model = mlp()
    optimizer = NFNOptimizer(model, rule=sparse_rule(), compile=True)
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
    assert len(recorded) == 1 + 2 + 2  # at the first steps the neurons always talk


def test_large_networks_are_not_compiled_whole(recorded: list[int]) -> None:
    assert is_small({"w": torch.empty(compiled_step.MOST_WEIGHTS)})
    assert not is_small({"w": torch.empty(compiled_step.MOST_WEIGHTS), "b": torch.empty(1)})
    assert not is_small({str(k): torch.empty(1) for k in range(compiled_step.MOST_TENSORS + 1)})
    model = nn.ParameterList([torch.ones(1) for _ in range(compiled_step.MOST_TENSORS + 1)])
    optimizer = NFNOptimizer(model, rule="adamw", compile=True)
    for p in model:
        p.grad = torch.ones(1)
    optimizer.step()
    assert not recorded


# ------------------------------------------------------------------------------------------------------------- compiled


@compiler
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["attention", "residual_cnn"])
def test_compiled_training_is_training(name: str) -> None:
    """200 steps in double precision, where rounding is far too small to be amplified into a difference."""
    network = ZOO[name]
    found = []
    for how in (False, True):
        torch.manual_seed(0)
        model = network.module().double()
        inputs = tuple(x.double() if x.is_floating_point() else x for x in network.inputs())
        optimizer = NFNOptimizer(model, rule=sparse_rule(), compile=how)
        for _ in range(200):
            give_gradients(model, inputs)
            optimizer.step()
        found.append(snapshot(optimizer))
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
