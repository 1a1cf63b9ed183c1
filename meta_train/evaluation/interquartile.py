"""Means over tasks, interquartile ones by default, with bootstrap confidence intervals.

References:
    Deep Reinforcement Learning at the Edge of the Statistical Precipice (Agarwal et al., 2021), Sec. 4,
    arXiv:2108.13264
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float


def interquartile_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over the last dimension without its lowest and its highest quarter (rounded down). `(..., n) -> (...)`.

    Example:
        >>> float(interquartile_mean(np.array([100.0, 1.0, 2.0, 3.0, -50.0, 4.0, 5.0, 0.0])))
        2.5
    """
    n = values.shape[-1]
    cut = n // 4
    middle: NDArray[np.float64] = np.sort(values, -1)[..., cut : n - cut].mean(-1)
    return middle


Mean = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""A mean over the last dimension, `(..., n) -> (...)`."""


def estimate(scores: NDArray[np.float64], mean: Mean = interquartile_mean) -> Estimate:
    """A mean over tasks of the median over seeds, with a bootstrap interval.

    Tasks and the seeds of each are resampled with replacement: the interval covers the choice of tasks.

    Args:
        scores: `(tasks, seeds)`.
        mean: Over tasks.
    """
    tasks, seeds = scores.shape
    generator = np.random.default_rng(0)
    task = generator.integers(tasks, size=(RESAMPLES, tasks, 1))
    seed = generator.integers(seeds, size=(RESAMPLES, tasks, seeds))
    resampled = mean(np.median(scores[task, seed], -1))  # (RESAMPLES,)
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (outside, 1 - outside))
    return Estimate(float(mean(np.median(scores, -1))), float(low), float(high))
