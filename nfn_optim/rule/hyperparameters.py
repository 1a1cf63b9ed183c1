"""Hyperparameters of a step: one value for all parameters, or one for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Hyper = float | Tensor | Mapping[str, float | Tensor]
"""One value for all parameters, or one for each by name."""


def by_tensor(hyper: Hyper, names: Sequence[str], steps: Tensor) -> Tensor | float:
    """A hyperparameter as a number or `(*batch or none, T or 1)`, broadcastable to steps `(*batch, T)`."""
    if isinstance(hyper, Mapping):
        ones = torch.ones_like(steps[..., :1])
        return torch.cat([by_tensor(hyper[n], names, steps) * ones for n in names], -1)
    if isinstance(hyper, Tensor):
        hyper = hyper.to(steps)
        return hyper.unsqueeze(-1) if hyper.dim() == steps.dim() - 1 > 0 else hyper.reshape((1,))
    return hyper


def is_zero(hyper: Hyper, name: str) -> bool:
    """Whether a hyperparameter of a tensor is the number 0 (not a tensor, which would have to be read)."""
    value = hyper[name] if isinstance(hyper, Mapping) else hyper
    return not isinstance(value, Tensor) and value == 0


def horizon_of(total_steps: Tensor | float, steps: Tensor) -> Tensor:
    """The horizon, `(*batch or none, 1)`, on the device of `steps`; a number is copied without synchronisation."""
    if isinstance(total_steps, Tensor):
        return total_steps.to(steps).unsqueeze(-1)
    return steps.new_full((1,), float(total_steps))
