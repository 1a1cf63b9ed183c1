"""The neural functional network of an update rule: from statistics of rows and tensors to coefficients.

    rows, tensors  ->  statistics (`nfn_optim.rule.features`)
                   ->  message passing (`nfn_optim.layers.message_passing`)
                   ->  coefficients of every row and tensor (`nfn_optim.rule.coefficients`)

Everything here costs O(neurons). The gain of a tensor, of a row and of a column is

    tensor_gain = (s / s0)^power exp(G + a_tensor)        row_gain = exp(a_row)        column_gains = exp(a_column)

with s the scale of the tensor, G its step-size adaptation (`nfn_optim.rule.step_size`) and a the last output of message
passing. A tensor whose update might be out of range falls back to Adam's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from nfn_optim.engine.executor import Executor
from nfn_optim.engine.passes import ALL_TERMS, COLUMNS, Terms
from nfn_optim.engine.weight_features import FEATURES, Statistics, WeightFeatures
from nfn_optim.layers import Incidence, MessagePassing
from nfn_optim.rule import features
from nfn_optim.rule.coefficients import Coefficients, FeatureCoefficients
from nfn_optim.rule.config import RuleConfig
from nfn_optim.rule.direction import Direction
from nfn_optim.rule.hyperparameters import horizon_of
from nfn_optim.rule.pooled import Pooled
from nfn_optim.rule.step import Step
from nfn_optim.rule.step_size import MAX_LOG_GAIN, adapt, gain_of, gradient_cosine, max_column_gain, shared_start

SCALE_UNIT = 0.05  # s0, the root mean square of a typical weight matrix at initialisation
FALLBACK_RMS = 50.0  # bound on the root mean square of a direction (Adam's has about 1), above which Adam's is taken


class CoefficientNetwork(nn.Module):
    """From statistics to coefficients; a new one yields Adam's (for `power=0` and `gain=1`).

    Args:
        config: Of the rule.
    """

    def __init__(self, config: RuleConfig) -> None:
        super().__init__()
        self.config = config
        self.message_passing = _message_passing(config)
        self.power = nn.Parameter(torch.tensor(float(config.power)))
        if config.adapt_rate:
            self.adapt_rate = nn.Parameter(torch.tensor(float(config.adapt_rate)))
            self.adapt_decay = nn.Parameter(torch.tensor(float(config.adapt_decay)))
        with torch.no_grad():
            for name, part in (("gradient", config.gradient_part), ("weight", config.shrinkage)):
                self.message_passing.tensor_bias[WeightFeatures._fields.index(name)] = part
            self.message_passing.tensor_bias[-1] = MAX_LOG_GAIN * math.atanh(math.log(config.gain) / MAX_LOG_GAIN)

    def output_parameters(self) -> list[nn.Parameter]:
        """The parameters without which the coefficients are Adam's."""
        others = [value for name, value in self.named_parameters() if not name.startswith("message_passing.")]
        return [*others, *self.message_passing.output_parameters()]

    def terms(self) -> Terms:
        """Of which updates may be made, whatever the inputs, with the present parameters; synchronises."""
        if self.config.hidden:
            return ALL_TERMS
        messages = self.message_passing
        constants = zip(WeightFeatures._fields, messages.tensor_bias.tolist()[:-1], strict=True)
        terms = {"adam", *(name for name, value in constants if value)}
        return frozenset(terms | ({COLUMNS} if any(bool(w.any()) for w in messages.row_skip.parameters()) else set()))

    def forward(
        self, executor: Executor, direction: Direction, pooled: Pooled, step: Step
    ) -> tuple[list[Coefficients], list[dict[str, Tensor]]]:
        """Compute the coefficients of every tensor.

        Args:
            executor: Of the step.
            direction: Base direction of the rule.
            pooled: Statistics of rows and tensors.
            step: The step.

        Returns:
            By tensor: its coefficients, and what else changes in its state.
        """
        rows, inputs = _inputs(executor, pooled, step, shrinks=self.config.shrinkage > 0)
        log_step_size = self._adapted(pooled, step)
        by_row, by_tensor = self._messages(executor, rows, inputs.tensors, pooled)
        del rows  # as large as everything that follows
        log_unit = self.power.unsqueeze(-1) * (inputs.scale / SCALE_UNIT).log()
        unit = torch.exp(log_unit if log_step_size is None else log_unit + log_step_size)  # (*batch, T)
        coefficients, trusted = _coefficients(direction, self.config.mixes, by_row, by_tensor, unit, inputs, pooled)
        entries = []
        for i, name in enumerate(step.names):
            entries.append({"fallbacks": step.state[name]["fallbacks"] + ~trusted[..., i]})
            entries[i] |= {} if log_step_size is None else {"log_step_size": log_step_size[..., i]}
            entries[i] |= coefficients[i].to_state()
        return coefficients, entries

    def _adapted(self, pooled: Pooled, step: Step) -> Tensor | None:
        """The logarithm of every tensor's step size after this step, `(*batch, T)`, if it is adapted."""
        if not self.config.adapt_rate:
            return None
        before = torch.stack([step.state[name]["log_step_size"] for name in step.names], -1)
        cosine = gradient_cosine(Statistics.unpack(pooled.tensors), step.steps, pooled.entries)
        power = self.adapt_rate.unsqueeze(-1) * cosine - self.adapt_decay.unsqueeze(-1)
        before = shared_start(before, step.steps, step.incidence.at(before)["sides"])
        return adapt(before, power, step.steps, self.config.refresh_every)

    def _messages(self, executor: Executor, rows: Tensor, tensors: Tensor, pooled: Pooled) -> tuple[Tensor, Tensor]:
        """`MessagePassing.forward`, compiled where that pays, once for each network."""
        incidence, active = pooled.incidence, (pooled.active_rows, pooled.active_tensors)
        if not executor.compiles(rows.numel()):
            coefficients: tuple[Tensor, Tensor] = self.message_passing(rows, tensors, incidence, active)
        else:
            theta, template = [*self.message_passing.parameters()], _template(self.config)
            args = (rows, tensors, theta, template, incidence, active)
            coefficients = executor.run(_functional_message_passing, *args, dynamic=False)
        return coefficients


