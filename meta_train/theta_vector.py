"""Theta as one vector, which estimators perturb, differentiate and average, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def flatten(rule: nn.Module) -> Tensor:
    """The parameters of a rule, flattened and concatenated, `(size,)`; detached."""
    return torch.cat([p.detach().flatten() for p in rule.parameters()])


def trainable_mask(rule: nn.Module) -> Tensor:
    """1 for every entry of `flatten` that is trained, else 0, `(size,)`."""
    return torch.cat([torch.full_like(p, float(p.requires_grad)).detach().flatten() for p in rule.parameters()])


def train_only(rule: nn.Module, prefixes: Sequence[str]) -> None:
    """Require gradients only of the parameters whose names start with one of some prefixes.

    Raises:
        ValueError: No name starts with one of the prefixes.
    """
    names = [name for name, _ in rule.named_parameters()]
    if unknown := [x for x in prefixes if not any(name.startswith(x) for name in names)]:
        raise ValueError(f"expected prefixes of the rule's parameter names, {names}, found {unknown}")
    for name, p in rule.named_parameters():
        p.requires_grad_(name.startswith(tuple(prefixes)))


def unflatten(rule: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """Split vectors into parameters.

    Args:
        rule: The rule whose parameters they are.
        rows: `(*batch, size)`.

    Returns:
        Name -> views of `rows`, `(*batch, *shape)`.
    """
    parts = torch.split_with_sizes(rows, [p.numel() for p in rule.parameters()], -1)
    named = zip(rule.named_parameters(), parts, strict=True)
    return {name: part.reshape((*rows.shape[:-1], *p.shape)) for (name, p), part in named}
