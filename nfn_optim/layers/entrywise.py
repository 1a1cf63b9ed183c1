"""Activations, dropout and residual blocks.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), App. E, arXiv:2302.14040
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class Entrywise(nn.Module):
    """Apply one function to every tensor.

    Args:
        function: Acts on entries or on their channels (the last dimension), for example `nn.ReLU()`.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the function. Name -> `(*batch, *shape, channels)`, the output as `function` returns it."""
        return {name: self.function(x) for name, x in features.items()}


class ChannelDropout(nn.Module):
    """Drop whole channels of a tensor in training: the same ones for all entries, which keeps the layer equivariant.

    Args:
        p: Probability of dropping a channel; the others are divided by `1 - p`.
        batch_dims: Number of leading batch dimensions; every member of the batch drops other channels.

    Raises:
        ValueError: `p` is not in [0, 1).
    """

    def __init__(self, p: float = 0.5, *, batch_dims: int = 1) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"expected a probability of at least 0 and below 1, found {p}")
        self.p, self.batch_dims = p, batch_dims

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Drop channels. Name -> `(*batch, *shape, channels)`, in and out."""
        if not self.training or self.p == 0:
            return dict(features)
        out = {}
        for name, x in features.items():
            ndim = x.dim() - self.batch_dims - 1
            shape = (*x.shape[: self.batch_dims], *(1,) * ndim, x.shape[-1])
            out[name] = x * torch.empty(shape, device=x.device).bernoulli_(1 - self.p).to(x.dtype).div_(1 - self.p)
        return out


class Residual(nn.Module):
    """`x + dropout(activation(layer(norm(x))))`.

    Args:
        layer: An NF-layer with as many output as input channels.
        activation: For example `Entrywise(nn.ReLU())`; optional.
        norm: For example `ChannelNorm`; optional.
        dropout: For example `ChannelDropout`; optional.
    """

    def __init__(
        self,
        layer: nn.Module,
        activation: nn.Module | None = None,
        norm: nn.Module | None = None,
        dropout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        stages = (norm, layer, activation, dropout)
        self.body = nn.Sequential(*(stage for stage in stages if stage is not None))

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the block. Name -> `(*batch, *shape, channels)`, in and out."""
        change = self.body(features)
        return {name: x + change[name] for name, x in features.items()}
