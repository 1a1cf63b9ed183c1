"""A model of another package, with a batch to train on."""

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
    """A model, a batch and a loss.

    Args:
        name: Package and model, for test ids and tables.
        build: Returns a new module.
        inputs: Returns a batch: a tensor is passed by position, a mapping by keyword.
        loss: Output of the module -> scalar loss.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    loss: Callable[[Any], Tensor]

    def module(self) -> nn.Module:
        """A new module with reproducible weights, in training mode."""
        torch.manual_seed(0)
        return self.build().train()

    def batch(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Positional and keyword arguments of the module; the same batch at every call."""
        torch.manual_seed(1)
        inputs = self.inputs()
        return ((inputs,), {}) if isinstance(inputs, Tensor) else ((), dict(inputs))
