"""Steps of a small network, and graphs of whole steps that run as they are recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rules import random_rule
from torch import Tensor, nn

from nfn_optim import NFNOptimizer
from nfn_optim.engine.inductor import Graph
from nfn_optim.optimizer import compiled_step
from nfn_optim.optimizer.state import entries_of
from nfn_optim.rule import UpdateRule


def cached_rule() -> UpdateRule:
    """One of which nothing is zero: orthogonal directions, step-size adaptation, a refresh at every second step."""
    return random_rule(rank=3, adapt_rate=1.0, refresh_every=2, seed=1)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 2))


def give_gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Those of a loss on the output of a network."""
    for p in model.parameters():
        p.grad = None
    torch.autograd.backward((model(*inputs).double() - 1).square().mean())


def snapshot(optimizer: NFNOptimizer) -> list[Tensor]:
    """Every parameter and its state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [x.detach().clone() for p in params for x in (p, *entries_of(optimizer.state[p]).values())]


def record(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let graphs run as they are traced, since compiling takes long; returns the numbers of inputs of graphs."""
    from torch.fx.experimental.proxy_tensor import make_fx

    found: list[int] = []

    def compile_graph(function: Callable[..., Any], args: list[Any]) -> Graph:
        found.append(len(args))
        return Graph(make_fx(function)(*args), tuple, {}, ())

    monkeypatch.setattr(compiled_step, "compile_graph", compile_graph)
    return found
