"""What neurons say to the weights of a tensor, and how the state keeps it while they are silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nfn_optim.engine.sharding import Shards


@dataclass(frozen=True)
class Said:
    """What one tensor and its rows, columns and taps say to its weights.

    Attributes:
        words: To each row, `(*batch, shape[0] or 1, words)`.
        gains: For every dimension but the first `(*batch, shape[dim])`.
    """

    words: Tensor
    gains: tuple[Tensor, ...] = ()

    @classmethod
    def kept(cls, state: Mapping[str, Tensor], lengths: Sequence[int]) -> Said:
        """What was said last, from the state of a tensor whose dimensions but the first have these lengths."""
        return cls(state["words"], torch.split(state["gains"], list(lengths), -1))

    def to_keep(self) -> dict[str, Tensor]:
        """The inverse of `kept`."""
        return {"words": self.words, "gains": torch.cat([self.words[..., 0, :0], *self.gains], -1)}

    def part(self, name: str, shards: Shards) -> Said:
        """What is said to those weights of the tensor that are here; no batch."""
        gains = tuple(gain[shards.part(name, dim)] for dim, gain in enumerate(self.gains, 1))
        return Said(self.words[shards.part(name, 0)], gains)
