"""Self-attention over weights, as in Neural Functional Transformers, for any symmetry.

For every free axis, the *tokens* are the vectors along the axis: the rows of one weight matrix, the columns of the next
and the bias between them are vectors over the same neurons. The tokens of one axis attend to each other, with inner
products over its neurons; in addition, the means of all tensors attend to each other.

    q, k, v = U x                         for every entry, with one U for all tensors
    y = sum over free axes a of softmax(q_a k_a^T / sqrt(n_a c)) v_a  +  softmax(mean q mean k^T / sqrt(c)) mean v

A nested axis has a separate set of tokens for every entry of its parents; only tokens of one set attend to each other.
Along an axis that has nested axes, these are averaged first, since their entries have no common order.

References:
    Neural Functional Transformers (Zhou et al., 2023), Sec. 3, arXiv:2305.13546
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nfn_optim.layers.block import Block, BlockId, BlockPartition
from nfn_optim.symmetry import Symmetry


@dataclass(frozen=True)
class TokenGroup:
    """The tokens of a block along one of its dimensions.

    Attributes:
        block: The block.
        dim: The dimension along which the tokens are vectors.
        parent_dims: The dimensions that `dim` is nested in, which act as batch dimensions.
        token_dims: The dimensions that index the tokens.
        nested_dims: The dimensions nested in `dim`, which are averaged.
    """

    block: Block
    dim: int
    parent_dims: tuple[int, ...]
    token_dims: tuple[int, ...]
    nested_dims: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """All dimensions of the block, in the order of the tokens' layout."""
        return (*self.parent_dims, *self.token_dims, self.dim, *self.nested_dims)

    def gather(self, x: Tensor) -> Tensor:
        """The tokens of a block. `(N, *block.shape, C)` to `(N * parents, T, n, C)`."""
        x = x.permute(0, *(1 + d for d in self.order), x.dim() - 1)  # (N, *parents, *tokens, n, *nested, C)
        if self.nested_dims:
            first = 2 + len(self.parent_dims) + len(self.token_dims)
            x = x.mean(tuple(range(first, first + len(self.nested_dims))))
        parents = math.prod([self.block.dims[d].size for d in self.parent_dims])
        return x.reshape(x.shape[0] * parents, -1, self.block.dims[self.dim].size, x.shape[-1])

    def scatter(self, tokens: Tensor, batch: int) -> Tensor:
        """Inverse layout. `(N * parents, T, n, C)` to `(N, *block.shape, C)`, of size 1 along nested dimensions."""
        sizes = [1 if d in self.nested_dims else self.block.dims[d].size for d in self.order]
        x = tokens.reshape(batch, *sizes, tokens.shape[-1])
        return x.permute(0, *(1 + self.order.index(d) for d in range(len(sizes))), x.dim() - 1)


class WeightAttention(nn.Module):
    """Self-attention over weights, along every free axis and between tensors.

    Args:
        symmetry: The tensors and their axes; the paper's layer has free inputs and outputs (`free_ends`).
        channels: Input and output channels of every tensor.
        heads: Number of heads.
        dropout: Probability of dropping an attention weight in training.

    Raises:
        ValueError: `heads` does not divide `channels`.
    """

    def __init__(self, symmetry: Symmetry, channels: int, heads: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"expected a number of heads that divides {channels} channels, found {heads}")
        self._partition = BlockPartition(symmetry)
        self._groups = _token_groups_of(self._partition.blocks)
        self.channels, self.heads, self.dropout = channels, heads, dropout
        self.project = nn.Linear(channels, 3 * channels)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the layer. Name -> `(*batch, *shape, channels)`, in and out."""
        batch, parts = self._partition.split(features, self.channels)
        qkv = {block: self.project(x) for block, x in parts.items()}  # (N, *block.shape, 3C)
        out = self._attend_between_tensors(qkv)
        for groups in self._groups.values():
            tokens = [group.gather(qkv[group.block.id]) for group in groups]  # (N * parents, T, n, 3C)
            attended = torch.split(self._attend(torch.cat(tokens, 1)), [t.shape[1] for t in tokens], 1)
            for group, y in zip(groups, attended, strict=True):
                block = group.block.id
                out[block] = out[block] + group.scatter(y, qkv[block].shape[0])
        return self._partition.join(batch, (out[block.id] for block in self._partition.blocks))

    def _attend_between_tensors(self, qkv: Mapping[BlockId, Tensor]) -> dict[BlockId, Tensor]:
        """One token per block, its mean; the result is expanded to the block."""
        means = [x.flatten(1, -2).mean(1) if x.dim() > 2 else x for x in qkv.values()]  # noqa: PLR2004 - (N, 3C)
        attended = self._attend(torch.stack(means, 1).unsqueeze(2))  # (N, blocks, 1, C)
        out = {}
        for index, (block, x) in enumerate(qkv.items()):
            y = attended[:, index, 0].reshape(-1, *(1,) * (x.dim() - 2), self.channels)
            out[block] = y.expand(*x.shape[:-1], self.channels)
        return out

    def _attend(self, qkv: Tensor) -> Tensor:
        """Attention among T tokens, vectors over n neurons. `(N, T, n, 3C)` to `(N, T, n, C)`."""
        batch, count, size, _ = qkv.shape
        split = qkv.reshape(batch, count, size, self.heads, 3, -1).permute(4, 0, 3, 1, 2, 5)  # (3, N, heads, T, n, c)
        q, k, v = split.flatten(-2).unbind(0)
        y = scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        y = y.reshape(batch, self.heads, count, size, -1).permute(0, 2, 3, 1, 4)  # (N, T, n, heads, c)
        return y.reshape(batch, count, size, -1)


def _token_groups_of(blocks: Sequence[Block]) -> dict[str, list[TokenGroup]]:
    """For every free axis, its tokens in all blocks."""
    groups: dict[str, list[TokenGroup]] = {}
    for block in blocks:
        for d in block.free_dims:
            dim = block.dims[d]
            nested = tuple(n for n, other in enumerate(block.dims) if d in other.parents)
            parents = tuple(sorted(dim.parents, key=lambda p: block.dims[p].axis))
            tokens = tuple(n for n in range(len(block.dims)) if n != d and n not in (*nested, *parents))
            groups.setdefault(dim.axis, []).append(TokenGroup(block, d, parents, tokens, nested))
    return groups
