"""The objective: one number per member for the performance of the rule in a window.

    log      log(LOG_EPS + mean over steps of loss)    halving the loss counts the same on every task and at every age
    mean     mean over steps of loss / first loss      early, coarse progress dominates
    last     loss after the last step / first loss     only the end of the window counts

The mean inside the logarithm removes the noise of single batches, which the logarithm would reward otherwise. Below
`LOG_EPS` improvement no longer counts; above `divergence_threshold` losses are clamped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LOG_EPS = 1e-3  # nats


@dataclass(frozen=True)
class Objective:
    """The meta-training objective, which is minimised.

    Args:
        measure: Statistic of the losses of a window: "log" of the mean, "mean" or "last", the latter two over the
            first loss of the inner run.
        averaged_fraction: Weight of the objective at the mean of the window's parameters, 0 to 1. Noise of single
            steps averages out there, so that stopping to move does not pay.
        tail_fraction: Fraction of the steps, the last ones, that count; above 0, at most 1.
        held_out: Whether losses are measured on data held out from inner training, instead of the training batches.

    Raises:
        ValueError: An unknown measure, or a fraction out of range.
    """

    measure: Literal["log", "mean", "last"] = "log"
    averaged_fraction: float = 0.0
    tail_fraction: float = 1.0
    held_out: bool = False

    def __post_init__(self) -> None:
        if self.measure not in ("log", "mean", "last"):
            raise ValueError(f"expected the measure 'log', 'mean' or 'last', found {self.measure!r}")
        if not 0 <= self.averaged_fraction <= 1:
            raise ValueError(f"expected a fraction between 0 and 1, found averaged_fraction={self.averaged_fraction}")
        if not 0 < self.tail_fraction <= 1:
            raise ValueError(f"expected a fraction above 0, at most 1, found tail_fraction={self.tail_fraction}")

    def __call__(self, losses: Tensor, first_loss: Tensor) -> Tensor:
        """The objective of every member.

        Args:
            losses: `(steps, members)`, in the order of the steps; those that are not finite are clamped too.
            first_loss: `(members,)`, before the first step of the inner run.

        Returns:
            `(members,)`: nats of loss ratio for "log", else losses over the first loss.
        """
        losses = clamp_losses(losses[-math.ceil(self.tail_fraction * len(losses)) :], first_loss)
        if self.measure == "log":
            return torch.log(losses.mean(0) + LOG_EPS)
        return (losses[-1] if self.measure == "last" else losses.mean(0)) / (first_loss + LOG_EPS)


def divergence_threshold(first_loss: Tensor) -> Tensor:
    """The loss above which an inner run has diverged: twice the first loss plus one. `(members,)`."""
    return 2 * first_loss + 1


def clamp_losses(losses: Tensor, first_loss: Tensor) -> Tensor:
    """Losses `(steps, members)` clamped to the divergence threshold, those that are not finite included."""
    return torch.minimum(torch.nan_to_num(losses, nan=torch.inf), divergence_threshold(first_loss))
