"""Scores of predictions, and bootstrap intervals over networks.

References:
    Predicting Neural Network Accuracy from Weights (Unterthiner et al., 2020), Sec. 5 (Kendall's tau), arXiv:2002.11448
    An Introduction to the Bootstrap (Efron and Tibshirani, 1993), Sec. 13.3 (percentiles)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def kendall_tau(predicted: Tensor, true: Tensor) -> float:
    """Kendall's tau-b: agreement of two orders, from -1 to 1; ties count in neither. NaN if all are tied.

    Args:
        predicted: `(N,)`.
        true: `(N,)`.

    Raises:
        ValueError: The lengths differ.

    Example:
        >>> round(kendall_tau(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])), 3)
        0.667
    """
    if predicted.shape != true.shape or predicted.dim() != 1:
        raise ValueError(f"expected two vectors of one length, found {tuple(predicted.shape)}, {tuple(true.shape)}")
    agreement, untied = 0.0, [0.0, 0.0]
    for rows in torch.arange(len(true)).split(1024):
        first, second = ((x[rows, None] - x[None]).sign() for x in (predicted, true))
        agreement += float((first * second).sum())
        untied = [total + float(s.abs().sum()) for total, s in zip(untied, (first, second), strict=True)]
    product = untied[0] * untied[1]
    return agreement / product**0.5 if product else float("nan")


def interval(
    score: Callable[[Tensor], float], count: int, *, groups: Tensor | None = None, resamples: int = 200, seed: int = 0
) -> tuple[float, float]:
    """The central 95 % of a score over resampled networks.

    Args:
        score: Of the networks at indices `(n,)`, which may repeat.
        count: Number of networks.
        groups: `(count,)`; networks of one group (a run) are drawn together. Default each by itself.
        resamples: Number of bootstrap samples.
        seed: Of the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(count) if groups is None else groups
    names, inverse = groups.unique(return_inverse=True)
    members = inverse.argsort(stable=True).split(inverse.bincount().tolist())
    values = []
    for _ in range(resamples):
        drawn = torch.randint(len(names), (len(names),), generator=generator).tolist()
        values.append(score(torch.cat([members[n] for n in drawn])))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)
