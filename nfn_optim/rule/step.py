"""One step of a network: its tensors arranged in blocks, its state and its hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from nfn_optim.engine.blocks import Block
from nfn_optim.engine.moments import State
from nfn_optim.layers import Incidence
from nfn_optim.rule.hyperparameters import Hyper
from nfn_optim.symmetry import Symmetry


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of a step, see `UpdateRule.forward`."""

    lr: Hyper
    weight_decay: Hyper
    total_steps: Tensor | float | None


@dataclass(frozen=True)
class Step:
    """The tensors of one step, arranged.

    Attributes:
        incidence: Of the network.
        state: Before the step, by name.
        steps: Steps taken, this one included, `(*batch, T)`.
        blocks: All tensors.
        hyper: Hyperparameters.
        batch_dims: How many leading dimensions are batch.
    """

    incidence: Incidence
    state: State
    steps: Tensor
    blocks: Sequence[Block]
    hyper: Hyperparameters
    batch_dims: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors, in order."""
        return self.incidence.names


@lru_cache(maxsize=64)
def incidence_of(symmetry: Symmetry) -> Incidence:
    """The index lists of a symmetry, made once."""
    return Incidence(symmetry)
