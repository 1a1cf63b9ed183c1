"""A tiny network, its training, and bit-exact comparison of two trainings."""

from __future__ import annotations

import io
from typing import Any

import torch
from rules import random_rule
from torch import Tensor, nn

from nfn_optim.optimizer.state import entries_of
from nfn_optim.symmetry import Symmetry

Snapshot = tuple[list[Tensor], list[dict[str, Tensor]]]
X = torch.linspace(-1, 1, 20).reshape(5, 4)


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """One hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


RULE = random_rule()
"""A rule of which nothing is zero."""


def backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Compute gradients."""
    optimizer.zero_grad()
    model(X.to(next(model.parameters()).dtype)).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Train for some steps."""
    for _ in range(steps):
        backward(model, optimizer)
        optimizer.step()


def grad_of(p: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    assert p.grad is not None
    return p.grad


def snapshot(optimizer: torch.optim.Optimizer) -> Snapshot:
    """Copies of all parameters and their state, hidden entries included."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [{key: value.clone() for key, value in entries_of(optimizer.state.get(p, {})).items()} for p in params]
    return [p.detach().clone() for p in params], state


def same(one: Snapshot, other: Snapshot) -> bool:
    """Whether two snapshots have equal bits and dtypes."""
    pairs = [*zip(one[0], other[0], strict=True)]
    for a, b in zip(one[1], other[1], strict=True):
        if a.keys() != b.keys():
            return False
        pairs += [(a[key], b[key]) for key in a]
    return all(a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in pairs)


def bits(value: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def symmetry_of_net(hidden: int = 6) -> Symmetry:
    """The symmetry of `net`, written by hand."""
    dims = {"0.weight": ("h", "in"), "0.bias": ("h",), "2.weight": ("out", "h"), "2.bias": ("out",)}
    return Symmetry(dims, {"h": hidden, "in": 4, "out": 3}, frozenset({"in", "out"}))


def through_file(value: Any) -> Any:
    """A value saved and loaded as a checkpoint, without pickle."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
