"""What the rule sees: of a weight, of a neuron, of a tensor, of time; and the state behind it.

For every parameter p with gradient g the state keeps three moments (floats a parameter: 3) and the number of steps t,

    m  <- .9  m  + .1  g                Adam's first moment           m^ = m / (1 - .9^t)
    M  <- .99 M  + .01 g                a slow one                    M^ = M / (1 - .99^t)
    v  <- .999 v + .001 g^2             Adam's second moment          v^ = v / (1 - .999^t)

and a weight has the following channels, each the product of a raw channel and of a unit that its whole tensor shares
(rms is over the tensor, and s its *scale*, see `scales_of`):

    raw                                 unit
    0  m^ / sqrt(v^)                    1                     Adam's direction, the nominal one
    1  M^ / sqrt(v^)                    1                     the same from the slow moment
    2  g / sqrt(v^)                     1                     the newest gradient
    3  p                                rms of channel 0 / s  the weight itself
    4  m^                               1 / rms of m^         the direction of momentum SGD

None of them changes when the loss or the tensor is multiplied by a constant (but for Adam's epsilon), and all of them
are zero when gradient and moments are. Channels 2 and 4 are clipped at `CLIP`, the latter only where it is used.

A row (one entry of one dimension) is described by the root mean square of each channel over the rest of the tensor, on
a log scale, and by the mean of channel 1 times 2, which is negative where training oscillates; a tensor by the same
over all of it, its order and sizes, and time. Since a unit is a number for each tensor, all of these follow from mean
squares of raw channels: one pass over the weights finds them, a second one can use them.

References:
    Practical tradeoffs between memory, compute, and performance in learned optimizers (Metz et al., 2022), App. A
    A Closer Look at Learned Optimization (Harrison et al., 2022), Sec. 4, arXiv:2209.11208
"""

from __future__ import annotations

import torch
from torch import Tensor

from nfn_optim.engine.moments import CHANNELS, EPS, ROW_CHANNELS, TINY
from nfn_optim.layers import Incidence

TIME_CHANNELS = 8
TENSOR_CHANNELS = ROW_CHANNELS + 1 + Incidence.STATIC + TIME_CHANNELS
FLOOR = 0.05  # added before logarithms of quantities of order one
MOST = 1e6  # statistics of finite features never exceed it
NO_SCALE = 1e-3  # scale of a tensor of zeros that shares no axis with a matrix


def units_of(whole: Tensor, scale: Tensor) -> Tensor:
    """What raw channels are multiplied by.

    Args:
        whole: Means over the tensors, `(*batch, T, ROW_CHANNELS)`.
        scale: `(*batch, T)`.

    Returns:
        `(*batch, T, CHANNELS)`.
    """
    one = torch.ones_like(scale)
    relative = (whole[..., 0] + TINY).sqrt() / scale
    shared = (whole[..., 4] + EPS**2).rsqrt()  # as Adam's epsilon: below it there is no scale to be free of
    return torch.stack([one, one, one, relative, shared], -1)


def describe(means: Tensor, units: Tensor) -> Tensor:
    """Mean squares of raw channels become log(rms of the channel + FLOOR); other means stay.

    Args:
        means: `(..., ROW_CHANNELS)`.
        units: `(..., CHANNELS)`, broadcastable.

    Returns:
        `(..., ROW_CHANNELS)`, finite.
    """
    sizes = torch.log(_finite((means[..., :CHANNELS] + TINY).sqrt() * units) + FLOOR)
    return torch.cat([sizes, _finite(means[..., CHANNELS:])], -1)


def scales_of(mean_squares: Tensor, incidence: Incidence) -> tuple[Tensor, Tensor]:
    """The scale of every tensor: its own root mean square or, where that says nothing, that of its kin.

    The scale is what one unit of the update is measured in. A vector counts at least as much as the matrices with which
    it shares a neuron, by geometric mean (a bias that starts at zero moves as the weights into and out of its neurons
    do); a matrix at least a tenth of that. A tensor of zeros without kin gets `NO_SCALE`.

    Args:
        mean_squares: Of the parameters, `(*batch, T)` in the order of `incidence`.
        incidence: Who shares axes with whom.

    Returns:
        Scales and root mean squares, `(*batch, T)` each.
    """
    index = incidence.at(mean_squares)
    rms = (torch.nan_to_num(mean_squares) + TINY).sqrt()
    alive = (rms > 1e-8).to(rms.dtype)  # noqa: PLR2004 - a tensor of zeros has no scale to give
    weight = alive @ index["kin"].T
    of_kin = ((rms.log() * alive) @ index["kin"].T / weight.clamp(min=1)).exp()
    least = of_kin * torch.where(index["static"][:, 0] > 0, 1.0, 0.1).to(rms.dtype)
    scale = torch.maximum(rms, torch.where(weight > 0, least, NO_SCALE * (1 - alive)))
    return scale, rms


def time_features(steps: Tensor, total_steps: Tensor | float | None) -> Tensor:
    """How far training has come.

    Args:
        steps: Steps taken, this one included, `(*batch, T)`.
        total_steps: The horizon in steps, broadcastable to `steps`; None, or entries of 0, where it is not known.

    Returns:
        `(*batch, T, TIME_CHANNELS)`: the age on four time scales and as a logarithm; whether the horizon is known, the
        fraction of it that is done and the logarithm of what is left.
    """
    age = [torch.tanh(steps / tau) for tau in (3.0, 30.0, 300.0, 3000.0)] + [torch.log1p(steps) / 10]
    zero = torch.zeros_like(steps)
    if total_steps is None:
        return torch.stack([*age, zero, zero, zero], -1)
    total = torch.as_tensor(total_steps, dtype=steps.dtype, device=steps.device).expand_as(steps)
    known = (total > 0).to(steps.dtype)
    done = (steps / total.clamp(min=1)).clamp(max=1.0) * known
    left = known * torch.log(1 + FLOOR - done) / 3
    return torch.stack([*age, known, done, left], -1)


def tensor_features(described: Tensor, scale: Tensor, rms: Tensor, time: Tensor, incidence: Incidence) -> Tensor:
    """Put together what is known of every tensor.

    Args:
        described: `(*batch, T, ROW_CHANNELS)`.
        scale: `(*batch, T)`.
        rms: `(*batch, T)`.
        time: `(*batch, T, TIME_CHANNELS)`.
        incidence: For the tensors' order and sizes.

    Returns:
        `(*batch, T, TENSOR_CHANNELS)`.
    """
    static = incidence.at(described)["static"].expand(*described.shape[:-1], Incidence.STATIC)
    grown = torch.log(rms / scale + FLOOR).unsqueeze(-1)  # 0 for a matrix, down to log(.05) for a bias of zeros
    return torch.cat([described, grown, static, time], -1)


def _finite(value: Tensor) -> Tensor:
    """Of an empty or a broken tensor too."""
    return torch.nan_to_num(value, nan=0.0, posinf=MOST, neginf=-MOST)
