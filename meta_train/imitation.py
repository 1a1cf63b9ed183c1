"""Distance between an update and an expert's update: a guide for the first iterations, annealed away.

    disagreement = mean over tensors of  .7 (1 - cos(update, expert)) + .3 |log(|update| / |expert|)|

    adamw    m^ / (sqrt(v^) + eps)                     the nominal direction
    muon     orthogonal factor of m, times             for tensors of two dimensions; adamw for the others
             max(1, rows / columns)^(1/2)

at the rule's learning rate times `Expert.boost`.

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

from nfn_optim.engine.moments import BETA1, BETA2, EPS, SQRT_EPS, State, append_dims
from nfn_optim.rule.inverse_root import inverse_root

DIRECTION_WEIGHT, SIZE_WEIGHT = 0.7, 0.3  # of the two parts of the disagreement


@dataclass(frozen=True)
class Expert:
    """The optimizer to imitate.

    Args:
        name: "adamw" or "muon".
        boost: The expert's learning rate in units of the rule's.

    Raises:
        ValueError: The name is unknown.
    """

    name: Literal["adamw", "muon"] = "adamw"
    boost: float = 3.0

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"expected the expert 'adamw' or 'muon', found {self.name!r}")

    def update(self, state: State, lr: float | Tensor) -> dict[str, Tensor]:
        """The expert's update, `(members, *shape)` by name.

        Args:
            state: The rule's, after its moments have been updated with the gradient; not changed.
            lr: Learning rate of the rule, per step; a number or `(members,)`.
        """
        updates = {}
        for name, s in state.items():
            m, v = s["exp_avg"], s["exp_avg_sq"]
            matrix = m.dim() == 3  # noqa: PLR2004 - members, rows, columns
            direction = orthogonal(m) if matrix and self.name == "muon" else adam_direction(m, v, s["step"])
            rate = append_dims(lr, m, 1) if isinstance(lr, Tensor) and lr.dim() else lr
            updates[name] = -rate * self.boost * direction
        return updates


def adam_direction(m: Tensor, v: Tensor, steps: Tensor) -> Tensor:
    """Adam's bias-corrected direction from its moments `(members, *shape)` after `(members,)` steps."""
    first, second = (append_dims(1 - beta**steps, m, 1) for beta in (BETA1, BETA2))
    return m / first / ((v / second).sqrt() + EPS)


def orthogonal(m: Tensor) -> Tensor:
    """The orthogonal factor of matrices `(*batch, rows, columns)`, singular values near one, times Muon's scale."""
    tall = m.shape[-2] > m.shape[-1]
    x = m.mT if tall else m
    x = x / (x.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)
    x = inverse_root(x @ x.mT) @ x
    scale: float = max(1.0, m.shape[-2] / max(m.shape[-1], 1)) ** 0.5
    return (x.mT if tall else x) * scale


def disagreement(expert: Expert, update: Mapping[str, Tensor], state: State, lr: float | Tensor) -> Tensor:
    """Distance between the rule's update and the expert's.

    Args:
        expert: The optimizer to imitate; no gradient flows through it.
        update: The rule's, `(members, *shape)` by name.
        state: The rule's, after the step.
        lr: Learning rate of the rule, per step.

    Returns:
        `(members,)`, mean over tensors.
    """
    with torch.no_grad():
        target = expert.update({name: state[name] for name in update}, lr)
    distances = []
    for name, value in update.items():
        u, e = value.flatten(1), target[name].flatten(1)  # (members, entries)
        u_norm, e_norm = ((x.square().sum(1) + SQRT_EPS).sqrt() for x in (u, e))
        cosine = (u * e).sum(1) / (u_norm * e_norm)
        distances.append(DIRECTION_WEIGHT * (1 - cosine) + SIZE_WEIGHT * (u_norm / e_norm).log().abs())
    return torch.stack(distances).mean(0)
