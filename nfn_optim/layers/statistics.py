"""Statistics of every tensor: what weights look like without looking at how they are wired (STATNN's features).

References:
    Predicting Neural Network Accuracy from Weights (Unterthiner et al., 2020), Sec. 3, arXiv:2002.11448
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 3.1, arXiv:2302.14040
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nfn_optim.symmetry import Symmetry

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Statistics(nn.Module):
    """Mean, variance and quartiles of every tensor, channel by channel.

    Args:
        symmetry: The tensors; of their axes only the number matters.
        channels: Channels of every tensor's features.

    Attributes:
        out_features: How many numbers come out: seven for each channel of each tensor.
    """

    def __init__(self, symmetry: Symmetry, channels: int) -> None:
        super().__init__()
        self._orders = {name: len(dims) for name, dims in symmetry.dims.items()}
        self.out_features = (2 + len(QUANTILES)) * channels * len(self._orders)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Describe. Name -> `(*batch, *shape, channels)` to `(*batch, out_features)`."""
        found = []
        for name, order in self._orders.items():
            x = features[name]
            flat = x.flatten(-1 - order, -2) if order else x.unsqueeze(-2)  # (*batch, entries, C)
            count = flat.shape[-2]
            variance = flat.var(-2, unbiased=count > 1)
            ordered = flat.sort(-2).values
            quantiles = [_between(ordered, q * (count - 1)) for q in QUANTILES]
            found.append(torch.stack([flat.mean(-2), variance, *quantiles], -1).flatten(-2))
        return torch.cat(found, -1)


def _between(ordered: Tensor, place: float) -> Tensor:
    """Linear interpolation. `(*batch, entries, C)` to `(*batch, C)`."""
    low = int(place)
    high = min(low + 1, ordered.shape[-2] - 1)
    return torch.lerp(ordered[..., low, :], ordered[..., high, :], place - low)
