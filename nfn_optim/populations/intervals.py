"""Scores of predictions, and bootstrap intervals over networks.

A bootstrap sample is a vector of weights, how often each network was drawn; scores take a batch of such vectors, so
that a thousand samples cost one matrix product and methods are compared on the same samples.

References:
    Predicting Neural Network Accuracy from Weights (Unterthiner et al., 2020), Sec. 5 (Kendall's tau), arXiv:2002.11448
    An Introduction to the Bootstrap (Efron and Tibshirani, 1993), Sec. 13.3 (percentiles)
"""

from __future__ import annotations

import torch
from torch import Tensor


def kendall_tau(predicted: Tensor, true: Tensor, weights: Tensor | None = None) -> Tensor:
    """Kendall's tau-b: agreement of two orders, from -1 to 1, corrected for ties; NaN if all are tied.

    Args:
        predicted: `(N,)`.
        true: `(N,)`.
        weights: `(R, N)`, how often each network counts; default once.

    Returns:
        `(R,)`, or a scalar without weights.

    Raises:
        ValueError: The lengths differ.

    Example:
        >>> round(kendall_tau(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])).item(), 3)
        0.667
    """
    if predicted.shape != true.shape or predicted.dim() != 1:
        raise ValueError(f"expected two vectors of one length, found {tuple(predicted.shape)}, {tuple(true.shape)}")
    first, second = ((x[:, None] - x[None]).sign() for x in (predicted.float(), true.float()))
    w = torch.ones(1, len(true)) if weights is None else weights
    agreement, one, other = (((w @ m) * w).sum(1) for m in (first * second, first.abs(), second.abs()))
    tau: Tensor = agreement / (one * other).sqrt()
    return tau[0] if weights is None else tau


def bootstrap_weights(groups: Tensor, resamples: int = 500, seed: int = 0) -> Tensor:
    """How often each network is drawn in bootstrap samples, `(resamples, N)`.

    Args:
        groups: `(N,)`; networks of one group (snapshots of a run) are drawn together.
        resamples: Number of samples.
        seed: Of the samples.
    """
    _, inverse = torch.unique(groups, return_inverse=True)
    count = int(inverse.max()) + 1
    drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(resamples, count).scatter_add_(1, drawn, torch.ones(resamples, count))
    return counts[:, inverse]


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Means of values `(N,)` under weights `(R, N)`: `(R,)`."""
    return (weights @ values.float()) / weights.sum(1)


def interval(samples: Tensor) -> tuple[float, float]:
    """The central 95 % of bootstrap values `(R,)`."""
    low, high = torch.nanquantile(samples.float(), torch.tensor([0.025, 0.975])).tolist()
    return low, high
