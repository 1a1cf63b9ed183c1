"""The configuration of a meta-training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from meta_train.imitation import Expert
from meta_train.meta_gradient import Estimation, Estimator
from meta_train.objective import Objective
from meta_train.tasks import MLPDistribution, TaskDistribution
from meta_train.unroll import Unrolling
from meta_train.validation import Validation
from nfn_optim.rule import RuleConfig


@dataclass(frozen=True)
class Config:
    """The configuration of a meta-training run.

    Args:
        rule: The architecture of the rule.
        trainable: Prefixes of the names of the rule's parameters that are trained; the others are frozen.
        initial: Name or file of the rule to start from, of the same architecture; None for a new rule.
        distribution: The distribution of training tasks.
        validation: The validation tasks, which select the best theta; None for no validation.
        iterations: Updates of theta in the learning rate schedule.
        until: Updates of theta after which to stop, if earlier.
        minutes: Wall-clock time after which to stop, if earlier, resumed sessions included.
        patience: Validations without improvement after which to stop; None for never.
        tasks: Tasks per iteration, each of which contributes one window; a multiple of the processes.
        members: Members of a task that are trained in parallel; with evolution strategies half of them at theta + e
            and half at theta - e.
        inner_runs: Inner runs in progress at once; a multiple of `tasks`.
        estimator: Meta-gradient estimator: "backprop", "es" or "pes".
        pes_from: Iteration from which "pes" replaces `estimator`; None for never.
        sigma: Standard deviation of the perturbations of theta, with "es" and "pes".
        standardised: Whether all tasks have the same weight, whatever the scale of their loss.
        window: Steps per window, from which one estimate is made; 0 for whole inner runs.
        horizon: Shortest and longest inner run, in steps, log-uniform, rounded up to whole windows.
        warm_start: Fraction of the inner runs that start from the trained networks of the run before, with a new
            optimizer state.
        curriculum: Iterations over which the longest inner run grows from the shortest, on a log scale.
        objective: The objective to minimise.
        expert: Optimizer to imitate in the first iterations: "adamw" or "muon".
        imitation: Weight of the disagreement with the expert at the first iteration.
        imitation_iterations: Iterations over which that weight falls linearly to zero.
        second_order: Whether to differentiate inner gradients too.
        segment: Steps between stored activations; those between are recomputed; 0 stores all.
        lr: Peak learning rate of theta (AdamW), per iteration; linear warm-up, then cosine to a tenth.
        warmup: Iterations of warm-up.
        clip: Largest norm of a meta-gradient, and of each member's with "backprop".
        reject: Member meta-gradients of larger norm come from an exploded window and are rejected.
        ema_decay: Decay of the exponential moving average of theta that is exported, per iteration.
        export_fraction: The exported theta is interpolated between the initial theta and that average: 1 is the
            average, less is closer to the initial theta; above 0, at most 1.
        seed: Random seed.
        checkpoint_every: Iterations between checkpoints.
        validate_every: Iterations between validations.
        device: Device of inner training: cpu, cuda.
    """

    rule: RuleConfig = field(default_factory=RuleConfig)
    trainable: tuple[str, ...] = ("",)
    initial: str | None = None
    distribution: TaskDistribution[Any] = field(default_factory=MLPDistribution)
    validation: Validation | None = None
    iterations: int = 5000
    until: int | None = None
    minutes: float | None = None
    patience: int | None = None
    tasks: int = 1
    members: int = 8
    inner_runs: int = 16
    estimator: Estimator = "backprop"
    pes_from: int | None = None
    sigma: float = 0.01
    standardised: bool = False
    window: int = 20
    horizon: tuple[int, int] = (100, 1000)
    warm_start: float = 0.0
    curriculum: int = 0
    objective: Objective = field(default_factory=Objective)
    expert: Literal["adamw", "muon"] = "adamw"
    imitation: float = 0.0
    imitation_iterations: int = 200
    second_order: bool = True
    segment: int = 0
    lr: float = 1e-3
    warmup: int = 50
    clip: float = 1.0
    reject: float = math.inf
    ema_decay: float = 0.99
    export_fraction: float = 1.0
    seed: int = 0
    checkpoint_every: int = 100
    validate_every: int = 100
    device: str = "cpu"

    @property
    def last_iteration(self) -> int:
        """The iteration after which the run ends."""
        return self.iterations if self.until is None else min(self.until, self.iterations)

    def estimation(self, iteration: int) -> Estimation:
        """The meta-gradient estimator of an iteration, counted from 0."""
        weight = self.imitation * max(0.0, 1 - iteration / max(self.imitation_iterations, 1))
        unrolling = Unrolling(
            second_order=self.second_order,
            segment=self.segment,
            expert=Expert(self.expert) if weight > 0 else None,
        )
        return Estimation(
            estimator="pes" if self.pes_from is not None and iteration >= self.pes_from else self.estimator,
            window=self.window,
            objective=self.objective,
            unrolling=unrolling,
            sigma=self.sigma,
            standardised=self.standardised,
            imitation=weight,
        )

    def horizon_at(self, iteration: int) -> tuple[int, int]:
        """Shortest and longest inner run that may start at an iteration, in steps."""
        low, high = self.horizon
        grown = min(1.0, iteration / self.curriculum) if self.curriculum else 1.0
        return low, round(low * (high / low) ** grown)

    def validates(self, iteration: int) -> bool:
        """Whether to validate after an iteration, counted from 1."""
        return self.validation is not None and (
            iteration % self.validate_every == 0 or iteration == self.last_iteration
        )

    def check(self, processes: int) -> None:
        """Check the ranges, and that the inner runs can be divided among the processes.

        Raises:
            ValueError: They cannot, or a number is out of range.
        """
        if self.inner_runs % self.tasks or self.tasks % processes:
            raise ValueError(
                f"expected inner_runs as a multiple of tasks, and tasks as a multiple of the {processes} processes, "
                f"found inner_runs={self.inner_runs}, tasks={self.tasks}; give each process the same number of tasks, "
                f"for instance --tasks {processes} --inner-runs {16 * processes}"
            )
        if not 0 < self.export_fraction <= 1:
            raise ValueError(f"expected an export_fraction above 0, at most 1, found {self.export_fraction}")
        if not 0 < self.horizon[0] <= self.horizon[1]:
            raise ValueError(f"expected 0 < shortest <= longest horizon, found {self.horizon}")
