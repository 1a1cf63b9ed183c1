"""Moments of the gradients: what an update rule remembers of every weight.

For a parameter p with gradient g, at step t,

    m  <- b1 m  + (1 - b1) g            Adam's first moment           m^ = m / (1 - b1^t)
    M  <- .99 M + .01 g                 a slow one                    M^ = M / (1 - .99^t)
    v  <- b2 v  + (1 - b2) g^2          Adam's second moment          v^ = v / (1 - b2^t)

with Adam's b1 = .9 and b2 = .999 unless a rule has others.

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


def update_moments(g: Tensor, moments: Sequence[Tensor], constants: Tensor, *, in_place: bool = False) -> list[Tensor]:
    """The moments m, v and, if there is a third, M after a gradient. All `(*batch, rows, rest)`.

    Args:
        g: The gradient.
        moments: Before it.
        constants: See `moment_constants`, `(*batch, rows or 1, 6)`.
        in_place: Whether to change `moments`.
    """
    m, v, *slow = moments
    g = g.to(m.dtype)
    new_m, new_v = constants[..., 4:].unsqueeze(-2).unbind(-1)
    lerp = torch.Tensor.lerp_ if in_place else torch.lerp
    return [lerp(m, g, new_m), lerp(v, g * g, new_v), *(lerp(x, g, 1 - BETA_SLOW) for x in slow)]


def moment_constants(steps: Tensor, beta1: float = BETA1, beta2: float = BETA2) -> Tensor:
    """Numbers by which moments are updated, and corrected for starting at zero.

    Args:
        steps: Steps taken, this one included, `(...)`.
        beta1: Decay of m.
        beta2: Decay of v.

    Returns:
        `(..., 6)`: corrections of m, of the square root of v and of M; the steps themselves; and the weights of a new
        gradient in m and in v.
    """
    bias = [-torch.expm1(steps * math.log(beta)) for beta in (beta1, beta2, BETA_SLOW)]  # 1 - beta^t, exactly
    weights = [torch.full_like(steps, 1 - beta) for beta in (beta1, beta2)]
    return torch.stack([1 / bias[0], bias[1].rsqrt(), 1 / bias[2], steps, *weights], -1)


def append_dims(value: Tensor, like: Tensor, batch_dims: int) -> Tensor:
    """Give a tensor `(*batch,)` trailing dimensions, so that it broadcasts against `like`, `(*batch, *shape)`."""
    return value.reshape(value.shape + (1,) * (like.dim() - batch_dims))
