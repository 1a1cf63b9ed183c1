"""Equivariant normalisation.

    ChannelNorm    every entry over its channels, or over its channels and fixed positions (the paper's form)
    TensorNorm     every channel of a tensor over all entries
    Scale          no normalisation: one learned factor for each tensor

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), App. E, arXiv:2302.14040
    Layer Normalization (Ba et al., 2016), Sec. 3, arXiv:1607.06450
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from nfn_optim.layers.block import Block, BlockPartition
from nfn_optim.layers.feature_dict import module_key
from nfn_optim.symmetry import Symmetry


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of every entry, with a learned gain and shift for each tensor.

    Args:
        symmetry: The tensors and their axes.
        channels: Channels of every tensor.
        positions: Normalise over channels and all positions on the fixed axes, with a gain and shift for each of them.
        eps: Added to the variance.
    """

    def __init__(self, symmetry: Symmetry, channels: int, *, positions: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self._partition = BlockPartition(symmetry)
        self.channels, self._positions, self._eps = channels, positions, eps
        self.gains, self.shifts = nn.ParameterDict(), nn.ParameterDict()
        for block in self._partition.blocks:
            width = (block.num_positions if positions else 1) * channels
            self.gains[_key_of(block)] = nn.Parameter(torch.ones(width))
            self.shifts[_key_of(block)] = nn.Parameter(torch.zeros(width))

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Normalise. Name -> `(*batch, *shape, channels)`, in and out."""
        batch, parts = self._partition.split(features, self.channels)
        return self._partition.join(batch, (self._normalise(b, parts[b.id]) for b in self._partition.blocks))

    def _normalise(self, block: Block, x: Tensor) -> Tensor:
        gain, shift = self.gains[_key_of(block)], self.shifts[_key_of(block)]
        if not self._positions or not block.fixed_dims:
            return layer_norm(x, (x.shape[-1],), gain, shift, self._eps)
        order = [0, *(1 + d for d in (*block.free_dims, *block.fixed_dims)), x.dim() - 1]
        x = x.permute(order)  # (N, *free, *fixed, C)
        flat = x.flatten(1 + len(block.free_dims))  # (N, *free, P * C)
        y = layer_norm(flat, (flat.shape[-1],), gain, shift, self._eps).reshape(x.shape)
        return y.permute([order.index(d) for d in range(len(order))])


class TensorNorm(nn.Module):
    """RMS normalisation of every channel over all entries of a tensor, with a learned gain for each.

    Args:
        symmetry: The tensors; only their numbers of dimensions are used.
        channels: Channels of every tensor.
        eps: Added to the mean square.
    """

    def __init__(self, symmetry: Symmetry, channels: int, *, eps: float = 1e-8) -> None:
        super().__init__()
        self._ndims = {name: len(dims) for name, dims in symmetry.dims.items()}
        self._eps = eps
        self.gains = nn.ParameterDict({module_key(name): nn.Parameter(torch.ones(channels)) for name in symmetry.dims})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Normalise. Name -> `(*batch, *shape, channels)`, in and out."""
        out = {}
        for name, ndim in self._ndims.items():
            x = features[name]
            dims = tuple(range(-1 - ndim, -1))
            square = x.square().mean(dims, keepdim=True) if dims else x.square()
            out[name] = x * torch.rsqrt(square + self._eps) * self.gains[module_key(name)]
        return out


class Scale(nn.Module):
    """Multiply every tensor by a learned factor.

    Args:
        symmetry: The tensors; their axes are not used.
        start: Initial factor.
    """

    def __init__(self, symmetry: Symmetry, start: float = 1.0) -> None:
        super().__init__()
        self.factors = nn.ParameterDict({module_key(n): nn.Parameter(torch.tensor(start)) for n in symmetry.dims})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply. Name -> `(*batch, *shape, channels)`, in and out."""
        return {name: x * self.factors[module_key(name)] for name, x in features.items()}


def _key_of(block: Block) -> str:
    return f"{module_key(block.tensor)}#{block.index}"
