"""Hyperparameters as the rule wants them: a number for every tensor, and how the learning rate goes with time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Hyper = float | Tensor | Mapping[str, float | Tensor]
"""One value for all parameters, or one for each by name."""

FADING_AGE = 100.0  # steps after which fading begins to be felt
COOLEST = 0.01  # what is left of the learning rate behind the end of the horizon


def by_tensor(hyper: Hyper, names: Sequence[str], steps: Tensor) -> Tensor | float:
    """A hyperparameter as a number or `(*batch or none, T or 1)`, to go with steps `(*batch, T)`."""
    if isinstance(hyper, Mapping):
        ones = torch.ones_like(steps[..., :1])
        return torch.cat([by_tensor(hyper[n], names, steps) * ones for n in names], -1)
    if isinstance(hyper, Tensor):
        hyper = hyper.to(steps)
        return hyper.unsqueeze(-1) if hyper.dim() == steps.dim() - 1 > 0 else hyper.reshape((1,))
    return hyper


def is_zero(hyper: Hyper, name: str) -> bool:
    """Whether a hyperparameter is the number 0 for a tensor."""
    value = hyper[name] if isinstance(hyper, Mapping) else hyper
    return not isinstance(value, Tensor) and value == 0


def horizon_of(total_steps: Tensor | float, steps: Tensor) -> Tensor:
    """The horizon, `(*batch or none, 1)`; a number gets to the device without being waited for."""
    if isinstance(total_steps, Tensor):
        return total_steps.to(steps).unsqueeze(-1)
    return steps.new_full((1,), float(total_steps))


def faded(steps: Tensor, fading: float) -> Tensor:
    """What is left of the learning rate where the horizon is not known, from 1 down; steps taken, this one included."""
    return (1 + (steps - 1) / FADING_AGE) ** -fading


def cooled(steps: Tensor, total: Tensor, cooldown: float, bend: float) -> Tensor:
    """What is left of the learning rate on the way to a known horizon.

    Args:
        steps: Steps taken, this one included.
        total: The horizon.
        cooldown: The last part of it over which the rate falls, 0 to 1.
        bend: The power with which it does.
    """
    if not cooldown:
        return torch.ones_like(steps)
    left = (1 - (steps - 1) / total.clamp(min=1)) / cooldown
    return left.clamp(COOLEST, 1.0) ** bend
