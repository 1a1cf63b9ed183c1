"""A model that people train, with a batch for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CLASSES, WORDS, BATCH, TOKENS = 5, 40, 4, 8

Inputs = Callable[[], Tensor | Mapping[str, Any]]


@dataclass(frozen=True)
class RealModel:
    """A model, a batch for it, and what is minimized.

    Args:
        name: Package and model, for test ids and tables.
        build: Makes the module.
        inputs: Makes one batch: a tensor is given by position, a mapping by keyword.
        loss: Output of the module -> scalar.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    loss: Callable[[Any], Tensor]

    def module(self) -> nn.Module:
        """A module with reproducible weights, in training mode."""
        torch.manual_seed(0)
        return self.build().train()

    def batch(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """The same batch at every call: arguments by position, and by keyword."""
        torch.manual_seed(1)
        inputs = self.inputs()
        return ((inputs,), {}) if isinstance(inputs, Tensor) else ((), dict(inputs))
