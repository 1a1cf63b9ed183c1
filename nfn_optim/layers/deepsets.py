"""Every entry on its own, or together with the mean of its tensor: the two smallest NF-layers.

    Pointwise    y = W_t x + b_t
    DeepSets     y = W_t x + V_t mean(x) + b_t        means over all entries of a tensor t

Both commute with every permutation of the entries of a tensor, so with those of any symmetry.

References:
    Deep Sets (Zaheer et al., 2017), Sec. 3.1, arXiv:1703.06114
    Universal Neural Functionals (Zhou et al., 2024), Sec. 5.2, arXiv:2402.05232
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from nfn_optim.symmetry import Symmetry


def slot_of(name: str) -> str:
    """A parameter's name without dots, as modules want it.

    Example:
        >>> slot_of("0.weight")
        '0/weight'
    """
    return name.replace(".", "/")


class Pointwise(nn.Module):
    """Mix the channels of every entry, for each tensor in its own way.

    Args:
        symmetry: The tensors; their axes are of no importance.
        in_channels: Channels of every tensor's features.
        out_channels: Channels that come out.
    """

    def __init__(self, symmetry: Symmetry, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.maps = nn.ModuleDict({slot_of(name): nn.Linear(in_channels, out_channels) for name in symmetry.dims})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the layer. Name -> `(*batch, *shape, in_channels)` to name -> `(*batch, *shape, out_channels)`."""
        return {name: self.maps[slot_of(name)](x) for name, x in features.items()}


class DeepSets(nn.Module):
    """`Pointwise`, and every entry hears the mean of its tensor.

    Args:
        symmetry: The tensors; of their axes only the number matters.
        in_channels: Channels of every tensor's features.
        out_channels: Channels that come out.
        pointwise: Let what the mean says start at zero.
    """

    def __init__(self, symmetry: Symmetry, in_channels: int, out_channels: int, *, pointwise: bool = False) -> None:
        super().__init__()
        self._orders = {name: len(dims) for name, dims in symmetry.dims.items()}
        self.own = Pointwise(symmetry, in_channels, out_channels)
        self.mean = nn.ModuleDict(
            {slot_of(name): nn.Linear(in_channels, out_channels, bias=False) for name in symmetry.dims}
        )
        if pointwise:
            for mean in self.mean.parameters():
                nn.init.zeros_(mean)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the layer. Name -> `(*batch, *shape, in_channels)` to name -> `(*batch, *shape, out_channels)`."""
        out: dict[str, Tensor] = self.own(features)
        for name, order in self._orders.items():
            if order:
                dims = tuple(range(-1 - order, -1))
                out[name] = out[name] + self.mean[slot_of(name)](features[name].mean(dims, keepdim=True))
        return out
