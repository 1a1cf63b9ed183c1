"""Axes during tracing: sets of neurons, merged and divided as ops show how they are related.

An `Axis` is a node of a union-find (`nfn_optim.symmetry.unification`). It may turn out to be a product of two axes, or
a sum of parts. An axis F that is multiplied by an axis X with parts may be different in each part of X:
`F.per_part.instances[i]` is F in part i of `F.per_part.owner` = X.

Legend: a `Dim` is one dimension of a tensor, the product of its axes, the first varying slowest; axes of size 1 may
be left out, so `()` is a dimension of size 1. A `Dims` has one `Dim` per dimension of a tensor. An *atom* is the
representative of unified axes that has no factors; it may have parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

IN, OUT, TAP, PLAIN = range(4)
"""Where an axis occurs: network inputs, network outputs, kernel taps, elsewhere. The smallest one prevails."""


class Axis:
    """A set of `size` neurons. Compare axes only after `atoms_of`.

    Args:
        size: Number of entries.
        fixed: Whether the order of the entries is meaningful.
        role: `IN`, `OUT`, `TAP` or `PLAIN`; chooses the axis's name.

    Attributes:
        parent: Towards the representative of the unified axes; None for the representative.
        factors: The slow and the fast factor, once the axis is known to be a product.
        parts: The dimensions that are laid end to end, once the axis is known to be a sum.
        fast_axes: The fast factors of the products in which this is the slow one.
        per_part: This axis in each part of another axis, if it may be different in each.
    """

    __slots__ = ("factors", "fast_axes", "fixed", "parent", "parts", "per_part", "role", "size")

    def __init__(self, size: int, fixed: bool = False, role: int = PLAIN) -> None:
        """See the class."""
        self.size = size
        self.fixed = fixed
        self.role = role
        self.parent: Axis | None = None
        self.factors: tuple[Axis, Axis] | None = None
        self.parts: tuple[Dim, ...] | None = None
        self.fast_axes: list[Axis] = []
        self.per_part: PerPart | None = None


Dim: TypeAlias = tuple[Axis, ...]
Dims: TypeAlias = tuple[Dim, ...]
Path: TypeAlias = Sequence[tuple[Axis, int]]
"""A part, within a part, ...: (axis with parts, index of the part), the outermost first."""


@dataclass(frozen=True)
class PerPart:
    """An axis in each part of its owner.

    Args:
        owner: An axis with parts.
        instances: One axis for each part.
    """

    owner: Axis
    instances: tuple[Axis, ...]


@dataclass(frozen=True)
class Slice:
    """A contiguous slice of a dimension.

    Args:
        dim: The slice as a dimension.
        path: The part of the dimension in which it lies.
    """

    dim: Dim
    path: tuple[tuple[Axis, int], ...] = ()

    def localise(self, dims: Dims) -> Dims:
        """The other dimensions of a tensor that is reduced to this slice."""
        return tuple(localise(dim, self.path) for dim in dims)


def fresh(shape: Sequence[int], fixed: bool = False, role: int = PLAIN) -> Dims:
    """New axes, one for each dimension of a tensor of this shape."""
    return tuple((Axis(int(size), fixed, role),) for size in shape)


def size_of(dim: Dim) -> int:
    """The length of a dimension."""
    return math.prod(axis.size for axis in dim)


def shape_of(dims: Dims) -> tuple[int, ...]:
    """The shape of a tensor with these dimensions."""
    return tuple(size_of(dim) for dim in dims)


def root_of(axis: Axis) -> Axis:
    """The representative of all axes that are unified with this one."""
    while axis.parent is not None:
        if axis.parent.parent is not None:
            axis.parent = axis.parent.parent
        axis = axis.parent
    return axis


def atoms_of(*dims: Dim) -> Dim:
    """The atoms whose product the dimensions are, as far as factors are known."""
    atoms: list[Axis] = []
    pending = [axis for dim in reversed(dims) for axis in reversed(dim)]
    while pending:
        axis = root_of(pending.pop())
        if axis.factors is None:
            atoms.append(axis)
        else:
            pending += reversed(axis.factors)
    return tuple(atoms)


def long_atoms_of(*dims: Dim) -> Dim:
    """The atoms whose size is not 1."""
    return tuple(atom for atom in atoms_of(*dims) if atom.size != 1)


def components_of(axis: Axis) -> Dim:
    """The axes that an axis is directly divided into, as a product or as a sum."""
    return (*(axis.factors or ()), *(atom for part in axis.parts or () for atom in part))


def owner_of(axis: Axis) -> Axis | None:
    """The axis in whose parts this one may be different; None if there is none."""
    return None if axis.per_part is None else root_of(axis.per_part.owner)


def localise(dim: Dim, path: Path) -> Dim:
    """A dimension as it is within a part of other axes: axes that differ between parts become their instances."""
    for axis, index in path:
        owner = root_of(axis)
        atoms = atoms_of(dim)
        if any(owner_of(atom) is owner for atom in atoms):
            dim = tuple(a.per_part.instances[index] if a.per_part and owner_of(a) is owner else a for a in atoms)
    return dim
