"""Invariant pooling: from weight space to one vector that no permutation changes.

All means by equality patterns that keep nothing: of every tensor, over the whole tensor and, where an axis occurs
twice, over the diagonal; one for every position on the fixed axes. They span all invariant linear maps. This is the
paper's HNP pooling, or with `free_ends(symmetry)` its NP pooling. Means of higher powers say how features spread, which
is what statistics of weights have and means of weights lack.

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

EPS = 1e-12
"""Added to mean squares, so that the derivative of the root is finite."""


class InvariantPool(nn.Module):
    """All invariant means of all tensors, concatenated.

    Args:
        symmetry: The tensors and their axes.
        channels: Channels of every tensor.
        moments: 1 for means; 2 for root mean squares in addition.

    Attributes:
        out_features: Length of the vector.

    Raises:
        ValueError: `moments` is neither 1 nor 2.

    Example:
        >>> s = Symmetry({"w": ("h", "in"), "b": ("h",)}, sizes={"h": 3, "in": 2}, fixed=frozenset({"in"}))
        >>> pool = InvariantPool(s, channels=4)
        >>> pool.out_features
        12
        >>> tuple(pool({"w": torch.randn(5, 3, 2, 4), "b": torch.randn(5, 3, 4)}).shape)
        (5, 12)
    """

    def __init__(self, symmetry: Symmetry, channels: int, *, moments: int = 1) -> None:
        super().__init__()
        if moments not in (1, 2):
            raise ValueError(f"expected 1 or 2 moments, found {moments}; Statistics has quantiles")
        self._partition = BlockPartition(symmetry)
        self.channels, self.moments = channels, moments
        self._patterns = [
            (block, [pattern for kept, patterns in equality_patterns_of(block) if not kept for pattern in patterns])
            for block in self._partition.blocks
        ]
        self.out_features = (
            moments * channels * sum(block.num_positions * len(patterns) for block, patterns in self._patterns)
        )

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Pool. Name -> `(*batch, *shape, channels)` to `(*batch, out_features)`."""
        batch, parts = self._partition.split(features, self.channels)
        means = []
        for block, patterns in self._patterns:
            pooled = PooledBlock(block, parts[block.id])
            means += [pooled.pool(pattern) for pattern in patterns]
            if self.moments > 1:
                squares = PooledBlock(block, parts[block.id].square())
                means += [(squares.pool(pattern) + EPS).sqrt() for pattern in patterns]
        return torch.cat(means, -1).reshape(*batch, self.out_features)
