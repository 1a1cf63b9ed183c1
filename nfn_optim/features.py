"""What the rule sees: of a weight, of a neuron, of a tensor, of time; and the state behind it.

For every parameter p with gradient g the state keeps three moments (floats a parameter: 3) and the number of steps t,

    m  <- .9  m  + .1  g                Adam's first moment           m^ = m / (1 - .9^t)
    M  <- .99 M  + .01 g                a slow one                    M^ = M / (1 - .99^t)
    v  <- .999 v + .001 g^2             Adam's second moment          v^ = v / (1 - .999^t)

and a weight has the following channels, none of which changes when the loss or the tensor is multiplied by a constant
(but for Adam's epsilon; rms is over the tensor, and s its *scale*, see `scales_of`):

    0  m^ / sqrt(v^)         Adam's direction, the nominal one          3  p / s, times the rms of channel 0
    1  M^ / sqrt(v^)         the same from the slow moment              4  m^ / rms(m^), the direction of momentum SGD
    2  g / sqrt(v^)          the newest gradient

All of them are zero when gradient and moments are. Channels 2 and 4 are clipped at `CLIP`. A row (one entry of one
dimension) is described by the root mean square of each channel over the rest of the tensor, on a log scale, and by
the mean of channel 1 times 2, which is negative where training oscillates; a tensor by the same over all of it, its
order and sizes, and time.

References:
    Practical tradeoffs between memory, compute, and performance in learned optimizers (Metz et al., 2022), App. A
    A Closer Look at Learned Optimization (Harrison et al., 2022), Sec. 4, arXiv:2209.11208
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nfn_optim.layers import Incidence

State = dict[str, dict[str, Tensor]]
"""Parameter name -> what is remembered of it. Moments have the parameter's shape, counters the shape `(*batch,)`."""

BETA1, BETA_SLOW, BETA2, EPS = 0.9, 0.99, 0.999, 1e-8
CHANNELS = 5  # of a weight
ROW_CHANNELS = CHANNELS + 1
TIME_CHANNELS = 8
TENSOR_CHANNELS = ROW_CHANNELS + 1 + Incidence.STATIC + TIME_CHANNELS
CLIP = 5.0  # of channels 2 and 4, in units of their root mean square
TINY = 1e-30  # keeps square roots differentiable at zero; far below EPS squared
FLOOR = 0.05  # added before logarithms of quantities of order one
MOST = 1e6  # statistics of finite features never exceed it
NO_SCALE = 1e-3  # scale of a tensor of zeros that shares no axis with a matrix


def init_state(params: Mapping[str, Tensor], batch_dims: int, *, learned: bool) -> State:
    """The state before the first step: all zeros.

    Args:
        params: Name -> tensor `(*batch, *shape)`.
        batch_dims: How many leading dimensions are batch.
        learned: Whether the learned part is in use; Adam alone needs neither the slow moment nor the counter.

    Returns:
        Moments in float32, or float64 for float64 parameters; counters `(*batch,)` in the same.
    """
    state: State = {}
    for name, p in params.items():
        dtype = torch.promote_types(p.dtype, torch.float32)
        moments = ("exp_avg", "exp_avg_sq", "exp_avg_slow") if learned else ("exp_avg", "exp_avg_sq")
        counters = ("step", "fallbacks") if learned else ("step",)
        state[name] = {key: torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format) for key in moments}
        state[name] |= {key: torch.zeros(p.shape[:batch_dims], dtype=dtype, device=p.device) for key in counters}
    return state


@dataclass(frozen=True)
class Moments:
    """The new state and Adam's bias-corrected view of it.

    Attributes:
        state: Name -> new moments and counters.
        correction1: `(*batch, T)`, 1 - .9^t, of each tensor in order; `correction_slow` and `correction2` likewise.
        steps: `(*batch, T)`, t.
    """

    state: State
    steps: Tensor
    correction1: Tensor
    correction_slow: Tensor
    correction2: Tensor


