"""Networks over weights that several experiments compare with."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nfn_optim.layers import Entrywise, FourierValues, Head, PositionEncoding, Standardise
from nfn_optim.populations import Population
from nfn_optim.symmetry import Symmetry


class Flat(nn.Module):
    """All weights in a row, standardised, `(N, out_features)`: permutations are not known any more."""

    def __init__(self, population: Population) -> None:
        super().__init__()
        self.standardise = Standardise(population.symmetry, 1).fit(population.features())
        self.out_features = sum(x[0].numel() for x in population.params.values())

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Name -> `(N, *shape, 1)` to `(N, out_features)`."""
        return torch.cat([x.flatten(1) for x in self.standardise(features).values()], 1)


def flat_perceptron(population: Population, out_features: int) -> nn.Module:
    """A perceptron on all weights in a row."""
    flat = Flat(population)
    return nn.Sequential(flat, Head(flat.out_features, out_features))


def recipe_layers(
    population: Population, symmetry: Symmetry, layer: Callable[..., nn.Module], channels: int, bands: int = 6
) -> list[nn.Module]:
    """The first layers of the paper's networks on SIRENs: Fourier values of raw weights, positions, three with ReLU.

    Args:
        population: Whose weights are read.
        symmetry: Of the layers.
        layer: `NFLinear`, `DeepSets` or `Pointwise`.
        channels: Of Fourier values and layers.
        bands: Of the positions.
    """
    encode = PositionEncoding(population.symmetry, bands=bands)
    layers: list[nn.Module] = [FourierValues(1, channels, scale=3.0), encode]
    for n, m in itertools.pairwise([2 * channels + encode.extra_channels, channels, channels, channels]):
        layers += [layer(symmetry, n, m), Entrywise(nn.ReLU())]
    return layers
