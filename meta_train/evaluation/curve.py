"""Statistics of a loss curve: final loss, steps to a loss, divergence.

The loss of single batches is noisy: all of them use the *running mean* over the last `smoothing_window(steps)` batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]

MIN_WINDOW = 30  # batches
WINDOW_FRACTION = 0.03  # of the steps
MIN_LOSS = 1e-12  # lower losses count as this
MAX_REDUCTION = 1e3  # of a loss


def smoothing_window(steps: int) -> int:
    """Number of batches in the running mean: 30, or 3 % of the steps if that is more."""
    return max(MIN_WINDOW, round(WINDOW_FRACTION * steps))


def running_mean(losses: Sequence[float]) -> Curve:
    """The running mean after every batch `(steps,)`; over all batches so far if there are fewer than the window.

    Args:
        losses: The loss of every batch, `(steps,)`; from the first non-finite one the running mean is infinite.

    Example:
        >>> running_mean([4.0, 2.0, 0.0])
        array([4., 3., 2.])
    """
    values = np.asarray(losses, dtype=np.float64)
    invalid = np.nonzero(~np.isfinite(values))[0]
    valid = values[: invalid[0]] if len(invalid) else values
    total = np.cumsum([0.0, *valid])
    last = np.arange(1, len(valid) + 1)
    first = np.maximum(last - smoothing_window(len(values)), 0)
    means = (total[last] - total[first]) / (last - first)
    return np.concatenate([means, np.full(len(values) - len(valid), np.inf)])


def step_reduction(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Steps of a reference over the steps after which its final loss is first reached; 0 for never.

    Args:
        losses: The loss of every batch, `(steps,)`.
        reference: The same of the reference.

    Example:
        >>> step_reduction([3.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0])
        4.0
    """
    return (
        len(reference) / steps if (steps := _steps_until(running_mean(losses) <= running_mean(reference)[-1])) else 0.0
    )


def step_reduction_to_best(scores: Sequence[tuple[int, float]], reference: Sequence[tuple[int, float]]) -> float:
    """Steps of a reference to its best held-out loss over the steps after which that is first reached; 0 for never.

    Args:
        scores: (step, held-out loss), in order.
        reference: The same of the reference.
    """
    at, best = min(reference, key=lambda point: point[1])
    return next((at / step for step, loss in scores if loss <= best), 0.0)


def loss_reduction(loss: float, reference: float) -> float:
    """A reference's loss over a loss; 0 if the latter is infinite.

    Example:
        >>> loss_reduction(0.5, 1.0), loss_reduction(float("inf"), 1.0), loss_reduction(0.0, float("inf"))
        (2.0, 0.0, 1000.0)
    """
    return min(reference / max(loss, MIN_LOSS), MAX_REDUCTION) if np.isfinite(loss) else 0.0


def diverged(losses: Sequence[float]) -> bool:
    """Whether a loss was not finite, or the final loss is above twice the first one."""
    return not running_mean(losses)[-1] <= 2 * abs(losses[0])


def _steps_until(true: NDArray[np.bool_]) -> int:
    """Number of entries up to the first true one; 0 if there is none."""
    indices = np.nonzero(true)[0]
    return int(indices[0]) + 1 if len(indices) else 0
