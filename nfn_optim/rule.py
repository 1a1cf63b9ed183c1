"""The update rule: a neural functional network from weights, gradients and moments to an update.

    update = -lr (gain (nominal + learned) + weight_decay p)

    nominal    m^ / (sqrt(v^) + eps), Adam's bias-corrected direction
    learned    sum_k c_k f_k, linear in the features f of the weight (form "linear"), or a network of them ("network")
    gain       (s / s0)^power exp(a), s the scale of the tensor

where -lr also falls to zero over the last part of training (`RuleConfig.cooldown`) if the horizon is known, the
coefficients c of a weight are what its row and its tensor say, and a the sum of what its row, its column,
its taps and its tensor say, each computed by messages between the neurons of the whole network
(`nfn_optim.layers.tied`); so the gain is a product of small factors and the linear form reads the features once. With
power = 1 an update is measured in units of its tensor's scale. With the learned part at zero (`UpdateRule.zero_`) or
absent (`UpdateRule.nominal`) the rule is AdamW.

The rule is one pure function: the optimizer calls it without gradients, meta-training with them, and nothing else
computes an update. All of it commutes with permuting neurons.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), arXiv:2302.14040
    Decoupled Weight Decay Regularization (Loshchilov and Hutter, 2019), Alg. 2, arXiv:1711.05101
    A Closer Look at Learned Optimization (Harrison et al., 2022), Sec. 4, arXiv:2209.11208
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from nfn_optim import features
from nfn_optim.features import CHANNELS, CLIP, ROW_CHANNELS, TENSOR_CHANNELS, State
from nfn_optim.layers import Incidence, TiedStack
from nfn_optim.symmetry import Symmetry

Hyper = float | Tensor | Mapping[str, float | Tensor]
"""One value for all parameters, or one for each by name."""

SCALE_UNIT = 0.05  # s0, the root mean square of a typical weight matrix at initialisation
GAIN_RANGE = 3.0  # no part of a exceeds this in size
COOLEST = 0.01  # what is left of the learning rate behind the end of the horizon
FALLBACK_RMS = 50.0  # a direction that might be of larger root mean square (Adam's has about 1) is not trusted


@dataclass(frozen=True)
class RuleConfig:
    """What an update rule is made of.

    Args:
        hidden: Channels of the embeddings of neurons and tensors. 0 leaves the learned part out: AdamW.
        rounds: Rounds of messages between neurons and tensors.
        form: How a weight's update follows from its features: linearly, or by a small network.
        weight_hidden: Hidden units of the network per weight, form "network" only.
        power: Power of the tensor's scale in the gain when meta-training starts; it is learned. 1 measures updates in
            units of the scale, 0 is Adam's.
        cooldown: Last part of a known horizon over which the learning rate falls linearly, 0 to 1.
    """

    hidden: int = 16
    rounds: int = 2
    form: Literal["linear", "network"] = "linear"
    weight_hidden: int = 8
    power: float = 0.0
    cooldown: float = 0.0

    def __post_init__(self) -> None:
        if self.hidden < 0 or self.rounds < 0 or self.weight_hidden < 1:
            raise ValueError(f"expected hidden >= 0, rounds >= 0 and weight_hidden >= 1, found {self}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"expected a cooldown of 0 to 1, found {self.cooldown}")
        if self.form not in ("linear", "network"):
            raise ValueError(f"expected form 'linear' or 'network', found {self.form!r}")


@dataclass(frozen=True)
class Said:
    """What one tensor and its rows, columns and taps say to its weights.

    Attributes:
        coefficients: Of each row, `(*batch, shape[0] or 1, channels)`.
        units: Of the channels, `(*batch, CHANNELS)`.
        gains: For every dimension `(*batch, shape[dim])`, the first with the tensor's own; `(*batch, 1)` of a scalar.
        trusted: Whether the direction is certain to stay in range, `(*batch,)`.
    """

    coefficients: Tensor
    units: Tensor
    gains: tuple[Tensor, ...]
    trusted: Tensor


class UpdateRule(nn.Module):
    """A learned update rule; its parameters are theta. A new one equals AdamW (for `power=0`).

    Theta may carry the leading dimensions of the batch (`torch.func.functional_call` with `(*batch, *shape)` for every
    parameter): every member then has a rule of its own, as the particles of evolution strategies do.

    Args:
        config: What it is made of.

    Example:
        >>> params = {"weight": torch.ones(3, 2)}
        >>> symmetry = Symmetry.separate({"weight": (3, 2)})
        >>> rule = UpdateRule()
        >>> update, state = rule(params, {"weight": torch.ones(3, 2)}, rule.init(params), symmetry, lr=0.1)
        >>> round(update["weight"][0, 0].item(), 4)  # one step of Adam
        -0.1
    """

    def __init__(self, config: RuleConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or RuleConfig()
        self.learns = config.hidden > 0
        if self.learns:
            out = (CHANNELS if config.form == "linear" else config.weight_hidden) + 1  # the last one is the gain's
            self.stack = TiedStack(ROW_CHANNELS, TENSOR_CHANNELS, config.hidden, out, config.rounds)
            self.power = nn.Parameter(torch.tensor(float(config.power)))
            if config.form == "network":
                self.see = nn.Linear(CHANNELS, config.weight_hidden)
                self.answer = nn.Linear(config.weight_hidden, 1, bias=False)
                nn.init.zeros_(self.answer.weight)

    @classmethod
    def nominal(cls) -> UpdateRule:
        """The rule without a learned part: AdamW with betas (.9, .999) and epsilon 1e-8."""
        return cls(RuleConfig(hidden=0))

    @torch.no_grad()
    def zero_(self) -> UpdateRule:
        """Set the learned part's output to zero, in place; what remains is AdamW."""
        if self.learns:
            self.power.zero_()
            for readout in (*self.stack.read_rows.values(), self.stack.read_tensors):
                for value in readout.parameters():
                    value.zero_()
            if self.config.form == "network":
                self.answer.weight.zero_()
        return self

    def init(self, params: Mapping[str, Tensor], batch_dims: int = 0) -> State:
        """The state before the first step.

        Args:
            params: Name -> tensor `(*batch, *shape)`.
            batch_dims: How many leading dimensions are batch.
        """
        return features.init_state(params, batch_dims, learned=self.learns)

    def forward(  # noqa: PLR0913 - this is the whole interface of a rule
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        state: State,
        symmetry: Symmetry,
        *,
        lr: Hyper,
        weight_decay: Hyper = 0.0,
        total_steps: Tensor | float | None = None,
        batch_dims: int = 0,
    ) -> tuple[dict[str, Tensor], State]:
        """One step: what to add to the parameters, and the new state. Pure; nothing is changed in place.

        Args:
            params: Name -> tensor `(*batch, *shape)`; the names of `symmetry`, in its order or another.
            grads: Name -> gradient of the loss, the same shapes.
            state: What `init` or the last step returned.
            symmetry: The axes of these tensors.
            lr: Learning rate, per step, in Adam's units; 0-d, or `(*batch,)` tensors, or by name.
            weight_decay: Decoupled weight decay, per unit of learning rate; as `lr`.
            total_steps: The horizon in steps, if known; 0 where it is not. A number or `(*batch,)`.
            batch_dims: How many leading dimensions of every tensor are batch: independent networks of one shape.

        Returns:
            Update and state; new parameters are `params + update`.
        """
        incidence = incidence_of(symmetry)
        names = incidence.names
        params, grads = {n: params[n] for n in names}, {n: grads[n] for n in names}
        moments = features.advance(grads, {n: state[n] for n in names})
        raw: list[list[Tensor]] = []
        said: list[Said] = []
        if self.learns:
            raw = [
                features.see(p, grads[n], moments, n, i, batch_dims) for i, (n, p) in enumerate(params.items())
            ]  # the first pass over the weights ends with pooling
            said = self._say([features.pool(x, batch_dims) for x in raw], moments, incidence, total_steps, batch_dims)
        cooling = self._cooling(moments.steps, total_steps)
        update = {}
        for i, (name, p) in enumerate(params.items()):
            if self.learns:
                direction = self._listen(raw[i], said[i], batch_dims)
                new = moments.state[name]
                new["fallbacks"] = new["fallbacks"] + (~said[i].trusted).to(new["fallbacks"].dtype)
            else:
                direction = features.nominal_of(moments, name, i, batch_dims)
            rate = _of(lr, name, direction, batch_dims)
            if cooling is not None:
                rate = rate * features.spread(cooling[..., i], direction, batch_dims)
            decay = _of(weight_decay, name, direction, batch_dims)
            update[name] = -rate * (direction + decay * p.to(direction.dtype))
        return update, moments.state

    def _cooling(self, steps: Tensor, total_steps: Tensor | float | None) -> Tensor | None:
        """What the learning rate is multiplied by, `(*batch, T)`: 1, falling to zero at the end of a known horizon."""
        if not self.config.cooldown or total_steps is None:
            return None
        total = torch.as_tensor(total_steps, dtype=steps.dtype, device=steps.device).unsqueeze(-1)
        left = (1 - (steps - 1) / total.clamp(min=1)) / self.config.cooldown
        return torch.where(total > 0, left.clamp(COOLEST, 1.0), torch.ones_like(left))

    def _say(
        self,
        pooled: list[tuple[list[Tensor], Tensor]],
        moments: features.Moments,
        incidence: Incidence,
        total_steps: Tensor | float | None,
        batch_dims: int,
    ) -> list[Said]:
        """What every tensor, its rows, columns and taps say to its weights; costs O(neurons).

        Args:
            pooled: For every tensor the means of its rows by dimension, and its own.
            moments: For the time.
            incidence: Where rows, neurons and tensors meet.
            total_steps: The horizon.
            batch_dims: How many leading dimensions are batch.
        """
        whole = torch.stack([tensor for _, tensor in pooled], -2)  # (*batch, T, ROW_CHANNELS)
        scale, rms = features.scales_of(whole[..., 3], incidence)  # (*batch, T)
        units = features.units_of(whole, scale)  # (*batch, T, CHANNELS)
        described = features.describe(whole, units)
        total = None
        if total_steps is not None:
            total = torch.as_tensor(total_steps, dtype=rms.dtype, device=rms.device).unsqueeze(-1)
        time = features.time_features(moments.steps, total)
        tensors = features.tensor_features(described, scale, rms, time, incidence)  # (*batch, T, TENSOR_CHANNELS)
        segments: dict[tuple[int, int], Tensor] = {}  # first row and length -> rows
        for i, (by_dim, _) in enumerate(pooled):
            for s, means in zip(incidence.segments[i], by_dim, strict=True):
                rows = features.describe(means, units[..., i, None, :])
                segments[s.start, s.length] = described[..., i, None, :].expand_as(rows) if s.mute else rows
        ordered = [segments[key] for key in sorted(segments)]
        everything = torch.cat(ordered, -2) if ordered else tensors.new_zeros((*tensors.shape[:-2], 0, ROW_CHANNELS))
        by_row, by_tensor = self.stack(everything, tensors, incidence)
        by_scale = torch.exp(self.power.unsqueeze(-1) * (scale / SCALE_UNIT).log())  # (*batch, T)
        by_row_gain, by_tensor_gain = _gain(by_row[..., -1]), _gain(by_tensor[..., -1])  # (*batch, N), (*batch, T)

        said = []
        for i, (by_dim, tensor) in enumerate(pooled):
            coefficients = by_tensor[..., i, None, :-1]  # (*batch, 1, channels)
            first = by_tensor_gain[..., i, None]  # (*batch, 1)
            gains = []
            for s in incidence.segments[i]:
                part = slice(s.start, s.start + s.length)
                if s.dim == 0:
                    coefficients = coefficients + by_row[..., part, :-1]  # (*batch, shape[0], channels)
                    first = first * by_row_gain[..., part]  # (*batch, shape[0])
                else:
                    gains.append(by_row_gain[..., part])  # (*batch, shape[dim])
            means = by_dim[0] if by_dim else tensor.unsqueeze(-2)  # (*batch, shape[0] or 1, ROW_CHANNELS)
            reach = first * self._reach(means, units[..., i, None, :], coefficients)
            bound = reach.detach().square().mean(-1).sqrt()  # (*batch,)
            for gain in gains:
                bound = bound * gain.detach().amax(-1)
            trusted = (bound <= FALLBACK_RMS) & torch.isfinite(by_scale[..., i])  # False for NaN
            first = first * by_scale[..., i, None]
            said.append(Said(coefficients, units[..., i, :], (first, *gains), trusted))
        return said

    def _reach(self, means: Tensor, units: Tensor, coefficients: Tensor) -> Tensor:
        """A bound on the root mean square of nominal + learned in every row, by Minkowski's inequality.

        Args:
            means: Means over the rows of raw channels, `(*batch, rows, ROW_CHANNELS)`.
            units: `(*batch, 1, CHANNELS)`.
            coefficients: `(*batch, rows, channels)`.

        Returns:
            `(*batch, rows)`, NaN where something is.
        """
        rms = means[..., :CHANNELS].sqrt() * units
        if self.config.form == "linear":
            nominal, *others = (rms * (coefficients + torch.eye(1, CHANNELS).to(rms))).abs().unbind(-1)
            return nominal + sum(others)
        activity = rms[..., 0].square().mean(-1, keepdim=True).sqrt()
        broken = 0 * (rms.sum(-1) + coefficients.sum(-1))  # NaN where something is not finite, which tanh may hide
        return rms[..., 0] + activity * self.answer.weight.abs().sum((-2, -1)).unsqueeze(-1) + broken

    def _listen(self, raw: list[Tensor], said: Said, batch_dims: int) -> Tensor:
        """The direction of every weight of one tensor, gain (nominal + learned): the second pass over the weights.

        Args:
            raw: Raw channels, `(*batch, *shape)` each.
            said: What the tensor and its rows, columns and taps say.
            batch_dims: How many leading dimensions are batch.

        Returns:
            `(*batch, *shape)`; the nominal direction where the tensor is not trusted.
        """
        nominal, ndim = raw[0], raw[0].dim() - batch_dims
        trusted = said.trusted.unsqueeze(-1)  # (*batch, 1)
        first, *gains = (torch.where(trusted, gain, 1.0) for gain in said.gains)
        units = torch.where(trusted, said.units, 0.0)  # (*batch, CHANNELS)
        relative, shared = (raw[k] * features.spread(units[..., k], nominal, batch_dims) for k in (3, 4))
        channels = [*raw[:3], relative, shared.clamp(-CLIP, CLIP)]
        heard = torch.where(trusted.unsqueeze(-1), said.coefficients, 0.0)  # (*batch, shape[0] or 1, channels)
        if self.config.form == "linear":
            learned = sum(x * _along(c, ndim, 0) for x, c in zip(channels, heard.unbind(-1), strict=True))
        else:
            learned = self._network(channels, heard, batch_dims)
        direction = _along(first, ndim, 0) * (nominal + learned)
        for dim, gain in enumerate(gains, 1):
            direction = direction * _along(gain, ndim, dim)
        return direction

    def _network(self, channels: list[Tensor], heard: Tensor, batch_dims: int) -> Tensor:
        """The learned part of form "network", `(*batch, *shape)`; arguments as in `_listen`."""
        f = torch.stack(channels, batch_dims)  # (*batch, CHANNELS, *shape)
        shape = f.shape[batch_dims + 1 :]
        rest = math.prod(shape) // max(heard.shape[-2], 1)
        rows = f.reshape((*f.shape[: batch_dims + 1], heard.shape[-2], rest))  # (*batch, CHANNELS, shape[0], rest)
        seen = torch.einsum("...krc,...hk->...hrc", rows, self.see.weight) + self.see.bias[..., None, None]
        answer = torch.tanh(seen + heard.transpose(-1, -2).unsqueeze(-1))  # (*batch, hidden, shape[0], rest)
        answer = torch.einsum("...hrc,...h->...rc", answer, self.answer.weight[..., 0, :])
        return answer.reshape((*f.shape[:batch_dims], *shape)) * _activity(channels[0], batch_dims)


