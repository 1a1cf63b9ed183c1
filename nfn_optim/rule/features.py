"""The inputs of message passing: statistics of rows and tensors, scales, and time.

A row (one entry of one dimension) is described by the root mean square of each weight feature
(`nfn_optim.engine.weight_features`) over the rest of the tensor, on a log scale, and by the mean of slow times
gradient, which is negative where training oscillates. A tensor is described by the same over all of it, its order and
sizes, its scale, and time. Each feature has a unit that the whole tensor shares (rms is over the tensor, s its
*scale*):

    adam, slow, gradient        1
    weight                      rms of adam / s
    momentum                    1 / rms of momentum

so that nothing changes when the loss or the tensor is multiplied by a constant (but for Adam's epsilon); where a rule
shrinks weights, their coefficient has the unit `shrink_unit`. Since a unit is one number per tensor, everything follows
from mean squares of the raw features: one pass computes them, a second one uses them.

References:
    Practical tradeoffs between memory, compute, and performance in learned optimizers (Metz et al., 2022), App. A
    A Closer Look at Learned Optimization (Harrison et al., 2022), Sec. 4, arXiv:2209.11208
"""

from __future__ import annotations

import torch
from torch import Tensor

from nfn_optim.engine.moments import EPS, SQRT_EPS
from nfn_optim.engine.weight_features import FEATURES, STATISTICS, Statistics, WeightFeatures
from nfn_optim.layers import Incidence

ROW_CHANNELS = STATISTICS
TIME_CHANNELS = 8
SIZE_CHANNELS = 3
TENSOR_CHANNELS = ROW_CHANNELS + 1 + Incidence.ORDERS + SIZE_CHANNELS + TIME_CHANNELS
LOG_EPS = 0.05  # added before logarithms of quantities of order one
MAX_STATISTIC = 1e6  # bound on statistics, which finite features never exceed
MIN_ALIVE_RMS = 1e-8  # a tensor of smaller root mean square counts as zero
DEFAULT_SCALE = 1e-3  # of a tensor of zeros that shares no axis with a matrix
NOISE_RMS = 0.2  # of Adam's direction where gradients are independent: sqrt(.1 / 1.9) is .23
SHRINK_AGE = 200.0  # steps after which weights shrink at half of the full rate


def units_of(means: Statistics, scale: Tensor) -> WeightFeatures:
    """The units of the features of every tensor; the features are multiplied by them.

    Args:
        means: Over the tensors, `(*batch, T)` each.
        scale: `(*batch, T)`.
    """
    one = torch.ones_like(scale)
    return WeightFeatures(
        adam=one,
        slow=one,
        gradient=one,
        weight=(means.adam + SQRT_EPS).sqrt() / scale,
        momentum=(means.momentum + EPS**2).rsqrt(),  # like Adam's epsilon: below it there is no scale to divide by
    )


def shrink_unit(means: Statistics, scale: Tensor, steps: Tensor) -> Tensor:
    """The unit of the weight where a rule shrinks weights, in place of that of `units_of`.

        min(rms of adam, NOISE_RMS)^2 / NOISE_RMS t / (t + SHRINK_AGE) / s

    So weights shrink in proportion to steps that are taken in noise: not more where gradients agree, hardly where they
    vanish, and little in the beginning, when weights have to grow.

    Args:
        means: Over the tensors, `(*batch, T)` each.
        scale: `(*batch, T)`.
        steps: Steps taken, this one included, `(*batch, T)`.
    """
    noise = means.adam.clamp(max=NOISE_RMS**2) / NOISE_RMS
    return noise * (steps / (steps + SHRINK_AGE)) / scale


def log_statistics(means: Tensor, units: Tensor) -> Tensor:
    """Mean squares of features become log(rms of the feature + LOG_EPS); the mean of slow times gradient stays.

    Args:
        means: `Statistics` packed, `(..., STATISTICS)`.
        units: `WeightFeatures` packed, `(..., FEATURES)`, broadcastable.

    Returns:
        `(..., ROW_CHANNELS)`, finite.
    """
    sizes = torch.log(_finite((means[..., :FEATURES] + SQRT_EPS).sqrt() * units) + LOG_EPS)
    return torch.cat([sizes, _finite(means[..., FEATURES:])], -1)


