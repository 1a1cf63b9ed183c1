"""Weight initialisations."""

from __future__ import annotations

from torch import nn

INITIALISATIONS = ("default", "normal", "orthogonal")
"""PyTorch's default; Xavier normal; orthogonal. The latter two with zero biases."""


def initialise(module: nn.Module, initialisation: str) -> nn.Module:
    """Set the initial weights of linear and convolutional layers.

    Args:
        module: Any module; modified in place.
        initialisation: One of `INITIALISATIONS`.

    Returns:
        The module.
    """
    for part in module.modules():
        if initialisation == "default" or not isinstance(part, nn.Linear | nn.Conv2d):
            continue
        if initialisation == "normal":
            nn.init.xavier_normal_(part.weight)
        else:
            nn.init.orthogonal_(part.weight)
        if part.bias is not None:
            nn.init.zeros_(part.bias)
    return module
