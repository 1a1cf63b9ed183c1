"""What a curve of losses says: where it ends, when it got somewhere, whether it diverged.

The loss of single batches is noisy, so everything is read off the *running mean* of the last `smooth(steps)` batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Curve = NDArray[np.float64]

LEAST_SMOOTH = 30  # batches
SMOOTH = 0.03  # fraction of the steps
LEAST_LOSS = 1e-12  # lower ones are not told apart
MOST = 1e3  # no loss is said to be more times better


def smooth(steps: int) -> int:
    """How many batches the running mean is taken over: 30, or 3 % of the steps where that is more."""
    return max(LEAST_SMOOTH, round(SMOOTH * steps))


def running_mean(losses: Sequence[float]) -> Curve:
    """The mean of the last batches after every one `(steps,)`; of all so far where there are fewer.

    Args:
        losses: The loss of every batch, `(steps,)`; once not finite, the running mean is infinite from there on.

    Example:
        >>> running_mean([4.0, 2.0, 0.0])
        array([4., 3., 2.])
    """
    values = np.asarray(losses, dtype=np.float64)
    broken = np.nonzero(~np.isfinite(values))[0]
    sound = values[: broken[0]] if len(broken) else values
    total = np.cumsum([0.0, *sound])
    last = np.arange(1, len(sound) + 1)
    first = np.maximum(last - smooth(len(values)), 0)
    means = (total[last] - total[first]) / (last - first)
    return np.concatenate([means, np.full(len(values) - len(sound), np.inf)])


def step_reduction(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Steps of a reference over the steps after which its final loss is first reached; 0 where it never is.

    Args:
        losses: The loss of every batch, `(steps,)`.
        reference: The same of the reference.

    Example:
        >>> step_reduction([3.0, 1.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0])
        4.0
    """
    return len(reference) / steps if (steps := _first(running_mean(losses) <= running_mean(reference)[-1])) else 0.0


def step_reduction_to_best(scores: Sequence[tuple[int, float]], reference: Sequence[tuple[int, float]]) -> float:
    """Steps of a reference to its best held-out loss over the steps after which that is first reached; 0 for never.

    Args:
        scores: (step, held-out loss), in order.
        reference: The same of the reference.
    """
    at, best = min(reference, key=lambda point: point[1])
    return next((at / step for step, loss in scores if loss <= best), 0.0)


def loss_reduction(loss: float, reference: float) -> float:
    """A reference's loss over another one; 0 where that is infinite.

    Example:
        >>> loss_reduction(0.5, 1.0), loss_reduction(float("inf"), 1.0), loss_reduction(0.0, float("inf"))
        (2.0, 0.0, 1000.0)
    """
    return min(reference / max(loss, LEAST_LOSS), MOST) if np.isfinite(loss) else 0.0


def diverged(losses: Sequence[float]) -> bool:
    """Whether a loss was not finite, or training ends above twice where it began."""
    return not running_mean(losses)[-1] <= 2 * abs(losses[0])


def _first(true: NDArray[np.bool_]) -> int:
    """The number, from 1, of the first true entry; 0 where there is none."""
    found = np.nonzero(true)[0]
    return int(found[0]) + 1 if len(found) else 0
