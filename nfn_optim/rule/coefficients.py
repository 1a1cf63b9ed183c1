"""The coefficients of a tensor's update: computed by the network at a refresh, cached in the state in between.

    update[i, j, ...] = -lr tensor_gain row_gain[i] column_gains[j, ...] (row_coeffs[i] . terms and features)

The state of a tensor has `row_coeffs`; and all gains in one vector, `gains`: of the tensor, its rows, and its further
dimensions one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nfn_optim.engine.sharding import Shards


class FeatureCoefficients(NamedTuple):
    """Coefficients of a row's features, behind those of the direction's terms."""

    slow: Tensor
    gradient: Tensor
    weight: Tensor
    momentum: Tensor
    momentum_unit: Tensor  # the last three without learning rate and gains
    slow_part: Tensor  # of X
    gradient_part: Tensor  # of X


UNSCALED = 3  # the last of them


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of one tensor `(*batch, *shape)`.

    Attributes:
        row_coeffs: Of the direction's terms, and `FeatureCoefficients`, `(*batch, shape[0] or 1, terms + 7)`.
        row_gain: `(*batch, shape[0] or 1)`.
        column_gains: For every dimension but the first `(*batch, shape[dim])`.
        tensor_gain: `(*batch,)`.
    """

    row_coeffs: Tensor
    row_gain: Tensor
    column_gains: tuple[Tensor, ...]
    tensor_gain: Tensor

    @classmethod
    def adam(cls, shape: Sequence[int], terms: int, like: Tensor) -> Coefficients:
        """Adam's update for a tensor `(*batch, *shape)`; `like` `(*batch,)`."""
        first, *others = shape[like.dim() :] or (1,)
        row_coeffs = F.pad(like.new_ones((*like.shape, first, 1)), (0, terms - 1 + len(FeatureCoefficients._fields)))
        gains = [like.new_ones((*like.shape, length)) for length in (first, *others)]
        return cls(row_coeffs, gains[0], tuple(gains[1:]), torch.ones_like(like))

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], lengths: Sequence[int]) -> Coefficients:
        """Read those of the last refresh.

        Args:
            state: Of the tensor.
            lengths: Of its dimensions; `(1,)` for a scalar.
        """
        tensor_gain, row_gain, *column_gains = torch.split(state["gains"], [1, *lengths], -1)
        return cls(state["row_coeffs"], row_gain, tuple(column_gains), tensor_gain.squeeze(-1))

    def to_state(self) -> dict[str, Tensor]:
        """The inverse of `from_state`."""
        gains = torch.cat([self.tensor_gain.unsqueeze(-1), self.row_gain, *self.column_gains], -1)
        return {"row_coeffs": self.row_coeffs, "gains": gains}

    def local(self, name: str, shards: Shards) -> Coefficients:
        """Those of the local part of a sharded tensor; no batch."""
        rows = shards.local_slice(name, 0)
        gains = tuple(gain[shards.local_slice(name, dim)] for dim, gain in enumerate(self.column_gains, 1))
        return Coefficients(self.row_coeffs[rows], self.row_gain[rows], gains, self.tensor_gain)
