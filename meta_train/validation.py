"""How good a rule is on fixed tasks that it is not trained on, beside AdamW: what the best theta is chosen by.

Every task is trained from the same initial parameters on the same batches by AdamW at each of `LEARNING_RATES`, the one
with the lowest final loss counting, and by the rule, told the horizon and not. The final loss is the mean over the last
tenth of the steps, and

    score    mean over tasks, members, told and not told, of log(final loss / AdamW's): below 0 the rule is better
    speed    AdamW's steps over the steps after which the rule's running mean is as low as AdamW's final loss
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from meta_train.imitation import Expert
from meta_train.objective import FLOOR, bounded
from meta_train.tasks import Task, TaskDistribution
from meta_train.unroll import LR, Carry, Unrolling, start, unroll
from nfn_optim.rule import UpdateRule

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Comparison:
    """A rule beside AdamW on one task.

    Attributes:
        name: The task's.
        score: Mean of log(final loss / AdamW's).
        speed: AdamW's steps over those to its final loss, of the mean curve, told the horizon; 0 if never reached.
        learned_over_nominal: Size of update - nominal over that of the nominal after the last step, mean over members.
        adamw: AdamW's losses, mean over members, `(steps,)`.
        told: The rule's, told the horizon.
        untold: The rule's, not told.
    """

    name: str
    score: float
    speed: float
    learned_over_nominal: float
    adamw: Tensor
    told: Tensor
    untold: Tensor


@dataclass(frozen=True)
class Validation:
    """What the best theta is chosen on.

    Args:
        distributions: Each draws one task; of other kinds or sizes than those trained on.
        members: Initialisations and batch orders of each.
        steps: Of every run.
        seed: Of everything random.
    """

    distributions: tuple[TaskDistribution[Any], ...]
    members: int = 2
    steps: int = 300
    seed: int = 1234
    _references: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _drawn(self) -> list[Task]:
        seeds = range(self.seed, self.seed + len(self.distributions))
        return [d.sample(torch.Generator().manual_seed(s)) for d, s in zip(self.distributions, seeds, strict=True)]

    def compare(self, rule: UpdateRule, number: int) -> Comparison:
        """Train task `number`, counted from 0, with the rule and with AdamW.

        AdamW's runs are kept for the next time.
        """
        task = self._drawn[number]
        task.to(next((p.device for p in rule.parameters()), torch.device("cpu")))
        if number not in self._references:
            self._references[number] = self._adamw(task)
        adamw = self._references[number]  # (steps, members)
        carry, losses = self._run(rule, task, 2, 1, Unrolling())
        untold, told = losses.chunk(2, 1)  # (steps, members) each
        score = (final(torch.stack([untold, told], 1)) + FLOOR).log() - (final(adamw) + FLOOR).log()  # (2, members)
        curves = [found.mean(1) for found in (adamw, told, untold)]
        ratio = self._ratio(rule, task, carry)
        return Comparison(task.name, score.mean().item(), speed_of(curves[1], curves[0]), ratio, *curves)

    def _adamw(self, task: Task) -> Tensor:
        """The losses of the best AdamW, `(steps, members)`."""
        rates = torch.tensor(LEARNING_RATES).repeat_interleave(self.members)
        losses = self._run(UpdateRule.nominal(), task, 1, len(LEARNING_RATES), Unrolling(lr=rates.to(task.device)))[1]
        tried = losses.chunk(len(LEARNING_RATES), 1)
        return min(tried, key=lambda found: (final(found) + FLOOR).log().mean().item())

    @torch.no_grad()
    def _run(self, rule: UpdateRule, task: Task, told: int, copies: int, how: Unrolling) -> tuple[Carry, Tensor]:
        """Train from the start; of two copies (`told` 2) the second is told the horizon. Losses bounded."""
        generator = torch.Generator().manual_seed(self.seed)
        copies *= told
        carry = start(rule, task, copies * self.members, self.steps, generator, copies=copies)
        known = torch.zeros_like(carry.total_steps)
        if told > 1:
            known[self.members :] = self.steps
        window = unroll(rule, task, replace(carry, total_steps=known), self.steps, generator, how=how)
        return window.carry, bounded(window.losses, carry.first_loss)

    @torch.no_grad()
    def _ratio(self, rule: UpdateRule, task: Task, carry: Carry) -> float:
        """Size of (update - nominal) over that of the nominal in one more step, mean over members."""
        after = unroll(rule, task, carry, 1, torch.Generator().manual_seed(self.seed)).carry
        nominal = Expert("adamw", 1.0).update(after.state, LR)
        apart = [after.params[n] - p - nominal[n] for n, p in carry.params.items()]
        sizes = [sum(v.flatten(1).square().sum(1) for v in values) for values in (apart, nominal.values())]
        return torch.nan_to_num((sizes[0] / sizes[1]).sqrt()).mean().item()  # type: ignore[union-attr]


def final(losses: Tensor) -> Tensor:
    """The mean over the last tenth of the steps. `(steps, ...) -> (...)`."""
    return losses[-max(len(losses) // 10, 1) :].mean(0)


def speed_of(curve: Tensor, reference: Tensor) -> float:
    """Steps of the reference over the steps of the curve to the reference's final loss; 0 if it is never reached.

    Args:
        curve: Losses `(steps,)`; they count averaged over a tenth of the steps.
        reference: The same of the reference.
    """
    width = max(len(curve) // 10, 1)
    running = curve.unfold(0, width, 1).mean(1)
    reached = (running <= final(reference)).nonzero()
    return len(reference) / (int(reached[0]) + width) if len(reached) else 0.0


def score_of(comparisons: Sequence[Comparison]) -> float:
    """The mean score."""
    return sum(c.score for c in comparisons) / len(comparisons)
