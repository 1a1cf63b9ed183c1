"""Estimates of the gradient of the objective with respect to theta, one from every member or pair of members.

    backprop   through one window, as if the carry at its start did not depend on theta. Exact where the window is the
               horizon; otherwise it favours what pays within a window.
    es         evolution strategies: e (L(theta + e) - L(theta - e)) / 2 s^2 for perturbations e of deviation s, both
               runs from the same carry. No backpropagation, hence no exploding gradient; truncated like backprop.
    pes        persistent evolution strategies: every run keeps its own carry from window to window, and the sum of
               the perturbations so far takes the place of e. Not biased by the truncation.

With backpropagation every member has a theta of its own, all equal, so that its gradient is known apart from the
others': one that exploded can be clipped or left out alone. In evolution strategies the first half of the members runs
with theta + e and the second half, on the same initial parameters and batches, with theta - e.

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
from meta_train.theta_vector import flatten, trained, unflatten
from meta_train.unroll import Carry, Unrolling, Window, batch_of, losses_of, unroll
from nfn_optim.engine.moments import TINY
from nfn_optim.rule import UpdateRule

AVERAGE_BATCHES = 4  # on which the loss of averaged parameters is measured

Estimator = Literal["backprop", "es", "pes"]


@dataclass(frozen=True)
class Estimate:
    """Estimates from one window of one task.

    Attributes:
        samples: One estimate a member or pair, `(samples, size of theta)`; rows that are not finite are possible.
        objective: `(members,)`.
        losses: `(window, members)`.
        carry: Where inner training stands now, without history.
    """

    samples: Tensor
    objective: Tensor
    losses: Tensor
    carry: Carry


@dataclass(frozen=True)
class Estimation:
    """How a window is turned into an estimate.

    Args:
        estimator: "backprop", "es" or "pes".
        window: Steps, in each; 0 for whole inner runs.
        objective: What is minimised.
        unrolling: How inner training is carried out.
        sigma: Standard deviation of the perturbations of theta; of "es" and "pes".
        standardised: Whether the gradients of the members of a task, or the differences that evolution strategies see
            within it, are divided by their root mean square, so that all tasks weigh the same, however much their loss
            moves.
        imitation: Weight of the disagreement with the expert in the objective, if there is one.

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
    def copies(self) -> int:
        """How often a member must stand in a carry."""
        return 1 if self.estimator == "backprop" else 2

    def __call__(self, rule: UpdateRule, task: Task, carry: Carry, generator: torch.Generator) -> Estimate:
        """Estimate the gradient from the next window of an inner run.

        Args:
            rule: The update rule.
            task: What is trained.
            carry: Where inner training stands, begun with `copies`.
            generator: Of batches and perturbations.

        Raises:
            ValueError: The carry was begun for another estimator, or nothing of the rule requires a gradient.
        """
        if not any(p.requires_grad for p in rule.parameters()):
            raise ValueError("expected a rule of which something is trained, found none; call rule.requires_grad_()")
        if carry.copies != self.copies:
            raise ValueError(
                f"expected a carry with {self.copies} copies of every member for {self.estimator!r}, found "
                f"{carry.copies}; begin it with start(..., copies={self.copies})"
            )
        estimate = self._backprop if self.estimator == "backprop" else self._evolution
        return estimate(rule, task, carry, generator)

    def _backprop(self, rule: UpdateRule, task: Task, carry: Carry, generator: torch.Generator) -> Estimate:
        theta = flatten(rule).expand(len(carry.total_steps), -1).clone().requires_grad_()
        with torch.enable_grad():
            window, scores = self._scored(rule, task, carry, generator, theta)
            (samples,) = torch.autograd.grad(scores.sum(), theta)
        samples = torch.where(carry.alive.unsqueeze(-1), samples * trained(rule), torch.nan)
        if self.standardised:
            squares = samples.square().sum(1)
            samples = samples / (squares[squares.isfinite()].mean().sqrt() + TINY)
        return Estimate(samples, scores.detach(), window.losses.detach(), window.carry.detach())

    @torch.no_grad()
    def _evolution(self, rule: UpdateRule, task: Task, carry: Carry, generator: torch.Generator) -> Estimate:
        center, pairs = flatten(rule), len(carry.total_steps) // 2
        noise = torch.randn(pairs, len(center), generator=generator, dtype=center.dtype).to(center.device)
        noise = noise * self.sigma * trained(rule)
        window, scores = self._scored(rule, task, carry, generator, center + torch.cat([noise, -noise]))
        difference = (scores[:pairs] - scores[pairs:]) / (2 * self.sigma**2)
        if self.standardised:
            difference = difference / (difference.square().mean().sqrt() + TINY)
        end = window.carry
        if self.estimator == "pes":
            drift = noise if carry.drift is None else carry.drift + noise
            end = replace(end, drift=drift)
        else:
            drift, end = noise, _first_half(end)
        return Estimate(drift * difference.unsqueeze(-1), scores, window.losses, end)

    def _scored(
        self, rule: UpdateRule, task: Task, carry: Carry, generator: torch.Generator, theta: Tensor
    ) -> tuple[Window, Tensor]:
        """Unroll with a theta for each member, `(members, size)`; the objective of each, `(members,)`."""
        how, objective = replace(self.unrolling, held_out=self.objective.held_out), self.objective
        steps = self.window or carry.horizon - carry.steps
        window = unroll(rule, task, carry, steps, generator, theta=unflatten(rule, theta), how=how)
        scores = objective(window.losses, carry.first_loss)
        if objective.averaged > 0:
            at_mean = torch.stack(
                [
                    losses_of(task, window.mean_params, carry.member, batch)
                    for batch in (
                        batch_of(task, carry, generator, held_out=objective.held_out) for _ in range(AVERAGE_BATCHES)
                    )
                ]
            )
            share = objective.averaged
            scores = (1 - share) * scores + share * objective(at_mean, carry.first_loss)
        if self.imitation > 0:
            scores = scores + self.imitation * window.disagreement
        return window, scores


