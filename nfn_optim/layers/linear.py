"""NFLinear: every equivariant linear map between weight spaces.

    y_T  =  sum over terms k   broadcast_T,k( W_k [ pool_k(x_1), pool_k(x_2), ... ] )  +  b_T

    N batch, C channels, P positions on the fixed axes, K sizes of the axes of a term

There is a *basis term* for every set of free axes that tensors may have in common: no axis, one axis (the rows of one
weight matrix, the columns of the next and the bias between them), both axes of a matrix. For each term, all tensors are
pooled to its axes by all of their equality patterns, one matrix mixes the channels of all pooled tensors, and the
result is split among the tensors and broadcast back (`nfn_optim.layers.equality_pattern`). Only the term that keeps all
axes of a tensor works on tensors of that size; the others work on pooled ones.

Entries of fixed axes are positions, which have separate coefficients for every pair of positions. So whether input and
output neurons have positions (the paper's HNP) or may be permuted (its NP) depends on the symmetry only:
`NFLinear(symmetry, ...)` is HNP, `NFLinear(free_ends(symmetry), ...)` is NP. The same holds for kernel taps.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), Sec. 2.2 and App. B, arXiv:2302.14040
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from nfn_optim.layers.block import Block, BlockId, BlockPartition
from nfn_optim.layers.broadcasting import Addend, broadcast_sum
from nfn_optim.layers.equality_pattern import EqualityPattern, KeptAxes, equality_patterns_of
from nfn_optim.layers.pooling import PooledBlock
from nfn_optim.symmetry import Symmetry

INVARIANT = "no axes"
"""Name of the basis term without axes, whose pooled values are invariant."""


@dataclass(frozen=True)
class ChannelSlice:
    """The channels `start ... start + width` of a basis term, which belong to one pattern of one block."""

    block: Block
    pattern: EqualityPattern
    start: int
    width: int

    @property
    def span(self) -> slice:
        """The channels as a slice."""
        return slice(self.start, self.start + self.width)

    @property
    def axes(self) -> list[str]:
        """The axes that the pattern keeps, sorted."""
        return sorted(self.block.dims[d].axis for d in self.pattern.kept_dims)


@dataclass
class BasisTerm:
    """The part of the map that goes through tensors pooled to the same axes.

    Attributes:
        name: The axes, key of the parameter.
        sources: Slices of the input channels: everything that is pooled to these axes.
        targets: Slices of the output channels: everything that is broadcast from these axes.
    """

    name: str
    sources: list[ChannelSlice] = field(default_factory=list)
    targets: list[ChannelSlice] = field(default_factory=list)

    @property
    def in_width(self) -> int:
        """Input channels, those of all sources together."""
        return sum(source.width for source in self.sources)

    @property
    def out_width(self) -> int:
        """Output channels, those of all targets together."""
        return sum(target.width for target in self.targets)

    @property
    def is_entrywise(self) -> bool:
        """Whether it only maps one block, of at least two free axes, entry by entry to itself."""
        one_to_one = len(self.sources) == len(self.targets) == 1
        return one_to_one and self.sources[0].pattern.is_identity and len(self.sources[0].pattern.kept) > 1


class NFLinear(nn.Module):
    """All linear maps that commute with the permutations of a symmetry.

    Args:
        symmetry: The tensors and their axes.
        in_channels: Input channels of every tensor.
        out_channels: Output channels of every tensor.
        bias: Whether to add a learned constant, one for every tensor, position and channel.
        pointwise: Initialise the layer as a map from every entry to itself, all other coefficients being zero.

    Attributes:
        weights: For every basis term, `(output channels, input channels)` of all tensors together; keys such as
            `"axes h0 in"`, or `"no axes"`.
        bias: `(output channels,)` of the term without axes, or None.

    Example:
        >>> s = Symmetry({"w": ("h", "in"), "b": ("h",)}, sizes={"h": 3, "in": 2}, fixed=frozenset({"in"}))
        >>> layer = NFLinear(s, in_channels=1, out_channels=4)
        >>> out = layer({"w": torch.randn(5, 3, 2, 1), "b": torch.randn(5, 3, 1)})
        >>> {name: tuple(x.shape) for name, x in out.items()}
        {'w': (5, 3, 2, 4), 'b': (5, 3, 4)}
    """

    def __init__(
        self, symmetry: Symmetry, in_channels: int, out_channels: int, *, bias: bool = True, pointwise: bool = False
    ) -> None:
        super().__init__()
        self.symmetry, self.in_channels, self.out_channels = symmetry, in_channels, out_channels
        self._partition = BlockPartition(symmetry)
        self._terms = _basis_terms_of(self._partition, in_channels, out_channels)
        self.weights = nn.ParameterDict(
            {term.name: nn.Parameter(torch.empty(term.out_width, term.in_width)) for term in self._terms}
        )
        widths = [term.out_width for term in self._terms if term.name == INVARIANT]
        self.bias = nn.Parameter(torch.empty(widths[0])) if bias and widths else None
        self.reset_parameters(pointwise=pointwise)

    def reset_parameters(self, *, pointwise: bool = False) -> None:
        """Draw new coefficients, uniformly in +-1/sqrt(fan-in) as in the paper's code.

        Args:
            pointwise: Only the coefficients from every entry to itself; all others become zero, the bias too.
        """
        fan_in: Counter[BlockId] = Counter()
        for term in self._terms:
            for target in term.targets:
                fan_in[target.block.id] += term.in_width
        with torch.no_grad():
            for term in self._terms:
                weight = self.weights[term.name]
                weight.zero_()
                for target in term.targets:
                    bound = 1 / math.sqrt(fan_in[target.block.id])
                    if not pointwise:
                        weight[target.span].uniform_(-bound, bound)
                    elif target.pattern.is_identity:
                        self._reset_pointwise(weight, term, target)
                    if term.name == INVARIANT and self.bias is not None:
                        self.bias[target.span].uniform_(-bound, bound)
            if pointwise and self.bias is not None:
                self.bias.zero_()

    def _reset_pointwise(self, weight: Tensor, term: BasisTerm, target: ChannelSlice) -> None:
        bound = 1 / math.sqrt(self.in_channels)
        for source in term.sources:
            if source.block == target.block and source.pattern == target.pattern:
                part = weight[target.span, source.span]  # (P * out_channels, P * in_channels)
                for position in range(target.block.num_positions):
                    row, column = position * self.out_channels, position * self.in_channels
                    part[row : row + self.out_channels, column : column + self.in_channels].uniform_(-bound, bound)

    def coefficients(self, target: str, source: str, axes: tuple[str, ...] = ()) -> Tensor:
        """A view of the coefficients from one tensor to another, to be read or written.

        Args:
            target: Name of the output tensor.
            source: Name of the input tensor, which is averaged over all its free axes except `axes`.
            axes: Free axes that both tensors have.

        Returns:
            A slice of a parameter, `(P * out_channels, P' * in_channels)`, channels varying faster than positions.

        Raises:
            ValueError: There is none, or more than one (an axis occurs twice in a tensor, or a tensor has several
                blocks).
        """
        matches = [
            (term, t, s)
            for term in self._terms
            for t in term.targets
            for s in term.sources
            if (t.block.tensor, s.block.tensor) == (target, source) and t.axes == s.axes == sorted(axes)
        ]
        if len(matches) != 1:
            raise ValueError(f"expected one map from {source!r} to {target!r} along {axes}, found {len(matches)}")
        term, t, s = matches[0]
        weight: Tensor = self.weights[term.name]
        return weight[t.span, s.span]

    def constants(self, target: str) -> Tensor:
        """A view of the bias of a tensor, to be read or written: `(P * out_channels,)`.

        Raises:
            ValueError: The layer has no bias, or more than one for this tensor (as for `coefficients`).
        """
        matches = [t for term in self._terms for t in term.targets if t.block.tensor == target and not t.pattern.kept]
        if len(matches) != 1 or self.bias is None:
            raise ValueError(f"expected one bias of {target!r}, found {0 if self.bias is None else len(matches)}")
        return self.bias[matches[0].span]

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the layer.

        Args:
            features: Tensor name -> `(*batch, *shape, in_channels)`.

        Returns:
            Tensor name -> `(*batch, *shape, out_channels)`.

        Raises:
            ValueError: The tensors are not those of the symmetry, or have other channels or different batch shapes.
        """
        batch, parts = self._partition.split(features, self.in_channels)
        pooled = {block.id: PooledBlock(block, parts[block.id]) for block in self._partition.blocks}
        whole: dict[BlockId, tuple[Addend, bool]] = {}  # and whether its memory may be reused
        others: dict[BlockId, list[Addend]] = {block.id: [] for block in self._partition.blocks}
        for term in self._terms:  # first, since this caches means
            if term.is_entrywise:
                source, target = term.sources[0], term.targets[0]
                y = pooled[source.block.id].mix(source.pattern, self.weights[term.name])
                whole[target.block.id] = (target.pattern, y), True
        for term in self._terms:
            if not term.is_entrywise:
                for target, y in self._apply_term(term, pooled):
                    if target.pattern.is_identity:
                        whole[target.block.id] = (target.pattern, y), len(term.targets) == 1
                    else:
                        others[target.block.id].append((target.pattern, y))

        def outputs() -> Iterator[Tensor]:
            for block in self._partition.blocks:
                addend, in_place = whole.pop(block.id)
                yield broadcast_sum(block, addend, others.pop(block.id), in_place)

        return self._partition.join(batch, outputs())

    def _apply_term(
        self, term: BasisTerm, pooled: Mapping[BlockId, PooledBlock]
    ) -> Iterator[tuple[ChannelSlice, Tensor]]:
        """`(N, *K, P * out_channels)` for every target."""
        means = [pooled[source.block.id].pool(source.pattern) for source in term.sources]
        x = means[0] if len(means) == 1 else torch.cat(means, -1)  # (N, *K, in_width)
        y = linear(x, self.weights[term.name], self.bias if term.name == INVARIANT else None)
        for target in term.targets:
            yield target, (y if len(term.targets) == 1 else y.narrow(-1, target.start, target.width))

    def extra_repr(self) -> str:
        """Channels and coefficients."""
        count = sum(p.numel() for p in self.parameters())
        return f"{self.in_channels}, {self.out_channels}, tensors={len(self.symmetry.dims)}, coefficients={count}"


