"""The two smallest NF-layers: every entry by itself, or together with the mean of its tensor.

    Pointwise    y = W_t x + b_t
    DeepSets     y = W_t x + V_t mean(x) + b_t        mean over all entries of tensor t

Both are equivariant to all permutations of the entries of a tensor, hence to those of any symmetry.

References:
    Deep Sets (Zaheer et al., 2017), Sec. 3.1, arXiv:1703.06114
    Universal Neural Functionals (Zhou et al., 2024), Sec. 5.2, arXiv:2402.05232
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from nfn_optim.layers.feature_dict import module_key
from nfn_optim.symmetry import Symmetry


class Pointwise(nn.Module):
    """Mix the channels of every entry, with separate coefficients for each tensor.

    Args:
        symmetry: The tensors; their axes are not used.
        in_channels: Input channels of every tensor.
        out_channels: Output channels of every tensor.
    """

    def __init__(self, symmetry: Symmetry, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.maps = nn.ModuleDict({module_key(name): nn.Linear(in_channels, out_channels) for name in symmetry.dims})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the layer. Name -> `(*batch, *shape, in_channels)` to name -> `(*batch, *shape, out_channels)`."""
        return {name: self.maps[module_key(name)](x) for name, x in features.items()}


class DeepSets(nn.Module):
    """`Pointwise` plus a linear map of the mean of the tensor.

    Args:
        symmetry: The tensors; only their numbers of dimensions are used.
        in_channels: Input channels of every tensor.
        out_channels: Output channels of every tensor.
        pointwise: Initialise the layer as `Pointwise`, the coefficients of the means being zero.
    """

    def __init__(self, symmetry: Symmetry, in_channels: int, out_channels: int, *, pointwise: bool = False) -> None:
        super().__init__()
        self._ndims = {name: len(dims) for name, dims in symmetry.dims.items()}
        self.pointwise = Pointwise(symmetry, in_channels, out_channels)
        self.mean = nn.ModuleDict(
            {module_key(name): nn.Linear(in_channels, out_channels, bias=False) for name in symmetry.dims}
        )
        if pointwise:
            for weight in self.mean.parameters():
                nn.init.zeros_(weight)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the layer. Name -> `(*batch, *shape, in_channels)` to name -> `(*batch, *shape, out_channels)`."""
        out: dict[str, Tensor] = self.pointwise(features)
        for name, ndim in self._ndims.items():
            if ndim:
                dims = tuple(range(-1 - ndim, -1))
                out[name] = out[name] + self.mean[module_key(name)](features[name].mean(dims, keepdim=True))
        return out
