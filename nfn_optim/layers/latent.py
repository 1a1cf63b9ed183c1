"""Cross-attention between weight space and a latent array (INR2ARRAY).

    LatentEncoder    learned latents attend to all entries of all tensors     invariant
    LatentDecoder    every entry attends to the latents                       equivariant

The decoder's queries are the features of the entries, so entries with equal features have equal outputs; add a
`LearnedEncoding` to distinguish the positions on fixed axes.

References:
    Neural Functional Transformers (Zhou et al., 2023), Sec. 3.3 (INR2ARRAY), arXiv:2305.13546
    Perceiver IO (Jaegle et al., 2021), Sec. 3, arXiv:2107.14795
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nfn_optim.layers.feature_dict import flatten_entries
from nfn_optim.symmetry import Symmetry


class CrossAttention(nn.Module):
    """Multi-head cross-attention.

    Args:
        channels: Channels of queries, of keys and values, and of the output.
        heads: Number of heads.

    Raises:
        ValueError: `heads` does not divide `channels`.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"expected a number of heads that divides {channels} channels, found {heads}")
        self.heads = heads
        self.query, self.key_value = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """Attend from queries to context. `(*batch, A, C)` and `(*batch, B, C)` to `(*batch, A, C)`."""
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # (*batch, heads, tokens, c)
            for x in (self.query(queries), *self.key_value(context).chunk(2, -1))
        )
        y: Tensor = self.out(scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))
        return y


class LatentEncoder(nn.Module):
    """From weight space to a latent array.

    Args:
        symmetry: The tensors; only their numbers of dimensions are used.
        channels: Channels of every tensor and of the latents.
        latents: Number of latents.
        heads: Number of heads, a divisor of `channels`.
    """

    def __init__(self, symmetry: Symmetry, channels: int, latents: int, heads: int = 1) -> None:
        super().__init__()
        self._ndims = {name: len(dims) for name, dims in symmetry.dims.items()}
        self.latents = nn.Parameter(torch.randn(latents, channels))
        self.attention = CrossAttention(channels, heads)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Encode. Name -> `(*batch, *shape, channels)` to `(*batch, latents, channels)`."""
        parts = [flatten_entries(features[name], ndim) for name, ndim in self._ndims.items()]
        entries = torch.cat(parts, -2)  # (*batch, entries, C)
        latents = self.latents.expand(*entries.shape[:-2], *self.latents.shape)
        y: Tensor = self.attention(latents, entries)
        return y


class LatentDecoder(nn.Module):
    """From a latent array back to weight space.

    Args:
        symmetry: The tensors; only their numbers of dimensions are used.
        channels: Channels of every tensor and of the latents.
        heads: Number of heads, a divisor of `channels`.
    """

    def __init__(self, symmetry: Symmetry, channels: int, heads: int = 1) -> None:
        super().__init__()
        self._ndims = {name: len(dims) for name, dims in symmetry.dims.items()}
        self.attention = CrossAttention(channels, heads)

    def forward(self, features: Mapping[str, Tensor], latents: Tensor) -> dict[str, Tensor]:
        """Decode.

        Args:
            features: The queries, name -> `(*batch, *shape, channels)`.
            latents: `(*batch, latents, channels)`.

        Returns:
            Name -> `(*batch, *shape, channels)`.
        """
        return {
            name: self.attention(flatten_entries(features[name], ndim), latents).reshape(features[name].shape)
            for name, ndim in self._ndims.items()
        }
