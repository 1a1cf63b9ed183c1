"""Nonlinearities by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
}


class Activation(nn.Module):
    """A nonlinearity as a module.

    Args:
        name: One of `ACTIVATIONS`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        """Apply it elementwise. `(...) -> (...)`."""
        return self.function(x)