@dataclass(frozen=True)
class _Inputs:
    """The inputs of message passing but for the rows, and what its outputs are combined with.

    Attributes:
        tensors: `(*batch, T, TENSOR_CHANNELS)`.
        units: Of the coefficients of `WeightFeatures`, packed, `(*batch, T, FEATURES)`.
        scale: Of the tensors, `(*batch, T)`.
    """

    tensors: Tensor
    units: Tensor
    scale: Tensor


def _inputs(executor: Executor, pooled: Pooled, step: Step, *, shrinks: bool) -> tuple[Tensor, _Inputs]:
    """`log_statistics` of all rows, `(*batch, N, ROW_CHANNELS)`, and the other inputs.

    Args:
        executor: As of `forward`; so are `pooled` and `step`.
        pooled: See there.
        step: See there.
        shrinks: Whether the coefficient of the weight has the unit `features.shrink_unit`.
    """
    incidence, steps = step.incidence, step.steps
    index = incidence.at(steps)
    means = Statistics.unpack(pooled.tensors)
    scale, rms = features.scales_of(means.weight, incidence)  # (*batch, T)
    units_of_features = features.units_of(means, scale)
    units = torch.stack(units_of_features, -1)  # (*batch, T, FEATURES)
    statistics = features.log_statistics(pooled.tensors, units)
    total = step.hyper.total_steps
    time = features.time_features(steps, None if total is None else horizon_of(total, steps))
    tensors = features.tensor_features(statistics, scale, rms, pooled.counts, time, incidence)
    compiles = executor.compiles(pooled.rows.numel())
    log_statistics = partial(executor.run, features.log_statistics) if compiles else features.log_statistics
    rows = log_statistics(pooled.rows, incidence.tensors_to_rows(units))
    if incidence.has_masked:
        rows = torch.where(index["masked"], incidence.tensors_to_rows(statistics), rows)
    if shrinks:
        units = torch.stack(units_of_features._replace(weight=features.shrink_unit(means, scale, steps)), -1)
    return rows, _Inputs(tensors, units, scale)


