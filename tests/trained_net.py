"""A tiny network, how it is trained, and whether two trainings are the same to the last bit."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor, nn

from nfn_optim.rule import UpdateRule
from nfn_optim.symmetry import Symmetry

Snapshot = tuple[list[Tensor], list[dict[str, Tensor]]]
X = torch.linspace(-1, 1, 20).reshape(5, 4)


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """One hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def random_rule() -> UpdateRule:
    """A rule of which nothing is zero."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        rule = UpdateRule()
        for value in rule.parameters():
            value.add_(0.2 * torch.randn(value.shape))
    return rule


RULE = random_rule()


def backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fresh gradients."""
    optimizer.zero_grad()
    model(X.to(next(model.parameters()).dtype)).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Some steps."""
    for _ in range(steps):
        backward(model, optimizer)
        optimizer.step()


def grad_of(p: Tensor) -> Tensor:
    """The gradient that is there."""
    assert p.grad is not None
    return p.grad


def snapshot(optimizer: torch.optim.Optimizer) -> Snapshot:
    """Copies of all parameters and of their state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [{key: value.clone() for key, value in optimizer.state.get(p, {}).items()} for p in params]
    return [p.detach().clone() for p in params], state


def same(one: Snapshot, other: Snapshot) -> bool:
    """Bit-equal, of the same dtypes."""
    pairs = [*zip(one[0], other[0], strict=True)]
    for a, b in zip(one[1], other[1], strict=True):
        if a.keys() != b.keys():
            return False
        pairs += [(a[key], b[key]) for key in a]
    return all(a.dtype == b.dtype and torch.equal(bits(a), bits(b)) for a, b in pairs)


def bits(value: Tensor) -> Tensor:
    """Every bit of a tensor."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def symmetry_of_net(hidden: int = 6) -> Symmetry:
    """The symmetry of `net`, by hand."""
    dims = {"0.weight": ("h", "in"), "0.bias": ("h",), "2.weight": ("out", "h"), "2.bias": ("out",)}
    return Symmetry(dims, {"h": hidden, "in": 4, "out": 3}, frozenset({"in", "out"}))


def through_file(value: Any) -> Any:
    """Saved and loaded as a checkpoint is, without pickle."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
