"""A network from weights to a vector that learns as it is: one good default, of public parts.

    values      standardised by the training population, their absolute values, positions (`free_ends`, `free_taps`)
    body        residual NF-layers
    pooling     means and root mean squares of the body's channels, beside statistics and spectra of the weights
    head        a perceptron

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 3.1, arXiv:2302.14040
    Predicting Neural Network Accuracy from Weights (Unterthiner et al., 2020), Sec. 3, arXiv:2002.11448
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nfn_optim.layers.branches import Head, Parallel
from nfn_optim.layers.encoding import PositionEncoding
from nfn_optim.layers.entrywise import Entrywise, Residual
from nfn_optim.layers.invariant import InvariantPool
from nfn_optim.layers.io_axes import free_ends, free_taps
from nfn_optim.layers.linear import NFLinear
from nfn_optim.layers.norm import ChannelNorm
from nfn_optim.layers.spectrum import Spectrum
from nfn_optim.layers.standardise import Standardise
from nfn_optim.layers.statistics import Statistics
from nfn_optim.symmetry import Symmetry


class Predictor(nn.Module):
    r"""From the weights of a network to a vector, invariant to the order of hidden neurons.

    Call `fit` with a training population before training, for the moments of its weights.

    Args:
        symmetry: The tensors and their axes.
        out_features: Length of the vector.
        channels: Of the NF-layers.
        in_channels: Of the features; 1 for weights.
        depth: Number of residual NF-layers after the first one.
        dropout: In the head.

    Example:
        >>> models = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(20)]
        >>> s = Symmetry.parse("0.weight h in\n0.bias h\n2.weight out h\n2.bias out\nfree h=8\nfixed in=4 out=2")
        >>> from nfn_optim.layers import weight_features
        >>> weights = weight_features(models, s)
        >>> tuple(Predictor(s, 1).fit(weights)(weights).shape)
        (20, 1)
    """

    def __init__(
        self,
        symmetry: Symmetry,
        out_features: int = 1,
        *,
        channels: int = 8,
        in_channels: int = 1,
        depth: int = 1,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        shared = free_ends(free_taps(symmetry))
        self.standardise = Standardise(symmetry, in_channels)
        self.encode = nn.Sequential(
            Parallel(nn.Identity(), Entrywise(torch.abs)), encoding := PositionEncoding(symmetry)
        )
        blocks = [
            Residual(NFLinear(shared, channels, channels), Entrywise(nn.ReLU()), ChannelNorm(shared, channels))
            for _ in range(depth)
        ]
        first = NFLinear(shared, 2 * in_channels + encoding.extra_channels, channels)
        self.body = nn.Sequential(first, Entrywise(nn.ReLU()), *blocks)
        self.pool = InvariantPool(shared, channels, moments=2)
        self.statistics = Statistics(symmetry, in_channels)
        self.spectrum = Spectrum(symmetry)
        pooled = self.pool.out_features + self.statistics.out_features + self.spectrum.out_features
        self.head = Head(pooled, out_features, dropout=dropout)

    def fit(self, features: Mapping[str, Tensor]) -> Predictor:
        """Take the moments of a training population. Name -> `(N, *shape, in_channels)`."""
        self.standardise.fit(features)
        return self

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Predict. Name -> `(N, *shape, in_channels)` to `(N, out_features)`."""
        values = self.standardise(features)
        learned = self.pool(self.body(self.encode(values)))
        out: Tensor = self.head(torch.cat([learned, self.statistics(values), self.spectrum(features)], -1))
        return out
