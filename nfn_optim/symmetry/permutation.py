"""Permutations of the free axes of a symmetry: how they compose, and how they reorder a dimension.

A set of permutations maps each free axis to an index tensor of shape `(*sizes of the axes it is nested in, size)`, so
that `new[i] = old[permutation[i]]`. A nested axis has one permutation for each entry s of the axes that it is nested
in, where s is counted after those axes are permuted. With `dim` nested in `head`, this is the wreath product of their
symmetric groups: any permutation of heads, and one permutation of `dim` for each head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nfn_optim.symmetry.expression import (
    Expression,
    Nested,
    entries_within,
    format_dim,
    length_of,
    occurrences_of,
)


@dataclass(frozen=True)
class PermutationGroup:
    """All permutations of the free axes of a symmetry.

    Args:
        sizes: Axis name -> number of entries, fixed axes included.
        free: The axes that may be permuted.
        nested: Free axis -> all axes that it is nested in, directly or indirectly.
    """

    sizes: Mapping[str, int]
    free: tuple[str, ...]
    nested: Nested

    def shape_of(self, axis: str) -> tuple[int, ...]:
        """The shape of the permutation of an axis: `(*sizes of the axes it is nested in, size)`."""
        return (*(self.sizes[parent] for parent in self.nested.get(axis, ())), self.sizes[axis])

    def check(self, permutations: Mapping[str, Tensor]) -> None:
        """Raise unless all of these are permutations of free axes.

        Raises:
            ValueError: An axis is fixed or unknown, or its tensor is not a permutation of the right shape.
        """
        for axis, permutation in permutations.items():
            if axis not in self.free:
                raise ValueError(f"expected a free axis, one of {self.free}, found {axis!r}")
            shape = self.shape_of(axis)
            identity = torch.arange(self.sizes[axis]).expand(shape)
            if permutation.shape != shape or not torch.equal(permutation.cpu().sort(-1).values, identity):
                raise ValueError(
                    f"expected a permutation of 0..{self.sizes[axis] - 1} of shape {shape} for axis {axis!r}, "
                    f"found {tuple(permutation.shape)}"
                )

    def random(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """A random permutation of every free axis, int64."""
        permutations = {}
        for axis in self.free:
            *outer, size = self.shape_of(axis)
            copies = [torch.randperm(size, generator=generator) for _ in range(math.prod(outer))]
            stacked = torch.stack(copies) if copies else torch.zeros(0, dtype=torch.int64)
            permutations[axis] = stacked.reshape(*outer, size)
        return permutations

    def compose(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The permutations equivalent to `first` followed by `second`; both permute all free axes."""
        composed = {}
        for axis in self.free:
            copies = second[axis].reshape(-1, self.sizes[axis])
            sources = first[axis].reshape(copies.shape)[self._source_copies(axis, second)]
            composed[axis] = sources.gather(-1, copies).reshape(first[axis].shape)
        return composed

    def invert(self, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse permutations; all free axes are permuted."""
        inverse: dict[str, Tensor] = {}
        for axis in sorted(self.free, key=lambda axis: len(self.nested.get(axis, ()))):  # parents before nested axes
            copies = permutations[axis].reshape(-1, self.sizes[axis])
            inverse[axis] = copies[self._source_copies(axis, inverse)].argsort(-1).reshape(permutations[axis].shape)
        return inverse

    def _source_copies(self, axis: str, permutations: Mapping[str, Tensor]) -> Tensor:
        """For each copy of a nested axis, the copy that moves there when its parents are permuted: `(copies,)`."""
        parents: tuple[str, ...] = self.nested.get(axis, ())
        index = torch.zeros((), dtype=torch.int64)
        for position, parent in enumerate(parents):
            shape = [self.sizes[p] for p in parents[: position + 1]]
            entries = torch.arange(self.sizes[parent]).expand(shape)
            if parent in permutations:
                entries = permutations[parent]
                for d, other in enumerate(parents[: position + 1]):
                    if other != parent and other not in self.nested.get(parent, ()):
                        entries = entries.unsqueeze(d)
                entries = entries.expand(shape)
            index = index.unsqueeze(-1) * self.sizes[parent] + entries
        return index.reshape(-1)

    def index_of(self, expression: Expression, permutations: Mapping[str, Tensor]) -> Tensor:
        """How permutations reorder the entries of a dimension.

        Returns:
            Index tensor `(length,)`, int64: `new = old[index]` along the dimension.

        Raises:
            ValueError: A nested axis is permuted, and an axis that it is nested in does not occur in the dimension.
        """
        index = torch.arange(length_of(expression, self.sizes))
        occurrences = occurrences_of(expression, self.sizes)
        for o in occurrences:
            if o.axis in permutations:
                copies = entries_within(o, occurrences, self.nested.get(o.axis, ()), self.sizes)
                if copies is None:
                    raise ValueError(
                        f"expected a dimension that contains {self.nested[o.axis]}, in which {o.axis!r} is nested, "
                        f"found {format_dim(expression, self.nested)}"
                    )
                source = permutations[o.axis].cpu().reshape(-1, self.sizes[o.axis])[copies, o.entries]
                index[o.rows] += (source - o.entries) * o.stride
        return index
