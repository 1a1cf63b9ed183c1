"""A network from weights to changed weights that learns as it is: one good default, of public parts.

    U'_k = U + g_T D_k(U),   k = 1 ... outputs

D is a stack of residual NF-layers on standardised weights and positions; every tensor T has a learned factor g_T that
starts small, so that training starts from the networks as they are. Several outputs are as many edited networks, whose
outputs are averaged: an edit that one network of this size cannot represent may be the mean of several.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), App. D.4, arXiv:2302.14040
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nfn_optim.layers.branches import Parallel
from nfn_optim.layers.encoding import PositionEncoding, SinusoidalValues
from nfn_optim.layers.entrywise import Entrywise, Residual
from nfn_optim.layers.io_axes import free_ends, free_taps
from nfn_optim.layers.linear import NFLinear
from nfn_optim.layers.norm import ChannelNorm
from nfn_optim.layers.standardise import Standardise
from nfn_optim.symmetry import Symmetry

START = 0.05
"""Factor of the change of a tensor at the start, in its standard deviations."""


class Editor(nn.Module):
    """From weights to weights, equivariant to the order of hidden neurons.

    Call `fit` with a training population before training, for the moments of its weights.

    Args:
        symmetry: The tensors and their axes.
        channels: Of the NF-layers.
        depth: Number of residual NF-layers between the first and the last.
        outputs: Edited networks for every network.
    """

    def __init__(self, symmetry: Symmetry, *, channels: int = 16, depth: int = 2, outputs: int = 1) -> None:
        super().__init__()
        shared = free_ends(free_taps(symmetry))
        self.standardise = Standardise(symmetry, 1)
        encoding = PositionEncoding(symmetry)
        self.encode = nn.Sequential(Parallel(nn.Identity(), SinusoidalValues(2, 2.0)), encoding)
        blocks = [
            Residual(NFLinear(shared, channels, channels), Entrywise(nn.GELU()), ChannelNorm(shared, channels))
            for _ in range(depth)
        ]
        first = NFLinear(shared, 6 + encoding.extra_channels, channels)
        self.body = nn.Sequential(first, Entrywise(nn.GELU()), *blocks, ChannelNorm(shared, channels))
        self.last = NFLinear(shared, channels, outputs)
        self.factors = nn.Parameter(torch.full((len(symmetry.dims),), START))

    def fit(self, features: Mapping[str, Tensor]) -> Editor:
        """Take the moments of a training population. Name -> `(N, *shape, 1)`."""
        self.standardise.fit(features)
        return self

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Edit. Name -> `(N, *shape, 1)` to name -> `(N, *shape, outputs)`."""
        changes = self.last(self.body(self.encode(self.standardise(features))))
        scaled = zip(features.items(), self.factors, strict=True)
        return {name: x + factor * self.standardise.deviation(name) * changes[name] for (name, x), factor in scaled}