@lru_cache(maxsize=64)
def incidence_of(symmetry: Symmetry) -> Incidence:
    """The index lists of a symmetry, made once."""
    return Incidence(symmetry)


def _of(hyper: Hyper, name: str, like: Tensor, batch_dims: int) -> Tensor | float:
    """The value of a hyperparameter for one tensor, made to broadcast against it."""
    value = hyper[name] if isinstance(hyper, Mapping) else hyper
    if isinstance(value, Tensor):
        value = value.to(like.device, like.dtype)
        return features.spread(value, like, batch_dims) if value.dim() == batch_dims > 0 else value.reshape(())
    return value


def _gain(said: Tensor) -> Tensor:
    """A factor of the gain, between exp(-GAIN_RANGE) and exp(GAIN_RANGE)."""
    return torch.exp(GAIN_RANGE * torch.tanh(said / GAIN_RANGE))


def _along(value: Tensor, ndim: int, dim: int) -> Tensor:
    """Place `(*batch, length)` on dimension `dim` of `ndim` dimensions: `(*batch, 1, ..., length, ..., 1)`."""
    return value.reshape((*value.shape[:-1], *(value.shape[-1] if d == dim else 1 for d in range(ndim))))


def _rms(value: Tensor, batch_dims: int) -> Tensor:
    """Root mean square over all but the batch. `(*batch, *shape) -> (*batch,)`."""
    batch = value.shape[:batch_dims]
    flat = value.reshape(*batch, -1) if value.numel() else value.new_zeros((*batch, 1))
    return flat.square().mean(-1).sqrt()


def _activity(nominal: Tensor, batch_dims: int) -> Tensor:
    """Root mean square of the nominal direction, 0 when there is nothing to do. `(*batch, 1, ..., 1)`."""
    return features.spread((_rms(nominal, batch_dims).square() + features.TINY).sqrt(), nominal, batch_dims)
