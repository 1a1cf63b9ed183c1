"""Attention over weights: self-attention of Neural Functional Transformers, for any symmetry.

For every free axis, everything that a tensor has along the axis is a *token*, one for each of its other entries: rows
of one weight matrix, columns of the next and the bias between them are vectors over the same neurons. Tokens attend to
each other, the products being sums over the neurons of the axis; then the means of all tensors attend to each other.

    q, k, v = U x                         for every entry, the same U for all tensors
    y = sum over free axes a of softmax(q_a k_a^T / sqrt(n_a c)) v_a  +  softmax(mean q mean k^T / sqrt(c)) mean v

A nested axis has tokens for each entry of what it is nested in, and these do not meet; where the tokens are those of an
axis in which others are nested, the others are pooled first, their entries having no common order.

References:
    Neural Functional Transformers (Zhou et al., 2023), Sec. 3, arXiv:2305.13546
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nfn_optim.layers.block import Block, Partition
from nfn_optim.layers.linear import batch_of
from nfn_optim.symmetry import Symmetry

Place = tuple[str, int]
"""A block: the name of its tensor, its number."""


@dataclass(frozen=True)
class Strand:
    """The tokens that a block has along an axis.

    Attributes:
        place: Which block.
        atom: The position of the axis.
        copies: Positions of what it is nested in.
        others: Positions of what numbers the tokens.
        inside: Positions of what is nested in it.
    """

    place: Place
    atom: int
    copies: tuple[int, ...]
    others: tuple[int, ...]
    inside: tuple[int, ...]


class WeightAttention(nn.Module):
    """Self-attention over weights, along every free axis and between tensors.

    Args:
        symmetry: The tensors and their axes; the paper's own has free ends (`free_ends`).
        channels: Channels in and out.
        heads: Number of heads, which divides the channels.
        dropout: Probability of dropping an attention weight in training.

    Raises:
        ValueError: The heads do not divide the channels.
    """

    def __init__(self, symmetry: Symmetry, channels: int, heads: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"expected a number of heads that divides {channels} channels, found {heads}")
        self._partitions = {name: Partition(symmetry, name) for name in symmetry.dims}
        blocks = [block for partition in self._partitions.values() for block in partition.blocks]
        self._blocks = {(block.tensor, block.number): block for block in blocks}
        self._strands = _strands_of(blocks)
        self.channels, self.heads, self.dropout = channels, heads, dropout
        self.project = nn.Linear(channels, 3 * channels)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Attend. Name -> `(*batch, *shape, channels)`, both ways."""
        batch = batch_of(self._partitions, features)
        given: dict[Place, Tensor] = {}
        for name, partition in self._partitions.items():
            flat = features[name].reshape(-1, *partition.shape, self.channels)  # (N, *shape, C)
            for block, x in zip(partition.blocks, partition.cut(flat), strict=True):
                given[name, block.number] = self.project(x)  # (N, *atoms, 3C)
        out = self._between_tensors(given)
        for strands in self._strands.values():
            tokens = [self._gathered(strand, given[strand.place]) for strand in strands]  # (N * copies, T, n, 3C)
            heard = torch.split(self._attended(torch.cat(tokens, 1)), [t.shape[1] for t in tokens], 1)
            for strand, own in zip(strands, heard, strict=True):
                out[strand.place] = out[strand.place] + self._scattered(strand, own, given[strand.place].shape)
        found = {}
        for name, partition in self._partitions.items():
            y = partition.join([out[name, block.number] for block in partition.blocks])
            found[name] = y.reshape(*batch, *partition.shape, self.channels)
        return found

    def _between_tensors(self, given: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
        means = [x.flatten(1, -2).mean(1) if x.dim() > 2 else x for x in given.values()]  # noqa: PLR2004 - (N, 3C)
        heard = self._attended(torch.stack(means, 1).unsqueeze(2))  # (N, blocks, 1, C)
        out = {}
        for number, (place, x) in enumerate(given.items()):
            own = heard[:, number, 0]
            shape = (*x.shape[:-1], self.channels)
            out[place] = own.reshape(-1, *(1,) * (x.dim() - 2), self.channels).expand(shape)
        return out

    def _attended(self, tokens: Tensor) -> Tensor:
        """Let tokens attend to each other. `(N, T, n, 3C)` to `(N, T, n, C)`."""
        n, count, size, _ = tokens.shape
        split = tokens.reshape(n, count, size, self.heads, 3, -1).permute(4, 0, 3, 1, 2, 5)  # (3, N, heads, T, n, c)
        q, k, v = split.flatten(-2).unbind(0)
        heard = scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return heard.reshape(n, self.heads, count, size, -1).permute(0, 2, 3, 1, 4).reshape(n, count, size, -1)

    def _gathered(self, strand: Strand, x: Tensor) -> Tensor:
        order = [0, *(1 + a for a in (*strand.copies, *strand.others, strand.atom, *strand.inside)), x.dim() - 1]
        block = self._blocks[strand.place]
        x = x.permute(order)
        if strand.inside:
            first = 2 + len(strand.copies) + len(strand.others)
            x = x.mean(tuple(range(first, first + len(strand.inside))))
        copies = math.prod([block.atoms[a].size for a in strand.copies])
        return x.reshape(x.shape[0] * copies, -1, block.atoms[strand.atom].size, x.shape[-1])

    def _scattered(self, strand: Strand, heard: Tensor, shape: torch.Size) -> Tensor:
        """Back to where the tokens came from. `(N * copies, T, n, C)` to `(N, *atoms, C)`."""
        atoms = self._blocks[strand.place].atoms
        order = (*strand.copies, *strand.others, strand.atom, *strand.inside)
        kept = [1 if a in strand.inside else atoms[a].size for a in order]
        x = heard.reshape(shape[0], *kept, self.channels)
        return x.permute(0, *(1 + order.index(a) for a in range(len(order))), x.dim() - 1)


def _strands_of(blocks: list[Block]) -> dict[str, list[Strand]]:
    """For every free axis its tokens in every block."""
    found: dict[str, list[Strand]] = {}
    for block in blocks:
        for n in block.free:
            atom = block.atoms[n]
            inside = tuple(m for m, other in enumerate(block.atoms) if n in other.parents)
            copies = tuple(sorted(atom.parents, key=lambda p: block.atoms[p].axis))
            others = tuple(m for m in range(len(block.atoms)) if m != n and m not in (*inside, *copies))
            found.setdefault(atom.axis, []).append(Strand((block.tensor, block.number), n, copies, others, inside))
    return found
