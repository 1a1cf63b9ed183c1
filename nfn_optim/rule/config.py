"""The configuration of an update rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from nfn_optim.engine.moments import BETA1, BETA2
from nfn_optim.rule.adam import AdamDirection
from nfn_optim.rule.direction import Direction
from nfn_optim.rule.orthogonal import OrthogonalDirection
from nfn_optim.rule.step_size import MAX_LOG_GAIN

DIRECTIONS: dict[str, Callable[[RuleConfig], Direction]] = {
    "adam": lambda config: AdamDirection(),
    "orthogonal": lambda config: OrthogonalDirection(config.rank, config.exact, config.whitening, config.minimax_roots),
}


@dataclass(frozen=True)
class RuleConfig:
    """The configuration of an update rule.

    Args:
        learned: Whether there is a learned part; without it the rule is AdamW and everything else is without effect.
        direction: Base direction of the update, a name in `DIRECTIONS`.
        rank: Dimension of the subspaces of direction "orthogonal".
        exact: Whether a matrix of at most `rank` rows needs no subspace, like one of at most `rank` columns.
        hidden: Channels of the embeddings of neurons and tensors. With 0, gains are linear in the logarithms of the
            statistics, and other coefficients are constant.
        rounds: Rounds of messages between neurons and tensors.
        power: Initial power of the tensor's scale in the gain; learned. 1 measures updates in units of the scale, 0 is
            Adam's.
        gain: Initial factor of every update, between exp(-3) and exp(3); learned.
        cooldown: Fraction of a known horizon, at its end, over which the learning rate falls; 0 to 1.
        cooldown_power: Power of that fall: 1 is linear, more than 1 falls sooner.
        inverse_time_power: Without a known horizon the learning rate falls as (1 + age / 100) to minus this power.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        mixes: Whether the slow direction and the newest gradient are mixed into the direction before its singular
            values are made equal; otherwise they are added to it, which is worth less.
        gradient_part: Initial part of the newest gradient in that mixture, 0 to 1; learned.
        shrinkage: Initial coefficient of the weights themselves, 0 to 1: a weight decay in proportion to the steps
            that are taken in noise (`nfn_optim.rule.features.shrink_unit`); learned. With 0 the coefficient starts at
            0, in the unit of the feature.
        whitening: Initial part of the whitened momentum in orthogonal directions (`nfn_optim.rule.whitening`), 0 to 1;
            learned. 0 leaves it out.
        minimax_roots: Whether singular values are made equal by the best polynomials in turn, which are fewer, instead
            of by one that is repeated (`nfn_optim.rule.inverse_root`).
        refresh_every: Steps between two computations of the coefficients, which are cached in between.
        adapt_rate: Initial rate of step-size adaptation (`nfn_optim.rule.step_size`); learned. 0 leaves it out.
        adapt_decay: Initial decay of the step size; learned.

    Raises:
        ValueError: A value is out of range.
    """

    learned: bool = True
    direction: str = "adam"
    rank: int = 32
    exact: bool = False
    hidden: int = 16
    rounds: int = 2
    power: float = 0.0
    gain: float = 1.0
    cooldown: float = 0.0
    cooldown_power: float = 1.0
    inverse_time_power: float = 0.0
    beta1: float = BETA1
    beta2: float = BETA2
    mixes: bool = False
    gradient_part: float = 0.0
    shrinkage: float = 0.0
    whitening: float = 0.0
    minimax_roots: bool = False
    refresh_every: int = 1
    adapt_rate: float = 0.0
    adapt_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"expected a direction, one of {sorted(DIRECTIONS)}, found {self.direction!r}")
        if self.rank < 1 or self.hidden < 0 or self.rounds < 0:
            raise ValueError(f"expected rank >= 1, hidden >= 0 and rounds >= 0, found {self}")
        if self.rounds and not self.hidden:
            raise ValueError(
                f"expected hidden channels for {self.rounds} rounds of messages, or rounds=0; found {self}"
            )
        if self.refresh_every < 1 or self.inverse_time_power < 0 or self.cooldown_power <= 0:
            raise ValueError(
                f"expected refresh_every >= 1, inverse_time_power >= 0 and cooldown_power > 0, found {self}"
            )
        if self.adapt_rate < 0 or (self.adapt_decay and not self.adapt_rate):
            raise ValueError(f"expected adapt_rate >= 0, and above 0 with adapt_decay, found {self}")
        if not (self.gain > 0 and abs(math.log(self.gain)) < MAX_LOG_GAIN):
            limits = f"exp(-{MAX_LOG_GAIN:g}) and exp({MAX_LOG_GAIN:g})"
            raise ValueError(f"expected a gain between {limits}, found {self.gain}")
        if not (0 <= self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ValueError(f"expected 0 <= beta1 < 1 and 0 < beta2 < 1, found {self.beta1} and {self.beta2}")
        if not (0 <= self.gradient_part <= 1 and (self.mixes or not self.gradient_part)):
            raise ValueError(f"expected a gradient_part of 0 to 1, and above 0 only with mixes, found {self}")
        if not (0 <= self.whitening <= 1 and (self.direction == "orthogonal" or not self.whitening)):
            raise ValueError(f"expected a whitening of 0 to 1, and above 0 only of orthogonal directions, found {self}")
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"expected a shrinkage of 0 to 1, found {self.shrinkage}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"expected a cooldown of 0 to 1, found {self.cooldown}")
