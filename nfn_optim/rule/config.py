"""What an update rule is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nfn_optim.rule.gains import GAIN_RANGE


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
        gain: Factor of every update when meta-training starts, between exp(-3) and exp(3); it is learned.
        cooldown: Last part of a known horizon over which the learning rate falls, 0 to 1.
        bend: Power with which it falls there: 1 linearly, more than 1 sooner.
        fading: Where the horizon is not known, the learning rate falls as (1 + age / FADING_AGE)^-fading; 0 or more.
        talk_every: Steps from one time that the neurons talk to the next; in between weights act on what was said last.
        rank: Directions in which the neurons of a matrix hear each other; 0 for none. With it, the nominal direction of
            matrices is the orthogonal one when meta-training starts; how far is learned. Form "linear" only.
        growth: Power with which the steps of a tensor grow with age while its gradients agree, and fall while they
            oscillate, when meta-training starts (`nfn_optim.rule.step_size`); it is learned. 0 leaves it out.
        waning: Power with which they fall besides, when meta-training starts; it is learned.
    """

    hidden: int = 16
    rounds: int = 2
    form: Literal["linear", "network"] = "linear"
    weight_hidden: int = 8
    power: float = 0.0
    gain: float = 1.0
    cooldown: float = 0.0
    bend: float = 1.0
    fading: float = 0.0
    talk_every: int = 1
    rank: int = 0
    growth: float = 0.0
    waning: float = 0.0

    def __post_init__(self) -> None:
        if self.talk_every < 1 or self.fading < 0 or self.bend <= 0:
            raise ValueError(f"expected talk_every >= 1, fading >= 0 and bend > 0, found {self}")
        if self.rank < 0 or (self.rank and (self.hidden == 0 or self.form != "linear")):
            raise ValueError(f"expected rank >= 0, and 0 without hidden channels or in form 'network', found {self}")
        if self.growth < 0 or (self.growth and self.hidden == 0) or (self.waning and not self.growth):
            raise ValueError(f"expected growth >= 0, above 0 with waning and 0 without hidden channels, found {self}")
        if self.hidden < 0 or self.rounds < 0 or self.weight_hidden < 1:
            raise ValueError(f"expected hidden >= 0, rounds >= 0 and weight_hidden >= 1, found {self}")
        if not (self.gain > 0 and abs(math.log(self.gain)) < GAIN_RANGE):
            raise ValueError(f"expected a gain between exp(-{GAIN_RANGE:g}) and exp({GAIN_RANGE:g}), found {self.gain}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"expected a cooldown of 0 to 1, found {self.cooldown}")
        if self.form not in ("linear", "network"):
            raise ValueError(f"expected form 'linear' or 'network', found {self.form!r}")
