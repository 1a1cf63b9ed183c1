"""One number for each member that says how good the rule was in a window.

    log      log(FLOOR + mean over steps of loss)      a halving counts the same on every task and at every age
    mean     mean over steps of loss / first loss      early and coarse progress counts most
    last     loss after the last step / first loss     nothing but where the window ends

The mean inside the logarithm takes the noise of single batches out before the logarithm would reward it; `FLOOR` is
where improvement stops to count, and `worst` is where deterioration does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FLOOR = 1e-3  # nats


@dataclass(frozen=True)
class Objective:
    """What meta-training minimises.

    Args:
        measure: "log", "mean" or "last".
        averaged: Share that is measured at the average of the window's parameters, 0 to 1. There the noise of single
            steps does not count, so that it does not pay to stop moving.
        tail: Share of the steps, the last ones, that count; above 0, at most 1.
        held_out: Whether losses are those on the data held out for meta-validation, instead of training batches.

    Raises:
        ValueError: An unknown measure, or a share out of range.
    """

    measure: Literal["log", "mean", "last"] = "log"
    averaged: float = 0.0
    tail: float = 1.0
    held_out: bool = False

    def __post_init__(self) -> None:
        if self.measure not in ("log", "mean", "last"):
            raise ValueError(f"expected the measure 'log', 'mean' or 'last', found {self.measure!r}")
        if not 0 <= self.averaged <= 1:
            raise ValueError(f"expected a share between 0 and 1, found averaged={self.averaged}")
        if not 0 < self.tail <= 1:
            raise ValueError(f"expected a share above 0, at most 1, found tail={self.tail}")

    def __call__(self, losses: Tensor, first_loss: Tensor) -> Tensor:
        """The objective of every member.

        Args:
            losses: `(steps, members)`, in the order of the steps; those that are not finite count as the worst.
            first_loss: `(members,)`, before the first step of the inner run.

        Returns:
            `(members,)`: nats of loss ratio for "log", else losses over the first loss.
        """
        losses = bounded(losses[-math.ceil(self.tail * len(losses)) :], first_loss)
        if self.measure == "log":
            return torch.log(losses.mean(0) + FLOOR)
        return (losses[-1] if self.measure == "last" else losses.mean(0)) / (first_loss + FLOOR)


def worst(first_loss: Tensor) -> Tensor:
    """The loss above which an inner run has diverged: twice where it began, and one. `(members,)`."""
    return 2 * first_loss + 1


def bounded(losses: Tensor, first_loss: Tensor) -> Tensor:
    """Losses `(steps, members)` of which none is above the worst, those that are not finite included."""
    return torch.minimum(torch.nan_to_num(losses, nan=torch.inf), worst(first_loss))