def _name_of(kept_axes: KeptAxes) -> str:
    axes = [axis + (f"[{','.join(map(str, parents))}]" if parents else "") for axis, parents in kept_axes]
    return f"axes {' '.join(axes)}".replace(".", "/") if axes else INVARIANT


def _basis_terms_of(partition: BlockPartition, in_channels: int, out_channels: int) -> list[BasisTerm]:
    """All basis terms, those of fewest axes first.

    Permuting the kept classes of source and target alike gives the same map, so the targets have one order each.
    """
    sources: dict[KeptAxes, list[tuple[Block, EqualityPattern]]] = {}
    targets: dict[KeptAxes, list[tuple[Block, EqualityPattern]]] = {}
    for block in partition.blocks:
        for kept_axes, patterns in equality_patterns_of(block):
            targets.setdefault(kept_axes, []).append((block, patterns[0]))
            sources.setdefault(kept_axes, []).extend((block, pattern) for pattern in patterns)
    terms = []
    for kept_axes in sorted(sources, key=lambda axes: (len(axes), axes)):
        order = _dim_order(targets[kept_axes], len(kept_axes))
        sliced_sources = _slices(sources[kept_axes], order, in_channels)
        terms.append(BasisTerm(_name_of(kept_axes), sliced_sources, _slices(targets[kept_axes], order, out_channels)))
    return terms


def _slices(patterns: list[tuple[Block, EqualityPattern]], order: list[int], channels: int) -> list[ChannelSlice]:
    """Consecutive channels for patterns, the kept classes of which are reordered."""
    slices, start = [], 0
    for block, pattern in patterns:
        width = block.num_positions * channels
        reordered = EqualityPattern(pattern.classes, tuple(pattern.kept[n] for n in order))
        slices.append(ChannelSlice(block, reordered, start, width))
        start += width
    return slices


def _dim_order(targets: list[tuple[Block, EqualityPattern]], count: int) -> list[int]:
    """The order in which the largest whole block has the axes, so that it need not be transposed."""
    whole = [(math.prod(block.shape), pattern) for block, pattern in targets if pattern.is_identity]
    if not whole:
        return list(range(count))
    _, largest = max(whole, key=lambda entry: entry[0])
    return sorted(range(count), key=lambda n: largest.classes[largest.kept[n]][0])