def scales_of(mean_squares: Tensor, incidence: Incidence) -> tuple[Tensor, Tensor]:
    """The scale of every tensor: its own root mean square or, where that says nothing, that of its neighbours.

    The scale is the unit of updates. A vector's is at least the geometric mean of those of the matrices with which it
    shares a neuron (a bias that starts at zero moves like the weights into and out of its neurons); a matrix's at least
    a tenth of that. A tensor of zeros without neighbours has `DEFAULT_SCALE`.

    Args:
        mean_squares: Of the parameters, `(*batch, T)` in the order of `incidence`.
        incidence: Which tensors share axes.

    Returns:
        Scales and root mean squares, `(*batch, T)` each.
    """
    index = incidence.at(mean_squares)
    rms = (torch.nan_to_num(mean_squares) + SQRT_EPS).sqrt()
    alive = (rms > MIN_ALIVE_RMS).to(rms.dtype)
    count = alive @ index["neighbours"].T
    of_neighbours = ((rms.log() * alive) @ index["neighbours"].T / count.clamp(min=1)).exp()
    lower = of_neighbours * torch.where(index["matrix"] > 0, 0.1, 1.0).to(rms.dtype)
    scale = torch.maximum(rms, torch.where(count > 0, lower, DEFAULT_SCALE * (1 - alive)))
    return scale, rms


def time_features(steps: Tensor, total_steps: Tensor | float | None) -> Tensor:
    """The age of training, and its progress where the horizon is known.

    Args:
        steps: Steps taken, this one included, `(*batch, T)`.
        total_steps: The horizon in steps, broadcastable to `steps`; None, or entries of 0, where it is unknown.

    Returns:
        `(*batch, T, TIME_CHANNELS)`: the age on four time scales and its logarithm; whether the horizon is known, the
        completed fraction of it and the logarithm of the rest.
    """
    age = [torch.tanh(steps / tau) for tau in (3.0, 30.0, 300.0, 3000.0)] + [torch.log1p(steps) / 10]
    zero = torch.zeros_like(steps)
    if total_steps is None:
        return torch.stack([*age, zero, zero, zero], -1)
    total = torch.as_tensor(total_steps, dtype=steps.dtype, device=steps.device).expand_as(steps)
    known = (total > 0).to(steps.dtype)
    done = (steps / total.clamp(min=1)).clamp(max=1.0) * known
    left = known * torch.log(1 + LOG_EPS - done) / 3
    return torch.stack([*age, known, done, left], -1)


def size_features(counts: Tensor) -> Tensor:
    """Logarithms of the sizes of the first two dimensions and of the number of entries.

    Args:
        counts: Sizes of every dimension, `(*batch, T, 2 or more)`.

    Returns:
        `(*batch, T, SIZE_CHANNELS)`.
    """
    logs = counts.log()
    return torch.cat([logs[..., :2] / 5, logs.sum(-1, keepdim=True) / 10], -1)


def tensor_features(
    statistics: Tensor, scale: Tensor, rms: Tensor, counts: Tensor, time: Tensor, incidence: Incidence
) -> Tensor:
    """All features of the tensors.

    Args:
        statistics: `log_statistics` of the tensors, `(*batch, T, ROW_CHANNELS)`.
        scale: `(*batch, T)`.
        rms: `(*batch, T)`.
        counts: Sizes of every dimension, `(*batch, T, 2 or more)`.
        time: `(*batch, T, TIME_CHANNELS)`.
        incidence: For the number of dimensions of the tensors.

    Returns:
        `(*batch, T, TENSOR_CHANNELS)`.
    """
    order = incidence.at(statistics)["order"].expand(*statistics.shape[:-1], -1)
    relative_rms = torch.log(rms / scale + LOG_EPS).unsqueeze(-1)  # 0 for a matrix, log(.05) for a bias of zeros
    return torch.cat([statistics, relative_rms, order, size_features(counts), time], -1)


def _finite(value: Tensor) -> Tensor:
    """Finite values, also of an empty or a broken tensor."""
    return torch.nan_to_num(value, nan=0.0, posinf=MAX_STATISTIC, neginf=-MAX_STATISTIC)
