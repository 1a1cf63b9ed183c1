"""Summary statistics of every tensor (the StatNN baseline); invariant to any permutation of its entries.

References:
    Predicting Neural Network Accuracy from Weights (Unterthiner et al., 2020), Sec. 3, arXiv:2002.11448
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 3.1, arXiv:2302.14040
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nfn_optim.layers.feature_dict import flatten_entries
from nfn_optim.symmetry import Symmetry

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Statistics(nn.Module):
    """Mean, variance and quartiles (with minimum and maximum) of every channel of every tensor.

    Args:
        symmetry: The tensors; only their numbers of dimensions are used.
        channels: Channels of every tensor.

    Attributes:
        out_features: Length of the output, seven for every channel of every tensor.
    """

    def __init__(self, symmetry: Symmetry, channels: int) -> None:
        super().__init__()
        self._ndims = {name: len(dims) for name, dims in symmetry.dims.items()}
        self.out_features = (2 + len(QUANTILES)) * channels * len(self._ndims)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Compute the statistics. Name -> `(*batch, *shape, channels)` to `(*batch, out_features)`."""
        out = []
        for name, ndim in self._ndims.items():
            entries = flatten_entries(features[name], ndim)  # (*batch, entries, C)
            count = entries.shape[-2]
            variance = entries.var(-2, unbiased=count > 1)
            ascending = entries.sort(-2).values
            quantiles = [_interpolate(ascending, q * (count - 1)) for q in QUANTILES]
            out.append(torch.stack([entries.mean(-2), variance, *quantiles], -1).flatten(-2))
        return torch.cat(out, -1)


def _interpolate(entries: Tensor, index: float) -> Tensor:
    """The entry at a fractional index, by linear interpolation. `(*batch, entries, C)` to `(*batch, C)`."""
    low = int(index)
    high = min(low + 1, entries.shape[-2] - 1)
    return torch.lerp(entries[..., low, :], entries[..., high, :], index - low)
