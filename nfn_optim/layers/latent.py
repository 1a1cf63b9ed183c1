"""Attention to and from a latent array: any weight space in a few vectors, and back.

    LatentEncoder    learned latents attend to all entries of all tensors     an invariant array
    LatentDecoder    every entry attends to the latents                       an equivariant reading

The decoder asks by the features of an entry; encode the places of fixed axes (`LearnedEncoding`) to tell entries apart.

References:
    Neural Functional Transformers (Zhou et al., 2023), Sec. 3.3 (INR2ARRAY), arXiv:2305.13546
    Perceiver IO (Jaegle et al., 2021), Sec. 3, arXiv:2107.14795
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nfn_optim.symmetry import Symmetry


class CrossAttention(nn.Module):
    """Attention of some tokens to others.

    Args:
        channels: Channels of both.
        heads: Number of heads, which divides the channels.

    Raises:
        ValueError: The heads do not divide the channels.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"expected a number of heads that divides {channels} channels, found {heads}")
        self.heads = heads
        self.ask, self.answer = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, asking: Tensor, asked: Tensor) -> Tensor:
        """Attend. `(*batch, A, C)` and `(*batch, B, C)` to `(*batch, A, C)`."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for part in (self.ask(asking), *self.answer(asked).chunk(2, -1))
        )
        heard: Tensor = self.out(scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))
        return heard


class LatentEncoder(nn.Module):
    """From weight space to a latent array.

    Args:
        symmetry: The tensors; of their axes only the number matters.
        channels: Channels of every tensor's features.
        latents: Vectors in the array.
        heads: Number of heads, which divides the channels.
    """

    def __init__(self, symmetry: Symmetry, channels: int, latents: int, heads: int = 1) -> None:
        super().__init__()
        self._orders = {name: len(dims) for name, dims in symmetry.dims.items()}
        self.latents = nn.Parameter(torch.randn(latents, channels))
        self.attention = CrossAttention(channels, heads)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Encode. Name -> `(*batch, *shape, channels)` to `(*batch, latents, channels)`."""
        parts = [
            features[name].flatten(-1 - order, -2) if order else features[name].unsqueeze(-2)
            for name, order in self._orders.items()
        ]
        entries = torch.cat(parts, -2)  # (*batch, entries, C)
        latents = self.latents.expand(*entries.shape[:-2], *self.latents.shape)
        found: Tensor = self.attention(latents, entries)
        return found


class LatentDecoder(nn.Module):
    """From a latent array back to weight space.

    Args:
        symmetry: The tensors; of their axes only the number matters.
        channels: Channels of every tensor's features.
        heads: Number of heads, which divides the channels.
    """

    def __init__(self, symmetry: Symmetry, channels: int, heads: int = 1) -> None:
        super().__init__()
        self._orders = {name: len(dims) for name, dims in symmetry.dims.items()}
        self.attention = CrossAttention(channels, heads)

    def forward(self, features: Mapping[str, Tensor], latents: Tensor) -> dict[str, Tensor]:
        """Decode.

        Args:
            features: What the entries ask by: name -> `(*batch, *shape, channels)`.
            latents: `(*batch, latents, channels)`.

        Returns:
            Name -> `(*batch, *shape, channels)`.
        """
        out = {}
        for name, order in self._orders.items():
            x = features[name]
            asking = x.flatten(-1 - order, -2) if order else x.unsqueeze(-2)
            out[name] = self.attention(asking, latents).reshape(x.shape)
        return out
