"""Networks over weights that predict which weights pruning keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pruning import Weights
from pruning_criteria import Criteria
from torch import nn

from nfn_optim.layers import ChannelNorm, Entrywise, LearnedEncoding, Parallel, Residual, Standardise, free_ends
from nfn_optim.populations import Population

START = 0.1
"""Factor of what a predictor adds to magnitude or SNIP, before training."""


class Gradient(nn.Module):
    """Weights, their gradients on one batch, and the logarithm of the magnitude of the product, as three channels."""

    def __init__(self, criteria: Criteria) -> None:
        super().__init__()
        self.gradient = criteria.gradient

    def forward(self, features: Weights) -> Weights:
        """Name -> `(N, *shape, 1)` to `(N, *shape, 3)`."""
        weights = {name: x[..., 0].detach() for name, x in features.items()}
        grads = self.gradient(weights)
        return {
            name: torch.stack([w, grads[name], (w * grads[name]).abs().clamp(min=1e-12).log()], -1)
            for name, w in weights.items()
        }


class Magnitude(nn.Module):
    """Weights, and the logarithm of their magnitude, as two channels."""

    def forward(self, features: Weights) -> Weights:
        """Name -> `(N, *shape, 1)` to `(N, *shape, 2)`."""
        return {name: torch.cat([x, x.abs().clamp(min=1e-6).log()], -1) for name, x in features.items()}


class Scores(nn.Module):
    """Scores of weights that start as the last of the input channels: magnitude, or SNIP; a network learns the rest.

    Args:
        population: Initial weights to train on.
        inputs: From weights to channels.
        layer: `NFLinear`, `DeepSets` or `Pointwise`.
        channels: Of every layer.
    """

    def __init__(
        self, population: Population, inputs: nn.Module, layer: Callable[..., nn.Module], channels: int
    ) -> None:
        super().__init__()
        symmetry, features = free_ends(population.symmetry), inputs(population.features())
        size = next(iter(features.values())).shape[-1]
        self.inputs, self.standardise = inputs, Standardise(symmetry, size).fit(features)
        self.factors = nn.Parameter(torch.ones(len(symmetry.dims)))
        blocks = [
            Residual(layer(symmetry, channels, channels), Entrywise(nn.GELU()), ChannelNorm(symmetry, channels))
            for _ in range(2)
        ]
        self.body = nn.Sequential(
            *(Parallel(nn.Identity(), Entrywise(torch.abs)), layer(symmetry, 2 * size, channels)),
            *(LearnedEncoding(population.symmetry, channels), Entrywise(nn.GELU()), *blocks),
            layer(symmetry, channels, 1),
        )

    def forward(self, features: Weights) -> Weights:
        """Name -> `(N, *shape, 1)`, in and out."""
        values = self.standardise(self.inputs(features))
        learned = self.body(values)
        return {
            name: factor * x[..., -1:] + START * learned[name]
            for (name, x), factor in zip(values.items(), self.factors, strict=True)
        }
