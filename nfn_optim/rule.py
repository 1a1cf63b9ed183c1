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
from nfn_optim.features import CHANNELS, ROW_CHANNELS, TENSOR_CHANNELS, State
from nfn_optim.layers import Incidence, TiedStack
from nfn_optim.symmetry import Symmetry

Hyper = float | Tensor | Mapping[str, float | Tensor]
"""One value for all parameters, or one for each by name."""

SCALE_UNIT = 0.05  # s0, the root mean square of a typical weight matrix at initialisation
GAIN_RANGE = 3.0  # no part of a exceeds this in size
COOLEST = 0.01  # what is left of the learning rate behind the end of the horizon
FALLBACK_RMS = 30.0  # a direction of larger root mean square (Adam's has about 1) is not trusted


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


class UpdateRule(nn.Module):
    """A learned update rule; its parameters are theta. A new one equals AdamW (for `power=0`).

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
            self.gains = Gains()
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
        if self.learns:
            directions = self._learned(params, grads, moments, incidence, total_steps, batch_dims)
        else:
            directions = {n: features.nominal_of(moments, n, i, batch_dims) for i, n in enumerate(names)}
        cooling = self.cooling(moments.steps, total_steps)
        update = {}
        for i, (name, direction) in enumerate(directions.items()):
            p = params[name].to(direction.dtype)
            rate = _of(lr, name, p, batch_dims)
            if cooling is not None:
                rate = rate * features.spread(cooling[..., i], p, batch_dims)
            update[name] = -rate * (direction + _of(weight_decay, name, p, batch_dims) * p)
        return update, moments.state

    def cooling(self, steps: Tensor, total_steps: Tensor | float | None) -> Tensor | None:
        """What the learning rate is multiplied by: 1, falling to zero at the end of a known horizon.

        Args:
            steps: Steps taken, this one included, `(*batch, T)`.
            total_steps: The horizon in steps, as in `forward`.

        Returns:
            `(*batch, T)`, or None where it is always 1.
        """
        if not self.config.cooldown or total_steps is None:
            return None
        total = torch.as_tensor(total_steps, dtype=steps.dtype, device=steps.device).unsqueeze(-1)
        left = (1 - (steps - 1) / total.clamp(min=1)) / self.config.cooldown
        return torch.where(total > 0, left.clamp(COOLEST, 1.0), torch.ones_like(left))

    def _learned(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        moments: features.Moments,
        incidence: Incidence,
        total_steps: Tensor | float | None,
        batch_dims: int,
    ) -> dict[str, Tensor]:
        """Directions `(*batch, *shape)` by name: gain (nominal + learned)."""
        scale, rms = features.scales_of(
            [p.to(moments.steps.dtype) for p in params.values()], incidence, batch_dims
        )  # (*batch, T)
        seen: dict[str, Tensor] = {}
        segments: dict[tuple[int, int], Tensor] = {}  # first row and length -> rows
        pooled = []
        for i, (name, p) in enumerate(params.items()):
            seen[name] = features.weight_features(p, grads[name], moments, scale[..., i], name, i, batch_dims)
            by_dim, whole = features.pool(seen[name], batch_dims)
            for s, rows in zip(incidence.segments[i], by_dim, strict=True):
                segments[s.start, s.length] = whole.unsqueeze(-2).expand_as(rows) if s.mute else rows
            pooled.append(whole)
        total = None
        if total_steps is not None:
            total = torch.as_tensor(total_steps, dtype=rms.dtype, device=rms.device).unsqueeze(-1)
        tensors = features.tensor_features(
            pooled, scale, rms, features.time_features(moments.steps, total), incidence
        )  # (*batch, T, TENSOR_CHANNELS)
        ordered = [segments[key] for key in sorted(segments)]
        everything = torch.cat(ordered, -2) if ordered else tensors.new_zeros((*tensors.shape[:-2], 0, ROW_CHANNELS))
        by_row, by_tensor = self.stack(everything, tensors, incidence)
        gains = torch.exp(self.power * (scale / SCALE_UNIT).log())  # (*batch, T)

        by_row_gain, by_tensor_gain = self.gains(by_row[..., -1], by_tensor[..., -1], gains)

        directions = {}
        for i, (name, f) in enumerate(seen.items()):
            nominal = f.select(batch_dims, 0)
            said = by_tensor[..., i, None, :-1]  # (*batch, 1, channels)
            gain = features.spread(by_tensor_gain[..., i], nominal, batch_dims)
            for s in incidence.segments[i]:
                part = slice(s.start, s.start + s.length)
                gain = gain * _along(by_row_gain[..., part], incidence.ndims[i], s.dim)
                said = said + by_row[..., part, :-1] if s.dim == 0 else said  # (*batch, shape[0], channels)
            direction = gain * (nominal + self._answer(f, said, batch_dims))
            trusted = _rms(direction.detach() / features.spread(gains[..., i], nominal, batch_dims), batch_dims)
            trusted = trusted <= FALLBACK_RMS  # (*batch,); False for NaN
            new = moments.state[name]
            new["fallbacks"] = new["fallbacks"] + (~trusted).to(new["fallbacks"].dtype)
            directions[name] = torch.where(features.spread(trusted, nominal, batch_dims), direction, nominal)
        return directions

    def _answer(self, f: Tensor, said: Tensor, batch_dims: int) -> Tensor:
        """The learned part of one tensor, before the gain.

        Args:
            f: Features `(*batch, CHANNELS, *shape)`.
            said: What each row says, `(*batch, shape[0] or 1, channels)`.
            batch_dims: How many leading dimensions are batch.

        Returns:
            `(*batch, *shape)`.
        """
        shape = f.shape[batch_dims + 1 :]
        rest = math.prod(shape) // max(said.shape[-2], 1)
        rows = f.reshape((*f.shape[: batch_dims + 1], said.shape[-2], rest))  # (*batch, CHANNELS, shape[0], rest)
        heard = said.transpose(-1, -2).unsqueeze(-1)  # (*batch, channels, shape[0] or 1, 1)
        if self.config.form == "linear":
            answer = (rows * heard).sum(batch_dims)  # (*batch, shape[0], rest)
        else:
            seen = torch.einsum("...krc,hk->...hrc", rows, self.see.weight) + self.see.bias[:, None, None]
            answer = torch.einsum("...hrc,h->...rc", torch.tanh(seen + heard), self.answer.weight[0])
        answer = answer.reshape((*f.shape[:batch_dims], *shape))
        return answer if self.config.form == "linear" else answer * _activity(f.select(batch_dims, 0), batch_dims)


class Gains(nn.Module):
    """The factors of the gain; a module without parameters, so that they can be heard by a forward hook."""

    def forward(self, by_row: Tensor, by_tensor: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
        """Turn what was said into factors, each of what was said between exp(-GAIN_RANGE) and exp(GAIN_RANGE).

        Args:
            by_row: What every row says, `(*batch, N)`.
            by_tensor: What every tensor says, `(*batch, T)`.
            units: What a tensor's updates are measured in, over that of a typical one, `(*batch, T)`.

        Returns:
            The factors of the rows `(*batch, N)` and of the tensors `(*batch, T)`.
        """
        return _gain(by_row), units * _gain(by_tensor)


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
    shape = [1] * ndim
    shape[dim] = value.shape[-1]
    return value.reshape(*value.shape[:-1], *shape)


def _rms(value: Tensor, batch_dims: int) -> Tensor:
    """Root mean square over all but the batch. `(*batch, *shape) -> (*batch,)`."""
    batch = value.shape[:batch_dims]
    flat = value.reshape(*batch, -1) if value.numel() else value.new_zeros((*batch, 1))
    return flat.square().mean(-1).sqrt()


def _activity(nominal: Tensor, batch_dims: int) -> Tensor:
    """Root mean square of the nominal direction, 0 when there is nothing to do. `(*batch, 1, ..., 1)`."""
    return features.spread((_rms(nominal, batch_dims).square() + features.TINY).sqrt(), nominal, batch_dims)
