"""The learning rate over time: factors that multiply `lr`, for a known and an unknown horizon."""

from __future__ import annotations

import torch
from torch import Tensor

INVERSE_TIME_AGE = 100.0  # steps after which the inverse-time factor begins to fall
MIN_COOLDOWN = 0.01  # base of the power at and after the end of the horizon


def inverse_time_factor(steps: Tensor, power: float) -> Tensor:
    """Factor where the horizon is unknown, from 1 downwards; `steps` taken, this one included."""
    return (1 + (steps - 1) / INVERSE_TIME_AGE) ** -power


def cooldown_factor(steps: Tensor, total: Tensor, cooldown: float, power: float) -> Tensor:
    """Factor where the horizon is known.

    Args:
        steps: Steps taken, this one included.
        total: The horizon in steps.
        cooldown: Fraction of the horizon, at its end, over which the rate falls; 0 to 1.
        power: Of the fall; 1 is linear.
    """
    if not cooldown:
        return torch.ones_like(steps)
    remaining = (1 - (steps - 1) / total.clamp(min=1)) / cooldown
    return remaining.clamp(MIN_COOLDOWN, 1.0) ** power