def _coefficients(
    direction: Direction,
    mixes: bool,
    by_row: Tensor,
    by_tensor: Tensor,
    unit: Tensor,
    inputs: _Inputs,
    pooled: Pooled,
) -> tuple[list[Coefficients], Tensor]:
    """From the outputs of message passing to the coefficients of every tensor.

    Args:
        direction: Base direction of the rule.
        mixes: See `RuleConfig`.
        by_row: Outputs for the rows, `(*batch, N, FEATURES + 1)`.
        by_tensor: Outputs for the tensors, `(*batch, T, FEATURES + 1)`.
        unit: Of each tensor's updates, `(*batch, T)`.
        inputs: Of message passing.
        pooled: Statistics of rows and tensors.

    Returns:
        By tensor; and which updates are in range, `(*batch, T)`: the others fall back to Adam's.
    """
    incidence = pooled.incidence
    index = incidence.at(unit)
    of_leading = index["tensor_of_leading"]  # F leading rows, of all tensors one after the other
    by_leading = F.pad(by_row, (0, 0, 0, 1)).index_select(-2, index["leading"])  # (*batch, F, FEATURES + 1)
    row_coeffs = by_leading[..., :-1] + by_tensor[..., :-1].index_select(-2, of_leading)
    row_gains, tensor_gain = gain_of(by_row[..., -1]), gain_of(by_tensor[..., -1])  # (*batch, N), (*batch, T)
    leading_gain = F.pad(row_gains, (0, 1), value=1.0).index_select(-1, index["leading"])  # (*batch, F)
    units = inputs.units.index_select(-2, of_leading)

    is_matrix = index["matrix"].index_select(-1, of_leading)
    bound = leading_gain * _rms_bound(direction, mixes, is_matrix, pooled.leading, units, row_coeffs)  # (*batch, F)
    others = tensor_gain * max_column_gain(torch.where(pooled.active_rows > 0, row_gains, 1.0), incidence)
    beyond = ~(bound * others.index_select(-1, of_leading) <= FALLBACK_RMS) * pooled.active_leading  # 1 for NaN
    trusted = torch.zeros_like(unit).index_add(-1, of_leading, beyond.detach()) == 0  # (*batch, T)

    row_gains = torch.where(trusted.index_select(-1, index["tensor_of_row"]), row_gains, 1.0)
    tensor_gain = torch.where(trusted, unit * tensor_gain, 1.0)
    trusted_rows = trusted.index_select(-1, of_leading)
    leading_gain = torch.where(trusted_rows, leading_gain, 1.0)
    coeffs = WeightFeatures(*torch.where(trusted_rows.unsqueeze(-1), row_coeffs, 0.0).unbind(-1))
    trusted_units = WeightFeatures(*torch.where(trusted_rows.unsqueeze(-1), units, 0.0).unbind(-1))
    packed = _pack(direction, mixes, coeffs, trusted_units, trusted_rows * is_matrix)
    by_tensor_rows = (torch.split(packed, incidence.lengths, -2), torch.split(leading_gain, incidence.lengths, -1))
    coefficients = []
    for i, (segments, coeffs_i, gain_i) in enumerate(zip(incidence.segments, *by_tensor_rows, strict=True)):
        column_gains = tuple(row_gains[..., s.start : s.start + s.length] for s in segments[1:])
        coefficients.append(Coefficients(coeffs_i, gain_i, column_gains, tensor_gain[..., i]))
    return coefficients, trusted


def _rms_bound(
    direction: Direction, mixes: bool, is_matrix: Tensor, means: Tensor, units: Tensor, row_coeffs: Tensor
) -> Tensor:
    """A bound on the root mean square of direction + learned in every row, by Minkowski's inequality.

    Args:
        direction: Base direction of the rule.
        mixes: See `RuleConfig`.
        is_matrix: 1 for rows of matrices, else 0; `(F,)`.
        means: `Statistics` over the rows packed, `(*batch, F, STATISTICS)`.
        units: `WeightFeatures` packed, `(*batch, F, FEATURES)`.
        row_coeffs: Likewise.

    Returns:
        `(*batch, F)`, NaN where a statistic or a coefficient is.
    """
    rms = means[..., :FEATURES].sqrt() * units
    coeffs = WeightFeatures(*row_coeffs.unbind(-1))
    parts = WeightFeatures(*(rms * row_coeffs).abs().unbind(-1))
    learned, x = parts.weight + parts.momentum, rms[..., 0]
    if mixes:
        x = x * (1 - coeffs.gradient).abs() + parts.slow + parts.gradient
    else:
        learned = learned + parts.slow + parts.gradient
    return (direction.rms_bound(x, is_matrix) * (1 + coeffs.adam)).abs() + learned


def _pack(direction: Direction, mixes: bool, coeffs: WeightFeatures, units: WeightFeatures, enabled: Tensor) -> Tensor:
    """Coefficients of the direction's terms and `FeatureCoefficients`, `(*batch, F, terms + 7)`; units applied."""
    zero = torch.zeros_like(coeffs.slow)
    added, parts = (coeffs.slow, coeffs.gradient), (zero, zero)
    if mixes:
        added, parts = parts, added
    terms = direction.terms_of(1 + coeffs.adam, enabled)
    others = FeatureCoefficients(
        slow=added[0],
        gradient=added[1],
        weight=coeffs.weight * units.weight,
        momentum=coeffs.momentum,
        momentum_unit=units.momentum,
        slow_part=parts[0],
        gradient_part=parts[1],
    )
    return torch.stack([*terms, *others], -1)


def _message_passing(config: RuleConfig) -> MessagePassing:
    """Message passing with an output for the coefficient of every feature and one for the gain."""
    channels = features.ROW_CHANNELS, features.TENSOR_CHANNELS
    return MessagePassing(*channels, config.hidden, FEATURES + 1, config.rounds)


@lru_cache(maxsize=16)
def _template(config: RuleConfig) -> MessagePassing:
    """Message passing without parameters of its own, the same object for all rules of one configuration."""
    with torch.device("meta"):
        return _message_passing(config)


def _functional_message_passing(
    rows: Tensor,
    tensors: Tensor,
    theta: Sequence[Tensor],
    template: MessagePassing,
    incidence: Incidence,
    active: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """`MessagePassing.forward` as a function of its parameters too, in their order."""
    named = {name: value for (name, _), value in zip(template.named_parameters(), theta, strict=True)}
    coefficients: tuple[Tensor, Tensor] = functional_call(template, named, (rows, tensors, incidence, active))
    return coefficients
