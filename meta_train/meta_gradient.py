"""Estimates of the gradient of the objective with respect to theta, one per member or antithetic pair.

    backprop   truncated backpropagation: through one window, with the carry at its start treated as a constant. Exact
               if the window is the horizon; otherwise biased towards short-term progress.
    es         antithetic evolution strategies: e (L(theta + e) - L(theta - e)) / 2 s^2 for perturbations e of standard
               deviation s, both runs from the same carry. No exploding gradients; truncated like backprop.
    pes        persistent evolution strategies: every run keeps its own carry from window to window, and the
               accumulated perturbation takes the place of e. Not biased by the truncation.

With backpropagation every member has its own copy of theta, so that there is one gradient per member, and one that
exploded can be clipped or rejected alone. In evolution strategies the first half of the members runs with theta + e and
the second half, on the same initial parameters and batches, with theta - e.

References:
    Understanding Short-Horizon Bias in Stochastic Meta-Optimization (Wu et al., 2018), arXiv:1803.02021
    Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution Strategies (Vicol et al.,
    2021), Alg. 2, arXiv:2112.13835
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from meta_train.objective import Objective
from meta_train.tasks import Task
from meta_train.theta_vector import flatten, trainable_mask, unflatten
from meta_train.unroll import Carry, Unrolling, Window, draw_batch, unroll
from nfn_optim.engine.moments import SQRT_EPS as SQRT_EPS
from nfn_optim.rule import UpdateRule

AVERAGE_BATCHES = 4  # batches for the loss at averaged parameters

Estimator = Literal["backprop", "es", "pes"]


@dataclass(frozen=True)
class Estimate:
    """Estimates from one window of one task.

    Attributes:
        samples: One estimate per member or pair, `(samples, size of theta)`; rows may be non-finite.
        objective: `(members,)`.
        losses: `(window, members)`.
        carry: The state of inner training after the window, detached.
    """

    samples: Tensor
    objective: Tensor
    losses: Tensor
    carry: Carry


@dataclass(frozen=True)
class Estimation:
    """A meta-gradient estimator.

    Args:
        estimator: "backprop", "es" or "pes".
        window: Steps per window; 0 for whole inner runs.
        objective: The objective to minimise.
        unrolling: Options of inner training.
        sigma: Standard deviation of the perturbations of theta, with "es" and "pes".
        standardised: Whether the member gradients of a task, or its antithetic differences, are divided by their root
            mean square, so that all tasks have the same weight whatever the scale of their loss.
        imitation: Weight of the disagreement with the expert in the objective, if there is an expert.

    Raises:
        ValueError: An unknown estimator, or a number out of range.
    """

    estimator: Estimator = "backprop"
    window: int = 20
    objective: Objective = field(default_factory=Objective)
    unrolling: Unrolling = field(default_factory=Unrolling)
    sigma: float = 0.01
    standardised: bool = False
    imitation: float = 0.0

    def __post_init__(self) -> None:
        if self.estimator not in ("backprop", "es", "pes"):
            raise ValueError(f"expected the estimator 'backprop', 'es' or 'pes', found {self.estimator!r}")
        if self.window < 0 or self.sigma <= 0:
            raise ValueError(f"expected a window of 0 steps or more, and sigma > 0, found {self.window}, {self.sigma}")

    @property
    def antithetic_copies(self) -> int:
        """Copies of every member that the carry must hold: 2 with perturbations of both signs, else 1."""
        return 1 if self.estimator == "backprop" else 2

    def __call__(self, rule: UpdateRule, task: Task, carry: Carry, generator: torch.Generator) -> Estimate:
        """Estimate the gradient from the next window of an inner run.

        Args:
            rule: The update rule.
            task: The task to train.
            carry: The state of inner training, started with `copies=antithetic_copies`.
            generator: Of batches and perturbations.

        Raises:
            ValueError: The carry was started for another estimator, or no parameter of the rule requires a gradient.
        """
        if not any(p.requires_grad for p in rule.parameters()):
            raise ValueError("expected a rule with trainable parameters, found none; call rule.requires_grad_()")
        if carry.copies != self.antithetic_copies:
            raise ValueError(
                f"expected a carry with {self.antithetic_copies} copies of every member for {self.estimator!r}, found "
                f"{carry.copies}; start it with start(..., copies={self.antithetic_copies})"
            )
        estimate = self._backprop if self.estimator == "backprop" else self._evolution
        return estimate(rule, task, carry, generator)

    def _backprop(self, rule: UpdateRule, task: Task, carry: Carry, generator: torch.Generator) -> Estimate:
        theta = flatten(rule).expand(len(carry.total_steps), -1).clone().requires_grad_()
        with torch.enable_grad():
            window, scores = self._scored(rule, task, carry, generator, theta)
            (samples,) = torch.autograd.grad(scores.sum(), theta)
        samples = torch.where(carry.alive.unsqueeze(-1), samples * trainable_mask(rule), torch.nan)
        if self.standardised:
            squares = samples.square().sum(1)
            samples = samples / (squares[squares.isfinite()].mean().sqrt() + SQRT_EPS)
        return Estimate(samples, scores.detach(), window.losses.detach(), window.carry.detach())

    @torch.no_grad()
    def _evolution(self, rule: UpdateRule, task: Task, carry: Carry, generator: torch.Generator) -> Estimate:
        center, pairs = flatten(rule), len(carry.total_steps) // 2
        noise = torch.randn(pairs, len(center), generator=generator, dtype=center.dtype).to(center.device)
        noise = noise * self.sigma * trainable_mask(rule)
        window, scores = self._scored(rule, task, carry, generator, center + torch.cat([noise, -noise]))
        difference = (scores[:pairs] - scores[pairs:]) / (2 * self.sigma**2)
        if self.standardised:
            difference = difference / (difference.square().mean().sqrt() + SQRT_EPS)
        end = window.carry
        if self.estimator == "pes":
            accumulated = carry.accumulated_perturbation
            perturbation = noise if accumulated is None else accumulated + noise
            end = replace(end, accumulated_perturbation=perturbation)
        else:
            perturbation, end = noise, _restart_from_first_half(end)
        return Estimate(perturbation * difference.unsqueeze(-1), scores, window.losses, end)

    def _scored(
        self, rule: UpdateRule, task: Task, carry: Carry, generator: torch.Generator, theta: Tensor
    ) -> tuple[Window, Tensor]:
        """Unroll with a theta for each member, `(members, size)`; the objective of each, `(members,)`."""
        unrolling, objective = replace(self.unrolling, held_out=self.objective.held_out), self.objective
        steps = self.window or carry.horizon - carry.steps
        window = unroll(rule, task, carry, steps, generator, theta=unflatten(rule, theta), unrolling=unrolling)
        scores = objective(window.losses, carry.first_loss)
        if objective.averaged_fraction > 0:
            batches = [draw_batch(task, carry, generator, held_out=objective.held_out) for _ in range(AVERAGE_BATCHES)]
            at_mean = torch.stack([task.losses(window.mean_params, carry.member, batch) for batch in batches])
            fraction = objective.averaged_fraction
            scores = (1 - fraction) * scores + fraction * objective(at_mean, carry.first_loss)
        if self.imitation > 0:
            scores = scores + self.imitation * window.disagreement
        return window, scores


@dataclass(frozen=True)
class Combined:
    """One gradient from many estimates.

    Attributes:
        gradient: `(size of theta,)`, clipped.
        norm: Of the gradient before it was clipped.
        signal_to_noise: Squared norm of the expected gradient over the variance of the mean, estimated; about 0 for
            pure noise, NaN from a single estimate.
        dropped: Fraction of the estimates that were rejected, 0 to 1.
    """

    gradient: Tensor
    norm: float
    signal_to_noise: float
    dropped: float

    @property
    def is_valid(self) -> bool:
        """Whether at least one estimate was accepted."""
        return self.dropped < 1


def combine(samples: Tensor, clip: float, *, clip_each: float = math.inf, reject: float = math.inf) -> Combined:
    """Average the estimates that are finite and not too large, and clip.

    Args:
        samples: `(samples, size of theta)`.
        clip: Largest norm of the mean.
        clip_each: Largest norm of an estimate; larger ones are scaled down to it.
        reject: Estimates of larger norm come from an exploded window and are rejected.
    """
    norms = samples.norm(dim=1)
    accepted = norms.isfinite() & (norms <= reject)
    count = int(accepted.sum())
    if count == 0:
        return Combined(torch.zeros_like(samples[0]), math.nan, math.nan, 1.0)
    estimates, norms = samples[accepted], norms[accepted]
    norm = estimates.mean(0).norm().item()
    if math.isfinite(clip_each):
        estimates = estimates * (clip_each / norms.clamp(min=clip_each)).unsqueeze(-1)
    mean = estimates.mean(0)
    noise = estimates.var(0).sum().item() / count if count > 1 else math.nan  # the variance of the mean
    signal = mean.square().sum().item() - noise
    mean = mean * min(1.0, clip / (mean.norm().item() + 1e-12))
    return Combined(mean, norm, signal / noise if noise > 0 else math.nan, 1 - count / len(samples))


def _restart_from_first_half(carry: Carry) -> Carry:
    """The carry with the second half of the members replaced by copies of the first half."""
    half = len(carry.total_steps) // 2

    def duplicate(value: Tensor) -> Tensor:
        return torch.cat([value[:half], value[:half]])

    params = {name: duplicate(p) for name, p in carry.params.items()}
    state = {name: {key: duplicate(value) for key, value in s.items()} for name, s in carry.state.items()}
    return replace(carry, params=params, state=state, alive=duplicate(carry.alive))
