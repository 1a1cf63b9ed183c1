"""Axes that are found to be the same: a union-find whose members can be cut into products.

An `Axis` is a set of neurons that has not been told apart from others yet. `unify` records that two dimensions are
the same one; where one of them is the flattened product of several axes, the other is cut into as many factors. `fix`
records that the order of an axis has a meaning. Both only ever take freedom away: whatever is unified, cut or fixed
in vain costs symmetry, never soundness.

Legend: a `Dim` is one dimension of a tensor, the product of its axes, the first varying slowest; axes of size 1 may
be left out, so `()` is a dimension of size 1. A `Dims` has one `Dim` per dimension of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

IN, OUT, TAP, PLAIN = range(4)
"""Where an axis has been seen: network inputs, network outputs, kernel taps, elsewhere. The smaller one prevails."""


class Axis:
    """A set of `size` neurons; compare axes only after `atoms_of`.

    Args:
        size: Number of entries.
        fixed: Whether the order of the entries has a meaning.
        role: `IN`, `OUT`, `TAP` or `PLAIN`, for its name.
    """

    __slots__ = ("factors", "fixed", "parent", "role", "size")

    def __init__(self, size: int, fixed: bool = False, role: int = PLAIN) -> None:
        """See the class."""
        self.size = size
        self.fixed = fixed
        self.role = role
        self.parent: Axis | None = None
        self.factors: tuple[Axis, Axis] | None = None


Dim: TypeAlias = tuple[Axis, ...]
Dims: TypeAlias = tuple[Dim, ...]


def fresh(shape: Sequence[int], fixed: bool = False, role: int = PLAIN) -> Dims:
    """New axes, one for each dimension of a tensor of this shape."""
    return tuple((Axis(int(size), fixed, role),) for size in shape)


def size_of(dim: Dim) -> int:
    """The length of a dimension."""
    return math.prod(axis.size for axis in dim)


def shape_of(dims: Dims) -> tuple[int, ...]:
    """The shape of a tensor with these dimensions."""
    return tuple(size_of(dim) for dim in dims)


def _root(axis: Axis) -> Axis:
    """The representative of everything that is unified with an axis."""
    while axis.parent is not None:
        if axis.parent.parent is not None:
            axis.parent = axis.parent.parent
        axis = axis.parent
    return axis


def atoms_of(*dims: Dim) -> Dim:
    """The axes whose product the dimensions are by now, cut as far as known."""
    atoms: list[Axis] = []
    pending = [axis for dim in reversed(dims) for axis in reversed(dim)]
    while pending:
        axis = _root(pending.pop())
        if axis.factors is None:
            atoms.append(axis)
        else:
            pending += reversed(axis.factors)
    return tuple(atoms)


def fix(*dims: Dim, role: int = PLAIN) -> None:
    """Record that the order of these dimensions has a meaning."""
    for atom in atoms_of(*dims):
        atom.fixed = True
        atom.role = min(atom.role, role)


def unify(left: Dim, right: Dim) -> None:
    """Record that two dimensions move together.

    Dimensions whose factors do not line up, such as (2 3) and (3 2), are fixed where they do not.

    Raises:
        ValueError: They have different sizes.
    """
    if size_of(left) != size_of(right):
        raise ValueError(f"expected dimensions of one size, found {size_of(left)} and {size_of(right)}")
    if size_of(left) <= 1:
        ones = [atom for atom in atoms_of(left, right) if atom.size == 1]
        for atom in ones[1:]:
            _join(_root(ones[0]), _root(atom))
        return
    while True:
        pairs = zip(_long_atoms_of(left), _long_atoms_of(right), strict=False)
        a, b = next(((a, b) for a, b in pairs if a is not b), (None, None))
        if a is None or b is None:
            return
        if a.size == b.size:
            _join(a, b)
        elif max(a.size, b.size) % min(a.size, b.size) == 0:
            _cut(max(a, b, key=lambda axis: axis.size), min(a.size, b.size))
        else:
            fix(left, right)
            return


def regroup(dims: Dims, shape: Sequence[int]) -> Dims:
    """The dimensions of a tensor after a view to another shape.

    Where the new shape runs across the old factors, everything from there on is fixed.

    Args:
        dims: The dimensions of the tensor.
        shape: The new shape, of as many entries.

    Raises:
        ValueError: The numbers of entries differ.
    """
    if math.prod(shape_of(dims)) != math.prod(shape):
        raise ValueError(f"expected a view of {shape_of(dims)}, found {tuple(shape)}")
    rest = list(_long_atoms_of(*dims))
    if 0 in shape:
        fix(*dims)
        return fresh(shape, fixed=True)
    grouped: list[Dim] = []
    for number, size in enumerate(shape):
        taken: list[Axis] = []
        need = size
        while need > 1:
            axis = rest.pop(0)
            if need % axis.size != 0:
                if axis.size % need != 0:
                    fix(tuple(taken), (axis,), tuple(rest))
                    return (*grouped, *fresh(shape[number:], fixed=True))
                _cut(axis, need)
                rest = list(_long_atoms_of((axis, *rest)))
                axis = rest.pop(0)
            taken.append(axis)
            need //= axis.size
        grouped.append(tuple(taken))
    return tuple(grouped)


def _long_atoms_of(*dims: Dim) -> Dim:
    return tuple(atom for atom in atoms_of(*dims) if atom.size != 1)


def _join(a: Axis, b: Axis) -> None:
    """Make two atoms of one size one."""
    if a is not b:
        b.parent = a
        a.fixed = a.fixed or b.fixed
        a.role = min(a.role, b.role)


def _cut(axis: Axis, size: int) -> None:
    """Write an atom as the product of a slow axis of `size` entries and a fast one."""
    axis.factors = (Axis(size, axis.fixed, axis.role), Axis(axis.size // size, axis.fixed, axis.role))
