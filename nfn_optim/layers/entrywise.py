"""What is done to every entry, or every channel, alike: activations, dropout, residual blocks.

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
        """Apply it. Name -> `(*batch, *shape, channels)` to what `function` makes of it."""
        return {name: self.function(x) for name, x in features.items()}


class ChannelDropout(nn.Module):
    """In training, set channels to zero: each for all entries of a tensor at once, so that no neuron is told apart.

    Args:
        p: Probability that a channel is dropped; the others are divided by `1 - p`.
        batch_dims: How many leading dimensions are batch, every member of which draws its own channels.
    """

    def __init__(self, p: float = 0.5, *, batch_dims: int = 1) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"expected a probability of at least 0 and below 1, found {p}")
        self.p, self.batch_dims = p, batch_dims

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Drop. Name -> `(*batch, *shape, channels)`, both ways."""
        if not self.training or self.p == 0:
            return dict(features)
        out = {}
        for name, x in features.items():
            inner = x.dim() - self.batch_dims - 1
            shape = (*x.shape[: self.batch_dims], *(1,) * inner, x.shape[-1])
            out[name] = x * torch.empty(shape, device=x.device).bernoulli_(1 - self.p).to(x.dtype).div_(1 - self.p)
        return out


class Residual(nn.Module):
    """`x + dropout(activation(layer(norm(x))))`.

    Args:
        layer: An NF-layer of as many channels out as in.
        activation: An NF-layer such as `Entrywise(nn.ReLU())`; none if not given.
        norm: An NF-layer such as `ChannelNorm`; none if not given.
        dropout: An NF-layer such as `ChannelDropout`; none if not given.
    """

    def __init__(
        self,
        layer: nn.Module,
        activation: nn.Module | None = None,
        norm: nn.Module | None = None,
        dropout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        given = (norm, layer, activation, dropout)
        self.body = nn.Sequential(*(part for part in given if part is not None))

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the block. Name -> `(*batch, *shape, channels)`, both ways."""
        changed = self.body(features)
        return {name: x + changed[name] for name, x in features.items()}