@dataclass(frozen=True)
class Combined:
    """One gradient from many estimates.

    Attributes:
        gradient: `(size of theta,)`, clipped.
        norm: Of the gradient before it was clipped.
        signal_to_noise: Squared norm of the true mean over the variance of the mean, estimated; about 0 where all is
            noise, NaN from a single estimate.
        dropped: Share of the estimates that were left out, 0 to 1.
    """

    gradient: Tensor
    norm: float
    signal_to_noise: float
    dropped: float

    @property
    def usable(self) -> bool:
        """Whether any estimate was left."""
        return self.dropped < 1


def combine(samples: Tensor, clip: float, *, each: float = math.inf, reject: float = math.inf) -> Combined:
    """Average estimates, leaving out what is not finite or too large, and clip.

    Args:
        samples: `(samples, size of theta)`.
        clip: Largest norm of the mean.
        each: Largest norm of an estimate; larger ones are scaled down to it.
        reject: Estimates of larger norm come from a window that exploded and are left out.
    """
    norms = samples.norm(dim=1)
    good = norms.isfinite() & (norms <= reject)
    count = int(good.sum())
    if count == 0:
        return Combined(torch.zeros_like(samples[0]), math.nan, math.nan, 1.0)
    kept, norms = samples[good], norms[good]
    norm = kept.mean(0).norm().item()
    kept = kept * (each / norms.clamp(min=each)).unsqueeze(-1) if math.isfinite(each) else kept
    mean = kept.mean(0)
    noise = kept.var(0).sum().item() / count if count > 1 else math.nan  # the variance of the mean
    signal = mean.square().sum().item() - noise
    mean = mean * min(1.0, clip / (mean.norm().item() + 1e-12))
    return Combined(mean, norm, signal / noise if noise > 0 else math.nan, 1 - count / len(samples))


def _first_half(carry: Carry) -> Carry:
    """The carry with the second half of the members standing where the first half stands."""
    half = len(carry.total_steps) // 2

    def twice(value: Tensor) -> Tensor:
        return torch.cat([value[:half], value[:half]])

    params = {name: twice(p) for name, p in carry.params.items()}
    state = {name: {key: twice(value) for key, value in s.items()} for name, s in carry.state.items()}
    return replace(carry, params=params, state=state, alive=twice(carry.alive))
