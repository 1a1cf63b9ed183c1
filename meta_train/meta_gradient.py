"""The gradient of the objective with respect to theta.

Truncated backpropagation through time: the gradient through one window of the unroll, as if the carry at its start did
not depend on theta. It is exact where the window is the horizon; otherwise it is biased towards what pays within a
window.

References:
    Understanding Short-Horizon Bias in Stochastic Meta-Optimization (Wu et al., 2018), arXiv:1803.02021
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from meta_train.objective import log_mean_loss
from meta_train.tasks import Task
from meta_train.unroll import Carry, losses_of, unroll
from nfn_optim.rule import UpdateRule

AVERAGE_BATCHES = 4  # on which the loss of averaged parameters is measured


@dataclass(frozen=True)
class MetaGradient:
    """One estimate.

    Attributes:
        grads: One tensor for each of `rule.parameters()`.
        objective: The objective, 0-d.
        losses: `(window, members)`.
        carry: Where inner training stands now, without history.
    """

    grads: tuple[Tensor, ...]
    objective: Tensor
    losses: Tensor
    carry: Carry

    @property
    def finite(self) -> bool:
        """Whether it can be used."""
        return all(bool(torch.isfinite(g).all()) for g in (*self.grads, self.objective))


def truncated_backprop(
    rule: UpdateRule,
    task: Task,
    carry: Carry,
    window: int,
    generator: torch.Generator,
    *,
    second_order: bool = True,
    averaged: float = 0.0,
) -> MetaGradient:
    """Differentiate one window.

    Args:
        rule: The update rule.
        task: What is trained.
        carry: Where inner training stands.
        window: Steps differentiated at once.
        generator: For the batches.
        second_order: Whether the inner gradient is differentiated too.
        averaged: Share of the objective that is measured at the average of the window's parameters, 0 to 1. There the
            noise of single steps does not count, so that it does not pay to stop moving.
    """
    losses, end, mean = unroll(rule, task, carry, window, generator, second_order=second_order)
    objective = log_mean_loss(losses)
    if averaged > 0:
        members = len(carry.total_steps)
        at_mean = [losses_of(task, mean, carry.member, task.batch(members, generator)) for _ in range(AVERAGE_BATCHES)]
        objective = (1 - averaged) * objective + averaged * log_mean_loss(torch.stack(at_mean))
    theta = list(rule.parameters())
    found = torch.autograd.grad(objective, theta, allow_unused=True)
    grads = tuple(torch.zeros_like(p) if g is None else g for p, g in zip(theta, found, strict=True))
    return MetaGradient(grads, objective.detach(), losses.detach(), end.detach())
