"""Branches side by side, and a head for pooled vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

BOUND = 4.0
"""Entries of a pooled vector approach this many standard deviations: some networks diverged."""


class Parallel(nn.Module):
    """Apply several modules to one input, and concatenate what they return: vectors, or channels of features.

    Args:
        branches: All return vectors `(*batch, size)`, or all return features with the same tensors.

    Example:
        >>> both = Parallel(nn.Linear(3, 2), nn.Linear(3, 5))
        >>> tuple(both(torch.randn(7, 3)).shape)
        (7, 7)
    """

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Any) -> Any:
        """Concatenate the outputs along the last dimension."""
        outputs = [branch(x) for branch in self.branches]
        if isinstance(outputs[0], Mapping):
            return {name: torch.cat([out[name] for out in outputs], -1) for name in outputs[0]}
        return torch.cat(outputs, -1)


class Head(nn.Module):
    """A perceptron on a pooled vector, whose entries are normalised by running moments first and bounded softly.

    Args:
        in_features: Length of the vector.
        out_features: Length of the output.
        hidden: Neurons of each of two hidden layers.
        dropout: Probability of dropping a hidden neuron in training.
    """

    def __init__(self, in_features: int, out_features: int, *, hidden: int = 256, dropout: float = 0.4) -> None:
        super().__init__()
        self.normalise = nn.BatchNorm1d(in_features, affine=False)
        self.body = nn.Sequential(
            nn.Linear(in_features, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, out_features),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply. `(N, in_features)` to `(N, out_features)`."""
        x = self.normalise(x)
        out: Tensor = self.body(x * torch.rsqrt(1 + (x / BOUND).square()))
        return out
