"""Equality patterns: all ways to pool a block over free axes, and to broadcast back to it.

An equality pattern is a partition of the free dimensions of a block into *classes* of dimensions with the same axis,
whose indices are set equal (a diagonal), some of which are *kept*:

    pool         take the diagonal of every class, average over the classes that are not kept
    broadcast    the adjoint: write to the diagonal of every class, constant along those that are not kept

Every equivariant linear map between two blocks is a sum of terms

    pool by a pattern of the input block, mix channels, broadcast by a pattern of the output block

over all pairs of patterns that keep the same axes. These terms are a basis: one for each orbit of pairs of entries,
"equal or arbitrary" indices spanning the same space as "equal or distinct" ones. Indices of nested axes are comparable
only where their parents are equal, so that dimensions of one class have parents of one class, and a class is kept only
together with its parents (the group is a wreath product).

References:
    Invariant and Equivariant Graph Networks (Maron et al., 2019), Sec. 3, arXiv:1812.09902
    Universal Neural Functionals (Zhou et al., 2024), Sec. 3, arXiv:2402.05232
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nfn_optim.layers.block import Block

Classes = tuple[tuple[int, ...], ...]
"""The dimensions of every class."""

KeptAxes = tuple[tuple[str, tuple[int, ...]], ...]
"""For every kept class in order: its axis, and which of the kept classes are its parents.

Tensors pooled to equal `KeptAxes` have the same dimensions and are permuted in the same way.
"""


@dataclass(frozen=True)
class EqualityPattern:
    """A partition of the free dimensions of a block, some classes of which are kept.

    Attributes:
        classes: The dimensions of every class.
        kept: Indices of the kept classes, in the order of the dimensions of the pooled tensor.
    """

    classes: Classes
    kept: tuple[int, ...]

    @property
    def is_identity(self) -> bool:
        """Whether nothing is pooled: every dimension is a class of its own, and kept."""
        return len(self.kept) == len(self.classes) and all(len(members) == 1 for members in self.classes)

    @property
    def kept_dims(self) -> list[int]:
        """One dimension of the block for every kept class, in order."""
        return [self.classes[c][0] for c in self.kept]


def equality_patterns_of(block: Block) -> list[tuple[KeptAxes, list[EqualityPattern]]]:
    """All equality patterns of a block.

    Returns:
        For every partition and choice of kept classes, the canonical `KeptAxes` and the orders of the kept classes
        that have them, one pattern each. There are several orders if several kept classes have the same axis.
    """
    patterns = []
    for classes in _classes_of(block):
        class_of = _class_of(classes)
        parents = [{class_of[p] for p in block.dims[members[0]].parents} for members in classes]
        for count in range(len(classes) + 1):
            for kept in itertools.combinations(range(len(classes)), count):
                if all(parents[c] <= set(kept) for c in kept):
                    patterns.append(_canonical_orders(block, classes, kept, parents))
    return patterns


def _canonical_orders(
    block: Block, classes: Classes, kept: Sequence[int], parents: list[set[int]]
) -> tuple[KeptAxes, list[EqualityPattern]]:
    axis_of = [block.dims[members[0]].axis for members in classes]
    by_axis = itertools.groupby(sorted(kept, key=lambda c: axis_of[c]), lambda c: axis_of[c])
    patterns: dict[KeptAxes, list[EqualityPattern]] = {}
    for choice in itertools.product(*[list(itertools.permutations(group)) for _, group in by_axis]):
        order = tuple(c for group in choice for c in group)
        index = {c: n for n, c in enumerate(order)}
        kept_axes = tuple((axis_of[c], tuple(sorted(index[p] for p in parents[c]))) for c in order)
        patterns.setdefault(kept_axes, []).append(EqualityPattern(classes, order))
    canonical = min(patterns)
    return canonical, patterns[canonical]


def _classes_of(block: Block) -> Iterator[Classes]:
    """All partitions in which the dimensions of a class have parents of the same classes."""
    by_axis: dict[str, list[int]] = {}
    for d in block.free_dims:
        by_axis.setdefault(block.dims[d].axis, []).append(d)
    for choice in itertools.product(*(list(_set_partitions(dims)) for dims in by_axis.values())):
        classes = tuple(sorted(tuple(members) for partition in choice for members in partition))
        class_of = _class_of(classes)
        if all(len({tuple(class_of[p] for p in block.dims[d].parents) for d in members}) == 1 for members in classes):
            yield classes


def _class_of(classes: Classes) -> dict[int, int]:
    """Dimension -> index of its class."""
    return {d: c for c, members in enumerate(classes) for d in members}


def _set_partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for partition in _set_partitions(rest):
        yield [[first], *partition]
        for n in range(len(partition)):
            yield [*partition[:n], [first, *partition[n]], *partition[n + 1 :]]
