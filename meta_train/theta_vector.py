"""Theta as one vector, and back: what estimators perturb, differentiate and average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def flatten(rule: nn.Module) -> Tensor:
    """The parameters of a rule one after the other, `(size,)`, without history."""
    return torch.cat([p.detach().flatten() for p in rule.parameters()])


def trained(rule: nn.Module) -> Tensor:
    """Which of the numbers of `flatten` are trained: 1 or 0 for each, `(size,)`."""
    return torch.cat([torch.full_like(p, float(p.requires_grad)).detach().flatten() for p in rule.parameters()])


def train_only(rule: nn.Module, prefixes: Sequence[str]) -> None:
    """Let only the parameters be trained whose names begin with one of some prefixes.

    Raises:
        ValueError: A prefix that no name begins with.
    """
    names = [name for name, _ in rule.named_parameters()]
    if unknown := [x for x in prefixes if not any(name.startswith(x) for name in names)]:
        raise ValueError(f"expected beginnings of names of the rule's parameters, {names}, found {unknown}")
    for name, p in rule.named_parameters():
        p.requires_grad_(name.startswith(tuple(prefixes)))


def unflatten(rule: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """Cut vectors into parameters.

    Args:
        rule: The rule whose parameters they are.
        rows: `(*batch, size)`.

    Returns:
        Name -> views of `rows`, `(*batch, *shape)`.
    """
    parts = torch.split_with_sizes(rows, [p.numel() for p in rule.parameters()], -1)
    named = zip(rule.named_parameters(), parts, strict=True)
    return {name: part.reshape((*rows.shape[:-1], *p.shape)) for (name, p), part in named}
