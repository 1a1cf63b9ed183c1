"""Step-size adaptation: one number per tensor that accumulates the agreement of successive gradients.

    c   = cos(M_{t-1}, g_t)                           gradients in units of sqrt(v^)
    G  <- G + ln(1 + k / (t - k + ADAPT_AGE)) (adapt_rate c - adapt_decay)             |G| <= MAX_LOG_STEP_SIZE

at every refresh t, k steps after the previous one; the update is multiplied by exp(G). Where a new gradient agrees with
the earlier ones, steps are short compared with the distance to go; where it is orthogonal, only noise is left; where it
points back, steps are too long. G accumulates over the logarithm of time, so that it is found in the first tenth of
training and hardly moves at the end: `adapt_rate c - adapt_decay` is the power with which the step size rises with age.

The cosine of a tensor with few entries is mostly chance, so it is shrunk towards that of the network, which counts as
`PRIOR_ENTRIES` entries. c follows from the statistics of tensors that the first pass computes anyway.

References:
    Online Learning Rate Adaptation with Hypergradient Descent (Baydin et al., 2018), arXiv:1703.04782: the same sign
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nfn_optim.engine.moments import BETA_SLOW
from nfn_optim.engine.weight_features import Statistics
from nfn_optim.layers import Incidence

ADAPT_AGE = 30.0  # steps before the cosine begins to count
MAX_LOG_STEP_SIZE = 3.0  # either way: a factor of 20
PRIOR_ENTRIES = 100.0  # weight of the network's cosine beside a tensor's own, in entries
PRIOR_SIDE = 32.0  # weight of the network's start beside a matrix's own, in singular values
COSINE_EPS = 1e-12  # of products of mean squares of gradients, in units of their root mean square
MAX_LOG_GAIN = 3.0  # of each learned factor


def gradient_cosine(means: Statistics, steps: Tensor, entries: Tensor) -> Tensor:
    """The cosine between the gradient of this step and the slow moment before it, -1 to 1.

    Args:
        means: Over the tensors, `(*batch, T)` each.
        steps: Steps taken, this one included, `(*batch, T)`.
        entries: Number of entries of each tensor, 0 where it has no gradients; `(*batch, T)`.

    Returns:
        `(*batch, T)`; 0 at the first step, and where there is no gradient.
    """
    slow, gradient, slow_gradient = (torch.nan_to_num(x) for x in (means.slow, means.gradient, means.slow_gradient))
    weight = -torch.expm1(steps * math.log(BETA_SLOW))  # 1 - .99^t
    new = 1 - BETA_SLOW
    slow_gradient = slow_gradient * weight  # M g
    slow = slow * weight.square()  # M M, with g in it
    product = (slow_gradient - new * gradient) / BETA_SLOW
    before = (slow - 2 * new * slow_gradient + new**2 * gradient).clamp(min=0) / BETA_SLOW**2
    own = (product / (before * gradient + COSINE_EPS).sqrt()).clamp(-1, 1)
    own = torch.where(steps > 1, own, 0.0)  # before the first step there is nothing but rounding
    trust = entries / (entries + PRIOR_ENTRIES)
    common = (own * trust).sum(-1, keepdim=True) / trust.sum(-1, keepdim=True).clamp(min=1 / PRIOR_ENTRIES)
    return trust * own + (1 - trust) * common


def shared_start(log_step_size: Tensor, steps: Tensor, sides: Tensor) -> Tensor:
    """G at the first step: of what tells little about itself, that of the tensors that start with it.

    Whether a matrix was trained before shows in its spectrum (`nfn_optim.rule.pretrained_weights`), the better the
    larger its shorter side is. A vector has no spectrum, and follows the others.

    Args:
        log_step_size: G of every tensor by itself, `(*batch, T)`.
        steps: Steps taken, this one included, `(*batch, T)`.
        sides: The shorter side of every matrix, 0 of a vector; `(T,)`.
    """
    trust = torch.where(steps <= 1, sides / (sides + PRIOR_SIDE), 0.0)
    common = (log_step_size * trust).sum(-1, keepdim=True) / trust.sum(-1, keepdim=True).clamp(min=1 / PRIOR_SIDE)
    return torch.where(steps <= 1, trust * log_step_size + (1 - trust) * common, log_step_size)


def adapt(log_step_size: Tensor, power: Tensor, steps: Tensor, interval: int) -> Tensor:
    """G after a refresh.

    Args:
        log_step_size: G before it, `(*batch, T)`.
        power: `adapt_rate c - adapt_decay`, `(*batch, T)`.
        steps: Steps taken, this one included, `(*batch, T)`.
        interval: Steps between two refreshes, but for the first ones.
    """
    since = torch.where(steps > interval + 1, float(interval), 1.0)
    change = torch.log1p(since / (steps - since + ADAPT_AGE)) * power
    return (log_step_size + change).clamp(-MAX_LOG_STEP_SIZE, MAX_LOG_STEP_SIZE)


def gain_of(log_gain: Tensor) -> Tensor:
    """A factor between exp(-MAX_LOG_GAIN) and exp(MAX_LOG_GAIN)."""
    return torch.exp(MAX_LOG_GAIN * torch.tanh(log_gain / MAX_LOG_GAIN))


def max_column_gain(by_row: Tensor, incidence: Incidence) -> Tensor:
    """The largest product of column and tap gains in each tensor. `(*batch, N) -> (*batch, T)`."""
    largest = []
    for segments in incidence.segments:
        value = torch.ones_like(by_row[..., 0]) if segments else by_row.new_ones(by_row.shape[:-1])
        for s in segments[1:]:
            value = value * by_row[..., s.start : s.start + s.length].detach().amax(-1)
        largest.append(value)
    return torch.stack(largest, -1)
