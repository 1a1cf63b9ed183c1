"""Moments of the gradients: what an update rule remembers of every weight.

For a parameter p with gradient g, at step t,

    m  <- .9  m  + .1  g                Adam's first moment           m^ = m / (1 - .9^t)
    M  <- .99 M  + .01 g                a slow one                    M^ = M / (1 - .99^t)
    v  <- .999 v + .001 g^2             Adam's second moment          v^ = v / (1 - .999^t)

References:
    Adam: A Method for Stochastic Optimization (Kingma and Ba, 2015), Alg. 1, arXiv:1412.6980
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

State = dict[str, dict[str, Tensor]]
"""Parameter name -> state entries. Moments have the parameter's shape, counters the shape `(*batch,)`."""

MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_slow")  # m, v, M
BETA1, BETA_SLOW, BETA2, EPS = 0.9, 0.99, 0.999, 1e-8
SQRT_EPS = 1e-30  # keeps square roots differentiable at zero; far below EPS squared


def init_moments(p: Tensor, *, slow: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Moments before the first step: zeros of the parameter's shape.

    Args:
        p: Parameter `(*batch, *shape)`.
        slow: Whether the slow moment M is needed; Adam alone does without.
        dtype: Their dtype.
    """
    return {key: torch.zeros_like(p, dtype=dtype) for key in (MOMENTS if slow else MOMENTS[:2])}


def update_moments(g: Tensor, moments: Sequence[Tensor]) -> list[Tensor]:
    """The moments m, v and, if there is a third, M after a gradient. All of one shape."""
    m, v, *slow = moments
    g = g.to(m.dtype)
    return [
        torch.lerp(m, g, 1 - BETA1),
        torch.addcmul(v * BETA2, g, g, value=1 - BETA2),
        *(torch.lerp(x, g, 1 - BETA_SLOW) for x in slow),
    ]


def bias_corrections(steps: Tensor) -> Tensor:
    """Factors that correct the moments for starting at zero.

    Args:
        steps: Steps taken, this one included, `(...)`.

    Returns:
        `(..., 4)`: factors of m, of the square root of v and of M; and the steps themselves.
    """
    bias = [-torch.expm1(steps * math.log(beta)) for beta in (BETA1, BETA2, BETA_SLOW)]  # 1 - beta^t, exactly
    return torch.stack([1 / bias[0], bias[1].rsqrt(), 1 / bias[2], steps], -1)


def append_dims(value: Tensor, like: Tensor, batch_dims: int) -> Tensor:
    """Give a tensor `(*batch,)` trailing dimensions, so that it broadcasts against `like`, `(*batch, *shape)`."""
    return value.reshape(value.shape + (1,) * (like.dim() - batch_dims))