def advance(grads: Mapping[str, Tensor], state: State) -> Moments:
    """Take one gradient into the moments.

    Args:
        grads: Name -> gradient `(*batch, *shape)`.
        state: Name -> state, left as it is.
    """
    new: State = {}
    for name, old in state.items():
        g = grads[name].to(old["exp_avg"].dtype)
        new[name] = {
            **old,
            "step": old["step"] + 1,
            "exp_avg": torch.lerp(old["exp_avg"], g, 1 - BETA1),
            "exp_avg_sq": torch.addcmul(old["exp_avg_sq"] * BETA2, g, g, value=1 - BETA2),
        }
        if "exp_avg_slow" in old:
            new[name]["exp_avg_slow"] = torch.lerp(old["exp_avg_slow"], g, 1 - BETA_SLOW)
    steps = torch.stack([s["step"] for s in new.values()], -1)
    corrections = [-torch.expm1(steps * math.log(beta)) for beta in (BETA1, BETA_SLOW, BETA2)]  # 1 - beta^t, exactly
    return Moments(new, steps, *corrections)


def spread(value: Tensor, like: Tensor, batch_dims: int) -> Tensor:
    """Give a tensor `(*batch,)` trailing dimensions, so that it broadcasts against `like`, `(*batch, *shape)`."""
    return value.reshape(value.shape + (1,) * (like.dim() - batch_dims))


def nominal_of(moments: Moments, name: str, index: int, batch_dims: int) -> Tensor:
    """Adam's direction m^ / (sqrt(v^) + eps). `(*batch, *shape)`."""
    m = moments.state[name]["exp_avg"]
    return m / _denominator(moments, name, index, batch_dims) / spread(moments.correction1[..., index], m, batch_dims)


def scales_of(params: Sequence[Tensor], incidence: Incidence, batch_dims: int) -> tuple[Tensor, Tensor]:
    """The scale of every tensor: its own root mean square or, where that says nothing, that of its kin.

    The scale is what one unit of the update is measured in. A vector counts at least as much as the matrices with which
    it shares a neuron, by geometric mean (a bias that starts at zero moves as the weights into and out of its neurons
    do); a matrix at least a tenth of that. A tensor of zeros without kin gets `NO_SCALE`.

    Args:
        params: Tensors `(*batch, *shape)` in the order of `incidence`.
        incidence: Who shares axes with whom.
        batch_dims: How many leading dimensions are batch.

    Returns:
        Scales and root mean squares, `(*batch, T)` each.
    """
    index = incidence.at(params[0])
    mean_squares = torch.stack([_mean_square(p, batch_dims).reshape(p.shape[:batch_dims]) for p in params], -1)
    rms = (torch.nan_to_num(mean_squares) + TINY).sqrt()
    alive = (rms > 1e-8).to(rms.dtype)  # noqa: PLR2004 - a tensor of zeros has no scale to give
    weight = alive @ index["kin"].T
    of_kin = ((rms.log() * alive) @ index["kin"].T / weight.clamp(min=1)).exp()
    least = of_kin * torch.where(index["static"][:, 0] > 0, 1.0, 0.1).to(rms.dtype)
    scale = torch.maximum(rms, torch.where(weight > 0, least, NO_SCALE * (1 - alive)))
    return scale, rms


def weight_features(
    p: Tensor, g: Tensor, moments: Moments, scale: Tensor, name: str, index: int, batch_dims: int
) -> Tensor:
    """The channels of every weight of one tensor.

    Args:
        p: Parameter `(*batch, *shape)`.
        g: Gradient, the same shape.
        moments: The moments, `g` included.
        scale: The tensor's scale, `(*batch,)`.
        name: The tensor's name.
        index: The tensor's number.
        batch_dims: How many leading dimensions are batch.

    Returns:
        `(*batch, CHANNELS, *shape)`: channels before the shape, since whole tensors are then stacked, pooled and summed
        at the speed of memory.
    """
    new = moments.state[name]
    denominator = _denominator(moments, name, index, batch_dims)
    fast = new["exp_avg"] / spread(moments.correction1[..., index], p, batch_dims)
    slow = new["exp_avg_slow"] / (denominator * spread(moments.correction_slow[..., index], p, batch_dims))
    nominal = fast / denominator
    newest = (g.to(fast.dtype) / denominator).clamp(-CLIP, CLIP)
    relative = p.to(fast.dtype) * (_mean_square(nominal, batch_dims) + TINY).sqrt() / spread(scale, p, batch_dims)
    shared = (fast * (_mean_square(fast, batch_dims) + TINY).rsqrt()).clamp(-CLIP, CLIP)
    return torch.stack([nominal, slow, newest, relative, shared], batch_dims)  # (*batch, CHANNELS, *shape)


