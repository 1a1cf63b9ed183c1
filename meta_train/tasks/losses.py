"""Loss functions; all are twice differentiable under `vmap`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy, in nats; its second derivative is far faster than that of `F.cross_entropy`.

    Args:
        output: Logits `(..., classes)`.
        y: Classes `(...)`, int64.

    Returns:
        0-d.

    Example:
        >>> round(cross_entropy(torch.zeros(3, 10), torch.tensor([1, 2, 3])).exp().item(), 4)
        10.0
    """
    target_logit = (output * F.one_hot(y, output.shape[-1])).sum(-1)  # (...)
    return (torch.logsumexp(output, -1) - target_logit).mean()


def smoothed(output: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy with label smoothing of 0.1, in nats; arguments of `cross_entropy`."""
    uniform = (torch.logsumexp(output, -1) - output.mean(-1)).mean()
    return 0.9 * cross_entropy(output, y) + 0.1 * uniform


def one_hot_error(output: Tensor, y: Tensor) -> Tensor:
    """Mean over examples of half the squared distance to the one-hot target; arguments of `cross_entropy`."""
    return (output - F.one_hot(y, output.shape[-1])).square().sum(-1).mean() / 2


def squared_error(output: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over all entries, 0-d.

    Args:
        output: Any shape.
        y: The same shape.
    """
    return (output - y).square().mean()


def huber(output: Tensor, y: Tensor) -> Tensor:
    """Mean of sqrt(1 + error^2) - 1, quadratic for small errors and linear for large ones, 0-d.

    Args:
        output: Any shape.
        y: The same shape.
    """
    return (torch.sqrt(1 + (output - y).square()) - 1).mean()


CLASSIFICATION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    loss.__name__: loss for loss in (cross_entropy, smoothed, one_hot_error)
}
REGRESSION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {loss.__name__: loss for loss in (squared_error, huber)}
LOSSES = CLASSIFICATION | REGRESSION
