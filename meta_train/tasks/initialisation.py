"""How the weights of a module start."""

from __future__ import annotations

from torch import nn

INITIALISATIONS = ("default", "normal", "orthogonal")
"""PyTorch's own; normal of variance 2 / (inputs + outputs); orthogonal. The latter two with biases of zero."""


def initialise(module: nn.Module, how: str) -> nn.Module:
    """Set the initial weights of linear and convolutional layers.

    Args:
        module: Any module; changed in place.
        how: One of `INITIALISATIONS`.

    Returns:
        The module.
    """
    for part in module.modules():
        if how == "default" or not isinstance(part, nn.Linear | nn.Conv2d):
            continue
        if how == "normal":
            nn.init.xavier_normal_(part.weight)
        else:
            nn.init.orthogonal_(part.weight)
        if part.bias is not None:
            nn.init.zeros_(part.bias)
    return module
