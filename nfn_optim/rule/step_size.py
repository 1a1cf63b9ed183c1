"""The growth of a tensor's steps: one number for each, in which the agreement of its gradients adds up.

    c   = cos(M_{t-1}, g_t)                           the agreement, of gradients in units of sqrt(v^)
    G  <- G + ln(1 + k / (t - k + GROWTH_AGE)) (growth c - waning)             |G| <= MOST_GROWTH

at every step t at which neurons talk, k steps after the last one; the gain is multiplied by exp(G). Where a new
gradient agrees with those before it, steps are short beside the way that there is to go; where it does not, all that
is left is noise; where it points back, steps are too long. G adds up over the logarithm of time, so that it is found
in the first tenth of training and hardly moves at its end: `growth c - waning` is the power with which the step size
rises with age.

The agreement of a tensor with few entries is mostly chance, so it is drawn towards that of the network, by as much as
`OTHERS` entries of it weigh. c follows from the means over tensors that the first pass finds anyhow.

References:
    Online Learning Rate Adaptation with Hypergradient Descent (Baydin et al., 2018), arXiv:1703.04782: the same sign
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nfn_optim.engine.moments import BETA_SLOW

GROWTH_AGE = 30.0  # steps: about as many have to be seen before what they say counts
MOST_GROWTH = 3.0  # either way: a factor of 20
OTHERS = 100.0  # entries' worth that the network's agreement counts beside a tensor's own
NOTHING = 1e-12  # products of mean squares of gradients, in units of their root mean square


def agreement(whole: Tensor, steps: Tensor, sizes: Tensor) -> Tensor:
    """The cosine between the gradients of this step and the slow moments before it, -1 to 1.

    Args:
        whole: Means over the tensors, `(*batch, T, ROW_CHANNELS)`.
        steps: Steps taken, this one included, `(*batch, T)`.
        sizes: Numbers of entries, `(T,)`.

    Returns:
        `(*batch, T)`; 0 at the first step, and where there is no gradient.
    """
    whole = torch.nan_to_num(whole)
    weight = -torch.expm1(steps * math.log(BETA_SLOW))  # 1 - .99^t
    new = 1 - BETA_SLOW
    both, of_new = whole[..., 5] * weight, whole[..., 2]  # M g and g g
    of_slow = whole[..., 1] * weight.square()  # M M, with g in it
    product = (both - new * of_new) / BETA_SLOW
    before = (of_slow - 2 * new * both + new**2 * of_new).clamp(min=0) / BETA_SLOW**2
    own = (product / (before * of_new + NOTHING).sqrt()).clamp(-1, 1)
    own = torch.where(steps > 1, own, 0.0)  # before the first step there is nothing but rounding
    trust = sizes / (sizes + OTHERS)
    common = (own * trust).sum(-1, keepdim=True) / trust.sum().clamp(min=1 / OTHERS)
    return trust * own + (1 - trust) * common


def grown(growth: Tensor, power: Tensor, steps: Tensor, apart: int) -> Tensor:
    """G after a step at which neurons talk.

    Args:
        growth: G before it, `(*batch, T)`.
        power: `growth c - waning`, `(*batch, T)`.
        steps: Steps taken, this one included, `(*batch, T)`.
        apart: Steps between two times that they talk, but for the first ones.
    """
    since = torch.where(steps > apart + 1, float(apart), 1.0)
    return (growth + torch.log1p(since / (steps - since + GROWTH_AGE)) * power).clamp(-MOST_GROWTH, MOST_GROWTH)