def pool(features: Tensor, batch_dims: int) -> tuple[list[Tensor], Tensor]:
    """Describe every row of a tensor, and the tensor, by the statistics of its weights.

    Args:
        features: `(*batch, CHANNELS, *shape)`.
        batch_dims: How many leading dimensions are batch.

    Returns:
        For every dimension d `(*batch, shape[d], ROW_CHANNELS)`, and for the tensor `(*batch, ROW_CHANNELS)`.
    """
    squares = features.square()
    agreement = features.select(batch_dims, 1) * features.select(batch_dims, 2)
    agreement = agreement.unsqueeze(batch_dims)  # (*batch, 1, *shape)
    dims = range(batch_dims + 1, features.dim())
    rows = []
    for d in dims:
        others = tuple(other for other in dims if other != d)
        parts = [part.mean(others) if others else part for part in (squares, agreement)]
        rows.append(torch.cat(parts, batch_dims).transpose(-1, -2))  # (*batch, shape[d], ROW_CHANNELS)
    whole = rows[0].mean(-2) if rows else torch.cat([squares, agreement], -1)
    return [_on_log_scale(row) for row in rows], _on_log_scale(whole)


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


def tensor_features(pooled: Sequence[Tensor], scale: Tensor, rms: Tensor, time: Tensor, incidence: Incidence) -> Tensor:
    """Put together what is known of every tensor.

    Args:
        pooled: For every tensor `(*batch, ROW_CHANNELS)`.
        scale: `(*batch, T)`.
        rms: `(*batch, T)`.
        time: `(*batch, T, TIME_CHANNELS)`.
        incidence: For the tensors' order and sizes.

    Returns:
        `(*batch, T, TENSOR_CHANNELS)`.
    """
    stacked = torch.stack(list(pooled), -2)  # (*batch, T, ROW_CHANNELS)
    static = incidence.at(stacked)["static"].expand(*stacked.shape[:-1], Incidence.STATIC)
    grown = torch.log(rms / scale + FLOOR).unsqueeze(-1)  # 0 for a matrix, down to log(.05) for a bias of zeros
    return torch.cat([stacked, grown, static, time], -1)


def _mean_square(value: Tensor, batch_dims: int) -> Tensor:
    """Over all but the batch. `(*batch, *shape) -> (*batch, 1, ..., 1)`."""
    dims = tuple(range(batch_dims, value.dim()))
    return value.square().mean(dims, keepdim=True) if dims else value.square()


def _denominator(moments: Moments, name: str, index: int, batch_dims: int) -> Tensor:
    v = moments.state[name]["exp_avg_sq"]
    return (v + TINY).sqrt() / spread(moments.correction2[..., index].sqrt(), v, batch_dims) + EPS


def _on_log_scale(moments: Tensor) -> Tensor:
    """Mean squares become log(rms + FLOOR), means stay. `(..., ROW_CHANNELS) -> (..., ROW_CHANNELS)`."""
    moments = torch.nan_to_num(moments, nan=0.0, posinf=MOST, neginf=-MOST)  # of an empty or a broken tensor
    squares = moments[..., :CHANNELS]
    return torch.cat([torch.log((squares + TINY).sqrt() + FLOOR), moments[..., CHANNELS:]], -1)
