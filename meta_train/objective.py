"""The losses of a window, and one number that says how good the rule was.

    objective = mean over members of log(FLOOR + mean over the window's steps of loss)

The logarithm makes a halving of the loss worth the same on every task and at every age; the mean inside it takes the
noise of single batches out before the logarithm would reward it. `FLOOR` is where improvement stops to count.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-3  # nats


def log_mean_loss(losses: Tensor) -> Tensor:
    """The objective.

    Args:
        losses: `(steps, members)`, training losses that depend on theta.

    Returns:
        0-d, in nats of loss ratio.
    """
    return torch.log(losses.mean(0) + FLOOR).mean()
