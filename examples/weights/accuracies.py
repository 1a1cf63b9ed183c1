"""Accuracies of single networks or images as text, with bootstrap intervals."""

from __future__ import annotations

from torch import Tensor

from nfn_optim.populations import interval, weighted_mean


def cells_of(right: Tensor, weights: Tensor) -> tuple[str, str]:
    """Mean in percent and its interval. Accuracies `(N,)`, weights of bootstrap samples `(R, N)`."""
    low, high = interval(weighted_mean(right, weights))
    return f"{100 * right.mean():.1f}", f"{100 * low:.1f} to {100 * high:.1f}"


def difference_note(title: str, difference: Tensor, weights: Tensor) -> str:
    """The mean of differences `(N,)` in points, with its interval."""
    low, high = (100 * x for x in interval(weighted_mean(difference, weights)))
    return f"{title}: {100 * difference.mean():+.1f} points (95 %: {low:+.1f} to {high:+.1f})"
