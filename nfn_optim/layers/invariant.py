"""Invariant pooling: from weight space to one vector that renaming neurons does not change.

The means of every tensor in all the ways in which nothing is kept: over the whole tensor; where an axis occurs twice,
over the diagonal too; one for every position of the fixed axes (the paper's HNP pooling; its NP pooling is the same
with `free_ends(symmetry)`). They span all invariant linear maps.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 2.3, arXiv:2302.14040
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nfn_optim.layers.block import Block, Partition
from nfn_optim.layers.equality_pattern import View, views_of
from nfn_optim.layers.linear import batch_of
from nfn_optim.layers.pooling import Pooled
from nfn_optim.symmetry import Symmetry


class InvariantPool(nn.Module):
    """All means of all tensors, side by side.

    Args:
        symmetry: The tensors and their axes.
        channels: Channels of every tensor's features.

    Attributes:
        out_features: How many numbers come out.

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
        self._partitions = {name: Partition(symmetry, name) for name in symmetry.dims}
        self._views = {
            (name, block.number): _invariant(block)
            for name, partition in self._partitions.items()
            for block in partition.blocks
        }
        positions = sum(
            block.positions * len(self._views[name, block.number])
            for name, partition in self._partitions.items()
            for block in partition.blocks
        )
        self.out_features = positions * channels

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Pool. Name -> `(*batch, *shape, channels)` to `(*batch, out_features)`."""
        batch = batch_of(self._partitions, features)
        means = []
        for name, partition in self._partitions.items():
            flat = features[name].reshape(-1, *features[name].shape[len(batch) :])  # (N, *shape, C)
            for block, x in zip(partition.blocks, partition.cut(flat), strict=True):
                pooled = Pooled(block, x)
                means += [pooled.by(view.classes, view.kept) for view in self._views[name, block.number]]
        return torch.cat(means, -1).reshape(*batch, self.out_features)


def _invariant(block: Block) -> list[View]:
    return [view for structure, views in views_of(block) if not structure for view in views]
