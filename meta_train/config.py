"""What a meta-training run is made of."""

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
    """What a meta-training run is made of.

    Args:
        rule: The architecture of the rule.
        learn: Beginnings of the names of the parameters of the rule that are trained; the others stay as they are.
        initial: Name or file of the rule to start from, of that architecture; None for a new one.
        distribution: What it is trained on.
        validation: What the best theta is chosen on; None for no choice.
        iterations: Updates of theta that the learning rate is scheduled for.
        until: Updates of theta after which to stop, if earlier.
        minutes: Wall-clock after which to stop, if earlier, resumed sessions included.
        patience: Validations without improvement after which to stop; None for never.
        tasks: Tasks from whose windows one meta-gradient is estimated; the work that processes share.
        members: Members of a task that are trained side by side; with evolution strategies half of them at theta + e
            and half at theta - e.
        slots: Tasks that are under way at once; a multiple of `tasks`.
        estimator: "backprop", "es" or "pes".
        polish: Iteration from which "pes" takes the place of `estimator`; None for never.
        sigma: Standard deviation of the perturbations of theta, of "es" and "pes".
        standardised: Whether all tasks weigh the same, however much their loss moves.
        window: Steps from which one estimate is made; 0 for whole inner runs.
        horizon: Shortest and longest inner run, in steps, log-uniform, rounded up to whole windows.
        restart: Share of the inner runs that go on with the networks of the run before, but with a new optimizer.
        curriculum: Iterations over which the longest inner run grows from the shortest to the longest, on a log scale.
        objective: What is minimised.
        expert: Optimizer to be imitated at first.
        imitation: Weight of the disagreement with the expert at the first iteration.
        imitate: Iterations over which that weight falls linearly to zero.
        second_order: Whether inner gradients are differentiated too.
        segment: Steps between two points of a window at which activations are kept; 0 keeps all.
        lr: Peak learning rate of theta (AdamW), per iteration; linear warm-up, then cosine to a tenth.
        warmup: Iterations of warm-up.
        clip: Largest norm of a meta-gradient, and of each member's with "backprop".
        reject: Members' meta-gradients of larger norm come from a window that exploded and are left out.
        average: Decay of the exponential moving average of theta that is exported, per iteration.
        reach: Share of the way from where theta began to that average at which the exported theta stands, above 0, at
            most 1: less is more cautious.
        seed: Of everything random.
        checkpoint_every: Iterations between checkpoints.
        validate_every: Iterations between validations.
        device: Where inner training takes place.
    """

    rule: RuleConfig = field(default_factory=RuleConfig)
    learn: tuple[str, ...] = ("",)
    initial: str | None = None
    distribution: TaskDistribution[Any] = field(default_factory=MLPDistribution)
    validation: Validation | None = None
    iterations: int = 5000
    until: int | None = None
    minutes: float | None = None
    patience: int | None = None
    tasks: int = 1
    members: int = 8
    slots: int = 16
    estimator: Estimator = "backprop"
    polish: int | None = None
    sigma: float = 0.01
    standardised: bool = False
    window: int = 20
    horizon: tuple[int, int] = (100, 1000)
    restart: float = 0.0
    curriculum: int = 0
    objective: Objective = field(default_factory=Objective)
    expert: Literal["adamw", "muon"] = "adamw"
    imitation: float = 0.0
    imitate: int = 200
    second_order: bool = True
    segment: int = 0
    lr: float = 1e-3
    warmup: int = 50
    clip: float = 1.0
    reject: float = math.inf
    average: float = 0.99
    reach: float = 1.0
    seed: int = 0
    checkpoint_every: int = 100
    validate_every: int = 100
    device: str = "cpu"

    @property
    def last(self) -> int:
        """The iteration after which the run is over."""
        return self.iterations if self.until is None else min(self.until, self.iterations)

    def estimation(self, iteration: int) -> Estimation:
        """How the meta-gradient of an iteration, counted from 0, is estimated."""
        weight = self.imitation * max(0.0, 1 - iteration / max(self.imitate, 1))
        unrolling = Unrolling(
            second_order=self.second_order,
            segment=self.segment,
            expert=Expert(self.expert) if weight > 0 else None,
        )
        return Estimation(
            estimator="pes" if self.polish is not None and iteration >= self.polish else self.estimator,
            window=self.window,
            objective=self.objective,
            unrolling=unrolling,
            sigma=self.sigma,
            standardised=self.standardised,
            imitation=weight,
        )

    def horizon_at(self, iteration: int) -> tuple[int, int]:
        """Shortest and longest inner run that may begin at an iteration."""
        low, high = self.horizon
        grown = min(1.0, iteration / self.curriculum) if self.curriculum else 1.0
        return low, round(low * (high / low) ** grown)

    def validates(self, iteration: int) -> bool:
        """Whether to validate after an iteration, counted from 1."""
        return self.validation is not None and (iteration % self.validate_every == 0 or iteration == self.last)

    def check(self, processes: int) -> None:
        """Raise unless the slots can be dealt out.

        Raises:
            ValueError: They cannot, or a number is out of range.
        """
        if self.slots % self.tasks or self.tasks % processes:
            raise ValueError(
                f"expected slots as a multiple of tasks, and tasks as a multiple of the {processes} processes, found "
                f"slots={self.slots}, tasks={self.tasks}; give each process the same number of tasks, "
                f"for instance --tasks {processes} --slots {16 * processes}"
            )
        if not 0 < self.reach <= 1:
            raise ValueError(f"expected a reach above 0, at most 1, found {self.reach}")
        if not 0 < self.horizon[0] <= self.horizon[1]:
            raise ValueError(f"expected 0 < shortest <= longest horizon, found {self.horizon}")
