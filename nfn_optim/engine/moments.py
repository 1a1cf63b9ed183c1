"""What is remembered of every weight, and how it starts; see `nfn_optim.rule.features`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, dict[str, Tensor]]
"""Parameter name -> what is remembered of it. Moments have the parameter's shape, counters the shape `(*batch,)`."""

MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_slow")  # m, v, M
BETA1, BETA_SLOW, BETA2, EPS = 0.9, 0.99, 0.999, 1e-8
CHANNELS = 5  # of a weight
ROW_CHANNELS = CHANNELS + 1
CLIP = 5.0  # of channels 2 and 4, in units of their root mean square
TINY = 1e-30  # keeps square roots differentiable at zero; far below EPS squared


def init_state(
    params: Mapping[str, Tensor], batch_dims: int, *, learned: bool, kept_in: torch.dtype | None = None
) -> State:
    """The state before the first step: all zeros.

    Args:
        params: Name -> tensor `(*batch, *shape)`.
        batch_dims: How many leading dimensions are batch.
        learned: Whether the learned part is in use; Adam alone needs neither the slow moment nor the counter.
        kept_in: Precision of the moments; None for that of the counters.

    Returns:
        Moments and counters `(*batch,)`, in float32, or float64 for float64 parameters.
    """
    state: State = {}
    for name, p in params.items():
        dtype = torch.promote_types(p.dtype, torch.float32)
        moments = MOMENTS if learned else MOMENTS[:2]
        counters = ("step", "fallbacks") if learned else ("step",)
        state[name] = {key: torch.zeros_like(p, dtype=kept_in or dtype) for key in moments}
        state[name] |= {key: torch.zeros(p.shape[:batch_dims], dtype=dtype, device=p.device) for key in counters}
    return state


def spread(value: Tensor, like: Tensor, batch_dims: int) -> Tensor:
    """Give a tensor `(*batch,)` trailing dimensions, so that it broadcasts against `like`, `(*batch, *shape)`."""
    return value.reshape(value.shape + (1,) * (like.dim() - batch_dims))


def corrections_of(steps: Tensor) -> Tensor:
    """What moments are multiplied by, since they start at zero.

    Args:
        steps: Steps taken, this one included, `(...)`.

    Returns:
        `(..., 4)`: for m, for the square root of v and for M; and the steps as they are.
    """
    bias = [-torch.expm1(steps * math.log(beta)) for beta in (BETA1, BETA2, BETA_SLOW)]  # 1 - beta^t, exactly
    return torch.stack([1 / bias[0], bias[1].rsqrt(), 1 / bias[2], steps], -1)
