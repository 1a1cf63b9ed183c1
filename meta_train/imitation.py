"""How far an update is from an expert's: a guide for the first iterations, annealed away.

    disagreement = sum over tensors of  .7 (1 - cos(update, expert)) + .3 |log(|update| / |expert|)|  over their number

    adamw    m^ / (sqrt(v^) + eps)                     the nominal direction
    muon     the orthogonal part of m, times           for tensors of two dimensions; the others follow adamw
             max(1, rows / columns)^(1/2)

at the learning rate given to the rule times `Expert.boost`.

References:
    Efficient Training of Learned Optimizers by Imitation (ELO, Yang et al., 2023): weights of direction and size
    Muon (Jordan et al., 2024)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nfn_optim.engine import moments
from nfn_optim.engine.moments import State
from nfn_optim.rule.orthogonal import inverse_root

DIRECTION, SIZE = 0.7, 0.3  # what the two parts of the disagreement weigh


@dataclass(frozen=True)
class Expert:
    """Who is imitated.

    Args:
        name: "adamw" or "muon".
        boost: The expert's learning rate in units of the rule's.

    Raises:
        ValueError: Nobody of that name is known.
    """

    name: Literal["adamw", "muon"] = "adamw"
    boost: float = 3.0

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"expected the expert 'adamw' or 'muon', found {self.name!r}")

    def update(self, state: State, lr: float | Tensor) -> dict[str, Tensor]:
        """What the expert would do, `(members, *shape)` by name.

        Args:
            state: The rule's, after it has taken in the gradient; left as it is.
            lr: Learning rate of the rule, per step; a number or `(members,)`.
        """
        updates = {}
        for name, s in state.items():
            m, v = s["exp_avg"], s["exp_avg_sq"]
            matrix = m.dim() == 3  # noqa: PLR2004 - members, rows, columns
            direction = orthogonal(m) if matrix and self.name == "muon" else adam_direction(m, v, s["step"])
            rate = moments.spread(lr, m, 1) if isinstance(lr, Tensor) and lr.dim() else lr
            updates[name] = -rate * self.boost * direction
        return updates


def adam_direction(m: Tensor, v: Tensor, steps: Tensor) -> Tensor:
    """Adam's bias-corrected direction from its moments `(members, *shape)` after `(members,)` steps."""
    first, second = (moments.spread(1 - beta**steps, m, 1) for beta in (moments.BETA1, moments.BETA2))
    return m / first / ((v / second).sqrt() + moments.EPS)


def orthogonal(m: Tensor) -> Tensor:
    """The orthogonal part of matrices `(*batch, rows, columns)`, singular values near one, times Muon's scale."""
    tall = m.shape[-2] > m.shape[-1]
    x = m.mT if tall else m
    x = x / (x.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)
    x = inverse_root(x @ x.mT) @ x
    scale: float = max(1.0, m.shape[-2] / max(m.shape[-1], 1)) ** 0.5
    return (x.mT if tall else x) * scale


def disagreement(expert: Expert, update: Mapping[str, Tensor], state: State, lr: float | Tensor) -> Tensor:
    """How far the rule's update is from the expert's.

    Args:
        expert: Who is imitated; no gradient flows through it.
        update: The rule's, `(members, *shape)` by name.
        state: The rule's, after the step.
        lr: Learning rate of the rule, per step.

    Returns:
        `(members,)`, mean over tensors.
    """
    with torch.no_grad():
        wanted = expert.update({name: state[name] for name in update}, lr)
    apart = []
    for name, found in update.items():
        u, e = found.flatten(1), wanted[name].flatten(1)  # (members, entries)
        nu, ne = (u.square().sum(1) + moments.TINY).sqrt(), (e.square().sum(1) + moments.TINY).sqrt()
        apart.append(DIRECTION * (1 - (u * e).sum(1) / (nu * ne)) + SIZE * (nu / ne).log().abs())
    return torch.stack(apart).mean(0)
