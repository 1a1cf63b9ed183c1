"""Comparison of a rule with AdamW on fixed tasks that it is not trained on; selects the best theta.

Every task is trained from the same initial parameters on the same batches by AdamW at each of `LEARNING_RATES`, of
which the one with the lowest final loss is the reference, and by the rule, with the horizon known and unknown. The
final loss is the mean over the last tenth of the steps, and

    score    mean over tasks, members, horizon known and unknown, of log(final loss / AdamW's); negative: better
    speed    AdamW's steps over the steps after which the rule's running mean reaches AdamW's final loss
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from meta_train.imitation import Expert
from meta_train.objective import LOG_EPS, clamp_losses
from meta_train.tasks import Task, TaskDistribution
from meta_train.unroll import LR, Carry, Unrolling, start, unroll
from nfn_optim.rule import UpdateRule

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Comparison:
    """A comparison of a rule with AdamW on one task.

    Attributes:
        name: The task's.
        score: Mean of log(final loss / AdamW's).
        speed: AdamW's steps over the rule's steps to AdamW's final loss, of the mean curves, with the horizon known;
            0 if never reached.
        learned_over_nominal: Norm of update - nominal over that of the nominal update after the last step, mean over
            members.
        adamw: AdamW's losses, mean over members, `(steps,)`.
        horizon_known: The rule's, with the horizon known.
        horizon_unknown: The rule's, with the horizon unknown.
    """

    name: str
    score: float
    speed: float
    learned_over_nominal: float
    adamw: Tensor
    horizon_known: Tensor
    horizon_unknown: Tensor


@dataclass(frozen=True)
class Validation:
    """The validation tasks.

    Args:
        distributions: Each draws one task; of other kinds or sizes than those trained on.
        members: Initialisations and batch orders per task.
        steps: Steps of every run.
        seed: Random seed.
    """

    distributions: tuple[TaskDistribution[Any], ...]
    members: int = 2
    steps: int = 300
    seed: int = 1234
    _adamw_losses: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _tasks(self) -> list[Task]:
        seeds = range(self.seed, self.seed + len(self.distributions))
        return [d.sample(torch.Generator().manual_seed(s)) for d, s in zip(self.distributions, seeds, strict=True)]

    def compare(self, rule: UpdateRule, index: int) -> Comparison:
        """Train one of the tasks with the rule and with AdamW, whose runs are cached."""
        task = self._tasks[index]
        task.to(next((p.device for p in rule.parameters()), torch.device("cpu")))
        if index not in self._adamw_losses:
            self._adamw_losses[index] = self._best_adamw(task)
        adamw = self._adamw_losses[index]  # (steps, members)
        carry, losses = self._run(rule, task, (0, self.steps), Unrolling())
        unknown_losses, known_losses = losses.chunk(2, 1)  # (steps, members) each
        rule_log = (final_loss(torch.stack([unknown_losses, known_losses], 1)) + LOG_EPS).log()  # (2, members)
        score = rule_log - (final_loss(adamw) + LOG_EPS).log()
        curves = [values.mean(1) for values in (adamw, known_losses, unknown_losses)]
        ratio = self._learned_over_nominal(rule, task, carry)
        return Comparison(task.name, score.mean().item(), speed_of(curves[1], curves[0]), ratio, *curves)

    def _best_adamw(self, task: Task) -> Tensor:
        """The losses of AdamW at its best learning rate, `(steps, members)`."""
        rates = torch.tensor(LEARNING_RATES).repeat_interleave(self.members)
        unrolling = Unrolling(lr=rates.to(task.device))
        _, losses = self._run(UpdateRule.adamw(), task, (0,) * len(LEARNING_RATES), unrolling)
        by_rate = losses.chunk(len(LEARNING_RATES), 1)
        return min(by_rate, key=lambda values: (final_loss(values) + LOG_EPS).log().mean().item())

    @torch.no_grad()
    def _run(self, rule: UpdateRule, task: Task, horizons: Sequence[int], unrolling: Unrolling) -> tuple[Carry, Tensor]:
        """Train a copy of the members per horizon, 0 for an unknown one. Losses are clamped."""
        generator = torch.Generator().manual_seed(self.seed)
        carry = start(rule, task, len(horizons) * self.members, self.steps, generator, copies=len(horizons))
        total_steps = torch.tensor(horizons).repeat_interleave(self.members).to(carry.total_steps)
        carry = replace(carry, total_steps=total_steps)
        window = unroll(rule, task, carry, self.steps, generator, unrolling=unrolling)
        return window.carry, clamp_losses(window.losses, carry.first_loss)

    @torch.no_grad()
    def _learned_over_nominal(self, rule: UpdateRule, task: Task, carry: Carry) -> float:
        """Norm of (update - nominal) over that of the nominal update in one more step, mean over members."""
        after = unroll(rule, task, carry, 1, torch.Generator().manual_seed(self.seed)).carry
        nominal = Expert("adamw", 1.0).update(after.state, LR)
        learned = [after.params[n] - p - nominal[n] for n, p in carry.params.items()]
        squares = [sum(v.flatten(1).square().sum(1) for v in values) for values in (learned, nominal.values())]
        return torch.nan_to_num((squares[0] / squares[1]).sqrt()).mean().item()  # type: ignore[union-attr]


def final_loss(losses: Tensor) -> Tensor:
    """The mean over the last tenth of the steps. `(steps, ...) -> (...)`."""
    return losses[-max(len(losses) // 10, 1) :].mean(0)


def speed_of(curve: Tensor, reference: Tensor) -> float:
    """Steps of the reference over the steps of the curve to the reference's final loss; 0 if it is never reached.

    Args:
        curve: Losses `(steps,)`; smoothed by a running mean over a tenth of the steps.
        reference: The same of the reference.
    """
    width = max(len(curve) // 10, 1)
    running = curve.unfold(0, width, 1).mean(1)
    reached = (running <= final_loss(reference)).nonzero()
    return len(reference) / (int(reached[0]) + width) if len(reached) else 0.0


def score_of(comparisons: Sequence[Comparison]) -> float:
    """The mean score."""
    return sum(c.score for c in comparisons) / len(comparisons)
