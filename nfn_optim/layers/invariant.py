"""Invariant pooling: from weight space to one vector that no permutation changes.

All means by equality patterns that keep nothing: of every tensor, over the whole tensor and, where an axis occurs
twice, over the diagonal; one for every position on the fixed axes. They span all invariant linear maps. This is the
paper's HNP pooling, or with `free_ends(symmetry)` its NP pooling.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 2.3, arXiv:2302.14040
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nfn_optim.layers.block import BlockPartition
from nfn_optim.layers.equality_pattern import equality_patterns_of
from nfn_optim.layers.pooling import PooledBlock
from nfn_optim.symmetry import Symmetry


class InvariantPool(nn.Module):
    """All invariant means of all tensors, concatenated.

    Args:
        symmetry: The tensors and their axes.
        channels: Channels of every tensor.

    Attributes:
        out_features: Length of the vector.

    Example:
        >>> s = Symmetry({"w": ("h", "in"), "b": ("h",)}, sizes={"h": 3, "in": 2}, fixed=frozenset({"in"}))
        >>> pool = InvariantPool(s, channels=4)
        >>> pool.out_features
        12
        >>> tuple(pool({"w": torch.randn(5, 3, 2, 4), "b": torch.randn(5, 3, 4)}).shape)
        (5, 12)
    """

    def __init__(self, symmetry: Symmetry, channels: int) -> None:
        super().__init__()
        self._partition = BlockPartition(symmetry)
        self.channels = channels
        self._patterns = [
            (block, [pattern for kept, patterns in equality_patterns_of(block) if not kept for pattern in patterns])
            for block in self._partition.blocks
        ]
        self.out_features = channels * sum(block.num_positions * len(patterns) for block, patterns in self._patterns)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Pool. Name -> `(*batch, *shape, channels)` to `(*batch, out_features)`."""
        batch, parts = self._partition.split(features, self.channels)
        means = []
        for block, patterns in self._patterns:
            pooled = PooledBlock(block, parts[block.id])
            means += [pooled.pool(pattern) for pattern in patterns]
        return torch.cat(means, -1).reshape(*batch, self.out_features)
