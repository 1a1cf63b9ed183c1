"""A multilayer perceptron as a module."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from meta_train.tasks.activation import Activation

NORMS = ("none", "none", "none", "layer", "batch")
"""The norm before every nonlinearity, equally likely: over neurons, over the batch, or none."""


class Perceptron(nn.Module):
    """Linear layers with nonlinearities between them.

    Args:
        sizes: Inputs, hidden neurons of each layer, outputs.
        activation: One of `ACTIVATIONS`.
        norm: One of `NORMS`; "batch" has no running statistics.
    """

    def __init__(self, sizes: tuple[int, ...], activation: str, norm: str = "none") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes[:-1]):
            layers += [nn.Linear(fan_in, fan_out), *_norm(norm, fan_out), Activation(activation)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """`(batch_size, ...) -> (batch_size, outputs)`; further dimensions of the input are flattened."""
        y: Tensor = self.layers(x.flatten(1))
        return y


def _norm(kind: str, width: int) -> list[nn.Module]:
    if kind == "layer":
        return [nn.LayerNorm(width)]
    return [nn.BatchNorm1d(width, track_running_stats=False)] if kind == "batch" else []
