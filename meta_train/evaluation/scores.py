"""Scores over tasks in which a miss, a target that is never reached, has a price.

References:
    Benchmarking optimization software with performance profiles (Dolan and Moré, 2002)
    Benchmarking Neural Network Training Algorithms (Dahl et al., 2023), Sec. 4.4, arXiv:2306.07179: AlgoPerf
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

PROFILE_END = 4.0  # times the fastest: later counts as never
MISS = 1 / PROFILE_END  # step reduction of a miss in geometric means; in interquartile means it is 0
MIN_LOSS_REDUCTION = 1e-3  # of a run that diverged, in geometric means


def geometric_mean(values: NDArray[np.float64], least: float) -> NDArray[np.float64]:
    """The geometric mean over the last dimension, `(..., n) -> (...)`; lower values count as `least`.

    Example:
        >>> round(float(geometric_mean(np.array([4.0, 0.0]), 0.25)), 6)
        1.0
    """
    means: NDArray[np.float64] = np.exp(np.log(np.maximum(values, least)).mean(-1))
    return means


def profile_scores(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """AlgoPerf's score: the area under performance profiles, `(optimizers, tasks) -> (optimizers,)`.

    A profile at tau is the fraction of tasks on which the time to the target is at most tau times the shortest one of
    all optimizers. Its mean over tau from 1 to `PROFILE_END` is that over tasks of (end - ratio) / (end - 1), at least
    0.

    Args:
        times: Until the target, in any unit; infinite for never.

    Example:
        >>> profile_scores(np.array([[10.0, 20.0], [10.0, 50.0], [40.0, np.inf]]))
        array([1.  , 0.75, 0.  ])
    """
    fastest = times.min(0)
    ratios = np.divide(times, fastest, out=np.full_like(times, np.inf), where=np.isfinite(times))
    scores: NDArray[np.float64] = np.clip((PROFILE_END - ratios) / (PROFILE_END - 1), 0, 1).mean(-1)
    return scores


def held_out_target(references: Sequence[Sequence[tuple[int, float]]]) -> float:
    """The lowest held-out loss of a reference's run, median over seeds.

    Args:
        references: (step, held-out loss) of every check, for each seed.

    Example:
        >>> held_out_target([[(10, 3.0), (20, 2.0)], [(10, 1.0), (20, 4.0)], [(10, 5.0), (20, 5.0)]])
        2.0
    """
    return float(np.median([min((loss for _, loss in checks), default=math.inf) for checks in references]))


def steps_to(target: float, checks: Sequence[tuple[int, float]]) -> float:
    """The first check with at most the target's loss; infinite for never, or if the target is infinite.

    Args:
        target: A held-out loss.
        checks: (step, held-out loss), in order.

    Example:
        >>> steps_to(2.0, [(10, 3.0), (20, 2.0), (30, 1.0)]), steps_to(0.5, [(10, 3.0)])
        (20.0, inf)
    """
    return float(next((step for step, loss in checks if loss <= target < math.inf), math.inf))


def strongest(losses: Mapping[str, Sequence[float]]) -> str:
    """The optimizer with the lowest mean loss over seeds; the first of equal ones.

    Example:
        >>> strongest({"a": [1.0, 2.0], "b": [1.0, 1.0], "c": [0.0, float("inf")]})
        'b'
    """
    return min(losses, key=lambda name: float(np.mean(losses[name])))
