"""Normalisation that commutes with renaming neurons.

    ChannelNorm    every entry over its channels, or over its channels and fixed positions (the paper's form)
    TensorNorm     every channel of a tensor over all its entries
    Scale          no statistics: one learned factor for each tensor

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), App. E, arXiv:2302.14040
    Layer Normalization (Ba et al., 2016), Sec. 3, arXiv:1607.06450
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from nfn_optim.layers.block import Partition
from nfn_optim.layers.deepsets import slot_of
from nfn_optim.layers.linear import batch_of
from nfn_optim.symmetry import Symmetry


class ChannelNorm(nn.Module):
    """Mean 0 and variance 1 over the channels of an entry, then a learned gain and shift for each tensor.

    Args:
        symmetry: The tensors and their axes.
        channels: Channels of every tensor's features.
        positions: Normalise over all positions of the fixed axes together with the channels, each position and channel
            with its own gain and shift.
        eps: Added to the variance.
    """

    def __init__(self, symmetry: Symmetry, channels: int, *, positions: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self._partitions = {name: Partition(symmetry, name) for name in symmetry.dims}
        self._positions, self._eps = positions, eps
        self.gains, self.shifts = nn.ParameterDict(), nn.ParameterDict()
        for name, partition in self._partitions.items():
            for block in partition.blocks:
                slot = _place(name, block.number)
                width = (block.positions if positions else 1) * channels
                self.gains[slot], self.shifts[slot] = (
                    nn.Parameter(torch.ones(width)),
                    nn.Parameter(torch.zeros(width)),
                )

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Normalise. Name -> `(*batch, *shape, channels)`, both ways."""
        batch = batch_of(self._partitions, features)
        out = {}
        for name, partition in self._partitions.items():
            shape = features[name].shape
            flat = features[name].reshape(-1, *shape[len(batch) :])  # (N, *shape, C)
            pieces = []
            for block, x in zip(partition.blocks, partition.cut(flat), strict=True):
                slot = _place(name, block.number)
                gain, shift = self.gains[slot], self.shifts[slot]
                if not self._positions or not block.fixed:
                    pieces.append(layer_norm(x, (x.shape[-1],), gain, shift, self._eps))
                    continue
                order = [0, *(1 + n for n in (*block.free, *block.fixed)), x.dim() - 1]
                last = x.permute(order)  # (N, *free, *fixed, C)
                folded = last.flatten(1 + len(block.free))
                y = layer_norm(folded, (folded.shape[-1],), gain, shift, self._eps).reshape(last.shape)
                pieces.append(y.permute([order.index(n) for n in range(len(order))]))
            out[name] = partition.join(pieces).reshape(shape)
        return out


class TensorNorm(nn.Module):
    """Mean square 1 over the entries of a tensor, channel by channel, then a learned gain for each tensor and channel.

    Args:
        symmetry: The tensors; of their axes only the number matters.
        channels: Channels of every tensor's features.
        eps: Added to the mean square.
    """

    def __init__(self, symmetry: Symmetry, channels: int, *, eps: float = 1e-8) -> None:
        super().__init__()
        self._orders = {name: len(dims) for name, dims in symmetry.dims.items()}
        self._eps = eps
        self.gains = nn.ParameterDict({slot_of(name): nn.Parameter(torch.ones(channels)) for name in symmetry.dims})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Normalise. Name -> `(*batch, *shape, channels)`, both ways."""
        out = {}
        for name, order in self._orders.items():
            x = features[name]
            dims = tuple(range(-1 - order, -1))
            square = x.square().mean(dims, keepdim=True) if dims else x.square()
            out[name] = x * torch.rsqrt(square + self._eps) * self.gains[slot_of(name)]
        return out


class Scale(nn.Module):
    """Multiply every tensor by a learned number.

    Args:
        symmetry: The tensors.
        start: The numbers to begin with.
    """

    def __init__(self, symmetry: Symmetry, start: float = 1.0) -> None:
        super().__init__()
        self.factors = nn.ParameterDict({slot_of(n): nn.Parameter(torch.tensor(start)) for n in symmetry.dims})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply. Name -> `(*batch, *shape, channels)`, both ways."""
        return {name: x * self.factors[slot_of(name)] for name, x in features.items()}


def _place(name: str, number: int) -> str:
    return f"{slot_of(name)}#{number}"
