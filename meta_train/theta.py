"""Theta as one vector, and back: what estimators perturb, differentiate and average."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def flatten(rule: nn.Module) -> Tensor:
    """The parameters of a rule one after the other, `(size,)`, without history."""
    return torch.cat([p.detach().flatten() for p in rule.parameters()])


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
